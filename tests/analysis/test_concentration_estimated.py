"""Concentration of matrices that are not formed: right within the error that it states."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest

import curvscope as cs
from curvscope.analysis.facts import Facts, Limits
from curvscope.analysis.quantity import jackknife
from curvscope.analysis.unformed_concentration import decibel, share
from curvscope.errors import OptionError
from curvscope.operators import BlockDiagonalOperator, DenseOperator, LowRankOperator
from tests.analysis import cases
from tests.analysis.test_compare_estimated import LAYOUT, MATRIX, SIZE, by_products

NUMBERS = ("diagonal_share", "snr", "noisy_snr", "scale", "kaiser", "dominant", "energy")


def test_the_numbers_of_the_formed_matrix_within_their_errors() -> None:
    exact = cs.concentration(DenseOperator(MATRIX))
    for seed in range(4):
        found = cs.concentration(by_products(MATRIX), method="estimated", seed=seed)
        assert found.method == "estimated" and 0 < found.cost.products < 500
        for name in NUMBERS:
            value, truth = getattr(found, name), getattr(exact, name)
            error = found.stderr[name]
            assert abs(value - truth) <= 5 * error, (name, value, truth, error)
            assert error < 0.3 * abs(truth) + 0.02, (name, error)
        assert found.score > 10 and "±" in found.verdict()
        rows = found.rows
        torch.testing.assert_close(found.centres, exact.centres[rows])
        torch.testing.assert_close(found.radii, exact.radii[rows])
        gap = (found.band_shares - exact.band_shares).abs() / found.band_stderr
        assert float(gap[: SIZE * 9 // 10].max()) < 5  # few rows reach the largest distances
        assert set(found.reasons) == {"disjoint", "kaiser_noisy", "fourier"}
        row = found.to_frame().iloc[-1]
        assert row["diagonal_share_stderr"] == found.stderr["diagonal_share"]


def test_z_scores_of_shares_are_normal() -> None:
    exact = cs.concentration(DenseOperator(MATRIX), samples=0)
    scores: dict[str, list[float]] = {"diagonal_share": [], "snr": []}
    for seed in range(200):
        facts = Facts(by_products(MATRIX), Limits(rows=0, products=64, seed=seed))
        for name, function in (("diagonal_share", share), ("snr", decibel)):
            found = jackknife(function, facts.energy, facts.diagonal_energy)
            scores[name].append((found.value - getattr(exact, name)) / found.stderr)
    for name, values in scores.items():
        assert kstest(values, "norm").pvalue > 0.001, name


def test_structure_keeps_what_it_gives_exactly() -> None:
    op = LowRankOperator(cases.normal(60, 5, seed=1))
    exact, found = cs.concentration(op), cs.concentration(op, limit=10)
    for name in ("diagonal_share", "snr", "scale", "kaiser", "energy"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=1e-9)
    assert found.cost.products == 0 and "diagonal_share" not in found.stderr


def test_blocks_and_the_whole() -> None:
    rows = {"one": LAYOUT.index(("one",)), "two": LAYOUT.index(("two",))}
    parts = {name: MATRIX[index][:, index] for name, index in rows.items()}

    def joint() -> BlockDiagonalOperator:
        made = {}
        for name, part in parts.items():
            made[name] = DenseOperator(part, layout=LAYOUT.restrict([name]))
        return BlockDiagonalOperator(made, LAYOUT, {name: (name,) for name in made})

    exact, found = cs.concentration(joint()), cs.concentration(joint(), method="estimated")
    assert found.method == "estimated" and set(found.blocks) == {"one", "two"}
    error = found.stderr["diagonal_share"]
    assert 0 < abs(found.diagonal_share - exact.diagonal_share) <= 5 * error < 0.2
    whole = cs.concentration(joint(), blocks=False)
    assert whole.method == "exact" and not whole.blocks and whole.size == SIZE
    # zeros outside the blocks are counted now, by the null model
    assert whole.diagonal_share == pytest.approx(exact.diagonal_share)
    assert whole.null.diagonal_share < exact.null.diagonal_share


def test_refusals_and_the_zero_matrix() -> None:
    with pytest.raises(OptionError, match="budget=3 is too small"):
        cs.concentration(by_products(MATRIX), method="estimated", budget=3)
    with pytest.raises(OptionError, match="method='guess'"):
        cs.concentration(by_products(MATRIX), method="guess")
    zero = cs.concentration(by_products(torch.zeros_like(MATRIX)), method="estimated")
    assert math.isnan(zero.diagonal_share) and "is zero" in zero.verdict()
