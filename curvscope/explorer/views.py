"""What the explorer shows: figures and tables as fragments of HTML, made anew at every choice."""

from __future__ import annotations

import html
import io
import math
import zlib
from collections.abc import Sequence
from typing import Any

from ..analysis.comparison import place
from ..display import Card, Table, render
from ..plotting.style import DASHES, INK, MUTED, PALETTE, log_axis, short, styled
from ..report.headings import heading
from ..report.svg import for_page
from .reading import Data, Row

_MOST_LINES = 8
_ROUNDING = 1e-12  # relative magnitudes of eigenvalues below it are left out


def errors(data: Data, choice: dict[str, Any]) -> str:
    """The chosen metric: over the steps of a run, over the blocks of anything else."""
    if not data.rows:
        return _nothing("No approximation was compared.")
    return _over_steps(data, choice) if data.steps else _over_blocks(data, choice)


@styled
def _over_steps(data: Data, choice: dict[str, Any]) -> str:
    metric, name, block = choice["metric"], choice["approximation"], choice["block"]
    title = heading(metric).title
    figure = _new_figure(6.0, 3.0)
    ax = figure.add_subplot()
    others = [n for n in data.approximations(choice["reference"]) if n != name]
    drawn = 0
    for rank, each in enumerate([name, *others[: _MOST_LINES - 1]]):
        rows = data.chosen(choice["reference"], block=block, approximation=each)
        points = [(r["step"], r[metric]) for r in rows if _finite(r.get(metric))]
        if not points:
            continue
        drawn += 1
        ax.plot(
            *zip(*sorted(points), strict=True),
            color=INK if rank == 0 else PALETTE[(rank - 1) % len(PALETTE)],
            linestyle=DASHES[rank % len(DASHES)],
            linewidth=2.0 if rank == 0 else 1.0,
            label=short(each),
        )
    if not drawn:
        return _nothing(f"The {title} was not measured on {place(block)}.")
    _logarithmic_if_wide(ax)
    ax.axvline(choice["step"], color=MUTED, linewidth=0.8)
    ax.set_xlabel("step")
    ax.set_ylabel(title)
    ax.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _figure(figure, f"{title} on {place(block)} over the steps, {name} in bold")


@styled
def _over_blocks(data: Data, choice: dict[str, Any]) -> str:
    metric, name = choice["metric"], choice["approximation"]
    title = heading(metric).title
    rows = data.chosen(choice["reference"], approximation=name)
    rows = [r for r in rows if _finite(r.get(metric))][:40]
    if not rows:
        return _nothing(f"There is no {title} of {name}: it is not defined, or was not computed.")
    figure = _new_figure(6.0, 1.0 + 0.26 * len(rows))
    ax = figure.add_subplot()
    places = list(range(len(rows)))
    bold = [r["block"] == choice["block"] for r in rows]
    bars = ax.barh(places, [r[metric] for r in rows], color=PALETTE[0], height=0.7)
    for rectangle, chosen in zip(bars, bold, strict=True):
        rectangle.set_alpha(1.0 if chosen else 0.45)
    if metric == "error":
        least = [(p, r["best_in_class"]) for p, r in enumerate(rows) if _known_best(r)]
        for height, value in least:
            ax.plot([value, value], [height - 0.4, height + 0.4], color=INK, linewidth=1.6)
    ax.set_yticks(places, [short(place(r["block"]).removeprefix("the ")) for r in rows])
    ax.invert_yaxis()
    ax.set_xlabel(f"{title} of {short(name)}")
    about = ", upright lines the best of its class" if metric == "error" else ""
    return _figure(figure, f"{title} of {name} by block{about}")


@styled
def training(data: Data, choice: dict[str, Any]) -> str:
    """Loss and largest eigenvalue over the steps of a run."""
    if not data.curves:
        return ""
    figure = _new_figure(6.0, 1.0 + 1.2 * len(data.curves))
    panels = figure.subplots(len(data.curves), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, (steps, values)) in zip(panels, data.curves.items(), strict=True):
        ax.plot(steps, values, color=INK)
        _logarithmic_if_wide(ax)
        ax.axvline(choice["step"], color=MUTED, linewidth=0.8)
        ax.set_ylabel(name)
    panels[-1].set_xlabel("step")
    return _figure(figure, f"{' and '.join(data.curves)} over the steps")


