"""Comparisons that form nothing: factored layers, and whole matrices known by products only."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

import curvscope.errors as errors
from curvscope.analysis import compare
from curvscope.analysis.metrics import METRICS
from curvscope.operators import (
    DenseOperator,
    DiagonalKroneckerOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    FunctionOperator,
    IdentityOperator,
    KroneckerOperator,
    LowRankOperator,
    Operator,
    RowGramOperator,
    RowHessianOperator,
)
from tests.analysis import cases

DAMPING = 0.2
SEEDS = 100
EASY = ["error", "error_rescaled", "scale", "cosine"]


def row_gram(samples: int = 6, out: int = 5, inp: int = 7, classes: int = 3) -> RowGramOperator:
    S = cases.normal(classes, samples, 1, out, seed=1)
    return RowGramOperator(S, cases.normal(samples, 1, inp, seed=2), 1 / samples)


def approximations(op: Operator) -> dict[str, Operator]:
    view = op.view
    assert view is not None
    out, inp = view.out, view.inp
    return {
        "Kronecker": KroneckerOperator(cases.definite(out, 3), cases.definite(inp, 4), view),
        "eigen": EigenKroneckerOperator(
            cases.orthogonal(out, 5),
            cases.orthogonal(inp, 6),
            cases.normal(out, inp, seed=7).square() + 0.01,
            view,
        ),
        "diagonal": DiagonalOperator(op.diagonal() + cases.normal(out * inp, seed=8).square()),
        "diagonal-Kronecker": DiagonalKroneckerOperator(
            cases.normal(out, seed=9).square(), cases.normal(inp, seed=10).square(), view
        ),
        "identity": IdentityOperator(out * inp, 0.3, dtype=torch.float64),
    }


@pytest.mark.parametrize("kind", ["gram", "hessian", "low rank"])
def test_factored_layers_give_the_numbers_of_the_formed_matrix(kind: str) -> None:
    op: Operator = row_gram()
    if kind == "hessian":
        a = cases.normal(5, 1, 8, seed=2)
        H = torch.stack([cases.definite(4, seed) for seed in range(5)]).reshape(5, 1, 4, 1, 4)
        op = RowHessianOperator(H, a, 0.2, positive_semidefinite=True)
    if kind == "low rank":
        op = LowRankOperator(cases.normal(35, 6, seed=3), view=op.view)
    gradient = op @ cases.normal(op.shape[0], seed=11)
    dense = DenseOperator(op.dense(), view=op.view)
    options = {"gradient": gradient, "damping": DAMPING, "metrics": list(METRICS)}
    others = approximations(op)
    exact = compare(dense, others, **options)
    few = {"memory": 8 * 6 * 20**2, "seed": 1}  # of fewer rows than it has
    found = compare(op, others, **few, **options)
    for name in others:
        row, wanted = found.row("(all)", name), exact.row("(all)", name)
        assert row.size > 20
        for metric in [*METRICS, "best_in_class", "excess"]:
            value, target = row[metric], wanted[metric]
            if math.isnan(target):
                assert math.isnan(value), (name, metric)
                continue
            assert not math.isnan(value), (name, metric, row.reasons[metric])
            slack = 5 * row.stderr.get(metric, 0.0) + 1e-7 * max(1.0, abs(target))
            assert abs(value - target) <= slack, (name, metric, value, target)
            assert row.method[metric] != "exact" or row.block == "(all)"
        for metric in ("error", "cosine", "trace_ratio", "spectrum_distance"):
            assert row.method[metric] == "structured"
    best, target = found.references[-1].best, exact.references[-1].best
    assert best == pytest.approx(target, rel=1e-6, abs=1e-7)


def test_a_layer_of_785_000_parameters_is_compared_without_forming_it() -> None:
    generator = torch.Generator().manual_seed(0)
    N, C, out, inp = 64, 10, 1000, 785
    a = torch.randn(N, 1, inp, generator=generator).relu()
    S = 0.1 * torch.randn(C, N, 1, out, generator=generator)
    reference = RowGramOperator(S, a, 1 / N)
    A = a[:, 0].mT @ a[:, 0] / N
    G = S[:, :, 0].flatten(0, 1).mT @ S[:, :, 0].flatten(0, 1) / N
    names = [*EASY, "trace_ratio", "diagonal_correlation"]
    start = time.process_time()
    found = compare(reference, {"K-FAC": KroneckerOperator(G, A)}, metrics=names)
    assert time.process_time() - start < 15  # a second on an idle machine; forming: 5 TB
    row = found.rows[0]
    s, x = S[:, :, 0].double().numpy(), a[:, 0].double().numpy()
    g, f = G.double().numpy(), A.double().numpy()
    squares = np.zeros((N, N))
    for c in range(C):
        for d in range(C):
            squares += (s[c] @ s[d].T) ** 2
    rr = np.sum(squares * (x @ x.T) ** 2) / N**2
    rb = sum(np.sum((s[c] @ g) * s[c], 1) @ np.sum((x @ f) * x, 1) for c in range(C)) / N
    bb = np.sum(g**2) * np.sum(f**2)
    assert row.error == pytest.approx(math.sqrt((rr - 2 * rb + bb) / rr), rel=1e-9)
    assert row["cosine"] == pytest.approx(rb / math.sqrt(rr * bb), rel=1e-9)
    assert row["trace_ratio"] == pytest.approx(
        np.trace(g) * np.trace(f) / (np.sum(np.sum(s**2, 2) * np.sum(x**2, 1)) / N)
    )
    diagonal = np.einsum("cno,ni->oi", s**2, x**2).ravel() / N
    wanted = np.corrcoef(diagonal, np.outer(np.diag(g), np.diag(f)).ravel())[0, 1]
    assert row["diagonal_correlation"] == pytest.approx(wanted, rel=1e-9)
    assert 0 < row.best_in_class <= row.error
    assert set(row.method.values()) == {"structured"}


def test_of_a_very_large_layer_what_iterates_must_be_asked_for() -> None:
    op = RowGramOperator(cases.normal(1, 2, 1, 600, seed=0), cases.normal(2, 1, 400, seed=1), 0.5)
    twin = op.scaled(1.5)
    row = compare(op, twin, best_in_class=False).rows[0]
    assert math.isnan(row["spectral_error"])
    assert "metrics=" in row.reasons["spectral_error"]
    asked = compare(op, twin, best_in_class=False, metrics=["spectral_error"]).rows[0]
    assert asked["spectral_error"] == pytest.approx(0.5, abs=1e-6)


# -- whole matrices known by products ------------------------------------------------------------


def test_a_whole_matrix_known_by_products_is_formed_where_the_budget_allows() -> None:
    reference = cases.reference()
    found = compare(reference, {"it": cases.block_diagonal("Kronecker")})
    row = found.row("(all)", "it")
    assert row.method["error"] == "exact"
    assert "error" not in row.stderr
    assert found.converged


def estimates(
    reference: Operator, approximation: Operator, **options: object
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Values and standard errors of the whole matrix over many seeds."""
    values: dict[str, list[float]] = {}
    spreads: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        row = compare(
            reference,
            {"it": approximation},
            memory=0,
            seed=seed,
            metrics=[*EASY, "trace_ratio"],
            **options,
        ).row("(all)", "it")
        for name, method in row.method.items():
            if method == "estimated":
                values.setdefault(name, []).append(row[name])
                spreads.setdefault(name, []).append(row.stderr[name])
    return values, spreads


