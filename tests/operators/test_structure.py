"""What keeps its structure under algebra, and the closed forms behind it."""

from __future__ import annotations

import math

import pytest
import torch

from curvscope.errors import (
    NotDefinedError,
    OptionError,
    ParameterMismatchError,
    ShapeError,
    SingularError,
)
from curvscope.operators import (
    Damped,
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
    Operator,
    ParameterSpec,
    Provenance,
    RowGramOperator,
    RowHessianOperator,
    Scaled,
    Sum,
    inner,
)
from tests.operators.cases import all_cases, randn, spd, sym

EYE = torch.eye(12, dtype=torch.float64)
DENSE = DenseOperator(spd(12))
DIAGONAL = DiagonalOperator(randn(12).abs() + 0.1)
KRON = KroneckerOperator(spd(3), spd(4, seed=1), positive_semidefinite=True)
EIGEN = KRON.eigenform()
FACTORS = DiagonalKroneckerOperator(randn(3).abs() + 0.1, randn(4, seed=1).abs() + 0.1)
LOW = LowRankOperator(randn(12, 3))
ONE = IdentityOperator(12, 2.0, dtype=torch.float64)
GRAM = RowGramOperator(randn(2, 3, 1, 3), randn(3, 1, 4))
HESS = RowHessianOperator(sym(3, 3).reshape(3, 1, 3, 1, 3), randn(3, 1, 4))


@pytest.mark.parametrize(
    ("op", "scaled", "damped", "inverse"),
    [
        (DENSE, DenseOperator, DenseOperator, DenseOperator),
        (DIAGONAL, DiagonalOperator, DiagonalOperator, DiagonalOperator),
        (KRON, KroneckerOperator, Damped, EigenKroneckerOperator),
        (EIGEN, EigenKroneckerOperator, EigenKroneckerOperator, EigenKroneckerOperator),
        (FACTORS, DiagonalKroneckerOperator, DiagonalOperator, DiagonalOperator),
        (LOW, LowRankOperator, Damped, Damped),
        (ONE, IdentityOperator, IdentityOperator, IdentityOperator),
        (GRAM, RowGramOperator, Damped, Damped),
        (HESS, RowHessianOperator, Damped, DenseOperator),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Operator) else x.__name__,
)
def test_class_after_algebra(op: Operator, scaled: type, damped: type, inverse: type) -> None:
    assert type(2.0 * op) is scaled
    assert type(op.damped(0.5)) is damped
    assert type(op.inverse(20.0)) is inverse
    assert type(op.damped(19.5).inverse(0.5)) is inverse
    assert op.damped(0.0) is op


def test_sums_that_stay_of_one_class() -> None:
    for left, right, kind in (
        (DENSE, DENSE, DenseOperator),
        (DIAGONAL, DIAGONAL, DiagonalOperator),
        (DIAGONAL, FACTORS, DiagonalOperator),
        (FACTORS, FACTORS, DiagonalOperator),
        (LOW, LOW, LowRankOperator),
        (DENSE, DIAGONAL, DenseOperator),
        (DIAGONAL, DENSE, DenseOperator),
        (DIAGONAL, ONE, DiagonalOperator),
        (ONE, ONE, IdentityOperator),
        (KRON, ONE, Damped),
        (ONE, KRON, Damped),
        (KRON, KRON, Sum),
        (KRON, DENSE, Sum),
    ):
        total = left + right
        assert type(total) is kind
        assert torch.allclose(total.dense(), left.dense() + right.dense(), atol=1e-12)


def _eigen_kronecker(shift: float) -> EigenKroneckerOperator:
    U_G, U_A = torch.linalg.qr(randn(3, 3)).Q, torch.linalg.qr(randn(4, 4)).Q
    U_A = torch.linalg.qr(U_A + shift * randn(4, 4)).Q  # so that the difference stays a sum
    return EigenKroneckerOperator(U_G, U_A, 1.0 + randn(3, 4).square())


