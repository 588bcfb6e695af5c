"""Forward over reverse, and when two ways to a product agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UnsupportedLayerError
from .forward import gradient_along
from .graphs import BatchGraph, HessianGraph, add_to

if TYPE_CHECKING:
    from typing import Any

    from .engine import Engine


DISAGREES = (
    "Forward mode is wrong for this model: its {} differs from that of reverse mode by {:.2g} "
    "of the norm. Use engine='auto'."
)


def gap(reference: Tensor, found: Tensor) -> float:
    """Relative to the norm of the reference."""
    return float((reference - found).double().norm() / reference.double().norm())


def agree(reference: Tensor, found: Tensor) -> bool:
    """Equal to what rounding allows."""
    gap, size = (reference - found).double().norm(), reference.double().norm()
    return bool(gap <= 10 * torch.finfo(reference.dtype).eps ** 0.5 * size)


class AlongGraph(BatchGraph):
    """Forward over reverse: no graph, every product differentiates the gradient along a vector."""

    def __init__(self, engine: Engine, inputs: Any, targets: Any) -> None:
        self.engine, self.inputs, self.targets = engine, inputs, targets
        self.parameters = engine.parameters

    def roots(self) -> list[Tensor]:
        return []

    def _total(self) -> Tensor:
        problem = self.engine.problem
        return problem.batch_total(problem.outputs(self.inputs), self.targets)

    def _one(self, parts: list[Tensor], retain: bool) -> Sequence[Tensor | None]:
        engine = self.engine
        try:
            found = gradient_along(engine.problem.model, self._total, self.parameters, parts)
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedLayerError(
                f"The model has no forward-mode derivative ({error}). Use engine='auto'."
            ) from error
        if not engine._trusted:
            engine._trusted = True
            total = self._total()
            flat = torch.zeros_like(torch.cat([p.detach().reshape(-1) for p in parts]))
            reverse, forward = flat, flat.clone()
            if total.requires_grad:
                graph = HessianGraph(total, self.parameters)
                add_to(reverse, graph._one(parts, False), self.parameters, 1.0)
            add_to(forward, found, self.parameters, 1.0)
            if not agree(reverse, forward):
                raise UnsupportedLayerError(DISAGREES.format("H v", gap(reverse, forward)))
        return found

    def _many(self, parts: list[Tensor]) -> Sequence[Tensor | None]:
        raise NotImplementedError
