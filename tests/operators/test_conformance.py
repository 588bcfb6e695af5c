"""What every operator must do, tested on every registered case against its dense truth."""

from __future__ import annotations

import importlib
import math
import pkgutil

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import curvscope.curvature
import curvscope.operators
from curvscope.errors import NonFiniteError, NotDefinedError, OptionError, ShapeError, SingularError
from curvscope.operators import (
    FunctionOperator,
    IdentityOperator,
    KroneckerOperator,
    MatrixView,
    Operator,
    inner,
    kronecker_eigenvalue_correction,
)
from tests.operators.cases import (
    REGISTRY,
    SIZE,
    Case,
    all_cases,
    concrete_subclasses,
    orthogonal,
    randn,
    spd,
)

TOL = 1e-11
CASES = pytest.mark.parametrize("case", all_cases(), ids=str)
EYE = torch.eye(SIZE, dtype=torch.float64)


def close(actual: Tensor | float, wanted: Tensor | float, tol: float = TOL) -> None:
    """Largest difference relative to the largest entry; for a truth of zero, next to nothing."""
    actual, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, wanted))
    assert actual.shape == wanted.shape
    gap = float((actual - wanted).abs().max()) if wanted.numel() else 0.0
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    assert gap <= tol * size + 1e-13, f"off by {gap:.3g}, size {size:.3g}"


def safe_damping(truth: Tensor) -> float:
    """A damping that makes the matrix well conditioned and positive definite."""
    least = float(torch.linalg.eigvalsh(truth)[0])
    return 0.3 + max(0.0, -1.5 * least)


def test_every_class_is_registered() -> None:
    for package in (curvscope.operators, curvscope.curvature):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    wanted = {
        kind for kind in concrete_subclasses(Operator) if kind.__module__.startswith("curvscope.")
    }
    missing = {kind.__qualname__ for kind in wanted} - {kind.__qualname__ for kind in REGISTRY}
    assert not missing, f"add cases for {missing} to tests/operators/cases.py"
    for kind in REGISTRY:
        assert any(type(case.op) is kind for case in all_cases()), kind


@CASES
def test_shape_and_dtype(case: Case) -> None:
    assert case.op.shape == (SIZE, SIZE)
    assert case.op.dtype == torch.float64
    assert case.op.device == torch.device("cpu")


@CASES
def test_product_with_vector(case: Case) -> None:
    v = randn(SIZE, seed=50)
    kept = v.clone()
    close(case.op @ v, case.truth @ v)
    assert torch.equal(v, kept)


@CASES
def test_product_with_columns(case: Case) -> None:
    for count in (1, 3, 20):
        vectors = randn(SIZE, count, seed=51)
        kept = vectors.clone()
        close(case.op @ vectors, case.truth @ vectors)
        assert torch.equal(vectors, kept)


@CASES
def test_product_with_no_columns(case: Case) -> None:
    assert (case.op @ randn(SIZE, 0)).shape == (SIZE, 0)


@CASES
def test_product_with_non_contiguous_input(case: Case) -> None:
    wide = randn(5, 2 * SIZE, seed=52)
    for vectors in (wide[:, ::2].T, wide[:, :SIZE].T, wide.T[SIZE:], wide[0, ::2]):
        assert vectors.ndim == 1 or not vectors.is_contiguous()
        close(case.op @ vectors, case.truth @ vectors.contiguous())
    one = randn(SIZE, 1, seed=53).expand(SIZE, 4)
    close(case.op @ one, case.truth @ one)


@CASES
def test_product_does_not_alias_its_input(case: Case) -> None:
    v = randn(SIZE, 2, seed=54)
    product = case.op @ v
    kept = product.clone()
    v.zero_()
    assert torch.equal(product, kept)


@CASES
def test_product_of_other_number_types(case: Case) -> None:
    v = torch.arange(SIZE)
    close(case.op @ v, case.truth @ v.double())
    close(case.op @ v.float(), case.truth @ v.double())
    graph = randn(SIZE, seed=55).requires_grad_()
    assert not (case.op @ graph).requires_grad


