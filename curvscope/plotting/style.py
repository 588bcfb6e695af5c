"""One look for all figures, as a context; nothing outside it changes."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_P = ParamSpec("_P")
_T = TypeVar("_T")

INK = "#1c2126"
"""Text, axes, and the exact matrix that everything else is compared with."""
GRID = "#d4d9de"
PAPER = "#ffffff"
MUTED = "#77818b"

# Okabe and Ito's colours, which remain apart for colour-blind readers, without the yellow that
# does not show on white. Line styles change with them, so that print in black and white works.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")
NEGATIVE = "#d55e00"
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
SIGNED_MAP = "RdBu_r"
SIZE_MAP = "viridis"

RC: Mapping[str, Any] = {
    "figure.facecolor": PAPER,
    "figure.dpi": 110,
    "savefig.facecolor": PAPER,
    "savefig.dpi": 150,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.facecolor": PAPER,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.prop_cycle": f"cycler(color={list(PALETTE)})",
    "text.color": INK,
    "text.usetex": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "lines.solid_capstyle": "round",
    "patch.linewidth": 0.6,
    "image.interpolation": "nearest",
    "svg.fonttype": "none",
    "svg.hashsalt": "curvscope",
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "path.simplify": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Inside, matplotlib draws in this package's style; the user's settings come back after."""
    import matplotlib

    settings: Any = dict(RC)  # newer releases type the names one by one
    interactive = matplotlib.is_interactive()
    try:
        with matplotlib.rc_context(settings):
            try:
                yield
            finally:
                interactive = matplotlib.is_interactive()
    finally:
        # The first figure of a notebook loads its backend, which turns interactive mode on:
        # taken back, no later picture would be shown.
        matplotlib.interactive(interactive)


def styled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a plotting function inside :func:`style`."""

    @functools.wraps(function)
    def inside(*args: _P.args, **keywords: _P.kwargs) -> _T:
        with style():
            return function(*args, **keywords)

    return inside


def axes_for(ax: Axes | None, *, width: float = 6.0, height: float = 3.4) -> Axes:
    """``ax`` itself, or the axes of a new figure of that size in inches."""
    if ax is not None:
        return ax
    return new_figure(width, height).subplots()


def axes_row(axes: Sequence[Axes] | None, count: int, *, side: float = 2.6) -> list[Axes]:
    """``axes`` as a list of ``count``, or new ones beside each other."""
    if axes is not None:
        given = list(axes)
        if len(given) < count:
            from ..errors import OptionError

            raise OptionError(f"axes= holds {len(given)} axes; this figure needs {count}.")
        return given[:count]
    return list(new_figure(side * count + 0.8, side + 0.5).subplots(1, count, squeeze=False)[0])


def new_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches.

    ``pyplot`` holds on to its figures until they are closed, so it makes them only where somebody
    sits in front and wants to see them: in a notebook or at a prompt.
    """
    if _interactive():
        import matplotlib.pyplot as plt

        return plt.figure(figsize=(width, height), layout="constrained")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _interactive() -> bool:
    import matplotlib

    shell = sys.modules.get("IPython")
    return (
        hasattr(sys, "ps1")
        or matplotlib.is_interactive()
        or (shell is not None and shell.get_ipython() is not None)
    )


def colours(names: Sequence[str], *, exact: int = 1) -> dict[str, str]:
    """A colour per name: ink for the first ``exact`` ones, then the palette, darker and lighter."""
    rest = names[exact:]
    found = dict.fromkeys(names[:exact], INK)
    return found | {name: _shade(k) for k, name in enumerate(rest)}


_SHADES = ((INK, 0.0), (INK, 0.5), (PAPER, 0.55))  # what is mixed into the palette, round by round


def _shade(place: int) -> str:
    """The colour at a place of the palette; later rounds are darker, then lighter."""
    colour = PALETTE[place % len(PALETTE)]
    other, share = _SHADES[place // len(PALETTE) % len(_SHADES)]
    pairs = [(int(colour[k : k + 2], 16), int(other[k : k + 2], 16)) for k in (1, 3, 5)]
    return "#" + "".join(f"{round((1 - share) * own + share * mixed):02x}" for own, mixed in pairs)


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(value: float) -> str:
    """``0.001`` -> ``"10⁻³"``, ``0.002`` -> ``"2·10⁻³"``; plain between 0.01 and 1,000."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 0.01 <= abs(value) <= 1000:
        return f"{value:g}".replace("-", "−")
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    mantissa = value / 10.0**exponent
    power = "10" + str(exponent).translate(_SUPERSCRIPT)
    sign = "−" if mantissa < 0 else ""
    if abs(abs(mantissa) - 1) < 1e-6:
        return sign + power
    return f"{sign}{abs(mantissa):.3g}·{power}"


def log_axis(axis: Any, *, minor: bool = True, most: int = 8) -> None:
    """Plain-text powers of ten on a logarithmic axis, not too many of them.

    Where fewer than about two of them fit on the axis, multiples between them are labelled too.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, numticks=most))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    if not minor:
        axis.set_minor_locator(NullLocator())

    def between(value: float, _: Any) -> str:
        low, high = sorted(axis.get_view_interval())
        if not (low > 0 and value > 0) or high > 30 * low:
            return ""
        digit = round(value / 10.0 ** math.floor(math.log10(value) + 1e-9))
        wanted = (2, 5) if high > 6 * low else (2, 3, 5, 7) if high > 3 * low else range(2, 10)
        return power_of_ten(value) if digit in wanted else ""

    axis.set_minor_formatter(FuncFormatter(between))


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers only, as counts, ranks and steps have them."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def short(name: str, most: int = 28) -> str:
    """A name that fits on an axis: long ones lose their middle."""
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[-(most - 1 - head) :]}"
