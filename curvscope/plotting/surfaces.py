"""The objective over a plane, and level lines of curvature on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import NotDefinedError, check_option
from .marks import mark
from .style import INK, MUTED, PALETTE, axes_for, power_of_ten, short, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..training.ellipses import Ellipse
    from ..training.planes import Plane
    from ..training.surfaces import LossSurface

Ellipses = Mapping[str, "Ellipse | Sequence[Ellipse]"]

_SCALES = ("quantiles", "log", "linear")
_MAP = "Blues_r"  # one hue, without its darkest third, so that ink and the palette stand out
_SHARE = 0.12  # median half axis of the ellipses, of the shorter side of the picture


@styled
def plot_surface(
    surface: LossSurface,
    *,
    ellipses: Ellipses | None = None,
    level: float | None = None,
    ax: Axes | None = None,
    scale: str = "quantiles",
    lines: int = 14,
    points: bool = False,
    title: str | None = None,
) -> Axes:
    """Contour lines through the evaluated points; crosses mark points without a finite value.

    ``scale="quantiles"`` puts the same number of points between any two of the ``lines``, so that
    a basin shows whatever lies around it; ``"linear"`` spaces them evenly, ``"log"`` by the
    logarithm of the objective, which has to be positive. ``points=True`` marks the points of the
    grid. ``ellipses`` and ``level`` are those of :func:`plot_ellipses`.
    """
    check_option("scale", scale, _SCALES)
    ax = axes_for(ax, width=6.4, height=4.2)
    image = draw_surface(ax, surface, scale=scale, lines=lines, points=points)
    if image is not None and not ellipses:  # whose legend takes the place; lines bear numbers
        bar = ax.figure.colorbar(image, ax=ax, shrink=0.85, pad=0.02, label="objective")
        ticks = np.asarray(image.levels)[:: max(1, len(image.levels) // 6)]
        bar.minorticks_off()
        bar.set_ticks(ticks.tolist(), labels=[_text(v) for v in ticks])
        bar.outline.set_linewidth(0.5)
    label_axes(ax, surface.plane)
    if ellipses:
        draw_ellipses(ax, ellipses, level)
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    ax.set_title(title if title is not None else f"Objective of {surface.of}")
    return ax


@styled
def plot_ellipses(
    ellipses: Ellipses,
    *,
    level: float | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Level lines of quadratic models on a plane, named, at one or several points each.

    A line shows where the quadratic term of a matrix raises the objective by ``level`` above its
    value at the centre (solid), or lowers it by as much (dashed): an ellipse for a definite matrix,
    hyperbolas for an indefinite one, two lines for a singular one. All have the same ``level``, so
    a smaller ellipse means more curvature; by default it is such that the median ellipse is
    clearly seen, and it is written under the picture's legend.
    """
    ax = axes_for(ax, width=5.4, height=4.2)
    draw_ellipses(ax, ellipses, level)
    ax.set_xlabel("first direction")
    ax.set_ylabel("second direction")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    if title is not None:
        ax.set_title(title)
    return ax


def draw_surface(
    ax: Axes,
    surface: LossSurface,
    *,
    scale: str = "quantiles",
    lines: int = 14,
    points: bool = False,
) -> Any:
    """Filled contours and the marks of what is not finite; the image, ``None`` if all is equal."""
    import matplotlib
    from matplotlib.colors import BoundaryNorm, ListedColormap

    x, y, loss = surface.x.numpy(), surface.y.numpy(), surface.loss.numpy()
    finite = np.isfinite(loss)
    if not finite.any():
        raise NotDefinedError(
            "The objective is not finite at any point of the grid: nothing to draw. Evaluate it on "
            "a smaller extent=."
        )
    levels = _levels(loss[finite], scale, lines)
    image = None
    if len(levels) > 1:
        shown = np.ma.masked_invalid(np.where(finite, loss, np.nan))
        colours = ListedColormap(matplotlib.colormaps[_MAP](np.linspace(0.35, 1.0, 256)))
        norm = BoundaryNorm(levels, 256)
        image = ax.contourf(x, y, shown, levels=levels, norm=norm, cmap=colours, zorder=0)
        drawn = ax.contour(x, y, shown, levels=levels, colors=[MUTED], linewidths=0.4, zorder=0.5)
        ax.clabel(drawn, levels=levels[1:-1:3].tolist(), fontsize=6, fmt=_text, colors=[INK])
    columns, rows = np.meshgrid(x, y)
    if points:
        ax.plot(columns[finite], rows[finite], ".", color=INK, ms=1.2, zorder=1)
    if not finite.all():
        ax.plot(columns[~finite], rows[~finite], "x", color=PALETTE[1], ms=3, label="not finite")
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(y[0], y[-1])
    return image


