"""A matrix of which nothing is said is not called exact."""

from __future__ import annotations

import torch

import curvscope as cs
from curvscope.operators import DenseOperator


def test_nothing_is_claimed_of_a_matrix_made_by_hand() -> None:
    op = DenseOperator(torch.eye(3))
    assert repr(op).startswith("DenseOperator(matrix, 3 x 3")
    assert "exact" not in op._repr_html_().replace("inexact", "")
    named = op.with_info(what="mine", exact=False)
    assert "(mine, approximate, 3 x 3" in repr(named)
    problem = cs.Problem(
        torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 1))
    )
    assert ", exact, " in repr(cs.ggn(problem))
