"""Networks, data, recorded trajectories and one table of the optimizers of one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope.optim import MFAC, AdaFisher, AdaFisherW, AdaHessian

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    """A recorded trajectory; integers as int64."""
    data = {k: torch.as_tensor(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}
    return {k: v if v.is_floating_point() else v.long() for k, v in data.items()}


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 5),
    )


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def seeded(make: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A network whose initial weights do not depend on what ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype)


def data(seed: int, *shape: int, classes: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=dtype)
    return x, torch.randint(0, classes, shape[:1], generator=generator)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def flat_grad(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


@dataclass(frozen=True)
class Method:
    """How one optimizer is built and stepped; all take a step after ``backward`` of their own."""

    name: str
    make: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, model: nn.Module, **options: Any) -> Any:
        return self.make(model, **{**self.options, **options})

    def backward(self, optimizer: Any, loss: Tensor) -> None:
        if isinstance(optimizer, AdaHessian):
            optimizer.backward(loss)
        else:
            loss.backward()

    def step(self, optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        self.backward(optimizer, loss)
        optimizer.step()
        return loss.detach()

    def closure(self, optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Any:
        """A closure as the method wants it."""

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if not isinstance(optimizer, AdaHessian):
                loss.backward()
            return loss

        return closure


METHODS = [
    Method("AdaFisher", AdaFisher, {"lr": 1e-3, "update_every": 3, "weight_decay": 1e-2}),
    Method("AdaFisherW", AdaFisherW, {"lr": 1e-3, "update_every": 1, "weight_decay": 1e-2}),
    Method("AdaFisher, release", AdaFisher, {"averaging": "release", "update_every": 2}),
    Method("AdaHessian", AdaHessian, {"lr": 0.05, "update_every": 2, "weight_decay": 1e-2}),
    Method("AdaHessian, 2 probes", AdaHessian, {"lr": 0.05, "n_probes": 2, "hessian_power": 0.5}),
    Method("M-FAC", MFAC, {"lr": 1e-2, "damping": 1e-2, "memory": 4, "weight_decay": 1e-2}),
]


each_method = pytest.mark.parametrize("method", METHODS, ids=[m.name for m in METHODS])


def batch(t: int):
    return data(100 + t, 8, 2, 8, 8, classes=5)


def run(method, model, optimizer, steps, start=0):
    for t in range(start, start + steps):
        method.step(optimizer, model, *batch(t))


def given(vectors):
    """Probes from a list of flat vectors, one after the other."""
    rest = iter(vectors)

    def probes(parameters):
        pieces = next(rest).double().split([p.numel() for p in parameters])
        return [v.reshape(p.shape) for v, p in zip(pieces, parameters)]

    return probes


def small_problem(seed=0):
    model = seeded(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), nn.Softplus())
    )
    x, y = data(seed, 6, 4, classes=2)
    return model, lambda: F.cross_entropy(model(x), y)