@CASES
def test_wrong_input_is_refused(case: Case) -> None:
    for wrong in (randn(SIZE + 1), randn(SIZE - 1, 2), randn(1, SIZE, 1), torch.tensor(1.0)):
        with pytest.raises(ShapeError):
            case.op @ wrong
    with pytest.raises(ShapeError, match="torch"):
        case.op @ np.ones(SIZE)  # type: ignore[operator]
    with pytest.raises(ShapeError, match="real"):
        case.op @ torch.ones(SIZE, dtype=torch.complex128)


@CASES
def test_dense(case: Case) -> None:
    dense = case.op.dense()
    close(dense, case.truth)
    dense.zero_()  # a copy: changing it changes nothing
    close(case.op.dense(), case.truth)


@CASES
def test_diagonal(case: Case) -> None:
    diagonal = case.op.diagonal()
    close(diagonal, case.truth.diagonal())
    diagonal.fill_(7.0)
    close(case.op.diagonal(), case.truth.diagonal())


@CASES
def test_trace(case: Case) -> None:
    assert isinstance(case.op.trace(), float)
    close(case.op.trace(), case.truth.trace())


@CASES
def test_frobenius_norm(case: Case) -> None:
    assert isinstance(case.op.frobenius_norm(), float)
    close(case.op.frobenius_norm(), torch.linalg.matrix_norm(case.truth))


@CASES
def test_eigenvalues(case: Case) -> None:
    close(case.op.eigenvalues(), torch.linalg.eigvalsh(case.truth))


@CASES
def test_eigh(case: Case) -> None:
    values, vectors = case.op.eigh()
    close(values, torch.linalg.eigvalsh(case.truth))
    close(vectors.T @ vectors, EYE)
    close((vectors * values) @ vectors.T, case.truth)


@CASES
def test_inverse_with_damping(case: Case) -> None:
    damping = safe_damping(case.truth)
    wanted = torch.linalg.inv(case.truth + damping * EYE)
    inverse = case.op.inverse(damping)
    close(inverse.dense(), wanted)
    v = randn(SIZE, 2, seed=56)
    close(inverse @ v, wanted @ v)
    assert inverse.layout == case.op.layout
    close(inverse.inverse().dense(), case.truth + damping * EYE, 1e-9)


@CASES
def test_inverse_without_damping(case: Case) -> None:
    values = torch.linalg.eigvalsh(case.truth).abs()
    if float(values.min()) > 1e-3 * float(values.max()):
        close(case.op.inverse().dense(), torch.linalg.inv(case.truth), 1e-9)
    elif float(values.min()) < 1e-14 * max(float(values.max()), 1e-300):
        with pytest.raises(SingularError):
            case.op.inverse()


@pytest.mark.parametrize(
    "case", [case for case in all_cases() if case.op.positive_semidefinite], ids=str
)
def test_tiny_damping_of_a_semidefinite_matrix(case: Case) -> None:
    assert float(torch.linalg.eigvalsh(case.truth)[0]) > -1e-12
    damping = 1e-6
    product = case.op.inverse(damping) @ (case.truth + damping * EYE)
    close(product, EYE, 1e-7)
    assert math.isfinite(case.op.logdet(damping))


@CASES
def test_logdet(case: Case) -> None:
    damping = safe_damping(case.truth)
    close(case.op.logdet(damping), torch.logdet(case.truth + damping * EYE))
    least = float(torch.linalg.eigvalsh(case.truth)[0])
    if least < 1e-13:
        with pytest.raises(NotDefinedError):
            case.op.logdet()
    else:
        close(case.op.logdet(), torch.logdet(case.truth))
    with pytest.raises(NotDefinedError, match="damping"):
        case.op.logdet(-least - 0.1)


@CASES
def test_damped(case: Case) -> None:
    for damping in (0.25, -0.5, 0.0):
        shift = IdentityOperator(case.op.shape[0], damping, dtype=case.op.dtype)
        damped = case.op.damped(damping) if damping >= 0 else case.op + shift
        wanted = case.truth + damping * EYE
        close(damped.dense(), wanted)
        close(damped.diagonal(), wanted.diagonal())
        close(damped.trace(), wanted.trace())
        close(damped.frobenius_norm(), wanted.norm())
        close(damped @ EYE, wanted)
        assert damped.layout == case.op.layout


