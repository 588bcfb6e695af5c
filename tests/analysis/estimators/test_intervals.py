"""Intervals of estimates whose probes or Lanczos steps are few."""

from __future__ import annotations

import pytest
import torch

import curvscope as cs
from curvscope.analysis.estimators.common import Meter, signs
from curvscope.analysis.estimators.slq import quadrature, with_node

from .matrices import by_products, with_spectrum

FEW_LARGE = torch.cat([torch.logspace(1, -3, 12), torch.zeros(68)]).double()
FALLING = torch.logspace(2, -6, 60).double()


@pytest.mark.parametrize("values", [FEW_LARGE, FALLING], ids=["few large", "falling"])
def test_xtrace_after_stopping_at_a_loose_tolerance(values: torch.Tensor) -> None:
    """Probes that share a subspace say little about their spread."""
    matrix = with_spectrum(values, seed=3)
    true, inside = float(matrix.trace()), 0
    for seed in range(100):
        found = cs.trace(by_products(matrix), method="xtrace", tol=0.2, seed=seed)
        inside += abs(found.value - true) <= found.high - found.value + 1e-9 * true
    assert inside >= 88, inside


def test_xdiag_entry_by_entry() -> None:
    matrix = with_spectrum(FALLING, seed=3)
    true, inside = matrix.diagonal(), []
    for seed in range(40):
        found = cs.diagonal(by_products(matrix), method="xdiag", tol=0.2, seed=seed)
        inside.append(((found.low <= true) & (true <= found.high)).double().mean())
    assert float(torch.stack(inside).mean()) >= 0.9


@pytest.mark.parametrize("size", [33, 40, 48, 75])
def test_probes_enough_for_the_whole_space_give_the_exact_value(size: int) -> None:
    """Before, 40 probes of a matrix of 40 rows gave errors of up to 100 standard errors."""
    clusters = torch.cat([1 + 1e-6 * torch.arange(10), 0.5 + 1e-6 * torch.arange(size - 10)])
    matrix = with_spectrum(clusters.double(), seed=0)
    op = by_products(matrix)
    trace = cs.trace(op, method="xtrace", tol=1e-12, seed=1)
    assert trace.converged and trace.stderr == 0 and trace.products <= 2 * size
    assert trace.value == pytest.approx(float(matrix.trace()), rel=1e-12)
    diagonal = cs.diagonal(op, method="xdiag", tol=1e-12, seed=1)
    assert diagonal.converged and diagonal.cost.products <= 2 * size
    torch.testing.assert_close(diagonal.value, matrix.diagonal())


@pytest.mark.parametrize("steps", [4, 6, 20])
def test_what_missing_lanczos_steps_change_is_in_the_interval(steps: int) -> None:
    matrix = with_spectrum(FALLING, seed=3)
    true = float((FALLING / (FALLING + 1)).sum())
    inside = 0
    for seed in range(30):
        found = cs.effective_dimension(
            by_products(matrix), damping=1.0, steps=steps, budget=300, tol=1e-6, seed=seed
        )
        assert not found.converged
        inside += found.low <= true <= found.high
    assert inside >= 25, inside


@pytest.mark.parametrize("steps", [5, 12, 30])
@pytest.mark.parametrize("damping", [1e-2, 1e-5])
def test_eigenvalues_that_no_step_has_reached(steps: int, damping: float) -> None:
    """Far below the others, they change nothing from step to step, but for the known bound."""
    values = torch.logspace(3, -9, 90).double()
    op = by_products(with_spectrum(values, seed=4))
    true = float((values / (values + damping)).sum())
    found = cs.effective_dimension(op, damping=damping, steps=steps, budget=6 * steps)
    assert found.low <= true <= found.high and not found.converged


def test_quadratures_with_a_given_node_bound_from_the_other_side() -> None:
    values = torch.logspace(2, -3, 40).double()
    matrix = with_spectrum(values, seed=5)
    meter = Meter(by_products(matrix))
    start = signs(meter.op, 1, 0, 2, stream=7)
    inverse = torch.linalg.inv(matrix + 0.01 * torch.eye(40))
    true = (start * (inverse @ start)).sum(0) / 40
    for steps in (1, 4, 9):
        found = quadrature(meter, 1, 0, 2, steps)
        other = with_node(found, 0.0)
        below, above = ((q.weights / (q.nodes + 0.01)).sum(1) for q in (found, other))
        assert bool((below <= true * (1 + 1e-9)).all() and (true <= above * (1 + 1e-9)).all())
        torch.testing.assert_close(other.nodes[:, 0], torch.zeros(2).double())
        power = (other.weights * other.nodes ** (2 * steps)).sum(1)  # exact up to this one
        image = torch.linalg.matrix_power(matrix, 2 * steps) @ start
        torch.testing.assert_close(power, (start * image).sum(0) / 40, rtol=1e-7, atol=0)
