"""Both ends of a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .style import MUTED, NEGATIVE, PALETTE, axes_for, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..analysis.extremes import Extremes


@styled
def plot_extremes(extremes: Extremes, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """The largest and the smallest eigenvalues on one line, with their residuals."""
    ax = axes_for(ax, height=1.6)
    ends = (
        ("largest", extremes.largest, extremes.largest_residuals, PALETTE[0], "o"),
        ("smallest", extremes.smallest, extremes.smallest_residuals, NEGATIVE, "s"),
    )
    ax.axvline(0, color=MUTED, lw=0.7)
    for row, (label, values, residuals, colour, marker) in enumerate(ends):
        heights = [1 - row] * len(values)
        ax.errorbar(values, heights, xerr=residuals, fmt=marker, color=colour, ms=4, label=label)
    ax.set_yticks([1, 0], ["largest", "smallest"])
    ax.set_ylim(-0.6, 1.6)
    ax.set_xlabel(f"eigenvalue of the {extremes.of}")
    if title is not None:
        ax.set_title(title)
    return ax
