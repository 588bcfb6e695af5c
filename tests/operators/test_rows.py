"""The factored forms: against dense truth over random sizes, and on a layer too large to store."""

from __future__ import annotations

import resource
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvscope.errors import MemoryLimitError, NonFiniteError, OptionError, ShapeError
from curvscope.memory import PeakBytes
from curvscope.operators import (
    DenseOperator,
    DiagonalKroneckerOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    KroneckerOperator,
    LowRankOperator,
    MatrixView,
    Operator,
    RowGramOperator,
    RowHessianOperator,
    best_diagonal_kronecker,
    best_kronecker,
    inner,
    kronecker_eigenvalue_correction,
    row_algebra,
)
from tests.operators.cases import orthogonal, randn, spd, sym

TOL = 1e-11


def close(actual: Tensor | float, wanted: Tensor | float, tol: float = TOL) -> None:
    actual, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, wanted))
    assert actual.shape == wanted.shape
    size = max(1.0, float(wanted.abs().max()))
    assert float((actual - wanted).abs().max()) <= tol * size


def gram_truth(S: Tensor, a: Tensor, scale: float, signs: Tensor | None) -> Tensor:
    """From the vectors, written out: ``[C, N, T, g, o]`` and ``[N, T, g, i]``."""
    v = torch.einsum("cntgo,ntgi->cngoi", S, a).flatten(2).flatten(0, 1)
    weights = torch.ones(len(v), dtype=v.dtype) if signs is None else signs.flatten()
    return scale * v.T @ torch.diag(weights) @ v


def hessian_truth(H: Tensor, a: Tensor, scale: float) -> Tensor:
    """From the Kronecker products, sample by sample: one group only."""
    samples, positions, out = H.shape[:3]
    truth = torch.zeros(out * a.shape[-1], out * a.shape[-1], dtype=H.dtype)
    for n in range(samples):
        for t in range(positions):
            for u in range(positions):
                truth += torch.kron(H[n, t, :, u], torch.outer(a[n, t], a[n, u]))
    return scale * truth


def check(op: Operator, truth: Tensor, view: MatrixView) -> None:
    """All numbers that the factored forms give without forming the matrix."""
    size = truth.shape[0]
    close(op.dense(), truth)
    close(op @ torch.eye(size, dtype=torch.float64), truth)
    close(op.trace(), truth.trace())
    close(op.diagonal(), truth.diagonal())
    close(op.frobenius_norm(), truth.norm())
    close(op.eigenvalues(), torch.linalg.eigvalsh(truth))
    g, o, i = view.shape
    U_G, U_A = orthogonal(g, o, seed=1), orthogonal(g, i, seed=2)
    for other in (
        KroneckerOperator(sym(g, o), sym(g, i, seed=1), view),
        DiagonalKroneckerOperator(randn(g, o), randn(g, i, seed=1), view),
        EigenKroneckerOperator(U_G, U_A, randn(g, o, i, seed=3), view),
        LowRankOperator(randn(size, 2, seed=4), randn(2, seed=5)),
        DiagonalOperator(randn(size, seed=6)),
        DenseOperator(sym(size, seed=7)),
    ):
        close(inner(op, other), (truth * other.dense()).sum())
    basis = torch.block_diag(*(torch.kron(u, w) for u, w in zip(U_G, U_A, strict=True)))
    corrected = (
        kronecker_eigenvalue_correction(op, U_G, U_A, view)
        if g > 1
        else (kronecker_eigenvalue_correction(op, U_G[0], U_A[0], view).unsqueeze(0))
    )
    close(corrected.flatten(), (basis.T @ truth @ basis).diagonal())


