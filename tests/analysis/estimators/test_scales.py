"""Matrices so large or small that squares of their products over- or underflow, or nearly."""

from __future__ import annotations

import pytest
import torch

import curvscope as cs

from .matrices import by_products, normal, with_spectrum

SCALES = [(torch.float32, s) for s in (1e-30, 1e7, 1e20)]
SCALES += [(torch.float64, s) for s in (1e-60, 1e20)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=lambda value: str(value))
def test_every_estimator(dtype: torch.dtype, scale: float) -> None:
    values = torch.cat([torch.tensor([3.0, 3.0, 2.0]), normal(37).abs() / 10]).double()
    matrix = (with_spectrum(values) * scale).to(dtype)
    op = by_products(matrix, dtype=dtype)
    exact = matrix.double() / scale
    values = torch.linalg.eigvalsh(exact).flip(0)
    found = cs.eigsh(op, 3, tol=1e-3, method="lanczos")
    torch.testing.assert_close(found.values / scale, values[:3], rtol=1e-4, atol=0)
    assert found.converged and found.reason.endswith("beside the subspace.")
    found = cs.eigsh(op, 2, which="SA", block=2, method="lanczos")
    torch.testing.assert_close(found.values / scale, values[-2:].flip(0), rtol=0, atol=1e-3)
    assert float(cs.norm(op, "spectral")) / scale == pytest.approx(3, rel=0.05)
    assert float(cs.norm(op)) / scale == pytest.approx(float(exact.norm()), rel=0.1)
    damped = float(cs.condition_number(op, damping=scale))
    assert damped == pytest.approx(float((values[0] + 1) / (values[-1] + 1)), rel=0.05)
    size = float(cs.effective_dimension(op, damping=scale))
    assert size == pytest.approx(float((values / (values + 1)).sum()), rel=0.1)
    b = normal(40, seed=4)
    for method, damping in (("cg", 1.0), ("minres", 0.3)):
        solved = cs.solve(op, b, damping=damping * scale, method=method, tol=1e-4)
        right = torch.linalg.solve(exact + damping * torch.eye(40), b)
        assert solved.converged, method
        torch.testing.assert_close(solved.value.double() * scale, right, rtol=1e-2, atol=1e-3)
    for method in ("hutchinson", "hutch++", "xtrace"):
        total = cs.trace(op, method=method, tol=0.02)
        assert total.value / scale == pytest.approx(float(exact.trace()), rel=0.1), method
    for method in ("hutchinson", "xdiag"):
        diagonal = cs.diagonal(op, method=method, tol=0.1).value / scale
        assert float((diagonal - exact.diagonal()).norm() / exact.diagonal().norm()) < 0.3, method
    for method in ("slq", "kpm"):
        first = float(cs.density(op, method=method, probes=4).moments[0]) / scale
        assert first == pytest.approx(float(exact.trace()) / 40, rel=0.5), method


@pytest.mark.parametrize("scale", [1e7, 1e20])
def test_spaces_beside_an_invariant_one(scale: float) -> None:
    """A multiple of the identity ends the iteration in every step."""
    found = cs.eigsh(by_products(scale * torch.eye(30, dtype=torch.float64)), 4, method="lanczos")
    torch.testing.assert_close(found.values / scale, torch.ones(4).double())
    assert found.converged
