"""Linear systems: against dense solutions and SciPy's iterations, with their residuals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import cg, minres
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors

SIZE = 40


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    basis = torch.linalg.qr(randn(len(values), len(values), seed=seed)).Q
    matrix = basis * values @ basis.T
    return (matrix + matrix.T) / 2


INDEFINITE = symmetric(torch.linspace(-3, 5, SIZE, dtype=torch.float64) + 0.01)
POSITIVE = symmetric(torch.logspace(-2, 1, SIZE, dtype=torch.float64))
B = randn(SIZE, 3, seed=5)
EYE = torch.eye(SIZE, dtype=torch.float64)


def network(dtype: torch.dtype = torch.float64) -> cs.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)
    data = randn(60, 8, seed=1).to(dtype), torch.arange(60) % 3
    batches = [(data[0][k : k + 17], data[1][k : k + 17]) for k in range(0, 60, 17)]
    return cs.Problem(model, nn.CrossEntropyLoss(), batches)


@pytest.mark.parametrize("method", ["cg", "minres", "direct"])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_solutions_are_the_dense_ones(method: str, preconditioned: bool, damping: float) -> None:
    matrix = POSITIVE if method == "cg" else INDEFINITE
    near = torch.linalg.inv(matrix @ matrix + EYE) if preconditioned else None
    found = cs.solve(
        matrix, B, damping=damping, method=method, preconditioner=near, tol=1e-11, budget=2000
    )
    truth = torch.linalg.solve(matrix + damping * EYE, B)
    assert found.converged and found.value.shape == B.shape
    assert float((found.value - truth).norm() / truth.norm()) < 1e-8
    rest = (B - matrix @ found.value - damping * found.value).norm(dim=0) / B.norm(dim=0)
    assert torch.allclose(found.residuals, rest, rtol=0.1, atol=1e-13)
    assert float(rest.max()) <= 1e-11
    one = cs.solve(matrix, B[:, 1], damping=damping, method=method, tol=1e-11, budget=2000)
    assert one.value.shape == (SIZE,)
    assert float((one.value - truth[:, 1]).norm() / truth[:, 1].norm()) < 1e-8


@pytest.mark.parametrize("method", ["cg", "minres"])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_steps_are_those_of_scipy(method: str, preconditioned: bool) -> None:
    """The residuals after every step, not only at the end."""
    matrix = POSITIVE if method == "cg" else INDEFINITE
    near = torch.linalg.inv(POSITIVE + 0.5 * EYE) if preconditioned else None
    b = B[:, 0]
    theirs: list[Tensor] = []
    options: dict[str, Any] = {} if near is None else {"M": near.numpy()}
    options |= {"rtol": 1e-14, "maxiter": 10}
    options["callback"] = lambda x: theirs.append(torch.as_tensor(x.copy()))
    solver = cg if method == "cg" else minres
    solver(matrix.numpy(), b.numpy(), **options)
    found = cs.solve(matrix, b, method=method, preconditioner=near, tol=1e-14, budget=11)
    assert not found.converged and found.history.shape == (10, 1)
    assert float((found.value - theirs[9]).norm() / theirs[9].norm()) < 1e-9
    if preconditioned and method == "minres":  # its residuals are known in another norm
        return
    true = [float((b - matrix @ x).norm() / b.norm()) for x in theirs[:10]]
    assert torch.allclose(found.history[:, 0], torch.tensor(true, dtype=torch.float64), rtol=1e-8)


SYSTEMS = st.fixed_dictionaries(
    {
        "size": st.integers(1, 12),
        "columns": st.integers(1, 4),
        "decades": st.floats(0, 3),
        "scale": st.sampled_from([1e-12, 1e-3, 1.0, 1e9]),
        "method": st.sampled_from(["cg", "minres"]),
        "seed": st.integers(0, 1000),
    }
)


@given(SYSTEMS)
@settings(max_examples=60, deadline=None)
def test_any_well_posed_system_is_solved(z: dict) -> None:
    values = torch.logspace(-z["decades"], 0, z["size"], dtype=torch.float64)
    if z["method"] == "minres":
        values[::2] *= -1
    matrix = z["scale"] * symmetric(values, z["seed"])
    b = randn(z["size"], z["columns"], seed=z["seed"])
    found = cs.solve(matrix, b, method=z["method"], tol=1e-9)
    assert found.converged, str(found)
    truth = torch.linalg.solve(matrix, b)
    assert float((found.value - truth).norm() / truth.norm()) < 1e-4


def test_networks_and_their_preconditioners() -> None:
    problem = network()
    b, damping = problem.gradient(), 1e-3
    near = cs.kfac(problem).inverse(damping)
    for matrix, method in ((cs.ggn(problem), "cg"), (cs.hessian(problem), "minres")):
        dense = matrix.dense() + damping * torch.eye(len(b), dtype=b.dtype)
        truth = torch.linalg.solve(dense, b)
        fresh = cs.ggn(problem) if method == "cg" else cs.hessian(problem)
        for preconditioner in (None, near):
            found = cs.solve(fresh, b, damping=damping, preconditioner=preconditioner, tol=1e-9)
            assert found.method == method and found.converged
            assert float((found.value - truth).norm() / truth.norm()) < 1e-6
    plain = cs.solve(cs.ggn(problem), b, damping=damping)
    exact = cs.ggn(problem).inverse(damping)
    helped = cs.solve(cs.ggn(problem), b, damping=damping, preconditioner=exact)
    assert helped.converged and helped.products <= 3 < plain.products
    assert cs.solve(cs.kfac(problem), b, damping=damping).method == "direct"


def test_error_bounds_hold() -> None:
    problem = network()
    b, damping = problem.gradient(), 1e-2
    truth = torch.linalg.solve(
        cs.ggn(problem).dense() + damping * torch.eye(len(b), dtype=b.dtype), b
    )
    for tol in (1e-1, 1e-3, 1e-6):
        found = cs.solve(cs.ggn(problem), b, damping=damping, tol=tol)
        error = float((found.value - truth).norm() / truth.norm())
        assert 0 < error <= float(found.error_bounds)
    assert torch.isinf(cs.solve(cs.hessian(problem), b, damping=damping).error_bounds).all()


def test_float32_goes_as_far_as_rounding_lets_it() -> None:
    found = cs.solve(POSITIVE.float(), B, method="cg", tol=1e-4)
    assert found.converged and found.value.dtype == torch.float32
    found = cs.solve(POSITIVE.float(), B, method="cg", tol=1e-9)
    assert not found.converged and "rounding" in found.reason
    rest = (B - POSITIVE @ found.value.double()).norm(dim=0) / B.norm(dim=0)
    assert torch.allclose(found.residuals, rest, rtol=0.2, atol=1e-4)
    assert float(found.residuals.max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_system_ends_with_the_smallest_residual(dtype: torch.dtype) -> None:
    values = torch.linspace(-4, 9, SIZE, dtype=torch.float64)
    values[:5] = 0
    matrix = symmetric(values)
    found = cs.solve(matrix.to(dtype), B, method="minres")
    least = (B - matrix @ torch.linalg.pinv(matrix, rtol=1e-9) @ B).norm(dim=0) / B.norm(dim=0)
    assert not found.converged and "singular" in found.reason
    assert found.products < 3 * 3 * SIZE  # of 1500: it notices
    assert torch.allclose(found.residuals, least, rtol=1e-2)
    inside = cs.solve(matrix, matrix @ B, method="minres", tol=1e-8)
    assert inside.converged


def test_in_float32_a_step_too_far_does_not_cost_what_was_found() -> None:
    values = torch.linspace(-4, 9, 20, dtype=torch.float64)
    values[3] = 0
    matrix, b = symmetric(values, 4), randn(20, 3, seed=104)
    least = (b - matrix @ torch.linalg.pinv(matrix, rtol=1e-9) @ b).norm(dim=0) / b.norm(dim=0)
    found = cs.solve(matrix.float(), b, method="minres")
    assert not found.converged and "singular" in found.reason and found.products < 300
    assert "budget" not in found.warnings[0]
    assert bool((found.residuals <= 1.3 * least).all())


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_larger_budget_and_another_tolerance_go_on(method: str, tmp_path: Path) -> None:
    file, matrix = tmp_path / "state", POSITIVE if method == "cg" else INDEFINITE
    straight = cs.solve(matrix, B, method=method, tol=1e-8)
    short = cs.solve(matrix, B, method=method, tol=1e-3, budget=20, checkpoint=file)
    assert not short.converged and short.products <= 20
    longer = cs.solve(matrix, B, method=method, tol=1e-8, checkpoint=file)
    assert longer.converged and longer.products == straight.products + 1
    assert torch.equal(longer.value, straight.value)
    again = cs.solve(matrix, B, method=method, tol=1e-10, checkpoint=file)
    assert again.converged and float(again.residuals.max()) <= 1e-10
    near = torch.linalg.inv(POSITIVE + EYE)
    with pytest.raises(errors.DataError, match="another computation"):
        cs.solve(matrix, B, method=method, preconditioner=near, checkpoint=file)


def test_what_a_type_does_not_hold_is_refused() -> None:
    small = (1e-30 * POSITIVE).float()
    for method in ("cg", "direct"):
        with pytest.raises(errors.NonFiniteError, match="too large or too small for float32"):
            cs.solve(small, 1e20 * B, method=method, tol=1e-3)
        with pytest.raises(errors.NonFiniteError, match="too large or too small for float32"):
            cs.solve((1e20 * POSITIVE).float(), 1e-30 * B, method=method, tol=1e-3)
    assert cs.solve(small, B, method="direct", tol=1e-3).converged
    with pytest.raises(errors.NonFiniteError, match=r"in torch\.float32"):
        cs.solve(small, 1e300 * B, method="cg")
    with pytest.raises(errors.OptionError, match="complex"):
        cs.solve(POSITIVE, B.to(torch.complex128))
    huge = torch.tensor([[1e150]], dtype=torch.float64)
    assert cs.solve(huge, torch.ones(1), method="cg").converged


def test_no_products_are_spent_below_rounding() -> None:
    found = cs.solve(POSITIVE, B, method="cg", tol=0)
    assert not found.converged and "rounding" in found.reason and found.products < 900
    assert "tol=" in found.warnings[0] and "budget" not in found.warnings[0]


def test_a_preconditioner_that_loses_directions_is_among_the_reasons() -> None:
    half = torch.diag((torch.arange(SIZE) % 2).double())
    found = cs.solve(INDEFINITE, B, method="minres", preconditioner=half)
    assert not found.converged and "not positive definite" in found.reason


def test_the_budget_is_kept_and_what_was_found_too() -> None:
    full = cs.solve(POSITIVE, B, method="cg", tol=1e-10)
    short = cs.solve(POSITIVE, B, method="cg", tol=1e-10, budget=30)
    assert short.products <= 30 < full.products
    assert not short.converged and "budget of 30" in short.reason
    assert "budget= or damping=" in short.warnings[0]
    energy = [
        ((x * (POSITIVE @ x)).sum(0) / 2 - (x * B).sum(0))
        for x in (torch.zeros_like(B), short.value, full.value)
    ]
    assert bool((energy[1] < energy[0]).all()) and bool((energy[2] < energy[1]).all())


def test_columns_that_are_done_cost_nothing_more() -> None:
    easy = torch.linalg.eigh(POSITIVE).eigenvectors[:, 3]
    both = cs.solve(POSITIVE, torch.stack([easy, B[:, 0]], 1), method="cg")
    alone = cs.solve(POSITIVE, B[:, 0], method="cg")
    assert both.converged
    assert both.products <= alone.products + 4
    nothing = cs.solve(POSITIVE, torch.zeros(SIZE, 2), method="cg")
    assert nothing.converged and not nothing.value.any() and nothing.products == 0


def test_bad_input() -> None:
    with pytest.raises(errors.ShapeError, match=r"takes \[40\] or \[40, k\]"):
        cs.solve(POSITIVE, torch.ones(39))
    with pytest.raises(errors.NonFiniteError, match="right-hand side"):
        cs.solve(POSITIVE, torch.full((SIZE,), torch.nan))
    with pytest.raises(errors.NotDefinedError, match="method='minres'"):
        cs.solve(INDEFINITE, B, method="cg")
    with pytest.raises(errors.NotDefinedError, match="not positive definite"):
        cs.solve(INDEFINITE, B, method="minres", preconditioner=-EYE)
    with pytest.raises(errors.OptionError, match="not symmetric"):
        cs.solve(cs.operators.from_scipy(torch.triu(POSITIVE).numpy()), B, method="minres")
    with pytest.raises(errors.OptionError, match="budget=3 is too small"):
        cs.solve(POSITIVE, B, method="cg", budget=3)
    with pytest.raises(errors.OptionError, match="damping"):
        cs.solve(POSITIVE, B, damping=-1.0)
    with pytest.raises(errors.SingularError):
        cs.solve(torch.zeros(3, 3), torch.ones(3))
    one, other = network(), network()
    names = list(other.params)
    mixed = cs.Problem(other.model, nn.CrossEntropyLoss(), list(other.batches()), params=names[:2])
    with pytest.raises(errors.ParameterMismatchError, match="preconditioner"):
        cs.solve(cs.ggn(one), one.gradient(), preconditioner=cs.kfac(mixed).inverse(0.1))
