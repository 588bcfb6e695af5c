"""What a run shows of itself in a notebook."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ..analysis.comparison import place
from ..display import Card, Table, spark

if TYPE_CHECKING:
    from .run import Run

_CURVES = (
    ("loss", "loss", "loss"),
    ("error", "error", "error of {block}"),
    ("sharpness", "lambda_max", "largest eigenvalue"),
)
_MOST = 4  # curves of one kind


def run_card(run: Run) -> Card:
    """What was measured and when, the loss, the errors, and the alarms."""
    rows: dict[str, list[dict[str, Any]]] = {name: run.rows(name) for name in run.measures}
    table = [
        {
            "measure": name,
            "rows": len(found),
            "first step": found[0]["step"],
            "last step": found[-1]["step"],
            "blocks": len({r["block"] for r in found if r.get("block")}) or None,
            "numbers": ", ".join(_numbers(found)),
        }
        for name, found in rows.items()
    ]
    alarms = [row for row in run.rows("alarm") if row.get("state") != "over"]
    count = Counter(str(row.get("alarm")) for row in alarms)
    facts = {
        "last step": run.last_step,
        "problem": run.header.get("problem"),
        "optimizer": run.header.get("optimizer"),
        "created": run.header.get("created"),
        "alarms": ", ".join(f"{name} {times}×" for name, times in count.items()),
        "folder": str(run.path),
    }
    events = [
        {name: row.get(name) for name in ("step", "alarm", "block", "message")} for row in alarms
    ]
    return Card(
        title=run.name,
        kind="Run",
        facts=facts,
        warnings=run.problems,
        pictures=_curves(rows),
        tables=[
            Table(table, where="run.frame(measure)"),
            Table(events, title=f"{len(events)} alarms", folded=True, where="run.alarms"),
        ],
        hints=["run.plot()", "run.frame('error')", "run.alarms", "cs.explore(run)"],
    )


def _curves(rows: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    found = []
    for measure, column, caption in _CURVES:
        lines: dict[str, list[float]] = {}
        for row in rows.get(measure, ()):
            if isinstance(row.get(column), float):
                lines.setdefault(str(row.get("block", "")), []).append(row[column])
        for block, values in list(lines.items())[:_MOST]:
            name = caption.format(block=place(block))
            found.append((name, spark(values, f"{name}, over the steps")))
    return found


def _numbers(rows: list[dict[str, Any]]) -> list[str]:
    """Columns that hold measured numbers."""
    place = ("step", "seconds", "row", "rows", "size", "damping")
    known = dict.fromkeys(k for r in rows[:20] for k, v in r.items() if isinstance(v, float))
    return [name for name in known if name not in place]
