"""Metrics of matrices known by their products alone: right within the error that they state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, spearmanr

from curvscope.analysis import Comparison, compare
from curvscope.analysis.facts import Facts, Limits
from curvscope.analysis.metrics import METRICS
from curvscope.analysis.pairs import Pair
from curvscope.analysis.quantity import Value
from curvscope.errors import OptionError
from curvscope.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    FunctionOperator,
    KroneckerOperator,
    Layout,
    LowRankOperator,
    MatrixView,
    Operator,
    ParameterSpec,
    Provenance,
)
from tests.analysis import cases

LAYOUT = Layout([ParameterSpec("one", (10, 12)), ParameterSpec("two", (12, 10))])
SIZE, DAMPING = LAYOUT.numel, 0.3
VIEWS = {
    "one": MatrixView.for_weight_and_bias(10, 12, bias=False),
    "two": MatrixView.for_weight_and_bias(12, 10, bias=False),
}
SUMS = ["error", "error_rescaled", "scale", "cosine", "trace_ratio", "diagonal_correlation"]


def matrix() -> torch.Tensor:
    """Positive definite, a decaying spectrum with ten outer eigenvalues, an uneven diagonal."""
    scales = torch.exp(0.6 * cases.normal(SIZE, seed=4))
    values = torch.cat(
        [torch.arange(22.0, 2.0, -2.0), torch.linspace(1.0, 0.05, SIZE - 10)]
    ).double()
    basis = torch.linalg.qr(cases.normal(SIZE, SIZE, seed=3)).Q
    found = scales[:, None] * ((basis * values) @ basis.mT) * scales
    return (found + found.mT) / 2


MATRIX = matrix()


def by_products(dense: torch.Tensor) -> FunctionOperator:
    return FunctionOperator(
        lambda vectors: dense @ vectors,
        SIZE,
        layout=LAYOUT,
        info=Provenance(what="hidden"),
        positive_semidefinite=True,
        check=False,
    )


def approximation(kind: str) -> Operator:
    if kind == "diagonal":
        noise = torch.exp(0.5 * cases.normal(SIZE, seed=9))
        return DiagonalOperator(MATRIX.diagonal() * noise, layout=LAYOUT)
    if kind == "low rank":
        values, vectors = torch.linalg.eigh(MATRIX + 0.2 * cases.definite(SIZE, 8))
        return LowRankOperator(vectors[:, -20:] * values[-20:].sqrt(), layout=LAYOUT)
    if kind == "products":
        return by_products(MATRIX + 0.4 * cases.definite(SIZE, 8))
    blocks: dict[str, Operator] = {
        name: KroneckerOperator(
            cases.definite(view.out, 5), 1.5 * cases.definite(view.inp, 6), view
        )
        for name, view in VIEWS.items()
    }
    return BlockDiagonalOperator(blocks, LAYOUT, {name: (name,) for name in blocks})


OTHERS = {kind: approximation(kind) for kind in ("diagonal", "Kronecker", "low rank", "products")}
GRADIENT = cases.normal(SIZE, seed=7)
OPTIONS = {"gradient": GRADIENT, "damping": DAMPING}


def dense(op: Operator) -> Operator:
    return DenseOperator(op.dense(), layout=LAYOUT)


@pytest.fixture(scope="module")
def exact() -> Comparison:
    others = {name: dense(op) if name == "products" else op for name, op in OTHERS.items()}
    return compare(DenseOperator(MATRIX, layout=LAYOUT), others, **OPTIONS, blocks="(all)")


@pytest.mark.parametrize("seed", range(3))
def test_every_metric_is_had_by_products_and_right_within_its_error(
    seed: int, exact: Comparison
) -> None:
    found = compare(
        by_products(MATRIX), OTHERS, **OPTIONS, memory=0, budget=200, seed=seed, blocks="(all)"
    )
    assert found.cost.products < 8 * 200
    for kind in OTHERS:
        row, truth = found.row("(all)", kind), exact.row("(all)", kind)
        for name in METRICS:
            if math.isnan(row[name]):
                assert math.isnan(truth[name]) or (kind, name) in UNKNOWN, (kind, name, row.reasons)
                continue
            error = row.stderr.get(name, 0.0)
            slack = 5 * error + 1e-6 * abs(truth[name])
            assert abs(row[name] - truth[name]) <= slack, (kind, name, row[name], truth[name])


# no inverse without the factors of B, no nearest product without the entries of R
UNKNOWN = {("products", "stein_divergence"), ("low rank", "stein_divergence")}


@pytest.mark.parametrize("kind", ["Kronecker", "products"])
def test_z_scores_of_sums_are_normal(kind: str, exact: Comparison) -> None:
    """Over 200 seeds at 64 probes, of numbers that are ratios and roots of sums."""
    truth = exact.row("(all)", kind)
    scores: dict[str, list[float]] = {name: [] for name in SUMS}
    for seed in range(200):
        limits = Limits(rows=0, products=64, seed=seed)
        pair = Pair(Facts(by_products(MATRIX), limits), Facts(OTHERS[kind], limits))
        for name in SUMS:
            found = METRICS[name].function(pair)
            assert isinstance(found, Value) and found.method == "estimated"
            scores[name].append((found.value - truth[name]) / found.stderr)
    for name, values in scores.items():
        assert kstest(values, "norm").pvalue > 0.001, (name, np.mean(values), np.std(values))


def test_the_best_of_a_class_is_estimated_where_products_give_it(exact: Comparison) -> None:
    options = {"memory": 0, "metrics": ["error"], "blocks": "(all)"}
    for kind in ("diagonal", "low rank"):
        row = compare(by_products(MATRIX), {kind: OTHERS[kind]}, **options).row("(all)", kind)
        truth = exact.row("(all)", kind)
        for name in ("best_in_class", "excess"):
            assert 0 < abs(row[name] - truth[name]) <= 5 * row.stderr[name] < 0.5
    best = compare(by_products(MATRIX), OTHERS, **options).references[-1]
    truth_best = exact.references[-1]
    for name in ("identity", "diagonal"):
        assert abs(best.best[name] - truth_best.best[name]) <= 5 * best.stderr[name]
    for name in ("norm", "trace"):
        gap = abs(getattr(best, name) - getattr(truth_best, name))
        assert 0 < gap <= 5 * best.stderr[name]


def test_frames_have_columns_of_standard_errors(exact: Comparison) -> None:
    found = compare(by_products(MATRIX), OTHERS, **OPTIONS, memory=0, blocks="(all)")
    frame, plain = found.to_frame(), exact.to_frame()
    assert {"cosine_stderr", "spectral_error_stderr", "best_in_class_stderr"} <= set(frame)
    assert frame.loc[0, "cosine_stderr"] == found.rows[0].stderr["cosine"]
    assert set(frame) - {c for c in frame if c.endswith("_stderr")} <= set(plain)
    assert {c for c in plain if c.endswith("_stderr")} == {"error_stderr", "outside_stderr"}
    assert "norm_stderr" in found.best_frame() and "norm_stderr" not in exact.best_frame()


def test_estimates_on_request_take_no_entry_and_exact_ones_take_all(exact: Comparison) -> None:
    stored = DenseOperator(MATRIX, layout=LAYOUT)
    names = ["error", "spectrum_distance", "step_angle", "diagonal_rank_correlation"]
    options = {**OPTIONS, "metrics": names, "blocks": "(all)"}
    for kind in ("diagonal", "Kronecker"):
        truth = exact.row("(all)", kind)
        asked = compare(stored, {kind: OTHERS[kind]}, method="estimated", **options)
        formed = compare(by_products(MATRIX), {kind: OTHERS[kind]}, method="exact", **options)
        assert asked.settings["method"] == "estimated" and asked.cost.products > 100
        for name in names:
            row = asked.row("(all)", kind)
            assert row.method[name] == "estimated"
            assert abs(row[name] - truth[name]) <= 5 * row.stderr[name] + 1e-6
            assert formed.row("(all)", kind)[name] == pytest.approx(truth[name], rel=1e-9)
    with pytest.raises(OptionError, match="method='guess'"):
        compare(stored, OTHERS, method="guess")


def test_a_rank_correlation_of_some_rows_is_never_sure() -> None:
    """Rows that were not drawn may be in another order, even where all that were drawn agree."""
    size = 1000
    generator = torch.Generator().manual_seed(0)
    entries = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
    operators = {
        name: FunctionOperator(lambda v, d=values: (v.mT * d).mT if v.ndim == 2 else v * d, size)
        for name, values in (("reference", entries), ("same order", entries.square()))
    }
    other = entries + 0.2 * torch.rand(size, generator=generator, dtype=torch.float64)
    operators["noisy"] = FunctionOperator(
        lambda v: (v.mT * other).mT if v.ndim == 2 else v * other, size
    )
    truth = {"same order": 1.0, "noisy": float(spearmanr(entries, other).statistic)}
    reference = operators.pop("reference")
    name = "diagonal_rank_correlation"
    deviations = []
    for seed in range(10):
        options = {"metrics": [name], "memory": 0, "blocks": "(all)", "seed": seed}
        for row in compare(reference, operators, method="estimated", budget=60, **options).rows:
            assert row.method[name] == "estimated" and 0 < row.stderr[name] < 0.2
            deviations.append((row[name] - truth[row.approximation]) / row.stderr[name])
    assert max(abs(z) for z in deviations) < 4.5
    assert max(abs(z) for z in deviations) > 0.3


def test_indefinite_matrices_and_short_budgets_say_so() -> None:
    shifted = MATRIX - 2 * torch.eye(SIZE, dtype=torch.float64)
    shifted[0, 0] -= 3.0
    row = compare(
        FunctionOperator(lambda v: shifted @ v, SIZE, layout=LAYOUT, check=False),
        {"diagonal": OTHERS["diagonal"]},
        **OPTIONS,
        memory=0,
        blocks="(all)",
    ).rows[-1]
    for name in ("stein_divergence", "reference_condition_number"):
        assert "indefinite" in row.reasons[name], (name, row.reasons)
    short = compare(by_products(MATRIX), OTHERS, memory=0, budget=8, blocks="(all)").rows[0]
    assert "too small" in short.reasons["eigenspace_overlap"]
    assert short.stderr["error"] > 0


def test_iterating_on_very_many_rows_must_be_asked_for() -> None:
    rows = 200_001
    op = FunctionOperator(lambda v: 2 * v, rows, check=False)
    other = {"twice": DiagonalOperator(torch.ones(rows, dtype=torch.float64))}
    row = compare(op, other, budget=8).rows[0]
    assert row.error == pytest.approx(0.5) and "ask by name" in row.reasons["spectral_error"]
    asked = compare(op, other, budget=8, metrics=["spectral_error"]).rows[0]
    assert asked["spectral_error"] == pytest.approx(0.5)


def test_rounding_of_single_precision_is_no_asymmetry() -> None:
    """A symmetric product that rounds in float32 is compared in float64 all the same."""
    matrix = cases.definite(6, 0).float()
    rounded = matrix.clone()
    rounded[0, 1] *= 1 + 3e-7
    op = FunctionOperator(lambda v: rounded @ v, 6, dtype=torch.float32, check=False)
    found = compare(DenseOperator(matrix), op, gradient=torch.ones(6), damping=0.1).rows[0]
    assert found.reasons.get("step_efficiency") is None
    assert found["step_efficiency"] == pytest.approx(1.0, abs=1e-4)


def test_a_reference_that_is_zero_has_no_relative_error() -> None:
    zero = FunctionOperator(lambda v: 0 * v, SIZE, layout=LAYOUT, check=False)
    other = DiagonalOperator(torch.ones(SIZE, dtype=torch.float64), layout=LAYOUT)
    row = compare(zero, other, method="estimated", blocks="(all)", budget=32).rows[0]
    assert math.isnan(row.values["error"]) and math.isnan(row.values["spectral_error"])
    assert "zero" in row.reasons["spectral_error"]
