"""Small problems whose trainings are looked at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import curvscope as cs


def data(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Two batches of unequal size."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=generator, dtype=dtype), torch.arange(12) % 3
    return [(x[:7], y[:7]), (x[7:], y[7:])]


def problem(dtype: torch.dtype = torch.float64) -> cs.Problem:
    """A frozen layer between two blocks of 25 and 12 parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 3)).to(dtype)
    for parameter in net[2].parameters():
        parameter.requires_grad_(False)
    return cs.Problem(net, nn.CrossEntropyLoss(), data(dtype))


def random_path(
    size: int = 37, count: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[tuple[int, Tensor]]:
    """A random walk of unequal strides, with a snapshot every third step."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(count, size, generator=generator, dtype=torch.float64)
    moves *= torch.linspace(1, 2, count, dtype=torch.float64).unsqueeze(1)
    return [(3 * k, theta.to(dtype)) for k, theta in enumerate(moves.cumsum(0))]


def put(p: cs.Problem, theta: Tensor) -> None:
    """Write a flat vector into the problem's parameters."""
    with torch.no_grad():
        for name, part in p.layout.split(theta).items():
            p.params[name].copy_(part)
