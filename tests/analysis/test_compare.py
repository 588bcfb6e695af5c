"""Metrics against their definitions, and properties that every metric has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import curvscope.errors as errors
from curvscope.analysis import compare
from curvscope.analysis.metrics import METRICS, metric
from curvscope.analysis.pairs import Pair
from curvscope.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    IdentityOperator,
    KroneckerOperator,
    Operator,
)
from tests.analysis import cases, formulas

DAMPING = 0.3
GRADIENT = cases.normal(cases.SIZE, seed=7)
SCORES = [name for name, metric in METRICS.items() if metric.better is not None]


def in_view(matrix: torch.Tensor, name: str) -> np.ndarray:
    return cases.VIEWS[name].dense_to_matrix(matrix).numpy()


@pytest.mark.parametrize("kind", [k for k in cases.KINDS if k != "identity"])
def test_metrics_equal_their_formulas_on_blocks_and_on_the_whole(kind: str) -> None:
    approximation = cases.block_diagonal(kind)
    found = compare(cases.reference(), {kind: approximation}, gradient=GRADIENT, damping=DAMPING)
    R, B = cases.reference_matrix().numpy(), approximation.dense().numpy()
    rows = {**{name: index.numpy() for name, index in cases.ROWS.items()}, "(all)": slice(None)}
    assert [row.block for row in found.rows] == list(rows)
    for block, index in rows.items():
        row = found.row(block, kind)
        wanted = formulas.metrics(
            R[index][:, index], B[index][:, index], DAMPING, GRADIENT.numpy()[index]
        )
        assert row.status == "compared"
        assert row.damping == DAMPING
        for name, value in wanted.items():
            if math.isnan(row[name]):  # low rank: no gap behind the third eigenvalue
                assert (kind, name) == ("low-rank", "eigenspace_overlap")
                assert "coincide" in row.reasons[name]
                continue
            assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-10), (block, name)
            assert row.method[name] == "exact"
            assert name not in row.reasons


def test_the_formulas_cover_most_metrics() -> None:
    """New metrics need no formula here, but none of these may be renamed unseen."""
    known = formulas.metrics(np.diag([1.0, 3, 2]) + 1, np.diag([1.0, 2, 3]), 0.1, np.ones(3))
    assert set(known) <= set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_best_where_the_approximation_is_exact(name: str) -> None:
    matrix = cases.reference_matrix()
    found = compare(
        DenseOperator(matrix), DenseOperator(matrix.clone()), gradient=GRADIENT, damping=DAMPING
    )
    value = found.rows[0][name]
    best = {"low": 0.0, "high": 1.0, "one": 1.0}
    assert math.isfinite(value), found.rows[0].reasons.get(name)
    if METRICS[name].better is not None:
        assert value == pytest.approx(best[METRICS[name].better], abs=1e-10)
    assert METRICS[name].title
    assert METRICS[name].doc


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_the_same_in_another_order_of_rows(name: str) -> None:
    R, B = cases.reference_matrix(), cases.definite(cases.SIZE, 5)
    order = torch.randperm(cases.SIZE, generator=torch.Generator().manual_seed(0))
    options = {"damping": DAMPING, "metrics": [name]}
    one = compare(DenseOperator(R), DenseOperator(B), gradient=GRADIENT, **options)
    other = compare(
        DenseOperator(R[order][:, order]),
        DenseOperator(B[order][:, order]),
        gradient=GRADIENT[order],
        **options,
    )
    assert other.rows[0][name] == pytest.approx(one.rows[0][name], rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_the_same_in_another_unit(name: str) -> None:
    R, B = cases.reference_matrix(), cases.definite(cases.SIZE, 5)
    one = compare(
        DenseOperator(R), DenseOperator(B), gradient=GRADIENT, damping=DAMPING, metrics=[name]
    )
    other = compare(
        DenseOperator(1e6 * R),
        DenseOperator(1e6 * B),
        gradient=1e3 * GRADIENT,
        damping=1e6 * DAMPING,
        metrics=[name],
    )
    assert other.rows[0][name] == pytest.approx(one.rows[0][name], rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("kind", [k for k in cases.KINDS if k != "low-rank"])
def test_without_forming_anything_the_numbers_are_the_same(kind: str) -> None:
    """A memory budget for matrices of no rows leaves the structured formulas."""
    reference = cases.block_diagonal("Kronecker-eigenbasis", seed=40)
    approximation = cases.block_diagonal(kind)
    options = {"gradient": GRADIENT, "damping": DAMPING}
    formed = compare(reference, {"it": approximation}, **options)
    unformed = compare(reference, {"it": approximation}, memory=0, **options)
    for row, other in zip(formed.rows, unformed.rows, strict=True):
        for name in [*METRICS, "best_in_class"]:
            if math.isnan(other[name]):
                large = "would need it to be formed" in other.reasons[name]
                assert (large and kind == "dense") or math.isnan(row[name]), (row.block, name)
                continue
            slack = 5 * other.stderr.get(name, 0.0) + 1e-7 * max(1.0, abs(row[name]))
            assert abs(other[name] - row[name]) <= slack, (row.block, name)
            assert other.method[name] in ("structured", "estimated", "exact")
    names = {"error", "error_rescaled", "cosine", "trace_ratio"}
    assert all(row.method[n] == "structured" for row in unformed.rows for n in names)


def test_the_spectral_distance_bounds_the_error_from_below() -> None:
    """Hoffman and Wielandt: the sorted spectra are never further apart than the matrices."""
    for seed in range(20):
        found = compare(
            DenseOperator(cases.definite(12, seed)), DenseOperator(cases.definite(12, seed + 50))
        )
        assert found.rows[0]["spectrum_distance"] <= found.rows[0].error + 1e-12


# -- the best of a class -------------------------------------------------------------------------


def test_best_in_class_equals_singular_values_and_projections() -> None:
    R = cases.reference_matrix()
    kinds = list(cases.KINDS)
    found = compare(cases.reference(), {kind: cases.block_diagonal(kind) for kind in kinds})
    whole = np.linalg.norm(R.numpy())
    outside = whole**2 - sum(
        float(R[index][:, index].square().sum()) for index in cases.ROWS.values()
    )
    for kind in kinds:
        gaps = []
        for block, view in cases.VIEWS.items():
            part = R[cases.ROWS[block]][:, cases.ROWS[block]]
            matrix, norm = in_view(part, block), float(part.norm())
            op = cases.block_operators(kind)[block]
            if kind == "Kronecker-eigenbasis":
                basis = np.kron(op.factors["U_G"].numpy(), op.factors["U_A"].numpy())
                inside = np.diag(basis.T @ matrix @ basis)
                gap = norm**2 - np.sum(inside**2)
            elif kind == "low-rank":
                gap = np.sum(np.sort(np.abs(np.linalg.eigvalsh(matrix)))[:-3] ** 2)
            elif kind == "Kronecker":
                gap = formulas.gap_kronecker(matrix, view.out, view.inp)
            elif kind == "diagonal-Kronecker":
                gap = formulas.gap_diagonal_kronecker(matrix, view.out, view.inp)
            elif kind == "diagonal":
                gap = formulas.gap_diagonal(matrix)
            elif kind == "identity":
                gap = formulas.gap_identity(matrix)
            else:
                gap = 0.0
            gaps.append(gap)
            row = found.row(block, kind)
            assert row.family == kind
            assert row.best_in_class == pytest.approx(math.sqrt(gap) / norm, abs=1e-10)
            if gap:
                assert row.excess == pytest.approx(row.error / row.best_in_class)
                assert row.excess >= 1 - 1e-12
            else:
                assert "0" in row.reasons["excess"]
        total = found.row("(all)", kind)
        wanted = math.sqrt(outside + sum(gaps)) / whole
        assert total.best_in_class == pytest.approx(wanted, abs=1e-10)
        assert total.outside == pytest.approx(outside / whole**2, abs=1e-12)


def test_best_frame_has_a_row_per_block_with_the_classes_of_the_reference() -> None:
    found = compare(cases.reference(), {"it": cases.block_diagonal("diagonal")})
    frame = found.best_frame().set_index("block")
    R = cases.reference_matrix()
    for block, view in cases.VIEWS.items():
        part = R[cases.ROWS[block]][:, cases.ROWS[block]]
        matrix, norm = in_view(part, block), float(part.norm())
        line = frame.loc[block]
        assert line["size"] == view.numel
        assert line["norm"] == pytest.approx(norm)
        assert line["trace"] == pytest.approx(float(part.trace()))
        assert line["share"] == pytest.approx(norm**2 / float(R.norm()) ** 2)
        gap = formulas.gap_kronecker(matrix, view.out, view.inp)
        assert line["Kronecker"] == pytest.approx(math.sqrt(gap) / norm, abs=1e-10)
        gap = formulas.gap_diagonal_kronecker(matrix, view.out, view.inp)
        assert line["diagonal-Kronecker"] == pytest.approx(math.sqrt(gap) / norm, abs=1e-10)
    assert frame.loc["(all)", "share"] == 1.0
    gap = formulas.gap_identity(R.numpy())
    assert frame.loc["(all)", "identity"] == pytest.approx(math.sqrt(gap) / float(R.norm()))


def test_the_nearest_member_itself_has_no_excess() -> None:
    part = cases.reference_matrix()[:15, :15]
    reference = DenseOperator(part, view=cases.VIEWS["one"])
    found = compare(
        reference,
        {
            "diagonal": DiagonalOperator(part.diagonal()),
            "identity": IdentityOperator(15, float(part.trace()) / 15, dtype=torch.float64),
        },
    )
    assert [row.excess for row in found.rows] == pytest.approx([1.0, 1.0])


def test_a_damped_kronecker_product_is_judged_in_its_eigenbasis() -> None:
    op = cases.KINDS["Kronecker"](cases.VIEWS["one"], 3).damped(0.2)
    reference = DenseOperator(op.dense(), view=cases.VIEWS["one"])
    row = compare(reference, op).rows[0]
    assert row.family == "Kronecker-eigenbasis"
    assert row.best_in_class < 1e-7
    assert row.error < 1e-12


def test_a_block_without_a_matrix_view_has_no_nearest_kronecker_product() -> None:
    part = cases.definite(15, 0)
    found = compare(DenseOperator(part), DiagonalOperator(part.diagonal()))
    assert math.isnan(found.references[0].best.get("Kronecker", math.nan))
    op = KroneckerOperator(cases.definite(3, 1), cases.definite(5, 2))
    row = compare(DenseOperator(part), op).rows[0]  # the view of the approximation is taken
    gap = formulas.gap_kronecker(part.numpy(), 3, 5)
    assert row.best_in_class == pytest.approx(math.sqrt(gap) / float(part.norm()), abs=1e-10)


# -- what is not defined -------------------------------------------------------------------------


def test_what_is_not_defined_is_empty_with_the_reason() -> None:
    matrix = cases.reference_matrix()
    indefinite = matrix - 1.0 * torch.eye(cases.SIZE, dtype=torch.float64)
    row = compare(
        DenseOperator(indefinite),
        {"it": IdentityOperator(cases.SIZE, 1.0, dtype=torch.float64)},
        gradient=GRADIENT,
    ).rows[0]
    for name, word in {
        "stein_divergence": "indefinite",
        "diagonal_correlation": "constant",
        "diagonal_rank_correlation": "constant",
        "eigenspace_overlap": "coincide",
        "step_efficiency": "indefinite",
    }.items():
        assert math.isnan(row[name])
        assert word in row.reasons[name], row.reasons[name]
    assert math.isfinite(row["step_angle"])


def test_without_a_gradient_the_steps_are_empty_and_say_so() -> None:
    row = compare(cases.reference(), {"it": cases.block_diagonal("Kronecker")}).rows[0]
    assert math.isnan(row["step_angle"])
    assert "gradient=" in row.reasons["step_angle"]


def test_a_singular_matrix_has_an_infinite_condition_number_unless_damped() -> None:
    reference, low = cases.reference(), {"it": cases.block_diagonal("low-rank")}
    bare = compare(reference, low, gradient=GRADIENT).row("one", "it")
    assert math.isinf(bare["condition_number"])
    assert "singular" in bare.reasons["condition_number"]
    assert math.isnan(bare["stein_divergence"])
    assert "singular" in bare.reasons["step_angle"]
    damped = compare(reference, low, gradient=GRADIENT, damping=0.1).row("one", "it")
    dense = low["it"].blocks["one"].dense().numpy() + 0.1 * np.eye(15)
    assert damped["condition_number"] == pytest.approx(np.linalg.cond(dense))
    assert damped["stein_divergence"] > 0


def test_zeros_rounded_below_zero_are_not_called_indefinite() -> None:
    low = cases.normal(16, 3, seed=5).float()
    rounded = low @ low.T
    assert torch.linalg.eigvalsh(rounded.double())[0] < -1e-8
    row = compare(DenseOperator(rounded), IdentityOperator(16, 1.0, dtype=torch.float32)).rows[0]
    assert math.isnan(row["stein_divergence"])
    assert "singular to working precision" in row.reasons["stein_divergence"]


def test_a_zero_reference_has_no_relative_numbers() -> None:
    zero = DenseOperator(torch.zeros(4, 4, dtype=torch.float64))
    row = compare(zero, DenseOperator(cases.definite(4, 0))).rows[0]
    for name in ("error", "cosine", "spectral_error", "spectrum_distance", "best_in_class"):
        assert math.isnan(row[name]), name
        assert "zero" in row.reasons[name]


def test_small_differences_keep_their_digits() -> None:
    """The difference is taken before the norm, so that it does not drown in rounding."""
    matrix = cases.reference_matrix()
    noise = 1e-11 * cases.definite(cases.SIZE, 9)
    row = compare(DenseOperator(matrix), DenseOperator(matrix + noise)).rows[0]
    wanted = float(noise.norm() / matrix.norm())
    assert row.error == pytest.approx(wanted, rel=1e-3)
    scaled = compare(DenseOperator(matrix), DenseOperator(3 * (matrix + noise))).rows[0]
    assert 0 < scaled["error_rescaled"] < 1.01 * wanted
    assert scaled["scale"] == pytest.approx(1 / 3)


# -- damping and gradient ------------------------------------------------------------------------


def test_damping_comes_from_the_argument_then_from_the_approximation() -> None:
    reference = cases.reference()
    own = cases.block_diagonal("Kronecker").with_info(settings={"damping": 0.05})
    plain = cases.block_diagonal("diagonal")
    found = compare(reference, {"own": own, "plain": plain}, gradient=GRADIENT)
    assert found.row("one", "own").damping == 0.05
    assert found.row("one", "plain").damping is None
    each = compare(reference, {"own": own, "plain": plain}, damping={"own": 0.4})
    assert each.row("(all)", "own").damping == 0.4
    assert each.row("(all)", "plain").damping is None


def test_damping_that_is_part_of_the_matrix_is_not_added_twice() -> None:
    reference = cases.reference()
    bare = cases.block_diagonal("Kronecker")
    damped = bare.damped(0.2).with_info(settings={"damping": 0.2, "damped": True})
    one = compare(reference, {"it": bare}, gradient=GRADIENT, damping=0.2)
    other = compare(reference, {"it": damped}, gradient=GRADIENT)
    for name in ("step_angle", "decrease_ratio", "stein_divergence", "condition_number"):
        for row, twin in zip(one.rows, other.rows, strict=True):
            assert twin[name] == pytest.approx(row[name], rel=1e-8), name


def test_a_problem_can_be_the_gradient() -> None:
    class Stub:
        def gradient(self) -> torch.Tensor:
            return GRADIENT

    op = {"it": cases.block_diagonal("Kronecker")}
    one = compare(cases.reference(), op, gradient=Stub(), damping=0.1)
    other = compare(cases.reference(), op, gradient=GRADIENT, damping=0.1)
    assert one.row("two", "it")["step_angle"] == other.row("two", "it")["step_angle"]


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"damping": -1.0}, errors.OptionError, "negative"),
        ({"gradient": torch.ones(5)}, errors.ShapeError, r"\[23\]"),
        ({"gradient": "g"}, errors.OptionError, "Problem"),
        ({"gradient": torch.full((23,), math.nan)}, errors.OptionError, "NaN"),
        ({"budget": 3}, errors.OptionError, "budget"),
        ({"tol": 0.0}, errors.OptionError, "tol"),
        ({"metrics": ["eror"]}, errors.OptionError, "error"),
        ({"blocks": ["ones"]}, errors.UnknownBlockError, "'one'"),
    ],
)
def test_bad_options_are_refused(options: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        compare(cases.reference(), {"it": cases.block_diagonal("diagonal")}, **options)


def test_nan_in_a_matrix_is_named() -> None:
    class Broken(Operator):
        shape, dtype, device = (4, 4), torch.float64, torch.device("cpu")

        def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
            return math.nan * vectors

    row = compare(DenseOperator(cases.definite(4, 0)), {"it": Broken()}).rows[0]
    assert math.isnan(row.error)
    assert "NaN" in row.reasons["error"]


def test_float32_operators_are_compared_in_float64() -> None:
    reference, approximation = cases.reference(), cases.block_diagonal("Kronecker")
    single = BlockDiagonalOperator(
        {name: block.to(torch.float32) for name, block in approximation.blocks.items()},
        cases.LAYOUT,
        cases.MEMBERS,
    )
    one = compare(reference, {"it": approximation}).row("(all)", "it").error
    other = compare(reference, {"it": single}).row("(all)", "it").error
    assert other == pytest.approx(one, rel=1e-6)
    assert other != one


def test_a_new_metric_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, known in list(METRICS.items()):  # put back what is there after the test
        monkeypatch.setitem(METRICS, name, known)
    monkeypatch.setitem(METRICS, "largest_entry", None)

    @metric("largest entry of the difference", better="low")
    def largest_entry(pair: Pair) -> float:
        """``max_ij |R_ij - B_ij|``."""
        return float(pair.difference.abs().max())

    found = compare(cases.reference(), {"it": cases.block_diagonal("Kronecker")})
    difference = cases.reference_matrix() - cases.block_diagonal("Kronecker").dense()
    assert found.row("(all)", "it")["largest_entry"] == float(difference.abs().max())
    assert "largest_entry" in found.to_frame().columns
    assert found.best("one", "largest_entry").approximation == "it"
    assert largest_entry.__doc__ == METRICS["largest_entry"].doc