@pytest.mark.parametrize(
    "make",
    [lambda shift: LowRankOperator(randn(5, 8) + shift, randn(8)), _eigen_kronecker],
    ids=["low rank", "eigenbasis"],
)
def test_differences_of_nearly_equal_matrices_are_symmetric(make) -> None:
    difference = make(1e-10) - make(0.0)
    dense = difference.dense()
    assert 0 < float(dense.abs().max()) < 1e-7
    assert torch.equal(dense, dense.mT)
    inverse = difference.inverse(0.5).dense()  # refused before: "The matrix is not symmetric"
    one = torch.eye(len(dense), dtype=torch.float64)
    assert float((inverse - 2.0 * one).norm()) < 1e-5


def test_sums_with_a_narrower_type_are_symmetric_in_the_wider_one() -> None:
    narrow = EigenKroneckerOperator(
        torch.linalg.qr(randn(3, 3)).Q.float(),
        torch.linalg.qr(randn(4, 4)).Q.float(),
        randn(3, 4).square().float(),
    )
    joint = narrow + DenseOperator(spd(12))
    assert torch.equal(joint.dense(), joint.dense().mT)
    eye = torch.eye(12, dtype=torch.float64)
    assert float((joint.inverse(1.0).dense() @ (joint.dense() + eye) - eye).norm()) < 1e-10


def test_sums_melt_into_the_terms_they_fit() -> None:
    total = (KRON + DENSE) + DENSE + DIAGONAL
    assert isinstance(total, Sum) and len(total.terms) == 2
    assert len((KRON + LOW + (KRON + DENSE)).terms) == 4  # type: ignore[attr-defined]


def test_names_of_derived_matrices() -> None:
    op = DENSE.with_info(what="GGN", seconds=1.0, passes=2.0)
    other = DIAGONAL.with_info(what="noise", exact=False, seconds=0.5, notes=("sampled",))
    total = op + other
    assert total.info.what == "GGN + noise" and not total.info.exact
    assert (total.info.seconds, total.info.passes, total.info.notes) == (1.5, 2.0, ("sampled",))
    assert (2 * op).info.what == "2 * (GGN)"
    assert op.damped(0.1).info.what == "GGN + 0.1 I"
    assert op.inverse(0.1).info.what == "inverse of (GGN + 0.1 I)"
    assert DENSE.info.what == "matrix"
    many = KRON + LOW + FunctionOperator(lambda v: v, 12) + EIGEN
    assert many.info.what == "sum of 4 matrices"


# -- Kronecker -----------------------------------------------------------------------------------


