"""Spectral densities against all eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest

import curvscope as cs
from curvscope.analysis.estimators.common import Meter
from curvscope.analysis.estimators.slq import quadrature
from curvscope.errors import OptionError
from curvscope.operators import DenseOperator

from .matrices import by_products, spectra, with_spectrum

SPECTRA = spectra(150)


@pytest.mark.parametrize("method", ["slq", "kpm"])
def test_z_scores_of_the_moments_are_normal(method: str) -> None:
    values = SPECTRA["outliers and bulk"]
    op = by_products(with_spectrum(values, seed=4))
    scores: list[list[float]] = [[], [], [], []]
    for seed in range(200):
        found = cs.density(op, method=method, probes=48, steps=4, seed=seed, points=2)
        for power in range(4):
            true = float((values ** (power + 1)).mean())
            gap = float(found.moments[power]) - true
            scores[power].append(gap / float(found.moments_stderr[power]))
    for power in (0, 1):  # higher powers are those of one outlier, and far from normal
        assert kstest(scores[power], "norm").pvalue > 0.001, power
    # four Lanczos steps are exact to the seventh power: no bias in any
    assert all(abs(sum(s) / len(s)) < 0.5 for s in scores)


@pytest.mark.parametrize("method", ["slq", "kpm"])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_close_to_the_exact_distribution(name: str, method: str) -> None:
    matrix = with_spectrum(SPECTRA[name])
    found = cs.density(by_products(matrix), method=method, probes=16, steps=60)
    exact = cs.spectrum(matrix)
    assert found.kolmogorov(exact) < (0.05 if method == "slq" else 0.15)
    total = torch.trapezoid(found.density, found.grid)
    assert float(total) == pytest.approx(1.0, abs=2e-3)
    assert bool((found.low <= found.density).all()) and bool((found.density <= found.high).all())
    assert found.products == 16 * 60 + (20 if method == "kpm" else 0) or name in (
        "rank 7",
        "zero",
        "multiple of the identity",
    )


def test_the_band_holds_the_truth() -> None:
    """95 % of the points of the broadened exact density lie within the band."""
    values = SPECTRA["indefinite"]
    matrix = with_spectrum(values)
    op, exact = by_products(matrix), cs.spectrum(matrix)
    inside = total = 0
    for seed in range(20):
        found = cs.density(op, probes=12, steps=60, width=0.1, seed=seed, points=50)
        gap = (found.grid[:, None] - exact.eigenvalues) / 0.1
        true = torch.exp(-(gap**2) / 2).mean(1) / (0.1 * math.sqrt(2 * math.pi))
        inside += int(((found.low <= true + 1e-12) & (true <= found.high + 1e-12)).sum())
        total += 50
    assert 0.90 <= inside / total <= 0.99


def test_all_steps_give_all_moments() -> None:
    values = SPECTRA["exponential"][:20]
    matrix = with_spectrum(values)
    found = cs.density(by_products(matrix), steps=64, probes=4)
    assert found.steps == 20
    for row in range(4):
        nodes = found.nodes[row][found.weights[row] > 1e-12]
        gaps = (nodes[:, None] - values).abs().min(1).values
        assert float(gaps.max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_selective_reorthogonalisation_gives_the_same_with_less(dtype: torch.dtype) -> None:
    matrix = with_spectrum(SPECTRA["outliers and bulk"])
    op = by_products(matrix, dtype=dtype)
    runs = {
        how: quadrature(Meter(op), 0, 0, 3, 90, reorthogonalise=how)
        for how in ("full", "selective", "none")
    }
    assert 0 < runs["selective"].reorthogonalised < 60
    assert runs["full"].reorthogonalised == 90
    top = runs["full"].nodes.max()

    def copies(name: str) -> int:
        return int((runs[name].nodes > top - 1e-3).sum())

    # without it, the largest eigenvalue appears again and again
    assert copies("full") == copies("selective") == 3 < copies("none")
    for function in (torch.abs, torch.exp):
        one, two = (
            (runs[how].weights * function(runs[how].nodes / 10)).sum(1)
            for how in ("full", "selective")
        )
        torch.testing.assert_close(one, two, rtol=1e-9 if dtype == torch.float64 else 1e-4, atol=0)


def test_exact_where_the_eigenvalues_are_known() -> None:
    matrix = with_spectrum(SPECTRA["clustered"])
    found = cs.density(DenseOperator(matrix))
    assert found.method == "exact" and found.products == 0 and found.probes == 0
    exact = cs.spectrum(matrix)
    assert found.kolmogorov(exact) < 1e-9
    grid, values = exact.density(400, width=found.width)
    torch.testing.assert_close(found.grid, grid)
    torch.testing.assert_close(found.density, values, atol=1e-9, rtol=1e-9)
    for power in range(4):
        true = float((SPECTRA["clustered"] ** (power + 1)).mean())
        assert float(found.moments[power]) == pytest.approx(true)


def test_a_budget_takes_fewer_probes() -> None:
    op = by_products(with_spectrum(SPECTRA["decaying"]))
    found = cs.density(op, steps=20, budget=70)
    assert found.probes == 3 and found.products == 60 and "allowed 3 probes" in found.warnings[0]
    assert len(found.to_frame()) == 400 and "Density" in found.summary()


@pytest.mark.parametrize("method", ["slq", "kpm"])
def test_one_probe_has_no_band(method: str) -> None:
    op = by_products(with_spectrum(SPECTRA["decaying"]))
    found = cs.density(op, method=method, probes=1, steps=20, width=0.05)
    two = cs.density(op, method=method, probes=2, steps=20, width=0.05)
    torch.testing.assert_close(found.nodes[0], two.nodes[0])
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1.0, abs=0.01)
    assert bool(found.low.isnan().all() and found.high.isnan().all())
    assert bool(found.moments_stderr.isnan().all()) and bool(torch.isfinite(found.moments).all())
    assert "probes=2" in found.warnings[0] and "nan" not in found.summary()
    assert "1 probe of" in found.summary()
    cs.plot.plot_density(found)
    if method == "slq":
        assert found.products == 20 and cs.density(op, probes=1, steps=20, budget=20).probes == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 100}, "needs at least 128 products"),
        ({"probes": 0}, "probes=0 must be an integer of at least 1"),
        ({"width": 0.0}, "width=0.0 must be positive"),
        ({"reorthogonalise": "never"}, "reorthogonalise='never'"),
        ({"method": "lanczos"}, "method='lanczos'"),
    ],
    ids=["budget", "probes", "width", "reorthogonalise", "method"],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cs.density(by_products(with_spectrum(SPECTRA["decaying"])), **options)  # type: ignore
