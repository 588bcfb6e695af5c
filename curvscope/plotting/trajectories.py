"""Paths of several trainings on a plane, and how far they are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import NotDefinedError
from .marks import mark
from .style import DASHES, INK, PALETTE, axes_for, power_of_ten, short, styled
from .surfaces import Ellipses, draw_ellipses, draw_surface, label_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..training.surfaces import LossSurface
    from ..training.trajectory import Trajectories


@styled
def plot_trajectories(
    trajectories: Trajectories,
    *,
    surface: LossSurface | None = None,
    ellipses: Ellipses | None = None,
    level: float | None = None,
    marks: int = 4,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """The runs' paths on their plane, from the circle to the square.

    ``surface`` draws the objective evaluated on the same plane below them, ``ellipses`` (a mapping
    from a name to one or several :class:`~curvscope.training.Ellipse`) the curvature at chosen
    points, all at one ``level`` as :func:`plot_ellipses` does. ``marks`` steps per path are written
    beside it. Paths lie above or below the plane in general: the legend says how much of the
    movement is along it. Raises ``NotDefinedError`` for a surface on another plane.
    """
    ax = axes_for(ax, width=7.2, height=4.2)
    if surface is not None:
        if surface.plane is not trajectories.plane and not _same(surface, trajectories):
            raise NotDefinedError(
                "The loss surface lies on another plane than the paths: pass the plane of one to "
                "the other, trajectories(runs, plane=surface.plane)."
            )
        draw_surface(ax, surface)
    # orange first: on the surface's blue
    tint = {n: PALETTE[(k + 1) % len(PALETTE)] for k, n in enumerate(trajectories.names)}
    for k, path in enumerate(trajectories.paths.values()):
        x, y = path.points.numpy().T
        colour = tint[path.name]
        share = path.share_inside
        within = "" if np.isnan(share) else f" ({100 * share:.0f} % along the plane)"
        known = np.flatnonzero(np.isfinite(x))
        if not len(known):
            continue
        halo = ax.plot(x, y, color="white", lw=3.0, zorder=2, alpha=0.7)
        mark(halo[0], series=path.name)
        line = ax.plot(
            x,
            y,
            color=colour,
            ls=DASHES[k % len(DASHES)],
            marker=".",
            ms=3,
            lw=1.5,
            zorder=3,
            label=f"{short(path.name, 20)}{within}",
        )
        ends = path.steps[known[0]], path.steps[known[-1]]
        mark(line[0], f"{path.name}, steps {ends[0]:,} to {ends[1]:,}", series=path.name)
        for place, marker in ((known[0], "o"), (known[-1], "s")):
            end = ax.plot(
                x[place], y[place], marker, color=colour, mec="white", mew=0.8, ms=6.5, zorder=3.5
            )
            mark(end[0], f"{path.name} at step {path.steps[place]:,}", series=path.name)
        for place in _spread(known, marks):
            note = ax.annotate(
                f"{path.steps[place]:,}",
                (x[place], y[place]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
                color=INK,
                zorder=5,
            )
            mark(note, series=path.name)
    if ellipses:
        draw_ellipses(ax, ellipses, level, tint)
    label_axes(ax, trajectories.plane)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    if title is not None:
        ax.set_title(title)
    return ax


@styled
def plot_distances(
    trajectories: Trajectories, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Distance between every two runs at equal steps; for one run, that from its start."""
    ax = axes_for(ax)
    shift = 0 if trajectories.pairs else 1  # a run has the colour of its path
    if trajectories.pairs:
        named = {
            f"{short(p.first, 16)} to {short(p.second, 16)}": (p.steps, p.distances)
            for p in trajectories.pairs
        }
        ax.set_ylabel("distance between the runs")
    else:
        named = {p.name: (p.steps, p.from_start) for p in trajectories.paths.values()}
        ax.set_ylabel("distance from the start")
    if not any(len(steps) for steps, _ in named.values()):
        raise NotDefinedError("The runs have no step in common: there is no distance to draw.")
    for k, (name, (steps, values)) in enumerate(named.items()):
        ax.plot(
            steps,
            values.numpy(),
            color=PALETTE[(k + shift) % len(PALETTE)],
            ls=DASHES[k % len(DASHES)],
            marker=".",
            label=name,
        )
    ax.set_xlabel("step")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(lambda value, _: power_of_ten(float(f"{value:.3g}")))
    ax.grid(True, axis="y")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    if title is not None:
        ax.set_title(title)
    return ax


def _spread(known: np.ndarray, count: int) -> list[int]:
    """``count`` of the places, evenly, without the first."""
    if count < 1 or len(known) < 2:
        return []
    chosen = np.linspace(0, len(known) - 1, count + 1)[1:].round().astype(int)
    return sorted({int(known[k]) for k in chosen})


def _same(surface: LossSurface, trajectories: Trajectories) -> bool:
    one, other = surface.plane, trajectories.plane
    return (
        one.size == other.size
        and bool((one.origin == other.origin).all())
        and bool((one.directions == other.directions).all())
    )