@styled
def spectra(data: Data, choice: dict[str, Any]) -> str:
    """Eigenvalues of the block by rank: the reference, the chosen approximation, what else is."""
    found = data.spectra(choice["step"], choice["block"])
    wanted = (choice["reference"], choice["approximation"])
    shown = {name: found[name] for name in wanted if name in found} or dict(found)
    if not shown:
        return _nothing(data.without("eigenvalues", choice))
    figure = _new_figure(6.0, 3.0)
    ax = figure.add_subplot()
    for rank, (name, values) in enumerate(list(shown.items())[:_MOST_LINES]):
        sizes = sorted((abs(v) for v in values if _finite(v) and v), reverse=True)
        sizes = [v for v in sizes if v > _ROUNDING * sizes[0]]
        colour = INK if rank == 0 else PALETTE[(rank - 1) % len(PALETTE)]
        ax.plot(
            range(1, len(sizes) + 1),
            sizes,
            color=colour,
            linestyle=DASHES[rank % len(DASHES)],
            marker="o" if len(sizes) <= 40 else "",
            markersize=2.5,
            label=short(name, 48),
        )
    ax.set_yscale("log")
    log_axis(ax.yaxis)
    ax.set_xlabel("rank")
    ax.set_ylabel("magnitude of eigenvalue")
    ax.legend(frameon=False, fontsize=8)
    caption = f"eigenvalues of {place(choice['block'])}: {', '.join(shown)}"
    if data.steps:  # of a run, whose monitor takes those of the whole matrix alone
        caption = f"eigenvalues: {', '.join(shown)}"
    elif choice["approximation"] not in found:
        caption += f"; there are none of {choice['approximation']}"
    return _figure(figure, caption)


def table(data: Data, choice: dict[str, Any]) -> str:
    """All approximations of the chosen block at the chosen step, the chosen one marked."""
    rows = data.chosen(choice["reference"], step=choice["step"], block=choice["block"])
    at = f", step {choice['step']}" if choice["step"] is not None else ""
    columns = ["", "approximation", choice["metric"], "error", "error_stderr", "best_in_class"]
    columns += ["excess", "cosine", "trace_ratio", "note"]
    if any(r.get("status", "compared") != "compared" for r in rows):
        columns.append("status")
    marked = [{"": "▶" if r["approximation"] == choice["approximation"] else "", **r} for r in rows]
    present = [n for n in dict.fromkeys(columns) if any(n in r for r in marked)]
    full = [{n: r.get(n) for n in present} for r in marked]
    card = Card(
        title=f"{data.title}: {place(choice['block'])}{at}",
        kind=f"against the {choice['reference']}" if choice["reference"] else "",
        facts={"parameters": rows[0].get("size")} if rows else {},
        text=[] if rows else ["Nothing was compared here."],
        tables=[_headed(full, present, bars=("error",))] if full else [],
    )
    return render(card)


def factors(data: Data, choice: dict[str, Any]) -> str:
    """How the block and its factors are concentrated, or what else is known of the block."""
    rows = data.concentrations(choice["step"], choice["block"])
    if not rows:
        return _nothing(data.without("concentration", choice))
    title = f"{data.beside} {place(choice['block'])}"
    return render(Card(title=title, tables=[_headed(rows, list(rows[0]))]))


def _headed(rows: Sequence[Row], columns: Sequence[str], **options: Any) -> Table:
    """A table whose columns are called as in reports."""
    heads = {name: heading(name) for name in columns}
    return Table(
        rows,
        columns=columns,
        names={name: head.title for name, head in heads.items()},
        docs={name: head.doc for name, head in heads.items()},
        **options,
    )


def notes(data: Data) -> str:
    """Warnings and alarms, folded if there are many."""
    if not data.notes:
        return ""
    rows = [{"what to know": text} for text in data.notes]
    return render(
        Card(title="", tables=[Table(rows, title=f"{len(rows)} notes and warnings", folded=True)])
    )


def _new_figure(width: float, height: float) -> Any:
    """A figure that pyplot does not know, or the notebook would show it a second time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _logarithmic_if_wide(ax: Any) -> None:
    """A logarithmic axis for positive values over more than a factor of 50."""
    drawn = [float(v) for line in ax.get_lines() for v in line.get_ydata() if _finite(float(v))]
    if drawn and min(drawn) > 0 and max(drawn) > 50 * min(drawn):
        ax.set_yscale("log")
        log_axis(ax.yaxis)


def _known_best(row: Row) -> bool:
    return _finite(row.get("best_in_class"))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _figure(figure: Any, caption: str) -> str:
    """The figure in the notebook's own colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight")
    picture = for_page(file.getvalue(), f"explore-{zlib.crc32(caption.encode())}", caption)
    return (
        '<div class="cs-explore" style="--grid:rgba(128,128,128,.4);--paper:transparent;'
        f'fill:currentColor;width:540px;max-width:100%;margin:4px">{picture}'
        f'<div style="opacity:.72;font-size:12px">{html.escape(caption)}</div></div>'
    )


def _nothing(text: str) -> str:
    return f'<p style="opacity:.72">{html.escape(text)}</p>'
