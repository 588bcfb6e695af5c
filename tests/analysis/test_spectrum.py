"""Spectra against NumPy, by structure and block by block."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch

import curvscope.errors as errors
from curvscope.analysis import spectrum
from curvscope.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    KroneckerOperator,
    LowRankOperator,
)
from tests.analysis import cases


@pytest.mark.parametrize("kind", cases.KINDS)
def test_every_class_has_the_eigenvalues_of_its_dense_form(kind: str) -> None:
    op = cases.block_diagonal(kind)
    found = spectrum(op, blocks=True)
    wanted = np.linalg.eigvalsh(op.dense().numpy())
    np.testing.assert_allclose(found.eigenvalues, wanted, atol=1e-10)
    np.testing.assert_allclose(spectrum(op).eigenvalues, wanted, atol=1e-10)
    for name, block in op.blocks.items():
        values = np.linalg.eigvalsh(block.dense().numpy())
        np.testing.assert_allclose(found.blocks[name].eigenvalues, values, atol=1e-10)


def test_numbers_follow_from_the_eigenvalues() -> None:
    values = [-2.0, -1e-17, 0.0, 1.0, 4.0]
    basis = cases.orthogonal(5, 0)
    found = spectrum(basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T)
    assert (found.negative, found.zero, found.positive) == (1, 2, 2)
    assert found.trace == pytest.approx(3.0)
    assert found.frobenius_norm == pytest.approx(math.sqrt(21))
    assert found.spectral_norm == pytest.approx(4.0)
    assert found.stable_rank == pytest.approx(21 / 16)
    assert (found.smallest, found.largest) == pytest.approx((-2.0, 4.0))
    shares = np.array([2, 1, 4]) / 7
    assert found.effective_rank == pytest.approx(math.exp(-np.sum(shares * np.log(shares))))
    assert math.isinf(found.condition_number)
    assert found.damped_condition_number(3.0) == pytest.approx(7.0)
    assert math.isinf(found.damped_condition_number(2.0))
    np.testing.assert_allclose(found.top(2), [4.0, -2.0], atol=1e-12)


def test_ranks_of_simple_matrices() -> None:
    identity = spectrum(3.0 * np.eye(6))
    assert identity.effective_rank == pytest.approx(6)
    assert identity.stable_rank == pytest.approx(6)
    assert identity.condition_number == pytest.approx(1)
    one = spectrum(LowRankOperator(cases.normal(7, 1, seed=0)))
    assert one.effective_rank == pytest.approx(1)
    assert (one.zero, one.positive) == (6, 1)
    nothing = spectrum(np.zeros((3, 3)))
    assert (nothing.effective_rank, nothing.stable_rank, nothing.zero) == (0, 0, 3)


def test_scaling_scales_and_rotation_does_nothing() -> None:
    matrix, basis = cases.definite(9, 0), cases.orthogonal(9, 1)
    one, other = spectrum(matrix), spectrum(5 * basis @ matrix @ basis.T)
    np.testing.assert_allclose(other.eigenvalues, 5 * one.eigenvalues, rtol=1e-10)
    assert other.effective_rank == pytest.approx(one.effective_rank, rel=1e-10)
    assert other.condition_number == pytest.approx(one.condition_number, rel=1e-10)


def test_a_kronecker_product_of_a_million_rows_takes_its_factors() -> None:
    G, A = cases.definite(1000, 0), cases.definite(1001, 1)
    small = KroneckerOperator(G[:100, :100], A[:101, :101])
    found = spectrum(small)
    products = np.outer(
        np.linalg.eigvalsh(G[:100, :100].numpy()), np.linalg.eigvalsh(A[:101, :101].numpy())
    )
    np.testing.assert_allclose(found.eigenvalues, np.sort(products.ravel()), rtol=1e-10)
    large = spectrum(KroneckerOperator(G, A))
    assert large.size == 1_001_000
    assert large.trace == pytest.approx(float(G.trace() * A.trace()), rel=1e-10)


def test_histogram_and_density() -> None:
    found = spectrum(cases.definite(50, 0))
    counts, edges = found.histogram(20)
    assert int(counts.sum()) == 50
    assert len(edges) == 21
    logs, bins = found.histogram(10, log=True)
    assert int(logs.sum()) == 50
    steps = np.diff(np.log10(bins.numpy()))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    grid, density = found.density(2000)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-3)
    mean = float(torch.trapezoid(density * grid, grid))
    assert mean == pytest.approx(found.trace / 50, rel=1e-2)
    with pytest.raises(errors.NotDefinedError, match="log=False"):
        spectrum(-np.eye(3)).histogram(log=True)
    flat, _ = spectrum(np.eye(4)).histogram(5, log=True)
    assert int(flat.sum()) == 4


def test_frames_json_and_words() -> None:
    op = cases.block_diagonal("Kronecker")
    found = spectrum(op, blocks=True)
    frame = found.to_frame()
    assert list(frame["block"]) == ["one", "two", "(all)"]
    assert frame["trace"].iloc[-1] == pytest.approx(op.trace())
    assert len(found.values_frame()) == cases.SIZE
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["blocks"]["one"]["positive"] == 15
    assert len(data["eigenvalues"]) == cases.SIZE
    twin = pickle.loads(pickle.dumps(found))
    assert torch.equal(twin.eigenvalues, found.eigenvalues)
    text = str(found)
    assert "block diagonal of the Kronecker (23 rows, 2 blocks)" in text
    assert "0 negative, 0 zero and 23 positive" in text
    assert "<table" in found._repr_html_()


def test_uncovered_blocks_are_left_out_and_named() -> None:
    blocks = {"one": cases.block_operators("Kronecker")["one"]}
    op = BlockDiagonalOperator(blocks, cases.LAYOUT, cases.MEMBERS)
    found = spectrum(op, blocks=True)
    assert found.size == 15
    assert any("two" in text for text in found.warnings)
    with pytest.raises(errors.UncoveredError):
        spectrum(op)


def test_float32_is_solved_in_float64_but_zero_is_judged_by_its_digits() -> None:
    vectors = cases.normal(20, 3, seed=0)
    found = spectrum(DenseOperator((vectors @ vectors.T).to(torch.float32)))
    assert found.eigenvalues.dtype == torch.float64
    assert (found.negative, found.zero, found.positive) == (0, 17, 3)


def test_what_is_refused() -> None:
    with pytest.raises(errors.OptionError, match="no blocks"):
        spectrum(np.eye(3), blocks=True)
    with pytest.raises(errors.OptionError, match="empty"):
        spectrum(DiagonalOperator(torch.empty(0)))
    with pytest.raises(errors.OptionError, match="not symmetric"):
        spectrum(np.arange(9.0).reshape(3, 3))
    with pytest.raises(errors.OptionError, match="Operator"):
        spectrum("matrix")  # type: ignore[arg-type]
    with pytest.raises(errors.OptionError, match="complex"):
        spectrum(torch.eye(3, dtype=torch.complex128))


def test_a_matrix_that_would_not_fit_is_refused_before_it_is_formed() -> None:
    rows = 5_000_000
    op = KroneckerOperator(cases.definite(2, 0), cases.definite(2, 1)) + LowRankOperator(
        cases.normal(4, 1, seed=0)
    )
    assert spectrum(op).size == 4
    huge = LowRankOperator(torch.ones(rows, 1)) + DiagonalOperator(torch.ones(rows))
    with pytest.raises(errors.MemoryLimitError, match="available"):
        spectrum(huge)
