"""Tables of a report of runs, for the page and as CSV files."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from ..cells import Cell, Column, Table, block_title, finite, number
from ..document import write_records
from ..numbers import NOTHING, percent, seconds, shown
from .gather import Group, Member, Runs
from .logged import logged_numbers
from .places import Places
from .watched import how, measured, when
from .words import last, median, spread


def result_table(runs: Runs) -> Table:
    """One row per optimizer, at its best learning rate."""
    tested = any("test_loss" in m.progress.columns for m in runs.members)
    right = any("test_accuracy" in m.progress.columns for m in runs.members)
    of = "the last epoch" if runs.axis == "epoch" else "the last steps"
    columns = [
        Column("optimizer", numeric=False),
        Column("learning rate", "The best of the rates tried; small: how many."),
        Column("training loss", f"Of {of}, mean and standard deviation over seeds."),
    ]
    columns += [Column("test loss")] if tested else []
    columns += [Column("test accuracy")] if right else []
    columns += [
        Column(f"seconds per {runs.axis}", "Of training, without the monitor and tests."),
        Column(
            "curvature's error", "Relative, of what the optimizer uses: median layer at the end."
        ),
        Column("curvature's cosine", "With the exact matrix: median layer at the end."),
        Column("monitoring / training", "The time of the monitor over that of training itself."),
        Column("alarms raised", "Per training."),
    ]
    rows = [_result(runs, group, tested, right) for group in runs.groups.values()]
    title = "The training." if runs.alone else "Every optimizer at its best learning rate."
    return Table(title, tuple(columns), rows)


def _result(runs: Runs, group: Group, tested: bool, right: bool) -> list[Cell]:
    best = group.best
    losses = [m.final_loss for m in best]
    cells = [
        Cell(group.optimizer, small=f"{len(best)} seeds" if len(best) > 1 else ""),
        Cell(
            shown(group.best_rate),
            small=f"of {len(group.rates)}" if len(group.rates) > 1 else "",
            sort=finite(group.best_rate),
        ),
        Cell(spread(losses), sort=finite(group.score(group.best_rate))),
    ]
    if tested:
        values = [last(m, "test_loss") for m in best]
        cells.append(Cell(spread(values), sort=_mean(values)))
    if right:
        values = [last(m, "test_accuracy") for m in best]
        mean = _mean(values)
        cells.append(Cell("–" if mean is None else percent(mean), sort=mean))
    each = [last(m, "seconds") / count for m in best if (count := last(m, runs.axis)) > 0]
    time = _mean(each)
    cells.append(Cell("–" if time is None else seconds(time), sort=time))
    cells += [number(median(best, "error", key), 2) for key in ("error", "cosine")]
    shares = [s / t for t, s in (m.monitored for m in best) if t > 0 and s == s]
    share = _mean(shares)
    cells.append(Cell("–" if share is None else _times(share), sort=share))
    alarms = sum(1 for m in best for r in m.rows("alarm") if r["state"] == "raised") / len(best)
    cells.append(_count(alarms))
    return cells


def _count(value: float) -> Cell:
    """A count, or a mean of counts."""
    return Cell(f"{value:,.0f}", sort=value) if value == value // 1 else number(value, 2)


def _times(share: float) -> str:
    return percent(share) if share < 1 else f"{shown(share, 2)} ×"


def _mean(values: list[float]) -> float | None:
    known = [v for v in values if math.isfinite(v)]
    return statistics.fmean(known) if known else None


def grid_table(runs: Runs) -> Table:
    """One row per training."""
    columns = (
        Column("optimizer", numeric=False),
        Column("learning rate"),
        Column("seed"),
        Column("how it ended", numeric=False),
        Column(f"{runs.axis}s"),
        Column("training loss"),
        Column("seconds"),
    )
    rows = []
    for group in runs.groups.values():
        for rate, members in group.rates.items():
            for m in members:
                chosen = rate == group.best_rate and len(group.rates) > 1
                rows.append(
                    [
                        Cell(m.optimizer, small=m.path),
                        Cell(shown(m.lr), small="the best" if chosen else "", sort=finite(m.lr)),
                        Cell(str(m.seed), sort=float(m.seed)),
                        Cell(m.state, small=m.reason),
                        _count(last(m, runs.axis)),
                        number(last(m, "train_loss")),
                        number(last(m, "seconds")),
                    ]
                )
    return Table("All trainings.", columns, rows)


def alarm_table(runs: Runs) -> Table:
    """Alarms of the runs at the best learning rates, the same sentence of several seeds once."""
    columns = (
        Column("optimizer", numeric=False),
        Column("layer", numeric=False),
        Column("alarm", numeric=False),
        Column("first at step"),
        Column("over at step"),
        Column("seeds"),
    )
    rows = []
    for name, members in runs.best():
        seen: dict[tuple[str, str], list[tuple[Member, dict[str, Any]]]] = {}
        for member in members:
            for row in member.rows("alarm"):
                if row["state"] == "raised":
                    seen.setdefault((str(row["alarm"]), str(row["block"])), []).append(
                        (member, row)
                    )
        for (alarm, block), found in seen.items():
            first = min(found, key=lambda pair: pair[1]["step"])
            over = [
                r["step"]
                for r in first[0].rows("alarm")
                if r["state"] != "raised"
                and (r["alarm"], r["block"]) == (alarm, block)
                and r["step"] >= first[1]["step"]
            ]
            rows.append(
                [
                    Cell(name),
                    Cell(block_title(block) or "–"),
                    Cell(str(first[1]["message"]), small=alarm),
                    number(int(first[1]["step"])),
                    number(min(over)) if over else Cell("not over"),
                    Cell(", ".join(str(s) for s in sorted({m.seed for m, _ in found}))),
                ]
            )
    return Table("Alarms, in words, when each was first raised.", columns, rows)


def monitor_table(runs: Runs) -> Table:
    """What the monitor measured, how often, and what it took: sums over all runs."""
    totals: dict[str, list[float]] = {}
    for member in runs.members:
        for row in member.rows("monitor"):
            if row.get("event") == "measure":
                old = totals.setdefault(str(row["of"]), [0.0] * 4)
                for k, key in enumerate(("taken", "thinned", "failed", "used")):
                    old[k] += float(row.get(key, 0) or 0)
                old[3] += float(row.get("outside", 0) or 0)
    columns = (
        Column("what was measured", numeric=False),
        Column("when", numeric=False),
        Column("taken"),
        Column("left out", "For lack of time within the budget."),
        Column("failed"),
        Column("seconds"),
        Column("seconds each"),
        Column("options", numeric=False),
    )
    rows = [
        [
            Cell(measured(name), small="" if measured(name) == name else name),
            Cell(when(runs, name) or NOTHING),
            *(number(int(v)) for v in (taken, thinned, failed)),
            number(used),
            number(used / taken if taken else math.nan),
            Cell(how(runs, name) or NOTHING),
        ]
        for name, (taken, thinned, failed, used) in totals.items()
    ]
    return Table("The monitor's measurements, summed over all trainings.", columns, rows)


def write_tables(runs: Runs, places: Places, folder: Path) -> None:
    """``runs``, ``progress``, ``errors``, ``sharpness``, ``alarms``, ``monitor`` and paths."""
    write_records(
        folder / "runs.csv",
        [
            {
                **_who(m),
                "state": m.state,
                "best": m in runs.groups[m.optimizer].best,
                "train_loss": m.final_loss,
                "seconds": last(m, "seconds"),
                "monitor_seconds": m.monitored[1],
                "reason": m.reason,
            }
            for m in runs.members
        ],
    )
    records = [{**_who(m), **row} for m in runs.members for row in _plain_rows(m)]
    write_records(folder / "progress.csv", records)
    for name, measures in (
        ("errors", ("error", "fresh")),
        ("sharpness", ("sharpness",)),
        ("alarms", ("alarm",)),
        ("monitor", ("monitor",)),
    ):
        rows = [
            {**_who(m), **{k: v for k, v in row.items() if k not in ("row", "rows", "versions")}}
            for m in runs.members
            for measure in measures
            for row in m.rows(measure)
        ]
        write_records(folder / f"{name}.csv", rows)
    logged = dict.fromkeys(name for name, _ in logged_numbers(runs))
    rows = [{**_who(m), **row} for m in runs.members for name in logged for row in m.rows(name)]
    if rows:
        write_records(folder / "logged.csv", rows)
    if places.paths is not None:
        write_records(folder / "trajectories.csv", places.paths.records())
        distances = places.paths.pairs_frame()
        if len(distances):
            distances.to_csv(folder / "distances.csv", index=False)
    if places.surface is not None:
        write_records(folder / "surface.csv", places.surface.records())


def _who(member: Member) -> dict[str, Any]:
    return {"run": member.path, "optimizer": member.optimizer, "lr": member.lr, "seed": member.seed}


def _plain_rows(member: Member) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in member.progress.to_dict("records")]
