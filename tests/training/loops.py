"""Small trainings for the tests of the monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import curvscope as cs

SAMPLES, BATCH = 32, 8


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """32 samples with 6 features and three classes that can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 6, generator=generator)
    y = (x[:, 0] > 0.3).long() + (x[:, 1] > 0).long()
    return x, y


def plain_net(seed: int = 0) -> nn.Module:
    """A smooth two-layer network."""
    torch.default_generator.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def noisy_net(seed: int = 0) -> nn.Module:
    """A network whose training draws random numbers and changes buffers."""
    torch.default_generator.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "K-BFGS": lambda m: cs.optim.KBFGS(m, lr=0.05, damping=0.1),
    "K-BFGS(L)": lambda m: cs.optim.KBFGS(m, lr=0.05, damping=0.1, memory=5),
    "K-FAC": lambda m: cs.optim.KFAC(m, lr=0.05, damping=0.1),
    "AdaFisher": lambda m: cs.optim.AdaFisher(m, lr=0.01, update_every=3),
    "AdaHessian": lambda m: cs.optim.AdaHessian(m, lr=0.05),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
}


def one_step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """One step by a closure, as every optimizer takes it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        if not isinstance(optimizer, cs.optim.AdaHessian):
            loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert isinstance(loss, Tensor)
    return loss


def batches(steps: int) -> list[Tensor]:
    """Indices of the samples of each step."""
    generator = torch.Generator().manual_seed(1)
    found: list[Tensor] = []
    while len(found) < steps:
        found += list(torch.randperm(SAMPLES, generator=generator).split(BATCH))
    return found[:steps]


def train(
    model: nn.Module, optimizer: Any, steps: int, after: Callable[[int, Tensor], None] | None = None
) -> None:
    """``steps`` steps; ``after(step, loss)`` follows each."""
    x, y = data()
    x = x.to(next(model.parameters()).dtype)
    model.train()
    for number, index in enumerate(batches(steps), 1):
        loss = one_step(model, optimizer, x[index], y[index])
        if after is not None:
            after(number, loss)


def problem_of(model: nn.Module, **options: Any) -> cs.Problem:
    """All 32 samples in one batch, with their cross-entropy."""
    return cs.Problem(model, nn.CrossEntropyLoss(), data(), **options)


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
