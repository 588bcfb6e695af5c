"""Curvature at the ends of the paths, on their plane: the exact matrix and the optimizers' own."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from ...curvature import ggn
from ...errors import CurvscopeError
from ...problem import Problem
from ...training.adapters import curvature_of
from ...training.checkpoints import load_checkpoint
from ...training.ellipses import Ellipse, ellipse
from ...training.optimizers_by_name import OptimizerSpec, build_optimizer
from ...training.paths import flat_parameters
from ...training.planes import Plane
from ...training.plans import CHECKPOINT
from ...training.subjects import Source
from .gather import Member, Runs

SAMPLES = 500  # on which the objective and its curvature are evaluated
EXACT = "exact GGN"


@dataclass
class End:
    """The end of one training: its problem, and the curvature that its optimizer uses there."""

    problem: Problem
    step: int
    member: Member
    spec: str
    state: dict[str, object] = field(repr=False)


def end_of(runs: Runs, member: Member) -> End:
    """The problem of the trainings at the end of one of them, with at most 500 samples.

    Raises what making the problem raises, ``CurvscopeError`` for runs that do not say how.
    """
    if not runs.plan:
        raise CurvscopeError("only runs of curvscope train say how their problem is made.")
    source = Source(runs.plan["problem"], batch_size=None, data=runs.plan.get("data"))
    problem = source.subject(member.seed).problem
    state = load_checkpoint(runs.folder / member.path / CHECKPOINT) or {}
    if state:
        problem.user_model.load_state_dict(state["model"])
    with suppress(CurvscopeError):
        if problem.n_samples > SAMPLES:
            problem = problem.subset(SAMPLES)
    spec = next((r["spec"] for r in runs.plan["runs"] if r["path"] == member.path), "")
    return End(problem, int(state.get("steps", 0)), member, str(spec), state)


def ellipses_of(name: str, end: End, plane: Plane) -> dict[str, Ellipse]:
    """At the end of one path: of the exact GGN, and of the optimizer's own matrix if it has one.

    Raises ``CurvscopeError`` where the optimizer cannot be made again.
    """
    if not end.state:
        return {}
    problem = end.problem
    theta = flat_parameters(problem)
    found = {EXACT: ellipse(ggn(problem), plane, at=theta, layout=problem.layout)}
    built = build_optimizer(OptimizerSpec.parse(end.spec), problem.user_model)
    try:
        built.optimizer.load_state_dict(end.state["optimizer"])
        own = curvature_of(built.optimizer, problem)
        if own is not None:
            found[name] = ellipse(own, plane, at=theta, layout=problem.layout)
    finally:
        if hasattr(built.optimizer, "close"):
            built.optimizer.close()
    return found
