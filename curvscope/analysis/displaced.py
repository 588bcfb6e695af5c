"""The objective and its gradient away from the current parameters, which stay as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..modes import plain_mode
from ..problem import Problem, Snapshot, flat_gradient


def displaced(problem: Problem, at: Snapshot, step: Tensor) -> Snapshot:
    """The snapshot ``at`` with the problem's parameters moved by ``step`` ``[P]``."""
    parts = step.split([p.numel() for p in problem.params.values()])
    moves = {id(p): v for p, v in zip(problem.params.values(), parts, strict=True)}
    values = []
    for parameter, value in zip(problem.model.parameters(), at.parameters, strict=True):
        move = moves.get(id(parameter))
        values.append(value if move is None else value + move.to(value).reshape(value.shape))
    return Snapshot(values, at.buffers)


@plain_mode()
def value_and_gradient(problem: Problem, at: Snapshot) -> tuple[float, Tensor]:
    """``f`` and its gradient ``[P]`` at a snapshot. Cost: one pass over the data."""
    parameters = list(problem.params.values())

    def one(inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        total = problem.batch_total(problem.outputs(inputs), targets)
        return total.detach().double(), flat_gradient(total, parameters)

    value, gradient = problem.sum_over_batches(one, at=at)
    return float(value) * problem.scale, gradient * problem.scale
