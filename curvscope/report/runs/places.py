"""The paths of the trainings in a common plane, above the objective evaluated on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ...errors import CurvscopeError
from ...plotting.trajectories import plot_distances, plot_trajectories
from ...problem import Problem
from ...progress import stage
from ...training.checkpoints import load_checkpoint
from ...training.planes import plane_of_paths
from ...training.plans import CHECKPOINT
from ...training.subjects import Source
from ...training.surfaces import LossSurface, loss_surface
from ...training.trajectory import Trajectories, trajectories
from ..figure_plans import Plan
from .gather import Member, Runs

_SAMPLES = 500  # on which the objective is evaluated
_PATHS = 8


@dataclass
class Places:
    """Paths and, where the problem could be made again, the objective on their plane."""

    paths: Trajectories | None = None
    surface: LossSurface | None = None
    names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: int = 0


def find_places(runs: Runs, *, surface: bool = True) -> Places:
    """Trajectories of every optimizer's best learning rate with its first seed, on one plane."""
    found = Places()
    chosen = {name: members[0] for name, members in runs.best()}
    kept: dict[str, Member] = {}
    for name, member in chosen.items():
        own = member.run.snapshots()
        if own.kind == "full" and len(own) > 1:
            kept[name] = member
        else:
            what = f"kept as {own.kind}" if own.kind else "not kept"
            found.notes.append(f"{name} has no path: its snapshots are {what}, not in full.")
    kept = dict(list(kept.items())[:_PATHS])
    if not kept:
        return found
    found.names = {name: member.path for name, member in kept.items()}
    stage("Trajectories")
    problem = None
    if surface:
        try:
            problem = _problem(runs, next(iter(kept.values())))
        except (CurvscopeError, RuntimeError) as error:
            found.notes.append(f"The objective is not drawn below the paths: {error}")
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
    return found


def _problem(runs: Runs, member: Member) -> Problem:
    """The problem of the trainings at the end of one of them, with at most 500 samples."""
    if not runs.plan:
        raise CurvscopeError("only runs of curvscope train say how their problem is made.")
    source = Source(runs.plan["problem"], batch_size=None, data=runs.plan.get("data"))
    problem = source.subject(member.seed).problem
    state = load_checkpoint(runs.folder / member.path / CHECKPOINT)
    if state is not None:
        problem.user_model.load_state_dict(state["model"])
    with suppress(CurvscopeError):
        if problem.n_samples > _SAMPLES:
            problem = problem.subset(_SAMPLES)
    return problem


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
        plot_trajectories(paths, surface=surface, ax=figure.subplots(), title="")

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
        "below the plane: between them and the contours there is what the plane does not show.",
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
