"""Eigenpairs against dense truth and SciPy, with their residuals and flags."""

from __future__ import annotations

import sys

import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

import curvscope as cs
from curvscope.analysis.estimators.krylov import wanted
from curvscope.errors import NonFiniteError, OptionError, ShapeError
from curvscope.operators import DenseOperator, FunctionOperator, LowRankOperator

from .matrices import by_products, normal, spectra, with_spectrum

SPECTRA = spectra()


def truth(values: torch.Tensor, k: int, which: str) -> torch.Tensor:
    values = values.sort().values
    return values[wanted(values, k, which)]


def check(found: cs.analysis.Eigenpairs, matrix: torch.Tensor) -> None:
    """Unit vectors, true residuals, flags that say what the residuals say."""
    vectors, k = found.vectors, len(found.values)
    gram = vectors.mT @ vectors
    torch.testing.assert_close(gram, torch.eye(k, dtype=gram.dtype), atol=1e-9, rtol=0)
    residuals = (matrix @ vectors - vectors * found.values).norm(dim=0)
    scale = max(float(matrix.abs().max()), 1e-3) * len(matrix)
    torch.testing.assert_close(found.residuals, residuals, atol=1e-12 * scale, rtol=1e-3)
    assert found.converged == all(found.pair_converged)
    assert len(found.to_frame()) == k and found.products == found.cost.products


@pytest.mark.parametrize("which", ["LM", "LA", "BE"])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_prescribed_spectra(name: str, which: str) -> None:
    values = SPECTRA[name]
    matrix = with_spectrum(values)
    found = cs.eigsh(by_products(matrix), 6, which=which, tol=1e-8, method="lanczos")
    assert found.converged, found
    check(found, matrix)
    expected = truth(values, 6, which)
    if which == "LM":  # signs of equal magnitudes may come in any order
        torch.testing.assert_close(found.values.abs(), expected.abs(), atol=1e-9, rtol=1e-9)
    else:
        torch.testing.assert_close(found.values, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["outliers and bulk", "indefinite", "multiple of the identity"])
def test_smallest(name: str) -> None:
    matrix = with_spectrum(SPECTRA[name])
    found = cs.eigsh(by_products(matrix), 3, which="SA", tol=1e-8, method="lanczos")
    check(found, matrix)
    torch.testing.assert_close(found.values, truth(SPECTRA[name], 3, "SA"), atol=1e-9, rtol=0)


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_every_copy_of_a_multiple_eigenvalue(copies: int) -> None:
    values = torch.cat([torch.full((copies,), 2.0), torch.linspace(0, 1, 150 - copies)]).double()
    matrix = with_spectrum(values, seed=copies)
    for seed in range(5):
        found = cs.eigsh(by_products(matrix), copies + 1, tol=1e-6, seed=seed)
        torch.testing.assert_close(found.values[:copies], values[:copies], atol=1e-9, rtol=0)
        assert found.values[copies] == pytest.approx(1.0, abs=1e-6)
        check(found, matrix)


