"""Which method covers which parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..analysis.coverage import COVERED, IGNORED, Coverage
from .marks import mark
from .style import GRID, INK, PAPER, axes_for, short, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

_FILL = {"fast": "#0072b2", "slow": "#9ecae1", "missing": "#e69f00", "ignored": GRID}
_TEXT = {
    "fast": "covered",
    "slow": "covered, column by column",
    "missing": "not covered",
    "ignored": "not part of the problem",
}
_SLOW = ("autograd",)  # routes that are exact everywhere, and slow everywhere


@styled
def plot_coverage(coverage: Coverage, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """A square per parameter (rows) and method (columns).

    Blue: covered (pale where only by the route that works for everything, column by column), orange
    with a cross: not covered, grey: frozen or left out.
    """
    from matplotlib.patches import Patch

    rows, methods = coverage.parameters, coverage.methods
    size = (2.4 + 0.27 * len(methods), 2.0 + 0.2 * len(rows))
    ax = axes_for(ax, width=max(size[0], 4.5), height=size[1])
    state = {
        (cell.parameter, cell.method): _state(cell.status, cell.route) for cell in coverage.cells
    }
    why = {(c.parameter, c.method): c.reason or c.route for c in coverage.cells}
    for y, row in enumerate(rows):
        for x, method in enumerate(methods):
            kind = state[row.name, method]
            reason = why[row.name, method]
            text = f"{row.name}, {method}: {_TEXT[kind]}" + (f" ({reason})" if reason else "")
            mark(ax.add_patch(_square(x, y, _FILL[kind])), text)
            if kind == "missing":
                ax.plot(x, y, marker="x", color=INK, ms=4.5, mew=1.0)
    ax.set_xlim(-0.5, len(methods) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xticks(
        range(len(methods)),
        [short(name, 32) for name in methods],
        rotation=55,
        ha="left",
        rotation_mode="anchor",
    )
    ax.xaxis.set_ticks_position("top")
    ax.set_yticks(range(len(rows)), [short(row.name, 34) for row in rows])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    seen = [kind for kind in _FILL if kind in set(state.values())]
    ax.legend(
        handles=[Patch(color=_FILL[kind], label=_TEXT[kind]) for kind in seen],
        loc="upper left",
        bbox_to_anchor=(0.0, -0.01),
        ncols=2 if len(methods) > 10 else 1,
    )
    if title is not None:
        ax.set_title(title)
    return ax


def _square(x: float, y: float, colour: str) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fc=colour, ec=PAPER, lw=0.5)


def _state(status: str, route: str) -> str:
    if status == COVERED:
        return "slow" if route in _SLOW else "fast"
    return "ignored" if status == IGNORED else "missing"
