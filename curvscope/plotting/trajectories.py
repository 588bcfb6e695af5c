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
    from matplotlib.text import Text

    from ..training.surfaces import LossSurface
    from ..training.trajectory import Trajectories

_SIZE = 7  # points, of the steps beside a path
_SIDES = (("left", 4, 4), ("right", -4, 4), ("left", 4, -10), ("right", -4, -10))
_CLEAR = 13  # points between a path and the middle of a number below it


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
    points, all at one ``level`` as :func:`plot_ellipses` does. Up to ``marks`` steps per path are
    written beside it where there is room. Paths lie above or below the plane in general: the legend
    says how much of the movement is along it. Raises ``NotDefinedError`` for a surface on another
    plane.
    """
    ax = axes_for(ax, width=7.2, height=4.2)
    if surface is not None:
        if surface.plane is not trajectories.plane and not _same(surface, trajectories):
            raise NotDefinedError(
                "The loss surface lies on another plane than the paths: pass the plane of one to "
                "the other, trajectories(runs, plane=surface.plane)."
            )
        draw_surface(ax, surface)
    heights = list(ax.texts)  # of the level lines
    notes: list[tuple[float, float, str, str, bool]] = []
    closed: list[tuple[float, float]] = []
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
            closed.append((x[place], y[place]))
            end = ax.plot(
                x[place], y[place], marker, color=colour, mec="white", mew=0.8, ms=6.5, zorder=3.5
            )
            mark(end[0], f"{path.name} at step {path.steps[place]:,}", series=path.name)
        for place in _spread(known, marks):
            last = place == known[-1]
            notes.append((x[place], y[place], f"{path.steps[place]:,}", path.name, last))
    if ellipses:
        draw_ellipses(ax, ellipses, level, tint)
    label_axes(ax, trajectories.plane)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    if title is not None:
        ax.set_title(title)
    if notes or heights:
        ax.figure.canvas.figure.draw_without_rendering()  # the layout says how much room there is
    _write_steps(ax, notes, closed)
    _uncover(ax, heights, [path.points.numpy() for path in trajectories.paths.values()])
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


def _write_steps(
    ax: Axes,
    notes: list[tuple[float, float, str, str, bool]],
    ends: list[tuple[float, float]],
) -> None:
    """Numbers beside the paths, those of the ends first; one without room is left out."""
    scale = ax.figure.dpi / 72
    taken: list[tuple[float, float, float, float]] = []  # in points; the marks of ends first
    for place in ends:
        px, py = ax.transData.transform(place) / scale
        taken.append((px - 4, py - 4, px + 4, py + 4))
    sides: dict[int, tuple[str, int, int]] = {}
    for k, (x, y, text, _, _) in sorted(enumerate(notes), key=lambda pair: not pair[1][-1]):
        px, py = ax.transData.transform((x, y)) / scale
        wide, high = 0.62 * _SIZE * len(text) + 4, _SIZE + 3
        for side, dx, dy in _SIDES:
            left = px + dx - (wide if side == "right" else 0)
            box = (left, py + dy, left + wide, py + dy + high)
            if not any(_overlap(box, other) for other in taken):
                taken.append(box)
                sides[k] = (side, dx, dy)
                break
    for k, (side, dx, dy) in sorted(sides.items()):
        x, y, text, series, _ = notes[k]
        note = ax.annotate(
            text,
            (x, y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=side,
            fontsize=_SIZE,
            color=INK,
            zorder=5,
        )
        mark(note, series=series)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _uncover(ax: Axes, texts: list[Text], paths: list[np.ndarray]) -> None:
    """Take away the numbers of level lines that a path runs over."""
    for text in texts:
        centre = ax.transData.transform(text.get_position())
        for points in paths:
            known = ax.transData.transform(points[np.isfinite(points).all(1)])
            starts, ends = known[:-1], known[1:]
            along = np.linspace(0, 1, 20)[:, None, None]
            gaps = np.linalg.norm(starts + along * (ends - starts) - centre, axis=-1)
            if gaps.size and gaps.min() < _CLEAR * ax.figure.dpi / 72:
                text.set_visible(False)


def _same(surface: LossSurface, trajectories: Trajectories) -> bool:
    one, other = surface.plane, trajectories.plane
    return (
        one.size == other.size
        and bool((one.origin == other.origin).all())
        and bool((one.directions == other.directions).all())
    )