def test_few_rows_allowed_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thick restarts: the same answers from a basis of 24 vectors."""
    monkeypatch.setattr(sys.modules["curvscope.analysis.estimators.eigsh"], "_CAPACITY", 24)
    values = SPECTRA["indefinite"]
    matrix = with_spectrum(values)
    found = cs.eigsh(by_products(matrix), 6, tol=1e-6, method="lanczos")
    assert found.converged and found.products > 48
    torch.testing.assert_close(found.values.abs(), truth(values, 6, "LM").abs(), atol=1e-9, rtol=0)
    check(found, matrix)
    wide = cs.eigsh(by_products(matrix), 4, tol=1e-6, method="lanczos", block=3)
    torch.testing.assert_close(wide.values.abs(), truth(values, 4, "LM").abs(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_blocks_give_the_same(block: int) -> None:
    values = SPECTRA["multiple"]
    matrix = with_spectrum(values)
    found = cs.eigsh(by_products(matrix), 6, tol=1e-8, block=block)
    torch.testing.assert_close(found.values, truth(values, 6, "LM"), atol=1e-9, rtol=0)
    check(found, matrix)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_tiny_matrices(size: int) -> None:
    matrix = with_spectrum(torch.arange(1.0, size + 1).double())
    for k in range(1, size + 1):
        found = cs.eigsh(by_products(matrix), k, tol=1e-10, method="lanczos")
        assert found.converged
        torch.testing.assert_close(found.values, torch.arange(size, size - k, -1).double())


@pytest.mark.parametrize("method", ["scipy", "lobpcg", "exact", "lanczos"])
def test_methods_agree(method: str) -> None:
    values = SPECTRA["decaying"]
    matrix = with_spectrum(values)
    found = cs.eigsh(by_products(matrix), 5, which="LA", tol=1e-8, method=method)
    assert found.converged and found.method == method
    assert (found.products > 0) == (method != "exact")
    torch.testing.assert_close(found.values, values[:5], atol=1e-9, rtol=0)
    check(found, matrix)


def test_fewer_products_than_scipy_in_two_thirds() -> None:
    """Top 10 to the same relative residuals, neither looking for copies of multiple ones."""
    wins, cases = 0, 0
    for name, values in spectra(400).items():
        if name in ("zero", "multiple of the identity"):
            continue  # SciPy refuses them
        op = by_products(with_spectrum(values))
        for tol in (1e-3, 1e-4, 1e-6):
            own = cs.eigsh(op, 10, tol=tol, method="lanczos", copies=False)
            other = cs.eigsh(op, 10, tol=tol, method="scipy", budget=3000)
            assert own.converged
            wins += own.products < other.products - 10  # 10 were for the residuals
            cases += 1
    assert wins >= 2 / 3 * cases, (wins, cases)


def test_stored_matrices_are_decomposed_and_low_rank_goes_through_its_gram_matrix() -> None:
    matrix = with_spectrum(SPECTRA["decaying"])
    found = cs.eigsh(DenseOperator(matrix), 4)
    assert found.method == "exact" and found.products == 0
    check(found, matrix)
    low = LowRankOperator(normal(3000, 12, seed=3))
    found = cs.eigsh(low, 5)
    assert found.method == "exact" and "Gram" in found.reason
    singular = torch.linalg.svdvals(low.factors["V"]).square()
    torch.testing.assert_close(found.values, singular[:5])
    vectors = found.vectors
    assert float((low @ vectors - vectors * found.values).norm()) < 1e-9 * float(singular[0])


def test_arrays_tensors_and_scipy_operators() -> None:
    matrix = with_spectrum(SPECTRA["exponential"])
    for given in (matrix, matrix.numpy(), aslinearoperator(matrix.numpy())):
        found = cs.eigsh(given, 2, tol=1e-8)
        torch.testing.assert_close(found.values, SPECTRA["exponential"][:2])


def test_float32_reaches_what_rounding_allows() -> None:
    matrix = with_spectrum(SPECTRA["outliers and bulk"])
    op = by_products(matrix, dtype=torch.float32)
    found = cs.eigsh(op, 4, tol=1e-5)
    assert found.converged and found.vectors.dtype == torch.float32
    expected = truth(SPECTRA["outliers and bulk"], 4, "LM")
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=0)
    strict = cs.eigsh(op, 4, tol=0.0)
    assert float(strict.residuals.max()) < 1e-4


def test_a_spent_budget_keeps_what_was_found() -> None:
    matrix = with_spectrum(SPECTRA["indefinite"])
    found = cs.eigsh(by_products(matrix), 10, tol=1e-8, budget=20, method="lanczos")
    assert not found.converged and found.products <= 20 and "budget" in found.reason
    assert len(found.values) == 10 and any("not converged" in w for w in found.warnings)
    check(found, matrix)


def test_negative_curvature() -> None:
    matrix = with_spectrum(SPECTRA["outliers and bulk"])
    found = cs.negative_curvature(by_products(matrix))
    assert found.negative and found.value == pytest.approx(-8.0, rel=1e-6)
    curvature = float(found.direction @ matrix @ found.direction)
    assert curvature == pytest.approx(found.value, rel=1e-9) and "negative" in found.summary()
    definite = by_products(with_spectrum(SPECTRA["clustered"]))
    assert not cs.negative_curvature(definite).negative
    assert not cs.negative_curvature(by_products(torch.zeros(9, 9).double())).negative


@pytest.mark.parametrize("seed", range(8))
def test_rounding_of_a_semidefinite_matrix_is_no_negative_curvature(seed: int) -> None:
    root = torch.randn(27, 5, generator=torch.Generator().manual_seed(seed)).double()
    found = cs.negative_curvature(root @ root.mT)
    assert not found.negative, (found.value, found.settings["rounding"])
    bent = root @ root.mT - 1e-8 * torch.eye(27).double()
    assert cs.negative_curvature(bent).negative


def test_start_vectors() -> None:
    matrix = with_spectrum(SPECTRA["decaying"])
    op = by_products(matrix)
    vectors = cs.eigsh(matrix, 1).vectors
    # from an eigenvector the iteration sees an invariant subspace at once, and goes on beside it
    found = cs.eigsh(op, 3, v0=vectors[:, 0], tol=1e-8)
    torch.testing.assert_close(found.values, SPECTRA["decaying"][:3], atol=1e-9, rtol=0)
    low = torch.linalg.eigh(matrix).eigenvectors[:, :1]
    blind = cs.eigsh(op, 1, v0=low, tol=1e-8)
    assert blind.values[0] == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(ShapeError, match="v0 has shape"):
        cs.eigsh(op, 1, v0=torch.ones(3))
    with pytest.raises(OptionError, match="v0 is zero"):
        cs.eigsh(op, 1, v0=torch.zeros(200))
    with pytest.raises(NonFiniteError, match="v0"):
        cs.eigsh(op, 1, v0=torch.full((200,), torch.nan))


def test_seeds_differ_and_repeat() -> None:
    op = by_products(with_spectrum(SPECTRA["decaying"]))
    one, two = (cs.eigsh(op, 3, seed=s) for s in (1, 2))
    again = cs.eigsh(op, 3, seed=1)
    assert torch.equal(one.vectors, again.vectors) and not torch.equal(one.vectors, two.vectors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 201}, "k=201 is more than the 200 rows"),
        ({"k": 0}, "k=0 must be an integer"),
        ({"which": "SM"}, "which='SM'"),
        ({"budget": 5}, "needs at least 11 products"),
        ({"tol": -1.0}, "tol=-1.0 must be"),
        ({"method": "lobpcg"}, "finds one end"),
        ({"method": "scipy", "checkpoint": "x"}, "cannot be resumed"),
        ({"method": "arnoldi"}, "method='arnoldi'"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
    ids=["k", "no k", "which", "budget", "tol", "lobpcg", "checkpoint", "method", "seed"],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    op = by_products(with_spectrum(SPECTRA["decaying"]))
    with pytest.raises(OptionError, match=message):
        cs.eigsh(op, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size, k", [(12, 10), (20, 18)])
@pytest.mark.parametrize("kind", ["close", "two values"])
def test_a_look_beside_the_subspace_that_completes_the_whole(
    kind: str, size: int, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q
    values = torch.linspace(1, 1.2, size).double()
    if kind == "two values":
        values = torch.tensor([1.0, 2.0]).double().repeat_interleave(size // 2)
    matrix = (basis * values) @ basis.mT
    op = FunctionOperator(lambda vectors: matrix @ vectors, size)
    found = cs.eigsh(op, k, seed=seed, tol=1e-3)
    assert found.converged
    wanted = values.sort(descending=True).values[:k]
    assert float((found.values.sort(descending=True).values - wanted).abs().max()) < 3e-3


def doubled(place: int, size: int = 300) -> torch.Tensor:
    """Outliers over a bulk, of which the one at ``place`` comes twice."""
    generator = torch.Generator().manual_seed(1)
    bulk = torch.randn(size - 9, generator=generator, dtype=torch.float64) / 2
    top = torch.tensor([50.0, 40, 30, 25, 20, 15, 10, 8]).double()
    return torch.cat([top[: place + 1], top[place:], bulk])


@pytest.mark.parametrize("place", [2, 4, 6])
def test_copies_are_overlooked_no_more_often_than_said(place: int) -> None:
    """The least visible copy matters most: that of the last value but one."""
    values = doubled(place)
    op = FunctionOperator(lambda v: (v.mT * values).mT if v.ndim == 2 else v * values, len(values))
    expected = values.abs().sort(descending=True).values[:8]
    lost = 0
    for seed in range(60):
        found = cs.eigsh(op, 8, tol=1e-4, method="lanczos", seed=seed)
        lost += float((found.values.abs() - expected).abs().max()) > 0.01
    # of 60 at most 5 % are lost: more than 8 have a probability of 0.3 %
    assert lost <= 8


def test_copies_that_change_nothing_cost_nothing() -> None:
    """Of values that are equal within the tolerance, another copy is the same answer."""
    values = torch.cat([torch.linspace(10, 10.01, 5), torch.linspace(0, 1, 195)]).double()
    op = by_products(with_spectrum(values))
    sure = cs.eigsh(op, 5, tol=1e-2, method="lanczos")
    plain = cs.eigsh(op, 5, tol=1e-2, method="lanczos", copies=False)
    assert sure.converged and sure.products == plain.products
    assert "would change nothing" in sure.reason
    # a start of one's own may be without whole eigenspaces, so that there is a look
    given = cs.eigsh(op, 5, tol=1e-2, method="lanczos", v0=normal(200, 1, seed=5)[:, 0])
    assert given.converged and "beside the subspace" in given.reason


def test_a_blind_start_is_found_out() -> None:
    """From a start without the leading eigenvector, the look beside the subspace finds it."""
    values = torch.cat([torch.tensor([9.0, 5, 4, 3]), torch.linspace(0, 1, 196)]).double()
    matrix = with_spectrum(values)
    vectors = torch.linalg.eigh(matrix).eigenvectors
    start = vectors[:, :-1] @ normal(199, 1, seed=2)[:, 0]
    found = cs.eigsh(by_products(matrix), 3, v0=start, tol=1e-3, method="lanczos")
    torch.testing.assert_close(found.values, values[:3], atol=1e-4, rtol=0)


def test_the_look_is_short_where_the_spectrum_decays() -> None:
    """Three products at most, for spectra as networks have them."""
    for name in ("decaying", "exponential", "outliers and bulk"):
        op = by_products(with_spectrum(SPECTRA[name]))
        plain = cs.eigsh(op, 6, tol=1e-4, method="lanczos", copies=False)
        sure = cs.eigsh(op, 6, tol=1e-4, method="lanczos")
        assert 0 < sure.products - plain.products <= 3, name


def test_the_look_is_a_glance_where_it_cannot_decide() -> None:
    """Towards a dense end of the spectrum only two products are spent, and a warning says so."""
    values = torch.linspace(-1, 1, 400).double() ** 3
    op = by_products(with_spectrum(values))
    plain = cs.eigsh(op, 10, tol=1e-4, method="lanczos", copies=False)
    sure = cs.eigsh(op, 10, tol=1e-4, method="lanczos")
    assert sure.products - plain.products == 2
    assert any("could not be decided" in words for words in sure.warnings)
    # where multiple eigenvalues have turned up already, it looks for more of them
    values[:3], values[-3:] = -1.5, 1.5
    twice = cs.eigsh(by_products(with_spectrum(values)), 7, tol=1e-4, method="lanczos", block=2)
    plain = cs.eigsh(
        by_products(with_spectrum(values)), 7, tol=1e-4, method="lanczos", block=2, copies=False
    )
    assert twice.products - plain.products > 2


@pytest.mark.parametrize("method", ["exact", "lanczos", "scipy", "lobpcg"])
def test_no_residual_is_below_the_rounding_of_the_matrix(method: str) -> None:
    values = torch.linspace(-1.0, 3.0, 30, dtype=torch.float64)
    matrix = with_spectrum(values)
    found = cs.eigsh(matrix.float(), 3, which="LA", method=method, tol=1e-6)
    assert float(found.residuals.min()) >= 2e-7
    assert bool(((found.values - values.flip(0)[:3]).abs() <= 10 * found.residuals).all())
    exact = cs.eigsh(matrix, 3, method="exact").residuals
    assert float(exact.max()) < 1e-13