def test_damping_of_a_kronecker_product_is_exact() -> None:
    for damping in (1e-8, 0.3):
        wanted = torch.kron(KRON.G, KRON.A) + damping * EYE
        assert torch.allclose(KRON.damped(damping).dense(), wanted, atol=1e-14)
        inverse = KRON.inverse(damping)
        assert isinstance(inverse, EigenKroneckerOperator)
        assert torch.allclose(inverse @ wanted, EYE, atol=1e-10)
    inverse = KRON.inverse()
    assert isinstance(inverse, KroneckerOperator)
    assert torch.allclose(inverse.G @ KRON.G, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("how", ["plain", "trace"])
def test_split_damping(groups: int, how: str) -> None:
    G, A = spd(groups, 3), 5 * spd(groups, 4, seed=1)
    view = MatrixView(groups, 3, 4)
    op = KroneckerOperator(G, A, view) if groups > 1 else KroneckerOperator(G[0], A[0], view)
    damping = 0.09
    split = op.split_damped(damping, how)
    parts = []
    for g in range(groups):
        pi = 1.0
        if how == "trace":
            pi = math.sqrt((float(A[g].trace()) / 4) / (float(G[g].trace()) / 3))
            assert pi > 1.2
        outer = G[g] + math.sqrt(damping) / pi * torch.eye(3, dtype=torch.float64)
        inside = A[g] + math.sqrt(damping) * pi * torch.eye(4, dtype=torch.float64)
        parts.append(torch.kron(outer, inside))
    assert torch.allclose(split.dense(), torch.block_diag(*parts), atol=1e-12)
    # the cross terms make it larger than exact damping
    assert split.trace() > op.damped(damping).trace()
    assert op.split_damped(0.0, how).dense().equal(op.dense())
    assert isinstance(split.inverse(), KroneckerOperator)


def test_split_damping_refuses_what_it_cannot_do() -> None:
    with pytest.raises(OptionError, match="how='norm'"):
        KRON.split_damped(0.1, "norm")
    with pytest.raises(OptionError, match="negative"):
        KRON.split_damped(-0.1)
    negative = KroneckerOperator(-spd(3), spd(4))
    with pytest.raises(NotDefinedError, match="plain"):
        negative.split_damped(0.1)
    dead = KroneckerOperator(0 * spd(3), spd(4)).split_damped(0.04)
    assert torch.allclose(dead.G, 0.2 * torch.eye(3, dtype=torch.float64))


def test_factors_are_what_was_given() -> None:
    G, A = spd(2, 3), spd(2, 4, seed=1)
    assert KroneckerOperator(G, A).factors["G"].shape == (2, 3, 3)
    assert KroneckerOperator(G[:1], A[:1]).factors["A"].shape == (4, 4)
    assert torch.equal(KroneckerOperator(G[0], A[0]).factors["A"], A[0])
    assert set(EIGEN.factors) == {"U_G", "U_A", "S"} and EIGEN.factors["S"].shape == (3, 4)
    assert FACTORS.factors["A"].shape == (4,) and FACTORS.factors["G"].shape == (3,)
    assert LOW.factors["V"].shape == (12, 3) and LOW.rank == 3
    assert GRAM.factors["S"].shape == (2, 3, 1, 1, 3) and GRAM.rank == 6


def test_a_singular_factor_names_the_way_out() -> None:
    flat = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    op = KroneckerOperator(flat, spd(4))
    with pytest.raises(SingularError, match="damping"):
        op.inverse()
    with pytest.raises(SingularError, match="damping"):
        op.eigenform().inverse()
    with pytest.raises(SingularError, match="damping"):
        DiagonalKroneckerOperator(flat.diagonal(), randn(4)).inverse()
    negative = DiagonalOperator(torch.tensor([-0.5, 1.0], dtype=torch.float64))
    with pytest.raises(SingularError, match="1 of 2 eigenvalues"):
        negative.inverse(0.5)
    with pytest.raises(SingularError, match="rank at most 3"):
        LOW.inverse()


def test_singular_matrices_that_rounding_makes_invertible_are_refused() -> None:
    """A matrix of low rank, stored: its inverse would be noise of 1e16."""
    for size in (5, 12, 60):
        V = randn(size, size - 2, seed=size)
        matrix = V @ V.T
        for op in (DenseOperator(matrix), LowRankOperator(torch.cat([V, V], 1))):
            with pytest.raises(SingularError):
                op.inverse()
            with pytest.raises(NotDefinedError):
                op.logdet()
            assert math.isfinite(op.logdet(1e-3))
        kron = KroneckerOperator(matrix, spd(2))
        with pytest.raises(SingularError):
            kron.inverse()
        with pytest.raises(NotDefinedError):
            kron.logdet()


def test_positive_semidefinite_inverse_at_a_tiny_damping() -> None:
    """Rounding leaves eigenvalues like -1e-17; the damping may be smaller than that."""
    V = randn(6, 2)
    kron = KroneckerOperator(V @ V.T, spd(2))
    inverse = kron.inverse(1e-18)
    assert inverse.positive_semidefinite
    assert float(inverse.eigenvalues()[0]) > 0


def test_logdet_says_why_it_is_not_defined() -> None:
    with pytest.raises(NotDefinedError, match="indefinite"):
        DenseOperator(torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64))).logdet()
    with pytest.raises(NotDefinedError, match="singular"):
        LOW.logdet()
    with pytest.raises(NotDefinedError, match="above 2"):
        DiagonalOperator(torch.tensor([1.0, -2.0], dtype=torch.float64)).logdet()


def test_woodbury_is_accurate_over_many_orders_of_magnitude() -> None:
    for damping in (1e-8, 1e-2, 1e6):
        inverse = LOW.inverse(damping)
        product = LOW.damped(damping) @ inverse.dense()
        assert torch.allclose(product, EYE, atol=1e-6 if damping < 1e-4 else 1e-11)


