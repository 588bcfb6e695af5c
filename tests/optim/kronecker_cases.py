"""Problems, closures and a plain transcription of K-BFGS, for the tests of K-BFGS and K-FAC."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope.optim import KBFGS, KFAC

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    data = {k: torch.as_tensor(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}
    data = {k: v if v.is_floating_point() else v.long() for k, v in data.items()}
    return {"T": data["X"], **data}


def seeded(make: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A network whose initial weights do not depend on what ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype)


def mlp(*widths: int, inplace: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=inplace)]
    return nn.Sequential(*layers[:-1])


def small(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return seeded(lambda: mlp(5, 6, 3), seed, dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def labels(n: int, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


def closure_of(
    optimizer: Any,
    model: nn.Module,
    x: Any,
    y: Tensor,
    loss: Callable[..., Tensor] = F.cross_entropy,
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    return closure


def run(optimizer: Any, model: nn.Module, steps: int = 3, n: int = 7, **kw: Any) -> None:
    """Some steps on different minibatches of made-up data."""
    for k in range(steps):
        x, y = normal(n, 5, seed=k, dtype=flat(model).dtype), labels(n, seed=k)
        optimizer.step(closure_of(optimizer, model, x, y, **kw))


class OneLayer:
    """K-BFGS on one layer, written down again from the description, with loops and inverses.

    ``rows(x)`` gives the input rows ``[N, T, groups, i]``, the 1 appended, ``loss(z, y)`` the mean
    loss of outputs ``z [N, T, groups, o]``; ``W [groups, o, i]`` are the weights.
    """

    def __init__(
        self,
        rows: Any,
        loss: Any,
        W: Tensor,
        *,
        lr: float,
        damping: float,
        tau: float,
        memory: int | None,
    ) -> None:
        self.rows, self.loss, self.W = rows, loss, W.clone()
        self.lr, self.eps, self.tau, self.memory = lr, math.sqrt(damping), tau, memory
        self.t = 0
        self.M = torch.zeros_like(W)
        self.A: list[Tensor] = []
        self.Ha: list[Tensor] = []
        self.Hg = [torch.eye(W.shape[1], dtype=W.dtype) for _ in W]
        self.pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in W]
        self.s = torch.zeros(W.shape[:2], dtype=W.dtype)
        self.y = torch.zeros(W.shape[:2], dtype=W.dtype)

    def means(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.rows(x)
        z = torch.einsum("goi,ntgi->ntgo", self.W, a).requires_grad_()
        value = self.loss(z, target)
        (g,) = torch.autograd.grad(value, z)
        g = g * len(a)  # derivative of each sample's own loss
        dW = torch.einsum("ntgo,ntgi->goi", g, a) / len(a)
        return z.detach().mean((0, 1)), g.mean((0, 1)), dW

    def step(self, x: Tensor, target: Tensor) -> None:
        a = self.rows(x)
        z, g, dW = self.means(x, target)
        self.M = 0.9 * self.M + 0.1 * (dW + self.tau * self.W)
        one = torch.eye(self.W.shape[2], dtype=self.W.dtype)
        for k in range(len(self.W)):
            new = torch.einsum("nti,ntj->ij", a[:, :, k], a[:, :, k]) / len(a)
            if self.t == 0:
                self.A.append(new)
                self.Ha.append(torch.linalg.inv(new + self.eps * one))
            else:
                self.A[k] = 0.9 * self.A[k] + 0.1 * new
            self.W[k] -= self.lr * self.inverse(k) @ self.M[k] @ self.Ha[k]
        z_new, g_new, _ = self.means(x, target)
        self.s = 0.9 * self.s + 0.1 * (z_new - z)
        self.y = 0.9 * self.y + 0.1 * (g_new - g)
        for k in range(len(self.W)):
            self.learn(k, g[k])
            mean = a[:, :, k].mean((0, 1))
            s = self.Ha[k] @ mean
            y = (self.A[k] + self.eps * one) @ s
            self.Ha[k] = textbook_bfgs(self.Ha[k], s, y)
        self.t += 1

    def inverse(self, k: int) -> Tensor:
        if self.memory is None:
            return self.Hg[k]
        H = torch.eye(self.W.shape[1], dtype=self.W.dtype)
        for s, y in self.pairs[k]:
            H = textbook_bfgs(H, s, y)
        return H

    def learn(self, k: int, g: Tensor) -> None:
        s, y, H = self.s[k], self.y[k], self.inverse(k)
        sy, yHy = s @ y, y @ H @ y
        if sy / yHy <= 0.2:
            theta = 0.8 * yHy / (yHy - sy)
            s = theta * s + (1 - theta) * H @ y
        sy, ss = s @ y, s @ s
        if sy / ss <= self.eps:
            theta = (1 - self.eps) * ss / (ss - sy)
            y = theta * y + (1 - theta) * s
        if s @ y <= 1e-4 * (s @ s) * g.norm():
            return
        self.Hg[k] = textbook_bfgs(self.Hg[k], s, y)
        self.pairs[k] = [*self.pairs[k], (s, y)][-(self.memory or 1) :]


def textbook_bfgs(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    rho = 1 / (s @ y)
    one = torch.eye(len(s), dtype=s.dtype)
    left = one - rho * torch.outer(s, y)
    return left @ H @ left.T + rho * torch.outer(s, s)


METHODS: dict[str, Callable[..., Any]] = {
    "K-BFGS": KBFGS,
    "K-BFGS(L)": lambda *a, **k: KBFGS(*a, memory=3, **k),
    "K-FAC": KFAC,
    "K-FAC, named loss": lambda *a, **k: KFAC(*a, loss=nn.CrossEntropyLoss(), **k),
    "K-FAC, empirical": lambda *a, **k: KFAC(*a, fisher="empirical", **k),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def mixed(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Covered layers, a normalisation with buffers, dropout."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3)
        ),
        seed,
        dtype,
    )


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
