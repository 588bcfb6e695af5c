"""Leading eigenvalues by iteration, against full decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curvscope.analysis.extremes import extremes
from curvscope.analysis.gram_form import GramForm
from curvscope.analysis.lanczos import leading_by_products, leading_of_dense, norm_of_dense
from curvscope.errors import SingularError
from curvscope.operators import DiagonalOperator, LowRankOperator, RowGramOperator
from tests.analysis import cases


@pytest.mark.parametrize("size", [5, 60, 700])
def test_leading_pairs_of_a_formed_matrix(size: int) -> None:
    matrix = cases.definite(size, 0) - 0.3 * torch.eye(size, dtype=torch.float64)
    values, vectors = leading_of_dense(matrix, 3)
    full = np.linalg.eigvalsh(matrix.numpy())
    np.testing.assert_allclose(values, full[np.argsort(-np.abs(full))[:3]], rtol=1e-10)
    assert float((matrix @ vectors - vectors * values).norm()) < 1e-10
    assert norm_of_dense(-matrix) == pytest.approx(np.abs(full).max(), rel=1e-12)


@pytest.mark.parametrize("size", [4, 600])
def test_simple_matrices_do_not_confuse_the_iteration(size: int) -> None:
    zero = torch.zeros(size, size, dtype=torch.float64)
    assert norm_of_dense(zero) == 0.0
    one = torch.eye(size, dtype=torch.float64)
    assert norm_of_dense(3 * one) == pytest.approx(3.0)
    one[0, 0] = -7.0
    assert norm_of_dense(one) == pytest.approx(7.0)


def test_residuals_bound_the_error_of_products() -> None:
    matrix = cases.definite(80, 1)
    truth = np.linalg.eigvalsh(matrix.numpy())[::-1]
    values, vectors, residuals = leading_by_products(matrix.matmul, 80, 2, steps=12)
    for place in range(2):
        exact = float((matrix @ vectors[:, place] - values[place] * vectors[:, place]).norm())
        assert float(residuals[place]) == pytest.approx(exact, rel=1e-6, abs=1e-12)
        assert min(abs(truth - float(values[place]))) <= exact + 1e-12
    values, _, residuals = leading_by_products(matrix.matmul, 80, 2, steps=80, tol=1e-10)
    np.testing.assert_allclose(values, truth[:2], rtol=1e-9)
    zero, _, _ = leading_by_products(lambda v: 0 * v, 9, 1)
    assert float(zero[0]) == 0.0


@pytest.mark.parametrize("kind", ["low rank", "rows"])
def test_the_gram_matrix_gives_spectrum_and_inverse(kind: str) -> None:
    if kind == "low rank":
        op = LowRankOperator(
            cases.normal(20, 4, seed=0), torch.tensor([1.0, 0.5, 2.0, 0.0]).double()
        )
    else:
        op = RowGramOperator(cases.normal(2, 3, 1, 4, seed=1), cases.normal(3, 1, 5, seed=2), 0.2)
    form = GramForm.of(op, 10)
    assert form is not None
    dense = op.dense()
    np.testing.assert_allclose(form.eigenvalues, torch.linalg.eigvalsh(dense), atol=1e-12)
    values, vectors = form.leading(op.rank + 2)
    good = values > 1e-12
    assert float((dense @ vectors - vectors * values)[:, good].norm()) < 1e-11
    np.testing.assert_allclose(vectors[:, good].norm(dim=0), 1.0, rtol=1e-10)
    assert not vectors[:, ~good].any()
    vector = cases.normal(20, seed=5)
    shifted = dense + 0.3 * torch.eye(20, dtype=torch.float64)
    np.testing.assert_allclose(
        form.solve(vector, 0.3), torch.linalg.solve(shifted, vector), atol=1e-12
    )
    with pytest.raises(SingularError, match="rank"):
        form.solve(vector, 0.0)


def test_matrices_without_such_a_form() -> None:
    assert GramForm.of(LowRankOperator(cases.normal(5, 8, seed=0)), 100) is None  # full rank
    assert GramForm.of(LowRankOperator(cases.normal(9, 8, seed=0)), 5) is None  # too large
    negative = LowRankOperator(cases.normal(9, 1, seed=0), -torch.ones(1).double())
    assert GramForm.of(negative, 5) is None


@pytest.mark.parametrize("size", [40, 240])
def test_ends_are_not_better_known_than_the_matrix(size: int) -> None:
    diagonal = torch.linspace(-1.0, 2.0, size, dtype=torch.float64)
    found = extremes(DiagonalOperator(diagonal.float()), 1, steps=size)
    assert found.largest_residuals[0] >= 2e-7 and found.smallest_residuals[0] >= 2e-7
    finer = extremes(DiagonalOperator(diagonal), 1, steps=size)
    assert 0 < finer.largest_residuals[0] < 1e-7
