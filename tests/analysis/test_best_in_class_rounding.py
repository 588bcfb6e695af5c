"""The best of a class is never farther than a member of it, whatever has cancelled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope import errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_members_are_no_nearer_than_the_best(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    data = torch.randn(40, 6, dtype=dtype), torch.randn(40, 2, dtype=dtype)
    problem = cs.Problem(model, nn.MSELoss(), data)
    # of the last layer under the squared error K-FAC and EKFAC are exact
    found = cs.compare(cs.ggn(problem), {"EKFAC": cs.ekfac(problem), "K-FAC": cs.kfac(problem)})
    for row in found.rows:
        assert row.best_in_class <= row.error
        assert math.isnan(row.excess) or row.excess >= 1
    for name in ("EKFAC", "K-FAC"):
        exact = found.row("2", name)
        assert exact.error < 1e-5 and exact.best_in_class < 1e-5
        assert math.isnan(exact.excess) and "rounding" in exact.reasons["excess"]


def test_one_layer_is_its_whole_matrix() -> None:
    torch.manual_seed(0)
    problem = cs.Problem(nn.Linear(8, 2), nn.MSELoss(), (torch.randn(200, 8), torch.randn(200, 2)))
    row = cs.compare(cs.ggn(problem), {"EKFAC": cs.ekfac(problem)}).row("(all)", "EKFAC")
    assert row.best_in_class <= row.error < 1e-5


@pytest.mark.parametrize(
    "nearest",
    [cs.best_kronecker, cs.best_diagonal, cs.best_identity, cs.best_diagonal_kronecker],
    ids=lambda f: f.__name__,
)
def test_nearest_matrices_are_those_of_matrices(nearest) -> None:
    problem = cs.Problem(nn.Linear(3, 2), nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)))
    for wrong in (problem, problem.model, torch.eye(3)):
        with pytest.raises(errors.OptionError, match=r"cs\.ggn\(problem\)"):
            nearest(wrong)
