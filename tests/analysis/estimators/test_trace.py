"""Trace and diagonal: against dense truth, with errors that are honest."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest

import curvscope as cs
from curvscope.analysis.estimators.common import Meter, signs
from curvscope.analysis.estimators.leave_one_out import LeaveOneOut
from curvscope.errors import OptionError
from curvscope.operators import DenseOperator, KroneckerOperator

from .matrices import by_products, normal, spectra, with_spectrum

SPECTRA = spectra(100)
TRACES = ("hutchinson", "hutch++", "xtrace")
# products of one estimate; the fewer probes behind the error, the heavier the tails of a z-score
SIZES = {"hutchinson": 128, "hutch++": 160, "xtrace": 80}


@pytest.mark.parametrize("method", TRACES)
@pytest.mark.parametrize("name", ["exponential", "indefinite"])
def test_z_scores_of_the_trace_are_normal(name: str, method: str) -> None:
    matrix = with_spectrum(SPECTRA[name], seed=7)
    op, true = by_products(matrix), float(matrix.trace())
    scores = []
    for seed in range(200):
        found = cs.trace(op, method=method, tol=0, budget=SIZES[method], seed=seed)
        scores.append((found.value - true) / found.stderr)
        assert not found.converged and found.products <= SIZES[method]
    assert kstest(scores, "norm").pvalue > 0.001, method


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
@pytest.mark.parametrize("name", ["exponential", "outliers and bulk"])
def test_z_scores_of_the_diagonal_are_normal(name: str, method: str) -> None:
    matrix = with_spectrum(SPECTRA[name], seed=7)
    op, true = by_products(matrix), matrix.diagonal()
    scores = []
    for seed in range(200):
        found = cs.diagonal(op, method=method, tol=0, budget=72, seed=seed)
        scores.append(((found.value - true) / found.stderr)[seed % 100])
    assert kstest(torch.stack(scores).numpy(), "norm").pvalue > 0.001


@pytest.mark.parametrize("method", TRACES)
def test_intervals_hold_after_stopping_at_a_tolerance(method: str) -> None:
    """Looking at the interval must not make it too short: 95 % within 2 of 1.5 %."""
    matrix = with_spectrum(SPECTRA["outliers and bulk"] + 3, seed=7)
    op, true = by_products(matrix), float(matrix.trace())
    inside, stopped = 0, set()
    for seed in range(200):
        found = cs.trace(op, method=method, tol=0.08, seed=seed)
        assert found.converged and "below 0.08" in found.reason
        assert max(found.high - found.value, found.value - found.low) <= 0.08 * abs(found.value)
        inside += found.low <= true <= found.high
        stopped.add(found.products)
    assert inside >= 180, inside
    assert method != "hutchinson" or len(stopped) > 20  # the rule was at work


@pytest.mark.parametrize("method", TRACES)
@pytest.mark.parametrize("name", list(SPECTRA))
def test_trace_within_its_errors(name: str, method: str) -> None:
    matrix = with_spectrum(SPECTRA[name])
    found = cs.trace(by_products(matrix), method=method, tol=0, budget=90)
    true = float(matrix.trace())
    assert abs(found.value - true) <= 5 * found.stderr + 1e-9
    assert found.of == "matrix" and found.size == 100 and float(found) == found.value


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_low_rank_is_exact(method: str) -> None:
    matrix = with_spectrum(SPECTRA["rank 7"])
    found = cs.trace(by_products(matrix), method=method, budget=60)
    assert found.value == pytest.approx(28.0, rel=1e-10) and found.stderr < 1e-9
    diagonal = cs.diagonal(by_products(matrix), method="xdiag", budget=60)
    torch.testing.assert_close(diagonal.value, matrix.diagonal())
    assert diagonal.error < 1e-9 and diagonal.converged


def test_decaying_spectra_need_fewer_products_with_the_better_methods() -> None:
    op = by_products(with_spectrum(SPECTRA["exponential"]))
    errors = {m: cs.trace(op, method=m, tol=0, budget=60).stderr for m in TRACES}
    assert 2 * errors["xtrace"] < errors["hutch++"] < errors["hutchinson"] / 3


def test_leaving_out_one_and_two_is_what_it_says() -> None:
    """The formulas of XTrace and XDiag and of their errors, against the definition."""
    size = 25
    matrix = normal(size, size)
    matrix = matrix + matrix.mT
    parts = LeaveOneOut(Meter(by_products(matrix)), 0)
    parts.add(3)
    parts.add(4)
    n = parts.count
    sketch = matrix @ parts.probes

    def values(left_out: set[int], probe: int) -> torch.Tensor:
        kept = [k for k in range(n) if k not in left_out]
        Q = torch.linalg.qr(sketch[:, kept]).Q
        rest = parts.probes[:, probe] - Q @ (Q.mT @ parts.probes[:, probe])
        trace = (Q * (matrix @ Q)).sum() + rest @ matrix @ rest
        image = sketch[:, probe] - Q @ (Q.mT @ sketch[:, probe])
        diagonal = (Q * (matrix @ Q)).sum(1) + parts.probes[:, probe] * image
        return torch.cat([trace.reshape(1), diagonal])

    one = torch.stack([values({i}, i) for i in range(n)])
    shared = torch.stack(
        [
            (one[i] - values({i, j}, i)) * (one[j] - values({i, j}, j))
            for i in range(n)
            for j in range(n)
            if i != j
        ]
    ).mean(0)
    plain = one.var(0) / n
    error = torch.maximum(plain + shared, plain / 4).sqrt()
    traces, stderr = parts.traces()
    torch.testing.assert_close(traces, one[:, 0])
    assert stderr == pytest.approx(float(error[0]))
    mean, errors = parts.diagonals()
    torch.testing.assert_close(mean, one.mean(0)[1:])
    torch.testing.assert_close(errors, error[1:])


def test_exact_by_structure() -> None:
    one, two = normal(4, 4), normal(5, 5)
    kronecker = KroneckerOperator(one @ one.mT, two @ two.mT)
    for op in (kronecker, DenseOperator(with_spectrum(SPECTRA["decaying"])), kronecker.damped(2.0)):
        found, diagonal = cs.trace(op), cs.diagonal(op)
        assert found.exact and found.products == 0 and found.stderr == 0
        assert found.interval == (found.value, found.value) and "exactly" in found.summary()
        assert found.value == pytest.approx(float(op.dense().trace()))
        torch.testing.assert_close(diagonal.value, op.dense().diagonal())
        assert diagonal.converged and not diagonal.stderr.any()


def test_probes_do_not_depend_on_how_many_are_drawn() -> None:
    op = by_products(torch.eye(50).double())
    whole = signs(op, 3, 0, 8)
    parts = torch.cat([signs(op, 3, 0, 3), signs(op, 3, 3, 5)], 1)
    assert torch.equal(whole, parts) and set(whole.unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(whole, signs(op, 4, 0, 8))
    gram = whole.mT @ whole / 50
    assert float((gram - torch.eye(8)).abs().max()) < 0.6


def test_diagonal_matrices_need_no_more_than_the_first_probes() -> None:
    values = normal(80)
    op = by_products(torch.diag(values))
    assert cs.trace(op).stderr == pytest.approx(0, abs=1e-12)
    found = cs.diagonal(op)
    assert found.products == 16 and found.converged
    torch.testing.assert_close(found.value, values)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("method", TRACES)
def test_tiny(size: int, method: str) -> None:
    matrix = with_spectrum(torch.arange(1.0, size + 1).double())
    found = cs.trace(by_products(matrix), method=method, budget=40, tol=0)
    assert abs(found.value - float(matrix.trace())) <= 4 * found.stderr + 1e-10
    diagonal = cs.diagonal(by_products(matrix), method="xdiag", budget=40)
    torch.testing.assert_close(diagonal.value, matrix.diagonal(), atol=1.0, rtol=0)


def test_a_spent_budget_says_what_would_be_needed() -> None:
    found = cs.trace(by_products(with_spectrum(SPECTRA["decaying"])), tol=1e-3, budget=32)
    assert not found.converged and "budget is spent" in found.reason and "About" in found.reason
    assert found.warnings and found.to_frame().loc[0, "converged"] == found.converged
    assert found.to_dict()["value"] == found.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1}, "needs at least 2 products"),
        ({"method": "xtrace", "budget": 7}, "needs at least 8 products"),
        ({"confidence": 1.0}, "confidence=1.0 must lie"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"method": "hutch"}, "Did you mean 'hutch"),
        ({"seed": "a"}, "seed='a'"),
    ],
    ids=["budget", "xtrace", "confidence", "tol", "method", "seed"],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    op = by_products(with_spectrum(SPECTRA["decaying"]))
    with pytest.raises(OptionError, match=message):
        cs.trace(op, **options)  # type: ignore[arg-type]
