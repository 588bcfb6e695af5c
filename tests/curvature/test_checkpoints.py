"""Models that forward mode must keep off: checkpointed ones, and those that change parameters."""

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


class Renormed(nn.Module):
    """Tied weights that the embedding brings to length at every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, max_norm=1.5)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x).cumsum(1))).transpose(1, 2)


def test_parameters_that_change_at_every_pass():
    torch.manual_seed(0)
    tokens = torch.randint(6, (7, 3))
    model = Renormed().double()
    model(tokens)
    op = cs.ggn(cs.Problem(model, nn.CrossEntropyLoss(), (tokens, tokens.roll(1, 1))))
    true = op.dense()
    op = cs.ggn(op.problem)
    V = torch.randn(24, 5, dtype=torch.float64)
    for _ in range(3):  # the second product failed
        assert relative(op @ V, true @ V) < 1e-12
    with pytest.raises(cs.errors.UnsupportedLayerError, match="changes its parameters in place"):
        cs.ggn(op.problem, engine="forward") @ V