def _levels(values: np.ndarray, scale: str, lines: int) -> np.ndarray:
    """Heights of the contour lines, from the lowest value to the highest."""
    low, high = float(values.min()), float(values.max())
    if scale == "log":
        if low <= 0:
            raise NotDefinedError(
                f"The objective is {low:.3g} at one point, so it has no logarithm there: take "
                'scale="quantiles" or "linear".'
            )
        found = np.geomspace(low, high, lines + 1)
    elif scale == "linear":
        found = np.linspace(low, high, lines + 1)
    else:
        found = np.quantile(values, np.linspace(0, 1, lines + 1))
    found[0], found[-1] = low, high
    apart = np.concatenate([[True], np.diff(found) > 1e-12 * max(abs(low), abs(high))])
    return found[apart]


def label_axes(ax: Axes, plane: Plane) -> None:
    """Names of the directions, with the share of variance where there is one."""
    for axis, name, share in zip((ax.xaxis, ax.yaxis), plane.names, plane.explained, strict=True):
        axis.set_label_text(name if math.isnan(share) else f"{name} ({100 * share:.0f} %)")


def draw_ellipses(
    ax: Axes, ellipses: Ellipses, level: float | None, taken: Mapping[str, str] | None = None
) -> None:
    """Level lines in their colours; a name in ``taken`` has its colour there, others a new one."""
    from ..training.ellipses import Ellipse

    named = {k: [v] if isinstance(v, Ellipse) else list(v) for k, v in ellipses.items()}
    every = [one for group in named.values() for one in group]
    if not every:
        raise NotDefinedError("There is no ellipse to draw.")
    seen = ax.has_data()
    box = np.array([ax.get_xlim(), ax.get_ylim()])
    if not seen:
        centres = np.stack([one.centre.numpy() for one in every])
        spread = np.ptp(centres, axis=0).max() or 1.0
        box = np.stack([centres.min(0) - spread / 2, centres.max(0) + spread / 2], 1)
    sides = box[:, 1] - box[:, 0]
    level = _level(every, _SHARE * float(sides.min())) if level is None else level
    reach = 0.25 * float(sides.min())
    known = dict(taken or {})
    free = [colour for colour in (INK, *PALETTE) if colour not in known.values()] or [INK]
    others = [name for name in named if name not in known]
    known |= {name: free[k % len(free)] for k, name in enumerate(others)}
    for name, group in named.items():
        colour, drawn = known[name], []
        for one in group:
            for sign, curve in one.curves(level, reach=reach) if level else ():
                xs, ys = curve.numpy().T
                style = "-" if sign > 0 else "--"
                drawn += ax.plot(xs, ys, color=colour, lw=1.2, ls=style, zorder=4)
            cx, cy = one.centre.tolist()
            drawn += ax.plot([cx], [cy], "+", color=colour, ms=5, zorder=4)
        for line in drawn:
            mark(line, f"curvature: {name}, {one.of}", series=name if name in (taken or ()) else "")
        ax.plot([], [], color=colour, lw=1.2, label=short(f"curvature: {name}", 32))
    ax.plot([], [], " ", label=f"±{_text(level)} by curvature" if level else "no curvature")
    if seen:
        ax.set_xlim(*box[0])
        ax.set_ylim(*box[1])
    else:
        ax.set_aspect("equal", adjustable="datalim")


def _level(ellipses: list[Ellipse], size: float) -> float:
    """The level at which the median matrix's larger eigenvalue has a half axis of ``size / 2``.

    Of the geometric means of both eigenvalues where both are there; two digits are enough.
    """
    curvatures = []
    for one in ellipses:
        values = [abs(float(v)) for v in one.values if float(v) != 0]
        if values:
            curvatures.append(math.exp(sum(map(math.log, values)) / len(values)))
    if not curvatures:
        return 0.0
    return float(f"{size**2 / 2 * float(np.median(curvatures)):.1g}")


def _text(value: float) -> str:
    return power_of_ten(float(f"{value:.3g}"))
