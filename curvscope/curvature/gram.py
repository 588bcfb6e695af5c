"""Blocks that are sums of outer products ``v v^T``, all of them in the same backward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import Operator
from ..problem import Problem, Snapshot
from ..problem.cotangents import root_cotangents, sampled_cotangents, scaled_terms
from ..progress import track
from .accumulate import GramAccumulator
from .cuts import Cuts
from .plan import BlockPlan, broken, plan_blocks
from .products import EMPIRICAL, FISHER, Kind
from .recording import Recording, record
from .rowhessian import RowHessianAccumulator


class RouteFailed(Exception):
    """A later batch does not allow the route that the first one did (caught by the caller)."""

    def __init__(self, block: str, reason: str) -> None:
        super().__init__(f"{block}: {reason}")
        self.block, self.reason = block, reason


def record_batch(
    problem: Problem,
    inputs: Any,
    targets: Any,
    plans: Sequence[BlockPlan] | None = None,
    *,
    planned: bool = False,
) -> Recording:
    """Record one batch (inside a session).

    With ``plans``, what only other blocks use is not cut into samples; ``planned``: it is the batch
    that the plans were made from.
    """
    only = None if plans is None else [p for plan in plans for p in plan.parameters]
    known = {k: axis for plan in plans or () for k, axis in plan.axes.items()} if planned else {}
    return record(
        lambda: problem.outputs(inputs),
        problem.params.values(),
        targets,
        problem.count_samples(inputs, targets),
        only=only,
        known=known,
    )


def plans_for(
    problem: Problem, blocks: dict[str, tuple[str, ...]], at: Snapshot
) -> dict[str, BlockPlan]:
    """Plans from the first batch."""
    with problem.session(at):
        inputs, targets = next(problem.batches())
        return plan_blocks(problem, record_batch(problem, inputs, targets), blocks)


def cotangents(
    problem: Problem, kind: Kind, recording: Recording, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cotangents (and signs ``[N]``) whose gradients' outer products make up the matrix."""
    loss, z, n = problem.loss, recording.outputs, recording.samples
    targets = recording.targets
    if kind.matrix == EMPIRICAL:
        for u in scaled_terms(loss, z, targets, n, kind.per):
            yield u, None
    elif kind.matrix == FISHER and kind.samples is not None:
        for _ in range(kind.samples):
            u = sampled_cotangents(loss, z, targets, n, generator)
            yield u / kind.samples**0.5, None
    else:
        yield from root_cotangents(loss, z, targets, n)


def pass_count(problem: Problem, kind: Kind, recording: Recording) -> int:
    """Backward passes per batch."""
    per_sample = recording.outputs[0].numel() * (recording.outputs.shape[0] // recording.samples)
    if kind.matrix == EMPIRICAL:
        if kind.per != "term":
            return 1
        return problem.loss.terms(recording.outputs.detach(), recording.samples).shape[1]
    return kind.samples if kind.samples is not None else per_sample


def _still_valid(
    problem: Problem, recording: Recording, plans: Sequence[BlockPlan], route: str
) -> None:
    for name, reason in broken(problem, recording, plans, route).items():
        raise RouteFailed(name, reason)


def gram_blocks(
    problem: Problem,
    kind: Kind,
    plans: Sequence[BlockPlan],
    at: Snapshot,
    form: str | None = None,
    route: str = "gram",
) -> tuple[dict[str, Operator], float]:
    """Compute the blocks; returns them and the number of backward passes over the data.

    ``route="piecewise-linear"`` makes sure that every batch allows it.
    """
    generator = kind.generator()
    accumulators: dict[str, GramAccumulator] = {}
    passes = 0.0
    facts = problem.check()
    wanted = sorted({k for plan in plans for k in plan.calls})
    with problem.session(at):
        batches = problem.batches()
        for inputs, targets in track(batches, f"{kind.title} blocks", total=facts.batches):
            first = not accumulators
            recording = record_batch(problem, inputs, targets, plans, planned=first)
            if not first:
                _still_valid(problem, recording, plans, route)
            count = pass_count(problem, kind, recording)
            if first:
                for plan in plans:
                    accumulators[plan.name] = GramAccumulator(
                        plan, problem.dtype, count * facts.samples, form
                    )
            if count > 1:
                recording.keep_rows(wanted)
            for u, sign in cotangents(problem, kind, recording, generator):
                gradients = recording.gradients(u, wanted)
                for accumulator in accumulators.values():
                    accumulator.add(recording, gradients, sign)
            for accumulator in accumulators.values():
                accumulator.end_batch(recording)
            passes += count
    scale = problem.scale
    found = {name: acc.result(scale) for name, acc in accumulators.items()}
    return found, passes / max(facts.batches, 1)


def row_blocks(
    problem: Problem, kind: Kind, plans: Sequence[BlockPlan], at: Snapshot
) -> tuple[dict[str, Operator], float]:
    """Hessian blocks by ``sum_n H_n (x) a_n a_n^T``."""
    accumulators = {plan.name: RowHessianAccumulator(plan, problem.dtype) for plan in plans}
    first = True
    with problem.session(at):
        for inputs, targets in problem.batches():
            recording = record_batch(problem, inputs, targets, plans, planned=first)
            if not first:
                _still_valid(problem, recording, plans, "rows")
            first = False
            total = problem.batch_total(recording.outputs, targets)
            layers = [recording.calls[plan.calls[0]].outputs for plan in plans]
            cuts = Cuts(total, recording, layers)
            for accumulator in accumulators.values():
                accumulator.add(problem, recording, cuts)
            del cuts, total, layers, recording  # before the next graph is made
    scale = problem.scale
    passes = sum(2.0 * plan.positions * plan.outputs for plan in plans)
    return {name: acc.result(scale) for name, acc in accumulators.items()}, passes
