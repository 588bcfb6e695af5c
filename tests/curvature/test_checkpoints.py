"""Checkpointed models where products take a fresh graph: forward mode must not lead into them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import curvscope as cs
from tests.truth import relative


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(checkpoint(self.first, x, use_reentrant=False))


@pytest.mark.parametrize("matrix", [cs.ggn, cs.empirical_fisher], ids=["ggn", "ef"])
def test_second_products_with_fresh_graphs(matrix):
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, dtype=torch.float64), torch.arange(32) % 2
    problem = cs.Problem(
        Net().double(), nn.CrossEntropyLoss(), [(x[:16], y[:16]), (x[16:], y[16:])]
    )
    true = matrix(problem).dense()
    V = torch.randn(26, 3, dtype=torch.float64)
    op = matrix(problem, engine="fresh")
    for _ in range(3):  # the second one tries forward mode
        assert relative(op @ V, true @ V) < 1e-12
    with pytest.raises(cs.errors.UnsupportedLayerError, match="no forward-mode derivative"):
        matrix(problem, engine="forward") @ V