SIZES = st.fixed_dictionaries(
    {
        "C": st.integers(1, 4),
        "N": st.integers(1, 6),
        "T": st.integers(1, 3),
        "g": st.integers(1, 3),
        "o": st.integers(1, 4),
        "i": st.integers(1, 7),
        "signed": st.booleans(),
        "seed": st.integers(0, 100),
    }
)


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_row_gram_of_any_size(z: dict) -> None:
    view = MatrixView(z["g"], z["o"], z["i"])
    S = randn(z["C"], z["N"], z["T"], z["g"], z["o"], seed=z["seed"])
    a = randn(z["N"], z["T"], z["g"], z["i"], seed=z["seed"] + 1)
    signs = randn(z["C"], z["N"], seed=z["seed"] + 2) if z["signed"] else None
    op = RowGramOperator(S, a, 0.5, signs=signs, view=view)
    check(op, gram_truth(S, a, 0.5, signs), view)
    close(op.to_lowrank().dense(), op.dense())


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_row_hessian_of_any_size(z: dict) -> None:
    view = MatrixView(1, z["o"], z["i"])
    size = z["T"] * z["o"]
    H = sym(z["N"], size, seed=z["seed"]).reshape(z["N"], z["T"], z["o"], z["T"], z["o"])
    a = randn(z["N"], z["T"], z["i"], seed=z["seed"] + 1)
    check(RowHessianOperator(H, a, 0.5), hessian_truth(H, a, 0.5), view)