def test_inverse_keeps_definiteness_where_it_is_known() -> None:
    assert KRON.inverse(0.1).positive_semidefinite
    assert LOW.inverse(0.1).positive_semidefinite
    assert KroneckerOperator(sym(3), spd(4)).inverse(0.1).positive_semidefinite is None


# -- identity of parameters ----------------------------------------------------------------------


def test_operators_of_other_parameters_are_not_mixed() -> None:
    one = Layout([ParameterSpec("a", (2, 6))])
    two = Layout([ParameterSpec("b", (2, 6))])
    left, right = DenseOperator(spd(12), layout=one), DiagonalOperator(randn(12), layout=two)
    for action in (lambda: left + right, lambda: left - right, lambda: inner(left, right)):
        with pytest.raises(ParameterMismatchError, match="different parameters"):
            action()
    assert (left + DIAGONAL).layout == one
    assert (KRON + left).layout == one
    with pytest.raises(ShapeError):
        left + IdentityOperator(3)


def test_number_types_mix_upwards() -> None:
    single = DIAGONAL.to(torch.float32)
    total = single + KRON
    assert total.dtype == torch.float64
    assert torch.allclose(total.dense(), KRON.dense() + single.dense().double(), atol=1e-12)
    assert abs(inner(single, KRON) - float((single.diagonal() * KRON.diagonal()).sum())) < 1e-12


def test_rounding_of_a_narrower_type_is_no_asymmetry_in_a_wider_one() -> None:
    matrix = spd(4).float()
    matrix[0, 1] *= 1 + 3e-7
    op = FunctionOperator(lambda v: matrix @ v, 4, dtype=torch.float32, check=False)
    wide = op.to(torch.float64)
    assert torch.equal(wide.dense(), wide.dense().mT)
    assert torch.allclose(wide.dense(), matrix.double(), rtol=1e-6)
    assert torch.allclose(wide.inverse().dense() @ wide.dense(), torch.eye(4).double(), atol=1e-10)


def test_layout_and_provenance_travel() -> None:
    layout = Layout([ParameterSpec("a", (3, 4))])
    info = Provenance("K-FAC", route="test", exact=False)
    op = KroneckerOperator(spd(3), spd(4), layout=layout, info=info)
    for other in (2 * op, op.damped(0.1), op.inverse(0.1), op.eigenform(), op.split_damped(0.1)):
        assert other.layout == layout and other.view == op.view
        assert "K-FAC" in other.info.what and not other.info.exact
    assert op.to(torch.float32).info == info


# -- SciPy ---------------------------------------------------------------------------------------


def test_scaled_zero_of_a_function_has_a_damped_inverse() -> None:
    op = Scaled(FunctionOperator(lambda v: v, 3), 0.0)
    assert torch.allclose(op.inverse(2.0).dense(), 0.5 * torch.eye(3, dtype=torch.float64))


def test_traces_are_added_in_double_precision() -> None:
    """A million float32 numbers of size 0.1 around 1e4: naive float32 sums lose three digits."""
    values = torch.full((1_000_000,), 0.1, dtype=torch.float32)
    values[0] = 1e7
    op = DiagonalOperator(values)
    wanted = float(values.double().sum())
    assert abs(op.trace() - wanted) < 1e-9 * wanted
    assert abs(inner(op, op) - float(values.double().square().sum())) < 1e-7 * 1e14


def test_every_case_can_be_cut_from_its_graph() -> None:
    """Operators made from tensors that require gradients hold none."""
    G, A = spd(3).requires_grad_(), spd(4).requires_grad_()
    for op in (
        KroneckerOperator(G, A),
        DenseOperator(G),
        DiagonalOperator(G[0]),
        LowRankOperator(G),
        DiagonalKroneckerOperator(G[0], A[0]),
    ):
        assert not op.dense().requires_grad
        assert not (op @ torch.ones(op.shape[0])).requires_grad
    assert all(not case.op.dense().requires_grad for case in all_cases()[:5])
