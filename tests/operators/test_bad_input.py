"""Constructors refuse what is no symmetric, finite, floating-point matrix of the right size."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch

import curvscope as cs
from curvscope import memory
from curvscope.errors import MemoryLimitError, NonFiniteError, OptionError, ShapeError
from curvscope.operators import (
    DenseOperator,
    DiagonalKroneckerOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    FunctionOperator,
    IdentityOperator,
    KroneckerOperator,
    Layout,
    LowRankOperator,
    MatrixView,
    ParameterSpec,
    Restricted,
    Scaled,
    Sum,
    from_scipy,
    inner,
)
from tests.operators.cases import orthogonal, randn, spd

NAN = float("nan")
BAD = spd(3).clone()
BAD[1, 1] = NAN
HUGE = spd(3).clone()
HUGE[0, 0] = float("inf")


@pytest.mark.parametrize(
    "make",
    [
        lambda: DenseOperator(BAD),
        lambda: DenseOperator(HUGE),
        lambda: DiagonalOperator(BAD[1]),
        lambda: KroneckerOperator(BAD, spd(2)),
        lambda: KroneckerOperator(spd(2), BAD),
        lambda: DiagonalKroneckerOperator(BAD[1], randn(2)),
        lambda: EigenKroneckerOperator(BAD, orthogonal(2), randn(3, 2)),
        lambda: EigenKroneckerOperator(orthogonal(3), orthogonal(3), BAD),
        lambda: LowRankOperator(BAD),
        lambda: LowRankOperator(randn(4, 3), BAD[1]),
        lambda: IdentityOperator(3, NAN),
        lambda: DenseOperator(spd(3)).damped(NAN),
        lambda: DenseOperator(spd(3)).inverse(float("inf")),
        lambda: DenseOperator(spd(3)).logdet(NAN),
    ],
)
def test_numbers_that_are_not_finite(make) -> None:
    with pytest.raises(NonFiniteError):
        make()


def test_the_message_counts_them() -> None:
    with pytest.raises(NonFiniteError, match="1 NaN or infinite entry of 9"):
        DenseOperator(BAD)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DenseOperator(randn(3, 3)),
        lambda: KroneckerOperator(randn(3, 3), spd(2)),
        lambda: KroneckerOperator(spd(3), randn(2, 2)),
        lambda: FunctionOperator(lambda v: torch.roll(v, 1, 0), 5),
        lambda: from_scipy(np.arange(9.0).reshape(3, 3)),
        lambda: from_scipy(scipy.sparse.csr_matrix(np.triu(np.ones((4, 4))))),
    ],
)
def test_matrices_that_are_not_symmetric(make) -> None:
    with pytest.raises(OptionError, match="symmetric"):
        make()


def test_rounding_is_not_asymmetry() -> None:
    matrix = spd(30) + 1e-13 * randn(30, 30)
    op = DenseOperator(matrix)
    assert torch.equal(op.dense(), op.dense().T)
    assert float((op.dense() - matrix).abs().max()) < 1e-12
    single = DenseOperator((spd(30) + 1e-6 * randn(30, 30)).float())
    assert torch.equal(single.dense(), single.dense().T)
    with pytest.raises(OptionError, match="symmetric"):
        DenseOperator(spd(30) + 1e-6 * randn(30, 30))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DenseOperator(randn(3, 4)),
        lambda: DenseOperator(randn(3)),
        lambda: DiagonalOperator(randn(3, 3)),
        lambda: KroneckerOperator(spd(3), randn(3, 4)),
        lambda: KroneckerOperator(spd(2, 3), spd(4)),
        lambda: KroneckerOperator(spd(2, 3), spd(3, 4)),
        lambda: DiagonalKroneckerOperator(randn(3), randn(1, 4)),
        lambda: EigenKroneckerOperator(orthogonal(3), orthogonal(4), randn(4, 3)),
        lambda: EigenKroneckerOperator(orthogonal(3), orthogonal(2, 4), randn(3, 4)),
        lambda: LowRankOperator(randn(5)),
        lambda: LowRankOperator(randn(5, 2), randn(3)),
        lambda: Restricted(DenseOperator(spd(3)), torch.tensor([0.0, 1.0])),
        lambda: FunctionOperator(lambda v: v[:2], 3),
        lambda: MatrixView(1, 2, 3, torch.arange(5)),
        lambda: MatrixView(1, 2, 3).to_matrix(randn(5, 1)),
        lambda: MatrixView(1, 2, 3).to_stack(randn(7, 1)),
        lambda: MatrixView(1, 2, 3).from_matrix(randn(1, 1, 3, 2)),
    ],
)
def test_shapes_that_do_not_fit(make) -> None:
    with pytest.raises(ShapeError):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DenseOperator(torch.eye(3, dtype=torch.long)),
        lambda: DenseOperator(torch.eye(3, dtype=torch.float16)),
        lambda: DenseOperator(torch.eye(3, dtype=torch.complex64)),
        lambda: DenseOperator(np.eye(3)),  # type: ignore[arg-type]
        lambda: KroneckerOperator(spd(3), spd(2).float()),
        lambda: LowRankOperator(randn(3, 2), torch.ones(2, dtype=torch.float32)),
        lambda: KroneckerOperator(spd(3), spd(2), MatrixView(1, 2, 3)),
        lambda: EigenKroneckerOperator(spd(3), orthogonal(2), randn(3, 2)),
        lambda: DenseOperator(spd(3), layout=Layout([ParameterSpec("w", (4,))])),
        lambda: DiagonalOperator(randn(3), view=MatrixView(1, 2, 2)),
        lambda: IdentityOperator(-1),
        lambda: Restricted(DenseOperator(spd(3)), torch.tensor([0, 3])),
        lambda: Restricted(DenseOperator(spd(3)), torch.tensor([1, 1])),
        lambda: MatrixView(1, 2, 2, torch.tensor([0, 1, 1, 2])),
        lambda: MatrixView(0, 2, 2),
        lambda: MatrixView.for_weight_and_bias(5, 2, groups=2),
        lambda: Sum([]),
        lambda: from_scipy(np.ones((2, 3))),
        lambda: from_scipy(np.eye(2) * 1j),
    ],
)
def test_values_that_are_not_accepted(make) -> None:
    with pytest.raises(OptionError):
        make()


def test_dense_matrices_that_do_not_fit_are_refused_before_allocating() -> None:
    free = memory.available_bytes()
    rows = int((free / 8) ** 0.5) + 1000
    op = DiagonalOperator(torch.ones(rows, dtype=torch.float64))
    low = LowRankOperator(torch.ones(rows, 1, dtype=torch.float64))
    function = FunctionOperator(lambda v: v, rows)
    for action in (
        op.dense,
        low.dense,
        low.eigh,
        function.eigenvalues,
        lambda: function.inverse(1.0),
        lambda: inner(function, FunctionOperator(lambda v: 2 * v, rows)),
    ):
        with pytest.raises(MemoryLimitError, match=r"bytes\) are available"):
            action()
    assert op.trace() == rows  # what needs no dense matrix still works
    assert low.inverse(1.0).shape == (rows, rows)
    assert memory.available_bytes() > 0.5 * free


def test_wrappers_keep_refusing() -> None:
    op = Scaled(DenseOperator(spd(3)), 2.0)
    with pytest.raises(ShapeError, match=r"\[3\] or \[3, k\]"):
        op @ randn(4)


@pytest.mark.parametrize("op", [DenseOperator(torch.eye(3)), DiagonalOperator(torch.ones(3))])
def test_negative_damping_is_refused_and_a_shift_offered(op: cs.operators.Operator) -> None:
    for call in (op.damped, op.inverse):
        with pytest.raises(OptionError, match=r"damping=-0\.5 is negative.*IdentityOperator\(3"):
            call(-0.5)
        with pytest.raises(NonFiniteError, match="damping"):
            call(float("nan"))
    shifted = op + IdentityOperator(3, -0.5)
    assert torch.equal(shifted.dense(), 0.5 * torch.eye(3))
    assert torch.allclose(shifted.inverse(0.5).dense(), torch.eye(3))
    assert torch.allclose((-1.0 * op).damped(3.0).inverse().dense(), 0.5 * torch.eye(3))
    assert torch.allclose((-1.0 * op).inverse(3.0).dense(), 0.5 * torch.eye(3))
