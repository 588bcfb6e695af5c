"""One table of all optimizers, and how each of them takes a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope.optim import KBFGS, KFAC, MFAC, AdaFisher, AdaFisherW, AdaHessian

from .kronecker_cases import labels, normal, seeded

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Method:
    """How one optimizer is built, and what its closure looks like."""

    name: str
    make: Any
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, model: Any, **options: Any) -> Any:
        return self.make(model, **{**self.options, **options})

    @property
    def calls_backward(self) -> bool:
        """Whether the closure calls ``backward()`` itself."""
        return self.make is not AdaHessian

    def closure(
        self, optimizer: Any, model: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy
    ) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(model(x), y)
            if self.calls_backward:
                value.backward()
            return value

        return closure

    def run(
        self, optimizer: Any, model: nn.Module, shape: tuple[int, ...], steps: int, start: int = 0
    ) -> None:
        """Steps on different minibatches of made-up data with three classes."""
        dtype = next(model.parameters()).dtype
        for k in range(start, start + steps):
            x, y = normal(*shape, seed=k, dtype=dtype), labels(shape[0], seed=k)
            optimizer.step(self.closure(optimizer, model, x, y))


METHODS = [
    Method("K-BFGS", KBFGS, {"lr": 0.05, "damping": 0.3}),
    Method("K-BFGS(L)", KBFGS, {"lr": 0.05, "damping": 0.3, "memory": 3}),
    Method("K-FAC", KFAC, {"lr": 0.05, "damping": 0.3}),
    Method("K-FAC, empirical", KFAC, {"lr": 0.05, "damping": 0.3, "fisher": "empirical"}),
    Method("AdaFisher", AdaFisher, {"lr": 1e-3, "update_every": 2}),
    Method("AdaFisherW", AdaFisherW, {"lr": 1e-3, "update_every": 1, "weight_decay": 1e-2}),
    Method("AdaHessian", AdaHessian, {"lr": 0.02, "update_every": 2}),
    Method("M-FAC", MFAC, {"lr": 1e-2, "damping": 1e-2, "memory": 4}),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=[m.name for m in METHODS])


def mlp() -> nn.Sequential:
    """5 inputs, 3 classes, a normalisation with buffers."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    )


def cnn() -> nn.Sequential:
    """Images ``[1, 7, 7]``, 3 classes."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 4, 2, bias=False),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
    )


IMAGES, ROWS = (8, 1, 7, 7), (8, 5)


def snapshot(optimizer: Any, model: nn.Module) -> tuple[Any, ...]:
    """All that a refused step must leave as it is: weights, buffers, the state that is saved."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.tolist()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    with torch.no_grad():
        weights = {k: torch.nan_to_num(v, nan=77.0) for k, v in model.state_dict().items()}
    return plain(weights), plain(optimizer.state_dict())