@CASES
def test_scaled(case: Case) -> None:
    for factor in (2.0, -0.5, 0.0):
        for scaled in (factor * case.op, case.op * factor, case.op.scaled(factor)):
            close(scaled.dense(), factor * case.truth)
        close(scaled.frobenius_norm(), abs(factor) * case.truth.norm())
        close(scaled @ EYE, factor * case.truth)
    close((case.op / 4).dense(), case.truth / 4)
    close((torch.tensor(3.0) * case.op).dense(), 3 * case.truth)
    close((np.float32(0.5) * case.op).dense(), case.truth / 2)
    close((-case.op).dense(), -case.truth)
    with pytest.raises(OptionError):
        case.op / 0
    with pytest.raises(NonFiniteError):
        case.op * math.nan
    with pytest.raises(TypeError):
        case.op * "2"  # type: ignore[operator]


@CASES
def test_sums(case: Case) -> None:
    close((case.op + case.op).dense(), 2 * case.truth)
    close((case.op - case.op).dense(), 0 * case.truth)
    for other in _partners(case):
        total, difference = case.op + other.op, case.op - other.op
        close(total.dense(), case.truth + other.truth)
        close(difference @ EYE, case.truth - other.truth)
        close(difference.frobenius_norm(), (case.truth - other.truth).norm())
        close(total.diagonal(), (case.truth + other.truth).diagonal())
        close(total.trace(), (case.truth + other.truth).trace())


@CASES
def test_operations_leave_the_operator_alone(case: Case) -> None:
    facts = (case.op.info, case.op.layout, case.op.view, case.op.positive_semidefinite)
    for _ in (case.op.damped(0.0), case.op.damped(1.0), 2 * case.op, case.op + case.op):
        pass
    case.op.with_info(what="something else")
    assert facts == (case.op.info, case.op.layout, case.op.view, case.op.positive_semidefinite)
    close(case.op.dense(), case.truth)


@CASES
def test_inner_with_every_other(case: Case) -> None:
    close(case.op.inner(case.op), (case.truth * case.truth).sum())
    # every pair once: with those before it in the registry
    earlier = [other for other in all_cases()[: all_cases().index(case)] if not other.slow]
    for other in _partners(case) + (earlier if not case.slow else []):
        if _aligned(case.op, other.op):
            close(inner(case.op, other.op), (case.truth * other.truth).sum())


@CASES
def test_positive_semidefinite_is_true_only_where_it_is(case: Case) -> None:
    assert case.op.positive_semidefinite in (True, None)
    for op, truth in (
        (case.op, case.truth),
        (-case.op, -case.truth),
        (case.op + IdentityOperator(case.op.shape[0], -5.0), case.truth - 5 * EYE),
        (case.op + case.op, 2 * case.truth),
    ):
        if op.positive_semidefinite:
            assert float(torch.linalg.eigvalsh(truth)[0]) >= -1e-11


@CASES
def test_diagonal_in_a_kronecker_basis(case: Case) -> None:
    own = case.op.view
    for view in {own or MatrixView(1, 3, 4), MatrixView(2, 3, 2, torch.arange(SIZE).flip(0))}:
        U_G, U_A = orthogonal(view.groups, view.out), orthogonal(view.groups, view.inp, seed=1)
        basis = torch.block_diag(*(torch.kron(u, w) for u, w in zip(U_G, U_A, strict=True)))
        order = torch.arange(SIZE) if view.perm is None else view.perm
        wanted = (basis.T @ case.truth[order][:, order] @ basis).diagonal().reshape(view.shape)
        close(kronecker_eigenvalue_correction(case.op, U_G, U_A, view), wanted)
        if view.groups == 1:
            found = kronecker_eigenvalue_correction(case.op, U_G[0], U_A[0], view)
            close(found, wanted[0])