@given(SIZES, st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_inner_products_of_factored_forms_with_each_other(z: dict, more: int) -> None:
    def gram(count: int, samples: int, positions: int, seed: int) -> RowGramOperator:
        S = randn(count, samples, positions, z["g"], z["o"], seed=seed)
        a = randn(samples, positions, z["g"], z["i"], seed=seed + 1)
        signs = randn(count, samples, seed=seed + 2) if z["signed"] else None
        return RowGramOperator(S, a, 0.5, signs=signs)

    def hessian(samples: int, positions: int, seed: int) -> RowHessianOperator:
        size = z["g"] * z["o"]
        H = sym(samples, positions * size, seed=seed)
        a = randn(samples, positions, z["g"], z["i"], seed=seed + 1)
        return RowHessianOperator(H.reshape(samples, positions, size, positions, size), a, 0.7)

    ops = [
        gram(z["C"], z["N"], z["T"], 1),
        gram(more, more, 1, 4),
        hessian(z["N"], z["T"], 7),
        hessian(more, 1, 10),
    ]
    for left in ops:
        for right in ops:
            close(inner(left, right), (left.dense() * right.dense()).sum())


def test_the_large_formulas_agree_with_the_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths for blocks too large for a dense matrix, on blocks where both are possible."""
    for module in ("rowgram", "rowhessian", "inner", "nearest"):
        # by name: the package exports a function called inner as well
        monkeypatch.setattr(sys.modules[f"curvscope.operators.{module}"], "SMALL", 0)
    for module in ("numerics", "row_algebra", "gram"):
        monkeypatch.setattr(sys.modules[f"curvscope.operators.{module}"], "CHUNK", 20)
    for g, T in ((1, 1), (1, 3), (2, 1), (2, 2)):
        S, a = randn(2, 3, T, g, 4), randn(3, T, g, 5, seed=1)
        signs = randn(2, 3, seed=2)
        view = MatrixView(g, 4, 5)
        check(RowGramOperator(S, a, 0.5, signs=signs), gram_truth(S, a, 0.5, signs), view)
        H = sym(3, T * g * 4, seed=3).reshape(3, T, g * 4, T, g * 4)
        hessian = RowHessianOperator(H, a, 0.7)
        dense = hessian @ torch.eye(g * 20, dtype=torch.float64)
        check(hessian, dense, view)
        for op, truth in ((hessian, dense), (RowGramOperator(S, a), gram_truth(S, a, 1.0, None))):
            close(inner(op, hessian), (truth * dense).sum())
            found = best_kronecker(op).dense()
            close(found, best_kronecker(DenseOperator(truth, view=view)).dense(), 1e-9)


def test_dense_of_many_samples_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["curvscope.operators.row_algebra"], "CHUNK", 20)
    parts = []
    outer_sums = row_algebra.outer_sums

    def counted(rows: Tensor, weights: Tensor) -> Tensor:
        parts.append(rows.shape[1])
        return outer_sums(rows, weights)

    monkeypatch.setattr(row_algebra, "outer_sums", counted)
    S, a, signs = randn(3, 50, 1, 1, 4), randn(50, 1, 1, 5, seed=1), randn(3, 50, seed=2)
    dense = RowGramOperator(S, a, 0.5, signs=signs).dense()
    close(dense, gram_truth(S, a, 0.5, signs))
    assert torch.equal(dense, dense.mT)
    assert len(parts) > 3 and sum(parts) == 50
    H = sym(50, 4, seed=3).reshape(50, 1, 4, 1, 4)
    close(RowHessianOperator(H, a, 0.7).dense(), hessian_truth(H, a.squeeze(2), 0.7))


@pytest.mark.parametrize("positions", [1, 3])
def test_rows_of_zeros_are_padding(positions: int) -> None:
    S, a = randn(2, 3, positions, 4), randn(3, positions, 5, seed=1)
    H = sym(3, positions * 4, seed=2).reshape(3, positions, 4, positions, 4)
    # two more positions whose input rows are zero, and one more sample of nothing
    a_padded = torch.zeros(4, positions + 2, 5, dtype=torch.float64)
    a_padded[:3, :positions] = a
    S_padded = torch.zeros(2, 4, positions + 2, 4, dtype=torch.float64)
    S_padded[:, :3, :positions] = S
    H_padded = sym(4, (positions + 2) * 4, seed=3).reshape(4, positions + 2, 4, positions + 2, 4)
    H_padded[:3, :positions, :, :positions] = H
    pairs = [
        (RowGramOperator(S, a, 0.2), RowGramOperator(S_padded, a_padded, 0.2)),
        (RowHessianOperator(H, a, 0.2), RowHessianOperator(H_padded, a_padded, 0.2)),
    ]
    for plain, padded in pairs:
        close(padded.dense(), plain.dense())
        close(padded.diagonal(), plain.diagonal())
        close(padded.trace(), plain.trace())
        close(padded.frobenius_norm(), plain.frobenius_norm())
        close(padded.eigenvalues(), plain.eigenvalues())
        close(best_kronecker(padded).dense(), best_kronecker(plain).dense(), 1e-9)


def test_a_row_gram_of_rank_one_samples_is_the_row_hessian_of_its_outer_products() -> None:
    S, a = randn(3, 4, 2, 5), randn(4, 2, 6, seed=1)
    H = torch.einsum("cnto,cnup->ntoup", S, S)
    close(RowGramOperator(S, a, 0.3).dense(), RowHessianOperator(H, a, 0.3).dense())
    close(
        RowGramOperator(S, a, 0.3).to_row_hessian().dense(), RowHessianOperator(H, a, 0.3).dense()
    )


def test_wrong_rows_are_refused() -> None:
    S, a, H = randn(2, 3, 1, 4), randn(3, 1, 5), sym(3, 4).reshape(3, 1, 4, 1, 4)
    with pytest.raises(ShapeError, match="samples"):
        RowGramOperator(S, a[:2])
    with pytest.raises(ShapeError, match="samples"):
        RowHessianOperator(H, a[:2])
    with pytest.raises(ShapeError, match=r"\[N, T, o, T, o\]"):
        RowHessianOperator(H[:, :, :3], a)
    with pytest.raises(ShapeError, match="groups"):
        RowGramOperator(S, randn(3, 1, 3, 5))
    with pytest.raises(OptionError, match="signs"):
        RowGramOperator(S, a, signs=randn(3, 2))
    with pytest.raises(OptionError, match="view"):
        RowGramOperator(S, a, view=MatrixView(1, 5, 4))
    with pytest.raises(OptionError, match="symmetric"):
        RowHessianOperator(randn(3, 1, 4, 1, 4), a)
    with pytest.raises(NonFiniteError):
        RowGramOperator(S / 0, a)
    with pytest.raises(NonFiniteError):
        RowGramOperator(S, a, float("nan"))


# -- a layer of 785,000 parameters ---------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> RowGramOperator:
    """Ten classes, 256 samples, a layer from 784 inputs and a bias to 1,000 outputs."""
    generator = torch.Generator().manual_seed(0)
    S = torch.randn(10, 256, 1, 1000, generator=generator, dtype=torch.float64)
    a = torch.rand(256, 1, 785, generator=generator, dtype=torch.float64)
    a[..., -1] = 1.0
    return RowGramOperator(S, a, 1 / 256, view=MatrixView.for_weight_and_bias(1000, 784))


def test_large_layer_is_compared_in_seconds_without_forming_it(large: RowGramOperator) -> None:
    G, A = spd(1000, seed=1), spd(785, seed=2)
    kron = KroneckerOperator(G, A, large.view)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    product, norm, trace = inner(large, kron), large.frobenius_norm(), large.trace()
    best = best_kronecker(large)
    distance = norm**2 - 2 * inner(large, best) + best.frobenius_norm() ** 2
    seconds = time.process_time() - start  # of all threads, whatever else the machine does
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    # by hand, sample by sample
    S, a = large._S[:, :, 0, 0], large._a[:, 0, 0]
    wanted = sum(
        float((S[c, n] @ G @ S[c, n]) * (a[n] @ A @ a[n])) for c in range(10) for n in range(256)
    )
    close(product / (wanted / 256), 1.0)
    squares = S.square().sum(-1).sum(0) * a.square().sum(-1)
    close(trace / (float(squares.sum()) / 256), 1.0)
    assert best.info.settings["converged"]
    # optimal scale: <B, K> = |K|^2, and the distance is what remains of the norm
    close(inner(large, best) / best.frobenius_norm() ** 2, 1.0)
    assert 0 < distance < norm**2
    # the vectors alone would take 16 GB, the matrix 4.9 TB
    assert grown < 600e6
    assert seconds < 10, "about one second on two cores"


def test_large_layer_agrees_with_a_small_one_inside_it(large: RowGramOperator) -> None:
    """Cutting outputs and inputs of the rows cuts the rows and columns of the matrix."""
    S, a = large._S[..., :7], large._a[..., :5]
    small = RowGramOperator(S, a, large.scale)
    dense = gram_truth(S, a, large.scale, None)
    close(small.frobenius_norm(), dense.norm())
    index = [r * 784 + c for r in range(7) for c in range(5)]
    unit = torch.zeros(785_000, 3, dtype=torch.float64)
    for column, row in enumerate(index[:3]):
        unit[row, column] = 1.0
    close((large @ unit)[index], dense[:, :3])
    close(large.diagonal()[index], dense.diagonal())


def test_large_layer_diagonal_and_its_nearest_products(large: RowGramOperator) -> None:
    diagonal = large.view.matrix(large.diagonal())[0]
    best = best_diagonal_kronecker(large)
    assert best.info.settings["converged"]
    top = float(torch.linalg.matrix_norm(diagonal, 2))
    close(best.frobenius_norm() / top, 1.0)
    assert bool((best.diagonal() >= 0).all())


def test_large_layer_refuses_what_does_not_fit(large: RowGramOperator) -> None:
    for action in (large.dense, large.eigh, large.to_lowrank, lambda: large.inverse(0.1)):
        with pytest.raises(MemoryLimitError, match="available"):
            action()


@pytest.mark.slow
def test_large_layer_spectrum_through_the_gram_matrix(large: RowGramOperator) -> None:
    fewer = RowGramOperator(large._S[:2, :100], large._a[:100], 1.0, view=large.view)
    values = fewer.eigenvalues()
    assert values.shape == (785_000,)
    close(float(values.sum()) / fewer.trace(), 1.0)
    close(float(values.norm()) / fewer.frobenius_norm(), 1.0)
    assert int((values.abs() > 1e-8 * values.max()).sum()) == 200


def test_large_row_hessian_is_compared_without_forming_it() -> None:
    samples, out, inp = 64, 200, 785
    H, a = sym(samples, out).reshape(samples, 1, out, 1, out), randn(samples, 1, inp, seed=1)
    op = RowHessianOperator(H, a, 1 / samples)
    G, A = spd(out), spd(inp, seed=1)
    wanted = sum(float((G * H[n, 0, :, 0]).sum() * (a[n, 0] @ A @ a[n, 0])) for n in range(samples))
    close(inner(op, KroneckerOperator(G, A)) / (wanted / samples), 1.0, 1e-10)
    norm = sum(
        float((H[n] * H[m]).sum() * (a[n, 0] @ a[m, 0]) ** 2)
        for n in range(samples)
        for m in range(samples)
    )
    close(op.frobenius_norm() / (norm**0.5 / samples), 1.0)
    best = best_kronecker(op)
    assert best.info.settings["converged"]
    close(inner(op, best) / best.frobenius_norm() ** 2, 1.0)


def test_dense_sums_take_one_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_algebra, "CHUNK", 2**16)
    H, a = sym(2).expand(500, 1, 2, 2).reshape(500, 1, 2, 1, 2), randn(500, 1, 100)
    op = RowHessianOperator(H, a)
    with PeakBytes() as peak:
        dense = op.dense()
    assert peak.bytes < 8 * (1.6 * 200**2 + 1.3 * 2**16)  # half of it once, and a chunk
    close(dense, torch.kron(H[0, 0, :, 0], a[:, 0].T @ a[:, 0]))
