"""Concentration against NumPy and closed forms, and the null model against simulation."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch

import curvscope.errors as errors
from curvscope.analysis import concentration
from curvscope.analysis.diagonality import disjoint_discs, off_diagonal_noise
from curvscope.analysis.null_model import NullModel, haar_orthogonal, null_model
from curvscope.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    KroneckerOperator,
    LowRankOperator,
)
from tests.analysis import cases


@pytest.mark.parametrize("seed", range(3))
def test_numbers_equal_their_definitions(seed: int) -> None:
    matrix = cases.definite(9, seed)
    matrix = matrix + torch.diag(cases.normal(9, seed=seed + 9).square())
    M = matrix.numpy()
    found = concentration(matrix, noise=0.0)
    energy = np.sum(M**2)
    assert found.diagonal_share == pytest.approx(np.sum(np.diag(M) ** 2) / energy, abs=1e-12)
    distance = np.abs(np.subtract.outer(np.arange(9), np.arange(9)))
    bands = [np.sum(M[distance <= k] ** 2) / energy for k in range(9)]
    np.testing.assert_allclose(found.band_shares, bands, atol=1e-12)
    radii = np.sum(np.abs(M), 1) - np.abs(np.diag(M))
    np.testing.assert_allclose(found.centres, np.diag(M))
    np.testing.assert_allclose(found.radii, radii)
    apart = [
        all(abs(M[i, i] - M[j, j]) > radii[i] + radii[j] for j in range(9) if j != i)
        for i in range(9)
    ]
    assert found.disjoint == sum(apart)
    assert found.dominant == pytest.approx(np.mean(np.abs(np.diag(M)) > radii))
    scaled = np.linalg.eigvalsh(M / np.mean(np.diag(M)))
    np.testing.assert_allclose(found.eigenvalues, scaled[::-1], atol=1e-12)
    np.testing.assert_allclose(found.noisy_eigenvalues, scaled[::-1], atol=1e-12)
    assert found.kaiser == found.kaiser_noisy == np.sum(scaled > 1)
    beside = np.sum(np.triu(M, 1) ** 2)
    assert found.snr == pytest.approx(10 * math.log10(np.sum(np.diag(M) ** 2) / beside))
    np.testing.assert_allclose(found.fourier, np.abs(np.fft.fft2(M)), atol=1e-10)
    trace = np.trace(M)
    assert found.null.diagonal_share == pytest.approx(
        (trace**2 + 2 * energy) / (11 * energy), abs=1e-12
    )


def test_a_diagonal_matrix_is_concentrated_in_every_way() -> None:
    found = concentration(torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0])))
    assert found.diagonal_share == 1.0
    assert found.disjoint == 4
    assert found.dominant == 1.0
    assert math.isinf(found.snr)
    assert found.snr > 0
    assert found.kaiser == 2  # 4 and 8 are above the mean of 3.75
    assert found.null.diagonal_share < 1
    assert "more concentrated" in found.verdict()


def test_the_identity_has_no_null_model_to_beat() -> None:
    found = concentration(np.eye(5))
    assert found.diagonal_share == found.null.diagonal_share == 1.0
    assert "no basis" in found.verdict()
    assert math.isnan(found.score)
    assert found.kaiser == 0


def test_a_random_eigenbasis_is_as_concentrated_as_its_null_model() -> None:
    values = cases.normal(30, seed=0).square()
    scores = []
    for seed in range(20):
        basis = haar_orthogonal(30, torch.Generator().manual_seed(seed))
        found = concentration((basis * values) @ basis.T, samples=64)
        scores.append(found.score)
    assert abs(np.mean(scores)) * math.sqrt(20) < 4
    assert 0.5 < np.std(scores) < 1.7


def test_the_constant_matrix_is_not_more_concentrated_than_chance() -> None:
    """Rank one along (1, ..., 1): share 1/d, where a random vector gives 3/(d + 2)."""
    found = concentration(np.ones((12, 12)))
    assert found.diagonal_share == pytest.approx(1 / 12)
    assert found.null.diagonal_share == pytest.approx(3 / 14)
    assert "not more concentrated" in found.verdict()
    assert found.score < -1


# -- null model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 5, 12])
def test_the_expected_share_equals_a_simulation(rows: int) -> None:
    values = cases.normal(rows, seed=rows)
    generator = torch.Generator().manual_seed(1)
    shares = []
    for _ in range(3000):
        basis = haar_orthogonal(rows, generator)
        diagonal = (basis.square() * values).sum(1)
        shares.append(float(diagonal.square().sum() / values.square().sum()))
    expected = NullModel.expected(float(values.sum()), float(values.square().sum()), rows)
    score = (np.mean(shares) - expected.diagonal_share) / (np.std(shares) / math.sqrt(3000))
    assert abs(score) < 4
    sampled = null_model(values, samples=400, seed=0)
    assert sampled.diagonal_share == expected.diagonal_share
    assert sampled.diagonal_share_std == pytest.approx(np.std(shares), rel=0.2)


def test_random_bases_are_orthogonal_with_haar_moments() -> None:
    """Entries have mean 0, variance 1/d and fourth moment 3/(d(d + 2))."""
    generator = torch.Generator().manual_seed(0)
    rows, draws = 4, 4000
    stack = torch.stack([haar_orthogonal(rows, generator) for _ in range(draws)])
    one = torch.eye(rows, dtype=torch.float64)
    assert float((stack.mT @ stack - one).abs().max()) < 1e-12
    for power, wanted in ((1, 0.0), (2, 1 / rows), (4, 3 / (rows * (rows + 2)))):
        moments = stack**power
        scores = (moments.mean(0) - wanted) / (moments.std(0) / math.sqrt(draws))
        assert float(scores.abs().max()) < 4.5, power


def test_the_spread_is_left_empty_where_sampling_would_take_long() -> None:
    values = torch.linspace(0, 1, 1500, dtype=torch.float64)
    plain = null_model(values)
    assert plain.samples == 0
    assert math.isnan(plain.diagonal_share_std)
    assert 0 < plain.diagonal_share < 1
    assert null_model(values[:40], samples=0).samples == 0


# -- discs and noise -----------------------------------------------------------------------------


def test_disjoint_discs_by_brute_force() -> None:
    for seed in range(50):
        centres, radii = cases.normal(8, seed=seed), 0.2 * cases.normal(8, seed=seed + 99).abs()
        low, high = (centres - radii).tolist(), (centres + radii).tolist()
        wanted = sum(
            all(high[i] < low[j] or high[j] < low[i] for j in range(8) if j != i) for i in range(8)
        )
        assert disjoint_discs(centres, radii) == wanted
    touching = torch.tensor([0.0, 1.0, 5.0])
    assert disjoint_discs(touching, torch.tensor([0.5, 0.5, 0.0])) == 1
    assert disjoint_discs(torch.zeros(1), torch.ones(1)) == 1
    assert disjoint_discs(torch.zeros(2), torch.zeros(2)) == 0


def test_noise_is_symmetric_normal_and_leaves_the_diagonal() -> None:
    matrix = torch.zeros(300, 300, dtype=torch.float64)
    noise = off_diagonal_noise(matrix, 0.5, seed=0)
    assert torch.equal(noise, noise.T)
    assert not noise.diagonal().any()
    entries = noise[torch.triu_indices(300, 300, 1).unbind()]
    count = len(entries)
    assert abs(float(entries.mean())) < 4 * 0.5 / math.sqrt(count)
    assert abs(float(entries.std()) - 0.5) < 4 * 0.5 / math.sqrt(2 * count)
    assert torch.equal(noise, off_diagonal_noise(matrix, 0.5, seed=0))
    assert not torch.equal(noise, off_diagonal_noise(matrix, 0.5, seed=1))


def test_scale_changes_nothing_that_is_relative() -> None:
    matrix = cases.definite(10, 0)
    one, other = concentration(matrix), concentration(1e5 * matrix)
    for name in ("diagonal_share", "dominant", "kaiser", "kaiser_noisy", "snr", "noisy_snr"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-9), name
    assert other.scale == pytest.approx(1e5 * one.scale)
    assert other.disjoint == one.disjoint


def test_order_changes_bands_but_not_the_share() -> None:
    matrix = torch.eye(8, dtype=torch.float64) + 0.3 * torch.diag(torch.ones(7), 1)
    matrix = (matrix + matrix.T) / 2
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    one, other = concentration(matrix), concentration(matrix[order][:, order])
    assert other.diagonal_share == pytest.approx(one.diagonal_share)
    assert float(one.band_shares[1]) == 1.0
    assert float(other.band_shares[1]) < 1.0


# -- operators -----------------------------------------------------------------------------------


def test_a_kronecker_product_is_described_with_its_factors() -> None:
    G, A = cases.definite(3, 0), cases.definite(5, 1)
    op = KroneckerOperator(G, A)
    found = concentration(op)
    assert set(found.factors) == {"G", "A"}
    assert found.factors["G"].diagonal_share == concentration(G).diagonal_share
    product = found.factors["G"].diagonal_share * found.factors["A"].diagonal_share
    assert found.diagonal_share == pytest.approx(product)  # shares of a product multiply
    assert found.diagonal_share == pytest.approx(concentration(op.dense()).diagonal_share)
    frame = found.to_frame()
    assert list(frame["factor"]) == ["G", "A", ""]


def test_what_is_too_large_to_form_keeps_its_share_and_the_exact_null_model() -> None:
    op = KroneckerOperator(cases.definite(3, 0), cases.definite(5, 1))
    whole, found = concentration(op), concentration(op, limit=10)
    assert found.diagonal_share == pytest.approx(whole.diagonal_share, abs=1e-12)
    assert found.null.diagonal_share == pytest.approx(whole.null.diagonal_share, abs=1e-12)
    assert found.disjoint is None and "takes all discs" in found.reasons["disjoint"]
    assert found.method == "estimated" and found.cost.products == 0
    torch.testing.assert_close(found.centres, whole.centres)  # all rows of so few
    torch.testing.assert_close(found.radii, whole.radii)
    assert (found.dominant, found.kaiser) == (whole.dominant, whole.kaiser)
    assert any("was not formed" in text for text in found.warnings)
    assert "than the null model expects" in found.verdict()
    large = concentration(LowRankOperator(cases.normal(40_000, 2, seed=0)))
    assert 0 < large.diagonal_share < 1e-3


def test_blocks_are_described_one_by_one() -> None:
    op = cases.block_diagonal("Kronecker")
    found = concentration(op)
    assert set(found.blocks) == {"one", "two"}
    assert set(found.blocks["one"].factors) == {"G", "A"}
    dense = op.dense()
    assert found.diagonal_share == pytest.approx(concentration(dense).diagonal_share)
    # the null model turns eigenvectors within blocks: zeros between them are no concentration
    energies = {name: float(b.frobenius_norm() ** 2) for name, b in op.blocks.items()}
    expected = sum(
        (float(op.blocks[n].trace()) ** 2 + 2 * e) / (op.blocks[n].shape[0] + 2)
        for n, e in energies.items()
    ) / sum(energies.values())
    assert found.null.diagonal_share == pytest.approx(expected)
    assert found.null.diagonal_share > concentration(dense).null.diagonal_share
    spreads = [
        (e / sum(energies.values()) * found.blocks[n].null.diagonal_share_std) ** 2
        for n, e in energies.items()
    ]
    assert found.null.diagonal_share_std == pytest.approx(math.sqrt(sum(spreads)))
    frame = found.to_frame()
    assert list(zip(frame["block"], frame["factor"], strict=True)) == [
        ("one", "G"),
        ("one", "A"),
        ("one", ""),
        ("two", "G"),
        ("two", "A"),
        ("two", ""),
        ("(all)", ""),
    ]
    assert list(frame.columns[:4]) == ["block", "factor", "size", "diagonal_share"]
    assert "Block one:" in str(found)
    partial = BlockDiagonalOperator(
        {"one": cases.block_operators("diagonal")["one"]}, cases.LAYOUT, cases.MEMBERS
    )
    assert any("two" in text for text in concentration(partial).warnings)


def test_results_pickle_and_turn_into_json() -> None:
    found = concentration(cases.block_diagonal("Kronecker"))
    twin = pickle.loads(pickle.dumps(found))
    assert twin.diagonal_share == found.diagonal_share
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["blocks"]["one"]["factors"]["G"]["size"] == 3
    assert "fourier" not in data["blocks"]["one"]
    assert "null model" in data["verdict"]
    assert "<table" in found._repr_html_()
    infinite = concentration(np.diag([1.0, 2.0]))
    assert infinite.to_dict()["snr"] is None


def test_large_fourier_pictures_are_averaged() -> None:
    matrix = cases.definite(256, 0)
    found = concentration(matrix, samples=0)
    magnitude = np.abs(np.fft.fft2(matrix.numpy()))
    wanted = magnitude.reshape(128, 2, 128, 2).mean((1, 3))
    np.testing.assert_allclose(found.fourier, wanted, rtol=1e-9)


def test_degenerate_matrices() -> None:
    zero = concentration(np.zeros((3, 3)))
    assert math.isnan(zero.diagonal_share)
    assert "zero" in zero.verdict()
    assert zero.kaiser is None
    hollow = concentration(np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert hollow.diagonal_share == 0.0
    assert any("Kaiser" in text for text in hollow.warnings)
    one = concentration(np.array([[2.0]]))
    assert (one.diagonal_share, one.disjoint, one.dominant) == (1.0, 1, 1.0)


def test_what_is_refused() -> None:
    with pytest.raises(errors.OptionError, match="noise"):
        concentration(np.eye(2), noise=-1.0)
    with pytest.raises(errors.OptionError, match="empty"):
        concentration(DiagonalOperator(torch.empty(0)))
    with pytest.raises(errors.OptionError, match="not symmetric"):
        concentration(np.arange(4.0).reshape(2, 2))
    with pytest.raises(errors.NonFiniteError):
        concentration(np.array([[math.nan]]))
    assert concentration(DenseOperator(torch.eye(2))).size == 2