@pytest.mark.parametrize("kind", ["blocks", "probes"])
def test_estimates_are_unbiased_and_their_standard_errors_honest(kind: str) -> None:
    """With the blocks known only what lies outside is probed; without, everything is."""
    matrix = cases.reference_matrix()
    reference = cases.Products(matrix, blocks=kind == "blocks")
    other: Operator = cases.block_diagonal("Kronecker")
    if kind == "probes":
        dense = other.dense()
        other = FunctionOperator(lambda v: dense @ v, 23, layout=cases.LAYOUT)
    exact = compare(cases.reference(), {"it": cases.block_diagonal("Kronecker")})
    truth = exact.row("(all)", "it")
    values, spreads = estimates(reference, other)
    wanted = {"error", "error_rescaled", "cosine"}
    wanted |= {"outside", "best_in_class"} if kind == "blocks" else {"scale"}
    assert wanted <= set(values)
    for name in wanted:
        found, spread = np.array(values[name]), np.array(spreads[name])
        scores = (found - truth[name]) / spread
        assert abs(scores.mean()) * math.sqrt(SEEDS) < 4, (name, scores.mean())
        assert 0.8 < scores.std() < 1.25, (name, scores.std())
        assert found.std() > 1e-4


@pytest.mark.parametrize("kind", cases.KINDS)
def test_whatever_cannot_be_had_by_products_says_why(kind: str) -> None:
    """Every class against a matrix known by products, with nothing formed: numbers or reasons."""
    found = compare(
        cases.reference(),
        {"it": cases.block_diagonal(kind)},
        gradient=cases.normal(23, seed=7),
        damping=DAMPING,
        memory=0,
    )
    for row in found.rows:
        assert row.status == "compared"
        for name in EASY:
            assert math.isfinite(row[name])
        for name in [*METRICS, "best_in_class", "excess"]:
            assert math.isfinite(row[name]) or row.reasons[name].endswith((".", "I"))


