"""Nearest members of a class: against a dense singular value decomposition, and by perturbation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvscope.errors import ShapeError
from curvscope.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalKroneckerOperator,
    DiagonalOperator,
    FunctionOperator,
    IdentityOperator,
    KroneckerOperator,
    Layout,
    LowRankOperator,
    MatrixView,
    Operator,
    ParameterSpec,
    RowGramOperator,
    RowHessianOperator,
    best_diagonal,
    best_diagonal_kronecker,
    best_identity,
    best_kronecker,
)
from curvscope.operators.singular import Space, leading_pair
from tests.operators.cases import all_cases, orthogonal, randn, spd, sym

VIEWS = [
    MatrixView(1, 3, 4),
    MatrixView(1, 4, 3, torch.randperm(12, generator=torch.Generator().manual_seed(0))),
    MatrixView(2, 3, 2, torch.arange(12).flip(0)),
    MatrixView(3, 2, 2),
    MatrixView(1, 1, 12),
    MatrixView(12, 1, 1),
]


def best_symmetric_distance(truth: Tensor, view: MatrixView) -> float:
    """Squared distance to the best product of symmetric factors, by a full SVD per group."""
    order = torch.arange(view.numel) if view.perm is None else view.perm
    g, o, i = view.shape
    blocks = truth[order][:, order].reshape(g, o, i, g, o, i)
    left = float(truth.square().sum())
    swap_o = torch.arange(o * o).reshape(o, o).T.flatten()
    swap_i = torch.arange(i * i).reshape(i, i).T.flatten()
    for k in range(g):
        R = blocks[k, :, :, k].permute(0, 2, 1, 3).reshape(o * o, i * i)
        # symmetric factors are unchanged by swapping their indices: project R onto those
        R = (R + R[swap_o]) / 2
        R = (R + R[:, swap_i]) / 2
        left -= float(torch.linalg.svdvals(R)[0]) ** 2
    return left


def distance(op: Operator, truth: Tensor) -> float:
    return float((op.dense() - truth).square().sum())


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("case", [case for case in all_cases() if not case.op.blocks], ids=str)
def test_best_kronecker_of_every_operator_is_the_leading_singular_pair(case, view) -> None:
    best = best_kronecker(case.op, view=view)
    assert isinstance(best, KroneckerOperator) and best.view == view
    assert best.info.settings["converged"] and not best.info.exact
    wanted = best_symmetric_distance(case.truth, view)
    size = max(1.0, float(case.truth.square().sum()))
    assert abs(distance(best, case.truth) - wanted) <= 1e-11 * size


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_no_perturbation_of_the_best_product_is_better(view: MatrixView) -> None:
    truth = spd(12, seed=3)
    op = DenseOperator(truth, view=view)
    for best, other in (
        (best_kronecker(op), KroneckerOperator),
        (best_diagonal_kronecker(op), DiagonalKroneckerOperator),
    ):
        least = distance(best, truth)
        first, second = best.factors["G"], best.factors["A"]  # type: ignore[attr-defined]
        make = sym if other is KroneckerOperator else (lambda *s, seed: randn(*s, seed=seed))
        for seed in range(20):
            shape = first.shape[:-1] if other is KroneckerOperator else first.shape
            nudge = make(*shape, seed=seed)
            shape = second.shape[:-1] if other is KroneckerOperator else second.shape
            shove = make(*shape, seed=seed + 100)
            for size in (1e-3, 1e-1):
                moved = other(first + size * nudge, second + size * shove, view)
                assert distance(moved, truth) >= least - 1e-12


@pytest.mark.parametrize("view", VIEWS[:4], ids=str)
def test_a_kronecker_product_is_its_own_nearest(view: MatrixView) -> None:
    g, o, i = view.shape
    kron = KroneckerOperator(sym(g, o), sym(g, i, seed=1), view)
    for op in (kron, DenseOperator(kron.dense(), view=view)):
        assert distance(best_kronecker(op), kron.dense()) < 1e-22
    diagonal = DiagonalKroneckerOperator(randn(g, o), randn(g, i, seed=1), view)
    for op in (diagonal, DenseOperator(diagonal.dense(), view=view)):
        assert distance(best_diagonal_kronecker(op), diagonal.dense()) < 1e-22


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_factors_of_a_semidefinite_matrix_are_semidefinite(
    seed: int, out: int, inp: int, rank: int
) -> None:
    view = MatrixView(1, out, inp)
    ops: list[Operator] = [
        LowRankOperator(randn(out * inp, rank, seed=seed), view=view),
        RowGramOperator(randn(2, rank, 1, out, seed=seed), randn(rank, 1, inp, seed=seed + 1)),
        RowGramOperator(randn(1, rank, 2, out, seed=seed), randn(rank, 2, inp, seed=seed + 1)),
        DenseOperator(spd(out * inp, seed=seed), view=view),  # not known to be semidefinite
    ]
    for op in ops:
        best = best_kronecker(op)
        for factor in best.factors.values():  # type: ignore[attr-defined]
            values = torch.linalg.eigvalsh(factor)
            assert float(values[0]) >= -1e-11 * float(values[-1])
        diagonal = best_diagonal_kronecker(op)
        assert all(bool((f >= 0).all()) for f in diagonal.factors.values())  # type: ignore[attr-defined]


def test_sign_is_that_of_the_traces() -> None:
    G, A = spd(3), spd(4, seed=1)
    best = best_kronecker(KroneckerOperator(-G, A))
    assert float(best.A.trace()) > 0 or float(best.G.trace()) > 0  # type: ignore[attr-defined]
    assert best.trace() < 0


def test_traceless_factors_are_found() -> None:
    """The identity, from which semidefinite matrices start, is orthogonal to these."""
    G = torch.tensor([[1.0, 2.0], [2.0, -3.0]], dtype=torch.float64)
    A = torch.tensor([[1.0, 4.0, 0.0], [4.0, -3.0, 1.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    assert float(A.trace()) == 0.0
    op = DenseOperator(torch.kron(G, A), view=MatrixView(1, 2, 3))
    assert distance(best_kronecker(op), op.dense()) < 1e-22


def test_equal_singular_values_still_give_a_nearest_product() -> None:
    """Two orthogonal products of equal norm: any mixture is as near, and the factors stay PSD."""
    one, two = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    truth = (torch.kron(one, one) + torch.kron(two, two)).double()
    op = DenseOperator(truth, view=MatrixView(1, 2, 2), positive_semidefinite=True)
    best = best_kronecker(op)
    assert abs(distance(best, truth) - 1.0) < 1e-12
    for factor in best.factors.values():  # type: ignore[attr-defined]
        assert float(torch.linalg.eigvalsh(factor)[0]) > -1e-12


def test_factors_of_a_diagonal_with_zeros_are_not_negative() -> None:
    """Rounding in the iteration leaves entries like -1e-17 where the factor is zero."""
    for seed in range(30):
        diagonal = torch.relu(randn(6, 5, seed=seed))
        diagonal[:, 3:] = 0.0
        diagonal[2:4, 0] = 0.0
        best = best_diagonal_kronecker(
            DiagonalOperator(diagonal.flatten()), view=MatrixView(1, 6, 5)
        )
        assert all(bool((f >= 0).all()) for f in best.factors.values())  # type: ignore[attr-defined]
        assert abs(best.frobenius_norm() - float(torch.linalg.matrix_norm(diagonal, 2))) < 1e-11


def test_zero_has_zero_factors() -> None:
    view = MatrixView(2, 2, 3)
    zero = DenseOperator(torch.zeros(12, 12, dtype=torch.float64), view=view)
    rows = RowGramOperator(
        *(torch.zeros(s, dtype=torch.float64) for s in ((2, 3, 1, 3), (3, 1, 4)))
    )
    for op in (zero, rows):
        for best in (best_kronecker(op), best_diagonal_kronecker(op)):
            assert best.frobenius_norm() == 0.0 and best.info.settings["converged"]


def test_too_few_iterations_are_reported() -> None:
    op = DenseOperator(sym(48), view=MatrixView(1, 6, 8))
    best = best_kronecker(op, max_iter=2)
    assert best.info.settings["converged"] is False
    assert best.info.settings["iterations"] == 2
    assert best.info.settings["residual"] > 1e-12
    assert "max_iter" in best.info.notes[0]
    assert best_kronecker(op).info.notes == ()


def test_slow_spectra_converge_over_restarts() -> None:
    """Singular values that decay slowly: power iteration would take thousands of steps."""
    U, V = orthogonal(60), orthogonal(60, seed=1)
    values = 1.0 - torch.arange(60, dtype=torch.float64) / 2000
    matrix = U @ torch.diag(values) @ V.T
    pair = leading_pair(
        Space(lambda v: matrix @ v, lambda u: matrix.T @ u), randn(60), tol=1e-12, max_iter=5000
    )
    assert pair.converged and abs(pair.value - 1.0) < 1e-12
    assert pair.iterations > 16
    overlap = abs(float(pair.left @ U[:, 0])) * abs(float(pair.right @ V[:, 0]))
    assert abs(overlap - 1.0) < 1e-10


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_leading_pair_of_any_matrix(seed: int, rows: int, columns: int, rank: int) -> None:
    matrix = randn(rows, rank, seed=seed) @ randn(rank, columns, seed=seed + 1)
    pair = leading_pair(
        Space(lambda v: matrix @ v, lambda u: matrix.T @ u),
        randn(columns, seed=seed + 2),
        tol=1e-12,
        max_iter=1000,
    )
    top = float(torch.linalg.matrix_norm(matrix, 2))
    assert abs(pair.value - top) <= 1e-11 * top
    gap = matrix - torch.outer(pair.left, pair.right)
    wanted = float(matrix.square().sum()) - top**2
    assert abs(float(gap.square().sum()) - wanted) <= 1e-11 * top**2


def test_single_precision_converges_to_single_precision() -> None:
    S, a = randn(3, 20, 1, 6), randn(20, 1, 8, seed=1)
    exact = best_kronecker(RowGramOperator(S, a))
    single = best_kronecker(RowGramOperator(S.float(), a.float()))
    assert single.dtype == torch.float32 and single.info.settings["converged"]
    assert distance(single, exact.dense()) < 1e-8 * exact.frobenius_norm() ** 2


def test_a_matrix_without_a_view_is_refused() -> None:
    op = FunctionOperator(lambda v: v, 6)
    for nearest in (best_kronecker, best_diagonal_kronecker):
        with pytest.raises(ShapeError, match="view"):
            nearest(op)
        with pytest.raises(ShapeError, match="rows"):
            nearest(op, view=MatrixView(1, 2, 2))
        assert nearest(op, view=MatrixView(1, 2, 3)).shape == (6, 6)


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_nearest_diagonal_and_identity(case) -> None:
    diagonal, identity = best_diagonal(case.op), best_identity(case.op)
    gap = (diagonal.dense() - torch.diag(case.truth.diagonal())).abs().max()
    assert float(gap) < 1e-11 * max(1.0, float(case.truth.abs().max()))
    if case.op.blocks:
        assert list(identity.blocks) == list(case.op.blocks)
        return
    assert isinstance(diagonal, DiagonalOperator) and isinstance(identity, IdentityOperator)
    assert abs(identity.scale - float(case.truth.trace()) / 12) < 1e-11
    least = distance(identity, case.truth)
    for step in (-1e-3, 1e-3):
        assert distance(identity + IdentityOperator(case.op.shape[0], step), case.truth) > least


def test_operators_with_blocks_are_taken_block_by_block() -> None:
    layout = Layout(
        [ParameterSpec("w", (2, 3)), ParameterSpec("norm", (4,)), ParameterSpec("free", (2,))]
    )
    view = MatrixView(1, 2, 3)
    parts = {"layer": spd(6), "norm": spd(4, seed=1)}
    op = BlockDiagonalOperator(
        {"layer": DenseOperator(parts["layer"], view=view), "norm": DenseOperator(parts["norm"])},
        layout,
        {"layer": ("w",), "norm": ("norm",)},
    )
    kron = best_kronecker(op)
    assert list(kron.blocks) == ["layer"]
    assert kron.uncovered == ("norm", "free")
    alone = best_kronecker(DenseOperator(parts["layer"], view=view))
    assert torch.equal(kron.blocks["layer"].dense(), alone.dense())
    diagonal, identity = best_diagonal(op), best_identity(op)
    assert diagonal.uncovered == identity.uncovered == ("free",)
    for name, part in parts.items():
        assert torch.equal(diagonal.blocks[name].diagonal(), part.diagonal())
        trace = identity.blocks[name].trace()
        assert abs(trace - float(part.trace())) < 1e-12
    zero = best_diagonal(op.with_uncovered("zero"))
    assert torch.equal(zero.diagonal()[-2:], torch.zeros(2, dtype=torch.float64))


def test_row_hessian_of_tokens_has_its_nearest_product() -> None:
    H = sym(4, 3 * 5).reshape(4, 3, 5, 3, 5)
    op = RowHessianOperator(H, randn(4, 3, 6, seed=1))
    wanted = best_symmetric_distance(op.dense(), op.view)
    assert abs(distance(best_kronecker(op), op.dense()) - wanted) < 1e-9
