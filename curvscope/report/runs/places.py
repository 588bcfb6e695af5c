"""The paths of the trainings in a common plane, above the objective evaluated on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ...analysis.result import listing
from ...errors import CurvscopeError
from ...plotting.trajectories import plot_distances, plot_trajectories
from ...progress import stage
from ...training.ellipses import Ellipse
from ...training.planes import plane_of_paths
from ...training.surfaces import LossSurface, loss_surface
from ...training.trajectory import Trajectories, trajectories
from ..figure_plans import Plan
from .curvatures import EXACT, End, ellipses_of, end_of
from .gather import Member, Runs

_PATHS = 8


@dataclass
class Places:
    """Paths and, where the problem could be made again, the objective on their plane."""

    paths: Trajectories | None = None
    surface: LossSurface | None = None
    names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: int = 0
    ellipses: dict[str, list[Ellipse]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)  # at which the ellipses are


def find_places(runs: Runs, *, surface: bool = True) -> Places:
    """Trajectories of every optimizer's best learning rate with its first seed, on one plane."""
    found = Places()
    chosen = {name: members[0] for name, members in runs.best()}
    kept: dict[str, Member] = {}
    without: dict[str, list[str]] = {}
    for name, member in chosen.items():
        own = member.run.snapshots()
        if own.kind == "full" and len(own) > 1:
            kept[name] = member
        else:
            what = f"are kept as {own.kind}" if own.kind else "were not kept"
            what = "are fewer than two" if own.kind == "full" else what
            without.setdefault(what, []).append(name)
    for what, names in without.items():
        has, its = ("has", "its") if len(names) == 1 else ("have", "their")
        found.notes.append(
            f"{listing(names, most=8)} {has} no path: {its} snapshots {what}. "
            'A monitor with snapshots="full" keeps what paths are drawn from.'
        )
    kept = dict(list(kept.items())[:_PATHS])
    if not kept:
        return found
    found.names = {name: member.path for name, member in kept.items()}
    stage("Trajectories")
    ends: dict[str, End] = {}
    if surface:
        try:
            ends = {name: end_of(runs, member) for name, member in kept.items()}
        except (CurvscopeError, RuntimeError) as error:
            found.notes.append(f"The objective is not drawn below the paths: {error}")
    problem = next((end.problem for end in ends.values()), None)
    layout = None if problem is None else problem.layout
    snapshots = {name: member.run.snapshots() for name, member in kept.items()}
    try:
        plane = plane_of_paths(snapshots, layout=layout)
        found.paths = trajectories(snapshots, plane=plane)
        found.notes += plane.notes
    except CurvscopeError as error:
        found.notes.append(f"The paths share no plane: {error}")
        return found
    if problem is not None:
        stage("Loss surface")
        try:
            points = (25, 19) if problem.layout.numel <= 100_000 else (15, 11)
            found.surface = loss_surface(problem, plane, points=points)
            found.samples = problem.n_samples
            found.notes += found.surface.warnings
        except CurvscopeError as error:
            found.notes.append(f"The objective is not drawn below the paths: {error}")
        stage("Curvature at the ends")
        _curvatures(ends, found)
    return found


def _curvatures(ends: dict[str, End], found: Places) -> None:
    """The ellipses at the ends of the paths; what stands in the way is a note."""
    assert found.paths is not None
    for name, end in ends.items():
        try:
            own = ellipses_of(name, end, found.paths.plane)
        except (CurvscopeError, RuntimeError, ValueError) as error:
            found.notes.append(f"No curvature is drawn at the end of {name}: {error}")
            continue
        for kind, one in own.items():
            found.ellipses.setdefault(kind, []).append(one)
        if own:
            found.steps[name] = end.step


def _about_ellipses(places: Places) -> str:
    if not places.ellipses:
        return ""
    own = [name for name in places.ellipses if name != EXACT]
    return (
        f" Curves around the ends are level lines of curvature on the plane, of the {EXACT} (black)"
        + (" and of the matrix that the optimizer uses there (in its colour)" if own else "")
        + ": within one, the quadratic term adds less than the number in the legend, so that the "
        "smaller one has the larger curvature, and a long one little of it along its axis."
    )


def place_plans(places: Places) -> Iterator[Plan]:
    """The pictures of :class:`Places`."""
    if places.paths is None:
        return
    paths, surface = places.paths, places.surface
    share = 100 * sum(v for v in paths.plane.explained)
    over = (
        f"The objective below them is evaluated at every point of the grid, on {places.samples} "
        "training samples. "
        if surface is not None
        else ""
    )

    def draw(figure: Any) -> None:
        drawn = places.ellipses or None
        plot_trajectories(paths, surface=surface, ellipses=drawn, ax=figure.subplots(), title="")

    def apart(figure: Any) -> None:
        plot_distances(paths, ax=figure.subplots(), title="")

    yield Plan(
        "trajectories",
        "",
        "Paths of the optimizers through parameter space in the plane of their first principal "
        "components" + (", above contour lines of the objective." if surface is not None else "."),
        "Every optimizer at its best learning rate, first seed, from the circle to the square, "
        "with steps beside it, in the plane of the first two principal components of all "
        f"snapshots, which has {share:.0f} % of their variance. " + over + "Paths lie above or "
        "below the plane: between them and the contours there is what the plane does not show."
        + _about_ellipses(places),
        (8.4, 4.6),
        draw,
    )
    yield Plan(
        "distances",
        "",
        "Distance between every two paths over the steps.",
        "Distance between the parameters of every two trainings at equal steps, in the whole space."
        if len(paths.paths) > 1
        else "Distance from the start, in the whole space.",
        (6.8, 3.2),
        apart,
    )
