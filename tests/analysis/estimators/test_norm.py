"""Norms, cosines, log-determinants, effective dimensions and condition numbers."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest

import curvscope as cs
from curvscope.errors import NotDefinedError, OptionError, ParameterMismatchError, ShapeError
from curvscope.operators import DenseOperator, DiagonalOperator, Layout, ParameterSpec

from .matrices import by_products, spectra, with_spectrum

SPECTRA = spectra(120)


def test_z_scores_of_norm_and_cosine_are_normal() -> None:
    one, two = (with_spectrum(SPECTRA["indefinite"] + 0.2, seed=s) for s in (1, 2))
    two = two + one
    A, B = by_products(one), by_products(two)
    norm, difference = float(one.norm()), float((one - two).norm())
    cosine = float((one * two).sum() / one.norm() / two.norm())
    scores: dict[str, list[float]] = {"norm": [], "difference": [], "cosine": []}
    for seed in range(200):
        for name, found, true in (
            ("norm", cs.norm(A, tol=0, budget=64, seed=seed), norm),
            ("difference", cs.norm(A - B, tol=0, budget=64, seed=seed), difference),
            ("cosine", cs.cosine(A, B, tol=0, budget=128, seed=seed), cosine),
        ):
            scores[name].append((found.value - true) / found.stderr)
    for name, values in scores.items():
        assert kstest(values, "norm").pvalue > 0.001, name


@pytest.mark.parametrize("name", list(SPECTRA))
def test_norms_of_prescribed_spectra(name: str) -> None:
    values = SPECTRA[name]
    matrix = with_spectrum(values)
    largest = float(values.abs().max())
    frobenius = cs.norm(by_products(matrix))
    assert abs(frobenius.value - float(values.norm())) <= 5 * frobenius.stderr + 1e-10
    spectral = cs.norm(by_products(matrix), "spectral", tol=1e-6)
    assert spectral.value == pytest.approx(largest, rel=1e-9, abs=1e-12) and spectral.converged
    assert spectral.low <= largest * (1 + 1e-12) + 1e-14 and largest <= spectral.high * (1 + 1e-9)
    for kind, value in (("fro", float(values.norm())), ("spectral", largest)):
        exact = cs.norm(DenseOperator(matrix), kind)
        assert exact.exact and exact.value == pytest.approx(value, rel=1e-10, abs=1e-13)
        forced = cs.norm(by_products(matrix), kind, method="exact")
        assert forced.value == pytest.approx(value, rel=1e-10, abs=1e-13)


def test_cosine_by_structure_and_its_refusals() -> None:
    one = with_spectrum(SPECTRA["decaying"])
    diagonal = DiagonalOperator(one.diagonal().clone())
    found = cs.cosine(one, diagonal)
    assert found.exact
    assert found.value == pytest.approx(float(one.diagonal().norm() / one.norm()))
    same = cs.cosine(by_products(one), by_products(one))
    assert same.value == pytest.approx(1.0) and same.high <= 1 + 1e-12 and same.products == 32
    with pytest.raises(NotDefinedError, match="is zero"):
        cs.cosine(by_products(one), by_products(torch.zeros_like(one)))
    with pytest.raises(ShapeError, match="120 and 3 rows"):
        cs.cosine(one, torch.eye(3))
    layouts = [Layout([ParameterSpec(name, (120,))]) for name in ("a", "b")]
    with pytest.raises(ParameterMismatchError, match="different parameters"):
        cs.cosine(*(DenseOperator(one, layout=x) for x in layouts))


@pytest.mark.parametrize("damping", [1.0, 0.01])
@pytest.mark.parametrize("name", ["decaying", "exponential", "clustered", "rank 7", "zero"])
def test_functions_of_the_spectrum(name: str, damping: float) -> None:
    values = SPECTRA[name]
    op = by_products(with_spectrum(values), positive_semidefinite=True)
    for function, true in (
        (cs.logdet, float((values + damping).log().sum())),
        (cs.effective_dimension, float((values / (values + damping)).sum())),
    ):
        found = function(op, damping=damping)
        bias = 0.005 * abs(true)  # a quarter of the tolerance, as for converged steps
        assert abs(found.value - true) <= 4.5 * found.stderr + bias + 1e-6, found
        exact = function(op.dense(), damping=damping)
        assert exact.exact and exact.value == pytest.approx(true, rel=1e-9, abs=1e-8)


def test_z_scores_of_the_log_determinant_are_normal() -> None:
    values = SPECTRA["clustered"][:60]
    op = by_products(with_spectrum(values, seed=5))
    true = float((values + 1).log().sum())
    scores = []
    for seed in range(200):
        found = cs.logdet(op, damping=1.0, tol=0, budget=480, steps=10, seed=seed)
        scores.append((found.value - true) / found.stderr)
    assert kstest(scores, "norm").pvalue > 0.001


def test_too_few_steps_are_not_called_converged() -> None:
    values = torch.logspace(-8, 0, 120, dtype=torch.float64)
    found = cs.logdet(by_products(with_spectrum(values)), damping=1e-8, steps=15, budget=3000)
    assert not found.converged and any("Lanczos steps" in w for w in found.warnings)


@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
def test_condition_number(damping: float) -> None:
    values = SPECTRA["clustered"]
    true = (float(values.max()) + damping) / (float(values.min()) + damping)
    found = cs.condition_number(by_products(with_spectrum(values)), damping=damping)
    assert found.converged and found.low * (1 - 1e-9) <= true <= found.high * (1 + 1e-9), found
    assert found.value == pytest.approx(true, rel=0.01)
    exact = cs.condition_number(with_spectrum(values), damping=damping)
    assert exact.exact and exact.value == pytest.approx(true, rel=1e-8)


def test_bounds_hold_as_often_as_they_say() -> None:
    """Spectral norm and condition number of a spectrum without gaps, from few products."""
    values = torch.linspace(1, 4, 120, dtype=torch.float64)
    op = by_products(with_spectrum(values))
    held = [0, 0]
    for seed in range(100):
        norm = cs.norm(op, "spectral", budget=8, seed=seed, confidence=0.8)
        condition = cs.condition_number(op, budget=8, seed=seed, confidence=0.8)
        assert norm.value <= 4 * (1 + 1e-12) and condition.value <= 4 * (1 + 1e-12)
        held[0] += norm.high >= 4
        held[1] += condition.high >= 4
    assert min(held) >= 75, held


def test_condition_number_of_singular_matrices() -> None:
    op = by_products(with_spectrum(SPECTRA["rank 7"]), positive_semidefinite=True)
    found = cs.condition_number(op, damping=0.5)
    assert found.value == pytest.approx(7.5 / 0.5, rel=1e-3) and found.low <= 15 * (1 + 1e-9)
    assert found.high >= 15 * (1 - 1e-9)
    assert math.isinf(cs.condition_number(op.dense()).value)
    with pytest.raises(NotDefinedError, match="singular"):
        cs.condition_number(op)
    short = cs.condition_number(
        by_products(with_spectrum(torch.logspace(-6, 0, 120, dtype=torch.float64))), budget=10
    )
    assert not short.converged and short.high > short.value


def test_indefinite_matrices_are_named_with_the_damping_they_need() -> None:
    op = by_products(with_spectrum(SPECTRA["indefinite"]))
    for call in (
        lambda: cs.logdet(op),
        lambda: cs.logdet(op, damping=0.5),
        lambda: cs.effective_dimension(op, damping=0.5),
        lambda: cs.condition_number(op, damping=0.5),
        lambda: cs.effective_dimension(op.dense(), damping=0.5),
    ):
        with pytest.raises(NotDefinedError, match=r"indefinite.*amping above"):
            call()
    assert cs.logdet(op, damping=2.0, budget=5000).value == pytest.approx(
        float((SPECTRA["indefinite"] + 2).log().sum()), rel=0.1
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: cs.norm(op, "nuclear"), "kind='nuclear'"),
        (lambda op: cs.norm(op, budget=1), "at least 2 products"),
        (lambda op: cs.cosine(op, op, budget=3), "at least 4 products"),
        (lambda op: cs.logdet(op, damping=-1.0), "damping=-1.0"),
        (lambda op: cs.logdet(op, budget=10), "at least 30 products"),
        (lambda op: cs.effective_dimension(op, damping=0.0), "pass a positive one"),
        (lambda op: cs.condition_number(op, budget=2), "at least 3 products"),
    ],
    ids=["kind", "norm", "cosine", "damping", "logdet", "no damping", "condition"],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call(by_products(with_spectrum(SPECTRA["decaying"])))
