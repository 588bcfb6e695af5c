"""Intervals of estimates whose probes or Lanczos steps are few."""

from __future__ import annotations

import pytest
import torch

import curvscope as cs

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
