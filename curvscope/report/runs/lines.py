"""Lines over steps with bands over seeds: what the pictures of runs are drawn with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...plotting.marks import mark
from ...plotting.style import DASHES, PALETTE, log_axis
from .gather import Curve, Member, Values, band

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def colour_of(names: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Colour and line style of each optimizer, the same in all pictures, those of paths as well."""
    return {
        name: (PALETTE[(k + 1) % len(PALETTE)], DASHES[(k // len(PALETTE)) % len(DASHES)])
        for k, name in enumerate(names)
    }


def draw_band(
    ax: Axes,
    curve: Curve,
    *,
    color: str,
    ls: Any = "-",
    label: str = "",
    lw: float = 1.5,
    series: str = "",
) -> None:
    """The mean as a line, least and largest value as a band.

    ``series`` is the name by which the page's check boxes switch both.
    """
    xs, mean, low, high = curve
    if not xs:
        return
    (line,) = ax.plot(
        xs,
        mean,
        color=color,
        ls=ls,
        lw=lw,
        label=label or None,
        marker="." if len(xs) < 60 else None,
        ms=3,
    )
    mark(line, label, series=series, points=list(zip(xs, mean, strict=True)))
    if low != high:
        mark(ax.fill_between(xs, low, high, color=color, alpha=0.18, lw=0), series=series)


def column(x: str, y: str) -> Values:
    """Pairs of two columns of a run's progress."""

    def pairs(member: Member) -> list[tuple[float, float]]:
        frame = member.progress
        if x not in frame.columns or y not in frame.columns:
            return []
        return list(zip(frame[x].astype(float), frame[y].astype(float), strict=True))

    return pairs


def of_block(measure: str, block: str, key: str, approximation: str | None = None) -> Values:
    """Pairs of step and one number of a block (``""``: of the whole)."""

    def pairs(member: Member) -> list[tuple[float, float]]:
        return [
            (float(row["step"]), float(row[key]))
            for row in member.rows(measure)
            if row.get("block", "") == block
            and approximation in (None, row.get("approximation"))
            and isinstance(row.get(key), int | float)
        ]

    return pairs


def over_seconds(members: Sequence[Member], axis: str, y: str) -> Curve:
    """As :func:`~.gather.band` over ``axis``, at the mean seconds of each of its places."""
    xs, mean, low, high = band(members, column(axis, y))
    times = dict(zip(*band(members, column(axis, "seconds"))[:2], strict=True))
    kept = [k for k, x in enumerate(xs) if x in times]
    return (
        [times[xs[k]] for k in kept],
        [mean[k] for k in kept],
        [low[k] for k in kept],
        [high[k] for k in kept],
    )


def heights(ax: Any) -> list[float]:
    """The values of all lines of a panel."""
    return [float(v) for line in ax.get_lines() for v in line.get_ydata()]


def logarithmic(ax: Axes, *, decades: float = 0.7) -> None:
    """A logarithmic axis where all values are positive and span enough."""
    values = [v for v in heights(ax) if math.isfinite(v)]
    positive = [v for v in values if v > 0]
    if not positive or len(positive) < len(values):
        return
    if max(positive) > 10**decades * min(positive):
        ax.set_yscale("log")
        log_axis(ax.yaxis, most=6)
        low, high = ax.get_ylim()
        if high < 12 * low:
            middle = math.sqrt(low * high)
            ax.set_ylim(middle / 3.5, middle * 3.5)


def blank(ax: Axes) -> None:
    """An unused panel."""
    ax.set_axis_off()


def legend_below(figure: Any, *, least: int = 1) -> None:
    """One legend for the lines of all panels, in as many columns as the figure is wide.

    A figure with fewer labels than ``least`` has none; one whose legend takes more rows than four
    columns would gets as much higher.
    """
    named = {
        label: handle
        for ax in figure.axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if len(named) < max(1, least):
        return
    first = min(4, len(named))
    for columns in range(first, 0, -1):
        legend = figure.legend(
            named.values(), named, loc="outside lower center", ncols=columns, columnspacing=1.4
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    more = math.ceil(len(named) / columns) - math.ceil(len(named) / first)
    figure.set_figheight(figure.get_figheight() + 0.18 * more)
