"""Estimators on a real problem, and matrices that are not what they should be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import curvscope as cs
from curvscope.errors import NonFiniteError, OptionError

from .matrices import by_products, normal, spectra, with_spectrum

CALLS: dict[str, Callable[[Any], Any]] = {
    "trace": lambda op: cs.trace(op),
    "hutch++": lambda op: cs.trace(op, method="hutch++"),
    "xtrace": lambda op: cs.trace(op, method="xtrace"),
    "diagonal": lambda op: cs.diagonal(op),
    "norm": lambda op: cs.norm(op),
    "spectral norm": lambda op: cs.norm(op, "spectral"),
    "cosine": lambda op: cs.cosine(op, op),
    "eigsh": lambda op: cs.eigsh(op),
    "scipy": lambda op: cs.eigsh(op, method="scipy"),
    "negative curvature": lambda op: cs.negative_curvature(op),
    "density": lambda op: cs.density(op),
    "kpm": lambda op: cs.density(op, method="kpm"),
    "logdet": lambda op: cs.logdet(op, damping=100.0),
    "effective dimension": lambda op: cs.effective_dimension(op, damping=100.0),
    "condition number": lambda op: cs.condition_number(op, damping=100.0),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_matrices_that_are_not_symmetric_are_named(name: str) -> None:
    matrix = normal(80, 80)
    with pytest.raises(OptionError, match=r"The matrix.* is not symmetric"):
        CALLS[name](by_products(matrix))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(CALLS))
def test_rounding_is_not_taken_for_asymmetry(name: str, dtype: torch.dtype) -> None:
    matrix = with_spectrum(spectra(80)["outliers and bulk"])
    CALLS[name](by_products(matrix, dtype=dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("name", list(CALLS))
def test_products_that_are_not_finite_are_named(name: str, value: float) -> None:
    matrix = with_spectrum(spectra(80)["decaying"])
    matrix[3, 3] = value
    with pytest.raises(NonFiniteError, match="is NaN or infinite"):
        CALLS[name](by_products(matrix))


@pytest.mark.parametrize("name", list(CALLS))
def test_empty_matrices_and_problems_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="empty"):
        CALLS[name](torch.zeros(0, 0))
    with pytest.raises(OptionError, match="is a Problem"):
        CALLS[name](PROBLEM)


PROBLEM = cs.zoo.load("digits-mlp", samples=100, dtype=torch.float64)


def test_a_network() -> None:
    """The GGN of a network by products, against its spectrum."""
    op = cs.ggn(PROBLEM)
    dense = cs.ggn(PROBLEM).dense()
    exact = cs.spectrum(dense)
    top = cs.eigsh(op, 6, tol=1e-6)
    assert top.converged and top.products < 60
    torch.testing.assert_close(top.values, exact.top(6), rtol=1e-9, atol=0)
    trace = cs.trace(op, method="hutch++", budget=120)
    assert abs(trace.value - exact.trace) < 4.5 * trace.stderr
    assert cs.trace(op, method="exact").value == pytest.approx(exact.trace, rel=1e-9)
    diagonal = cs.diagonal(op, method="xdiag", budget=120)
    assert float((diagonal.value - dense.diagonal()).norm()) < 3 * float(diagonal.stderr.norm())
    norm = cs.norm(op)
    assert abs(norm.value - exact.frobenius_norm) < 4.5 * norm.stderr
    assert cs.norm(op, "spectral").value == pytest.approx(exact.spectral_norm, rel=1e-3)
    kfac = cs.kfac(PROBLEM)
    difference, cosine = cs.norm(op - kfac), cs.cosine(op, kfac)
    other = kfac.dense()
    assert abs(difference.value - float((dense - other).norm())) < 4.5 * difference.stderr
    true = float((dense * other).sum() / dense.norm() / other.norm())
    assert abs(cosine.value - true) < 4.5 * cosine.stderr
    logdet = cs.logdet(op, damping=0.1)
    assert abs(logdet.value - float((exact.eigenvalues + 0.1).log().sum())) < 5 * logdet.stderr
    assert not cs.negative_curvature(op, budget=30).negative
    density = cs.density(op, steps=40)
    assert density.kolmogorov(exact) < 0.01
    low = cs.negative_curvature(cs.hessian(PROBLEM), budget=150)
    assert low.value < 0 and low.negative