def test_an_estimate_says_so_and_counts_its_products() -> None:
    reference = cases.reference()
    before = reference.count
    options = {"budget": 16, "seed": 3, "metrics": [*EASY, "trace_ratio"]}
    found = compare(reference, {"it": cases.block_diagonal("Kronecker")}, **options)
    row = found.row("(all)", "it")
    assert row.method["error"] == row.method["outside"] == "estimated"
    assert row.stderr["error"] > 0
    assert "±" in row.sentence()
    assert found.cost.products == 16 == reference.count - before
    frame = found.to_frame().set_index(["block", "approximation"])
    assert frame.loc[("(all)", "it"), "error_stderr"] == row.stderr["error"]
    assert row.method["trace_ratio"] == "structured"  # from the blocks: exact
    assert row["trace_ratio"] == pytest.approx(
        float(cases.block_diagonal("Kronecker").trace() / cases.reference_matrix().trace())
    )
    again = compare(cases.reference(), {"it": cases.block_diagonal("Kronecker")}, **options)
    assert again.row("(all)", "it").error == row.error


def test_probing_stops_at_the_tolerance_or_says_that_it_could_not() -> None:
    op = {"it": cases.block_diagonal("Kronecker")}
    options = {"memory": 0, "budget": 2000, "metrics": EASY}
    loose = compare(cases.reference(), op, tol=0.2, **options)
    tight = compare(cases.reference(), op, tol=0.01, **options)
    assert loose.converged
    assert tight.converged
    assert 8 <= loose.cost.products < tight.cost.products < 2000
    truth = compare(cases.reference(), op).row("(all)", "it").error
    assert tight.row("(all)", "it").error == pytest.approx(truth, rel=0.03)
    short = compare(cases.reference(), op, memory=0, budget=16, tol=1e-4)
    assert not short.converged
    assert any("raise budget" in text for text in short.warnings)


def test_steps_with_a_matrix_known_by_products() -> None:
    op = {"it": cases.block_diagonal("Kronecker")}
    gradient = cases.normal(23, seed=4)
    options = {"gradient": gradient, "damping": DAMPING}
    exact = compare(cases.reference(), op, **options).row("(all)", "it")
    found = compare(cases.reference(), op, memory=0, **options).row("(all)", "it")
    for name in ("step_angle", "actual_decrease", "decrease_ratio", "step_efficiency"):
        assert found[name] == pytest.approx(exact[name], rel=1e-7), name
    slack = 5 * found.stderr.get("eigenspace_overlap", 0.0) + 1e-9
    assert abs(found["eigenspace_overlap"] - exact["eigenspace_overlap"]) <= slack
    short = compare(cases.reference(), op, memory=0, budget=8, gradient=gradient, damping=1e-9)
    assert "not converged in 8 products" in short.row("(all)", "it").reasons["step_angle"]
    assert math.isfinite(short.row("(all)", "it")["actual_decrease"])
    indefinite = cases.Products(cases.reference_matrix() - torch.eye(23, dtype=torch.float64))
    row = compare(indefinite, op, memory=0, **options).row("(all)", "it")
    assert "negative" in row.reasons["step_efficiency"]
    assert math.isfinite(row["actual_decrease"])


def test_diagonal_and_identity_are_judged_on_the_whole_matrix() -> None:
    """Their nearest members need no blocks, and the whole diagonal is known from the blocks."""
    diagonal = DiagonalOperator(cases.normal(23, seed=1).square(), layout=cases.LAYOUT)
    exact = compare(cases.reference(), {"it": diagonal}).row("(all)", "it")
    row = compare(cases.reference(), {"it": diagonal}, memory=0).row("(all)", "it")
    assert row["diagonal_correlation"] == pytest.approx(exact["diagonal_correlation"])
    assert abs(row.best_in_class - exact.best_in_class) < 5 * row.stderr["best_in_class"]
    assert row.stderr["best_in_class"] > 0


def test_a_block_that_does_not_fit_is_taken_by_products() -> None:
    class Huge(cases.Products):
        @property
        def blocks(self):  # type: ignore[no-untyped-def]
            class Refusing(dict):  # type: ignore[type-arg]
                def __getitem__(self, name):  # type: ignore[no-untyped-def]
                    raise errors.MemoryLimitError("does not fit")

            return Refusing(super().blocks)

    matrix = cases.reference_matrix()
    op = {"it": cases.block_diagonal("Kronecker")}
    truth = compare(cases.reference(), op)
    for memory, tolerance in ((None, 1e-10), (0, 0.5)):
        found = compare(Huge(matrix), op, memory=memory)
        row = found.row("one", "it")
        assert row.error == pytest.approx(truth.row("one", "it").error, rel=tolerance)
        assert row.method["error"] == ("exact" if memory is None else "estimated")
