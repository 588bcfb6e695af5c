"""Errors of approximations beside the best of their class, and what computations cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..analysis.comparison import WHOLE, Comparison, Row
from ..errors import NotDefinedError, UnknownBlockError, nearest
from .marks import mark, value
from .style import GRID, INK, MUTED, axes_for, colours, log_axis, power_of_ten, short, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 0.19  # inches per bar
_NO_BEST = 1e-9  # a best in class below is that of a class without limits


@styled
def plot_comparison(
    comparison: Comparison,
    *,
    ax: Axes | None = None,
    metric: str = "error",
    blocks: Sequence[str] | None = None,
    approximations: Sequence[str] | None = None,
    title: str | None = None,
) -> Axes:
    """Bars of a metric: per block a group, within it a bar per approximation.

    Beside an error stands a black tick, the error of the best member of the approximation's class,
    and a thin line with its standard error where it is estimated. ``blocks`` (``"(all)"`` is the
    whole matrix) and ``approximations`` choose among them. What an approximation does not cover is
    said in words where its bar would be. Raises ``UnknownBlockError`` for a name that is not there
    and ``NotDefinedError`` where no number is left to draw.
    """
    rows = _chosen(comparison, blocks, approximations)
    values = [row[metric] for row in rows if math.isfinite(row[metric])]
    if not values:
        raise NotDefinedError(f"No {metric!r} is defined for {blocks or 'any block'}.")
    names = list(dict.fromkeys(row.block for row in rows))
    groups = {name: [row for row in rows if row.block == name] for name in names}
    single = len(groups) == 1
    bars = sum(len(group) for group in groups.values()) + (len(groups) - 1)
    ax = axes_for(ax, width=6.6, height=1.0 + _HEIGHT * bars + (0 if single else 0.3))
    # A single group has its names beside the bars, which leaves colour to tell the families apart.
    tag = (lambda row: row.family or "none") if single else (lambda row: row.approximation)
    tint = colours(list(dict.fromkeys(tag(row) for row in rows)), exact=0)
    log = min(values) > 0 and max(values) > 20 * min(values)
    floor = 10 ** math.floor(math.log10(min(values))) if log else min(0.0, *values)
    if log:
        ax.set_xscale("log")
        log_axis(ax.xaxis)
    span = (floor, max(values))
    ax.set_xlim(floor, _beyond(span, log))
    place, ticks, texts = 0.0, [], []
    for name, group in groups.items():
        start = place
        for row in group:
            _bar(ax, place, row, metric, tint[tag(row)], floor)
            if single:
                ticks.append(place)
                texts.append(short(row.approximation, 34))
            place += 1
        if not single:
            ticks.append((start + place - 1) / 2)
            texts.append("whole matrix" if name == WHOLE else short(name))
            if name != names[-1]:
                ax.axhline(place, color=GRID, lw=0.6)
        place += 1
    ax.set_ylim(place - 1.3, -0.7)
    ax.set_yticks(ticks, texts)
    if single:
        for label, row in zip(ax.get_yticklabels(), rows, strict=True):
            mark(label, series=row.approximation)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(_metric_title(metric))
    ax.grid(True, axis="x")
    if metric in ("error", "spectral_error") and span[1] > 0.5:
        ax.axvline(1.0, color=MUTED, lw=0.8, ls=(0, (4, 2)), zorder=1.5)
    _legend(ax, rows, metric, tint, single)
    if title is not None:
        ax.set_title(title)
    return ax


def _chosen(
    comparison: Comparison, blocks: Sequence[str] | None, approximations: Sequence[str] | None
) -> list[Row]:
    known = list(dict.fromkeys(row.block for row in comparison.rows))
    for name in blocks or ():
        if name not in known:
            raise UnknownBlockError(f"There is no block {name!r}.{nearest(name, known)}")
    for name in approximations or ():
        if name not in comparison.approximations:
            hint = nearest(name, comparison.approximations)
            raise UnknownBlockError(f"There is no approximation {name!r}.{hint}")
    order = list(blocks) if blocks is not None else known
    kept = [
        row
        for row in comparison.rows
        if row.block in order and (approximations is None or row.approximation in approximations)
    ]
    return sorted(kept, key=lambda row: order.index(row.block))


def _bar(ax: Axes, place: float, row: Row, metric: str, colour: str, floor: float) -> None:
    size = row[metric]
    if not math.isfinite(size):
        word = row.status if row.status in ("uncovered", "failed") else "not defined"
        text = ax.annotate(
            word,
            (0, place),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=MUTED,
            fontsize=7.5,
            fontstyle="italic",
        )
        mark(text, row.note or row.reasons.get(metric, word), series=row.approximation)
        return
    (bar,) = ax.barh(place, size - floor, left=floor, height=0.78, color=colour)
    mark(bar, _tip(row, metric), series=row.approximation)
    spread = row.stderr.get(metric, math.nan)
    if math.isfinite(spread) and spread > 0:
        line = ax.errorbar(size, place, xerr=spread, color=INK, lw=0.9, capsize=2)
        for part in line.get_children():
            mark(part, series=row.approximation)
    if metric == "error" and row.best_in_class > _NO_BEST:
        (tick,) = ax.plot(
            [max(row.best_in_class, floor)],
            [place],
            marker="|",
            ms=9,
            mew=2.2,
            color=INK,
            ls="none",
            zorder=3,
        )
        mark(tick, series=row.approximation)


def _tip(row: Row, metric: str) -> str:
    """What a bar says when asked."""
    where = "the whole matrix" if row.block == WHOLE else row.block
    text = f"{row.approximation} on {where}: {metric.replace('_', ' ')} {value(row[metric])}"
    spread = row.stderr.get(metric, math.nan)
    if math.isfinite(spread) and spread > 0:
        text += f" ± {value(spread, 2)}"
    if metric == "error" and row.best_in_class > _NO_BEST:
        text += f", best of its class {value(row.best_in_class)}"
    return text


def _legend(ax: Axes, rows: list[Row], metric: str, tint: Mapping[str, str], single: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = {name: colour for name, colour in tint.items() if name != "none"}
    handles: list[object] = []
    if len(shown) > 1 or not single:
        handles = [Patch(color=colour, label=short(name)) for name, colour in shown.items()]
    if metric == "error" and any(row.best_in_class > _NO_BEST for row in rows):
        handles.append(
            Line2D(
                [], [], marker="|", ms=9, mew=2.2, color=INK, ls="none", label="best of its class"
            )
        )
    if any(math.isfinite(row.stderr.get(metric, math.nan)) for row in rows):
        handles.append(Line2D([], [], color=INK, lw=0.9, label="standard error"))
    if not handles:
        return
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _metric_title(metric: str) -> str:
    if metric == "error":
        return "relative Frobenius error (0: equal, 1: as far off as the zero matrix)"
    from ..analysis.metrics import METRICS

    return METRICS[metric].title if metric in METRICS else metric.replace("_", " ")


def _beyond(span: tuple[float, float], log: bool) -> float:
    low, high = span
    if log:
        return high * (high / low) ** 0.06
    return high + 0.06 * (high - low) if high > low else high + 1.0


@styled
def plot_cost(
    seconds: Mapping[str, float], *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Seconds of wall-clock time per computation, on a logarithmic axis, in the order given."""
    shown = {name: spent for name, spent in seconds.items() if spent > 0}
    if not shown:
        raise NotDefinedError("No computation has a cost above zero to draw.")
    ax = axes_for(ax, width=6.6, height=0.9 + _HEIGHT * len(shown))
    low = 10 ** math.floor(math.log10(min(shown.values())))
    places = list(range(len(shown)))
    lengths = [spent - low for spent in shown.values()]
    bars = ax.barh(places, lengths, left=low, height=0.72, color=colours(["x"], exact=0)["x"])
    for bar, (name, spent) in zip(bars, shown.items(), strict=True):
        mark(bar, f"{name}: {spent:.3g} s")
    ax.set_xscale("log")
    log_axis(ax.xaxis)
    ax.set_xlim(low, max(shown.values()) * 4)
    for place, spent in zip(places, shown.values(), strict=True):
        text = f"{float(f'{spent:.2g}'):g} s" if spent >= 0.01 else f"{power_of_ten_s(spent)} s"
        ax.annotate(
            text,
            (spent, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    ax.set_yticks(places, [short(name, 40) for name in shown])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlabel("wall-clock time (s)")
    ax.grid(True, axis="x")
    if title is not None:
        ax.set_title(title)
    return ax


def power_of_ten_s(value: float) -> str:
    """Two digits of a small number of seconds."""
    return power_of_ten(float(f"{value:.1e}"))