@CASES
def test_to_scipy(case: Case) -> None:
    linear = case.op.to_scipy()
    truth = case.truth.numpy()
    v, many = randn(SIZE, seed=57).numpy(), randn(SIZE, 3, seed=58).numpy()
    assert linear.shape == (SIZE, SIZE) and linear.dtype == np.float64
    close(torch.from_numpy(linear @ v), torch.from_numpy(truth @ v))
    close(torch.from_numpy(linear.matmat(many)), torch.from_numpy(truth @ many))
    close(torch.from_numpy(linear.rmatvec(v)), torch.from_numpy(truth @ v))
    backwards = v[::-1]
    backwards.flags.writeable = False
    close(torch.from_numpy(linear.matvec(backwards)), torch.from_numpy(truth @ backwards))
    values = np.sort(np.linalg.eigvalsh(truth))
    if np.abs(values).max() > 0:
        found = scipy.sparse.linalg.eigsh(linear, k=2, which="LA", return_eigenvectors=False)
        close(torch.from_numpy(np.sort(found)), torch.from_numpy(values[-2:]), 1e-9)


@CASES
def test_float32(case: Case) -> None:
    single = case.op.to(torch.float32)
    assert single.dtype == torch.float32
    v = randn(SIZE, 2, seed=59)
    product = single @ v.float()
    assert product.dtype == torch.float32
    close(product, case.truth @ v, 1e-5)
    close(single.dense(), case.truth, 1e-5)
    close(single.diagonal(), case.truth.diagonal(), 1e-5)
    close(single.frobenius_norm(), case.truth.norm(), 1e-5)
    close(single.trace(), case.truth.trace(), 1e-5)
    close(inner(single, case.op), case.truth.square().sum(), 1e-5)
    assert case.op.dtype == torch.float64
    assert case.op.to(torch.float64).dtype == torch.float64


@CASES
def test_repr_names_class_and_shape(case: Case) -> None:
    text = repr(case.op)
    assert type(case.op).__name__ in text and "12 x 12" in text and "float64" in text


@CASES
def test_restriction_to_parameters(case: Case) -> None:
    if case.op.layout is None:
        with pytest.raises(curvscope.errors.ParameterMismatchError, match="layout"):
            case.op.restrict(["a"])
        return
    names = list(case.op.layout.names)
    for chosen in ([names[0]], [names[-1], names[0]], names):
        index = case.op.layout.index(chosen)
        part = case.op.restrict(chosen)
        wanted = case.truth[index][:, index]
        close(part.dense(), wanted)
        close(part.diagonal(), wanted.diagonal())
        close(part.frobenius_norm(), wanted.norm())
        close(part @ torch.eye(len(index)), wanted)
        assert part.layout is not None and set(part.layout.names) == set(chosen)
        close(inner(part, part), wanted.square().sum())
    with pytest.raises(curvscope.errors.ParameterMismatchError, match="Did you mean"):
        case.op.restrict([names[0] + "x"])


@CASES
def test_blocks_are_principal_submatrices(case: Case) -> None:
    for name, block in case.op.blocks.items():
        assert block.layout is not None and case.op.layout is not None, name
        index = case.op.layout.index(block.layout.names)
        close(block.dense(), case.truth[index][:, index])


def test_matrices_without_rows_of_their_own_kind_still_meet() -> None:
    """Operators in different views of the same vector have the right inner product."""
    views = [
        MatrixView(1, 3, 4),
        MatrixView(1, 4, 3),
        MatrixView(1, 3, 4, torch.arange(12).flip(0)),
    ]
    ops = [KroneckerOperator(spd(v.out), spd(v.inp, seed=1), v) for v in views]
    for left in ops:
        for right in ops:
            close(inner(left, right), (left.dense() * right.dense()).sum())


def test_operators_of_other_sizes_or_parameters_do_not_mix() -> None:
    small = FunctionOperator(lambda v: v, 3)
    for case in all_cases()[:3]:
        with pytest.raises(ShapeError):
            case.op + small
        with pytest.raises(ShapeError):
            inner(case.op, small)


def _aligned(left: Operator, right: Operator) -> bool:
    return left.layout is None or right.layout is None or left.layout == right.layout


def _partners(case: Case) -> list[Case]:
    """One case of every class that speaks of the same parameters.

    Of the slow ones only those that meet a class for the first time.
    """
    first = next(c for c in all_cases() if type(c.op) is type(case.op))
    partners: dict[type, Case] = {}
    for other in all_cases():
        if _aligned(case.op, other.op) and (first is case or not other.slow):
            partners.setdefault(type(other.op), other)
    return list(partners.values())
