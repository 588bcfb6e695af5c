"""Which parameters and blocks are compared with which, and what is said where some are missing."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch

import curvscope.errors as errors
from curvscope.analysis import Comparison, compare
from curvscope.analysis.metrics import METRICS
from curvscope.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    Layout,
    ParameterSpec,
    Provenance,
)
from tests.analysis import cases

COLUMNS = [
    *("block", "approximation", "status", "size", "family", "damping", "error", "error_stderr"),
    *("best_class", "best_in_class", "excess", "outside", "outside_stderr"),
]


def error(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / left.norm())


def test_whole_matrices_without_blocks_make_one_row() -> None:
    left, right = cases.definite(6, 0), cases.definite(6, 1)
    found = compare(DenseOperator(left), DenseOperator(right))
    assert [row.block for row in found.rows] == ["(all)"]
    assert found.rows[0].error == pytest.approx(error(left, right))
    assert math.isnan(found.rows[0].outside)


def test_tensors_and_arrays_are_taken_as_matrices() -> None:
    left, right = cases.definite(6, 0), cases.definite(6, 1)
    found = compare(left, {"it": right.numpy()})
    assert found.rows[0].error == pytest.approx(error(left, right))


def test_an_approximation_without_blocks_is_restricted_to_each() -> None:
    matrix = cases.definite(cases.SIZE, 3)
    diagonal = torch.rand(cases.SIZE, dtype=torch.float64)
    found = compare(
        cases.reference(),
        {
            "with layout": DiagonalOperator(diagonal, layout=cases.LAYOUT),
            "bare": DiagonalOperator(diagonal),
            "dense": DenseOperator(matrix),
        },
    )
    R = cases.reference_matrix()
    for block, rows in cases.ROWS.items():
        part = R[rows][:, rows]
        assert found.row(block, "dense").error == pytest.approx(error(part, matrix[rows][:, rows]))
        for name in ("with layout", "bare"):
            assert found.row(block, name).family == "diagonal"
            assert found.row(block, name).error == pytest.approx(
                error(part, torch.diag(diagonal[rows]))
            )
    assert found.row("(all)", "dense").error == pytest.approx(error(R, matrix))


def test_a_reference_without_blocks_takes_those_of_an_approximation() -> None:
    approximation = cases.block_diagonal("Kronecker")
    R = cases.reference_matrix()
    found = compare(DenseOperator(R), {"it": approximation})
    assert found.blocks == ("one", "two")
    twin = compare(cases.reference(), {"it": approximation})
    for row, other in zip(found.rows, twin.rows, strict=True):
        assert row.error == pytest.approx(other.error)
        assert math.isnan(row.outside) == math.isnan(other.outside)
    assert found.row("(all)", "it").outside == pytest.approx(twin.row("(all)", "it").outside)


def test_finer_and_coarser_blocks_are_brought_together() -> None:
    R = cases.reference_matrix()
    index = {spec.name: cases.LAYOUT.index([spec.name]) for spec in cases.LAYOUT}
    finer = BlockDiagonalOperator(
        {n: DenseOperator(R[i][:, i], layout=cases.LAYOUT.restrict([n])) for n, i in index.items()},
        cases.LAYOUT,
    )
    coarser = BlockDiagonalOperator(
        {"everything": DenseOperator(R, layout=cases.LAYOUT)}, cases.LAYOUT
    )
    found = compare(cases.reference(), {"finer": finer, "coarser": coarser})
    for block in ("one", "two"):
        row = found.row(block, "finer")
        assert row.error == pytest.approx(row.best_in_class)  # it is the best of its class
        assert row.error > 0.1
        assert found.row(block, "coarser").error < 1e-12
    assert found.row("(all)", "coarser").error < 1e-12
    row = found.row("(all)", "finer")
    assert row.error == pytest.approx(row.best_in_class)
    # and the other way round: a finer reference shows less than the coarser approximation has
    reverse = compare(finer, {"it": cases.block_diagonal("Kronecker")})
    assert reverse.blocks == tuple(spec.name for spec in cases.LAYOUT)
    assert reverse.row("(all)", "it").outside == 0.0


def test_uncovered_blocks_are_rows_without_numbers_and_count_as_zero() -> None:
    blocks = cases.block_operators("Kronecker")
    partial = BlockDiagonalOperator(
        {"one": blocks["one"]},
        cases.LAYOUT,
        cases.MEMBERS,
        info=Provenance(what="K-FAC", settings={"uncovered": {"two": "it is an embedding"}}),
    )
    found = compare(cases.reference(), {"it": partial})
    missing = found.row("two", "it")
    assert missing.status == "uncovered"
    assert math.isnan(missing.error)
    assert missing.note == "the K-FAC does not define this block: it is an embedding"
    assert "says nothing about two" in missing.sentence()
    whole = found.row("(all)", "it")
    assert whole.status == "partial"
    assert "two not covered, taken as zero" in whole.note
    R = cases.reference_matrix()
    assert whole.error == pytest.approx(error(R, partial.with_uncovered("zero").dense()))
    assert any("does not cover two" in text for text in found.warnings)
    # the price of the class includes the whole of the missing block
    rows = cases.ROWS["two"]
    assert whole.best_in_class**2 >= float(R[rows][:, rows].norm() ** 2 / R.norm() ** 2)


def test_a_block_of_which_a_parameter_is_missing_is_partial() -> None:
    R = cases.reference_matrix()
    index = cases.LAYOUT.index(["one.weight"])
    only = BlockDiagonalOperator(
        {"weight": DenseOperator(R[index][:, index], layout=cases.LAYOUT.restrict(["one.weight"]))},
        cases.LAYOUT,
    )
    found = compare(cases.reference(), {"it": only})
    row = found.row("one", "it")
    assert row.status == "partial"
    assert "one.bias" in row.note
    part = R[cases.ROWS["one"]][:, cases.ROWS["one"]]
    inside = torch.zeros_like(part)
    inside[:12, :12] = part[:12, :12]
    assert row.error == pytest.approx(error(part, inside))
    assert found.row("two", "it").status == "uncovered"


def test_a_block_that_fails_is_a_row_that_says_why_and_spoils_nothing_else() -> None:
    class Failing(cases.Products):
        @property
        def blocks(self):  # type: ignore[no-untyped-def]
            found = dict(super().blocks)

            class Lazy(dict):  # type: ignore[type-arg]
                def __getitem__(self, name):  # type: ignore[no-untyped-def]
                    if name == "two":
                        raise errors.UnsupportedLayerError("not for this layer")
                    return super().__getitem__(name)

            return Lazy(found)

    good = cases.block_diagonal("diagonal")
    found = compare(cases.reference(), {"bad": Failing(cases.definite(23, 1)), "good": good})
    assert found.row("one", "bad").status == "compared"
    assert found.row("two", "bad").status == "failed"
    assert "not for this layer" in found.row("two", "bad").note
    assert found.row("(all)", "bad").status == "failed"
    assert found.row("two", "good").status == "compared"
    assert any("not for this layer" in text for text in found.warnings)


def test_chosen_blocks_only() -> None:
    op = {"it": cases.block_diagonal("diagonal")}
    one = compare(cases.reference(), op, blocks="one")
    assert [row.block for row in one.rows] == ["one"]
    both = compare(cases.reference(), op, blocks=["two", "(all)"])
    assert [row.block for row in both.rows] == ["two", "(all)"]


def test_blocks_that_the_user_defines() -> None:
    op = {"it": cases.block_diagonal("diagonal")}
    found = compare(
        cases.reference(),
        op,
        blocks={"weights": ["two.weight", "one.weight"], "biases": ["one.bias", "two.bias"]},
    )
    assert [row.block for row in found.rows] == ["weights", "biases", "(all)"]
    R, rows = cases.reference_matrix(), cases.LAYOUT.index(["one.weight", "two.weight"])
    part = R[rows][:, rows]
    wanted = torch.diag(op["it"].dense().diagonal()[rows])
    assert found.row("weights", "it").error == pytest.approx(error(part, wanted))
    with pytest.raises(errors.OptionError, match="more than one"):
        compare(cases.reference(), op, blocks={"a": "one.bias", "b": ["one.bias"]})


@pytest.mark.parametrize(
    ("layout", "word"),
    [
        ([("one.weight", (3, 4)), ("one.bias", (3,)), ("two.weight", (2, 3))], "lacks"),
        ([*[(s.name, s.shape) for s in cases.LAYOUT], ("extra", (2,))], "in addition"),
        (
            [(s.name, s.shape if s.name != "one.weight" else (4, 3)) for s in cases.LAYOUT],
            r"\[4, 3\] instead of \[3, 4\]",
        ),
        ([(s.name, s.shape) for s in reversed(cases.LAYOUT)], "order"),
    ],
)
def test_other_parameters_are_refused_and_named(layout: list, word: str) -> None:
    other = Layout(ParameterSpec(name, tuple(shape)) for name, shape in layout)
    op = DiagonalOperator(torch.ones(other.numel, dtype=torch.float64), layout=other)
    with pytest.raises(errors.ParameterMismatchError, match=word):
        compare(cases.reference(), {"it": op})


def test_other_sizes_are_refused() -> None:
    with pytest.raises(errors.ParameterMismatchError, match="23"):
        compare(cases.reference(), {"it": DenseOperator(cases.definite(5, 0))})
    with pytest.raises(errors.ShapeError, match="rows"):
        compare(DenseOperator(cases.definite(4, 0)), DenseOperator(cases.definite(5, 0)))


def test_things_that_are_no_matrices_are_refused() -> None:
    with pytest.raises(errors.OptionError, match="nothing to compare"):
        compare(cases.reference(), {})
    with pytest.raises(errors.OptionError, match="'it'"):
        compare(cases.reference(), {"it": "K-FAC"})  # type: ignore[dict-item]


# -- the result ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> Comparison:
    wrong = cases.block_diagonal("Kronecker-eigenbasis").scaled(5.0)
    found = {"K-FAC": cases.block_diagonal("Kronecker"), "wrong": wrong}
    return compare(cases.reference(), found, damping=0.1)


def test_the_frame_has_a_row_per_block_and_approximation_and_stable_columns(
    result: Comparison,
) -> None:
    frame = result.to_frame()
    assert list(frame.columns[:13]) == COLUMNS
    assert set(METRICS) <= set(frame.columns)
    assert frame.columns[-1] == "note"
    assert frame.columns.is_unique
    pairs = [(b, a) for b in ("one", "two", "(all)") for a in ("K-FAC", "wrong")]
    assert list(zip(frame["block"], frame["approximation"], strict=True)) == pairs
    details = result.details()
    assert list(details.columns) == (
        ["block", "approximation", "metric", "value", "stderr", "method", "reason"]
    )
    empty = details[details["value"].isna()]
    assert (empty["reason"] != "").all()
    assert set(details.dropna(subset="value")["method"]) == {"exact"}


def test_it_survives_pickling_and_turns_into_json(result: Comparison) -> None:
    twin = pickle.loads(pickle.dumps(result))
    np.testing.assert_equal(
        dict(twin.row("one", "K-FAC").values), dict(result.row("one", "K-FAC").values)
    )
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["type"] == "Comparison"
    assert data["rows"][0]["values"]["step_angle"] is None
    assert "gradient" in data["rows"][0]["reasons"]["step_angle"]
    assert data["rows"][0]["values"]["error"] == result.rows[0].error
    assert data["settings"]["damping"] == 0.1
    assert data["cost"]["seconds"] > 0


def test_sentences_say_what_is_the_price_of_the_class(result: Comparison) -> None:
    row = result.row("one", "K-FAC")
    assert row.sentence() == (
        f"K-FAC is off by {row.error:.3g} on one, of which {row.best_in_class:.3g} is the price of "
        "being Kronecker."
    )
    text = str(result)
    assert "Compared with the hidden (23 parameters, 2 blocks)" in text
    assert "the whole matrix" in text
    assert any("off in scale" in warning for warning in result.warnings)
    assert "wrong is off in scale" in text
    html = result._repr_html_()
    assert "<table" in html
    assert "K-FAC" in html


def test_the_best_approximation_of_a_block(result: Comparison) -> None:
    errors_of = {row.approximation: row.error for row in result.rows if row.block == "one"}
    assert result.best("one").approximation == min(errors_of, key=lambda name: errors_of[name])
    ratio = result.best("one", "trace_ratio")
    assert abs(ratio["trace_ratio"] - 1) == min(
        abs(row["trace_ratio"] - 1) for row in result.rows if row.block == "one"
    )
    with pytest.raises(errors.UnknownBlockError, match="'one'"):
        result.best("ones")
    with pytest.raises(errors.OptionError, match="metric"):
        result.best("one", "size")
    with pytest.raises(errors.NotDefinedError, match="step_angle"):
        result.best("one", "step_angle")
    with pytest.raises(errors.UnknownBlockError, match="Did you mean 'K-FAC'"):
        result.row("one", "KFAC")


def test_an_approximate_reference_and_notes_are_mentioned() -> None:
    reference = cases.block_diagonal("dense").with_info(notes=("computed as under eval()",))
    found = compare(reference, {"it": cases.block_diagonal("diagonal")})
    assert any("itself an approximation" in text for text in found.warnings)
    assert any("eval()" in text for text in found.warnings)


def test_metrics_can_be_chosen() -> None:
    found = compare(
        cases.reference(), {"it": cases.block_diagonal("diagonal")}, metrics=["cosine", "error"]
    )
    assert found.metrics == ("error", "cosine")
    assert set(found.rows[0].values) == {"error", "cosine", "best_in_class", "excess"}
    bare = compare(
        cases.reference(),
        {"it": cases.block_diagonal("diagonal")},
        metrics="error",
        best_in_class=False,
    )
    assert set(bare.rows[0].values) == {"error"}
    assert bare.references[0].best == {}


def test_classes_in_words() -> None:
    found = compare(
        cases.reference(),
        {
            kind: cases.block_diagonal(kind)
            for kind in ("Kronecker-eigenbasis", "low-rank", "dense")
        },
    )
    whole = {name: found.row("(all)", name).sentence() for name in found.approximations}
    wanted = "the price of being block-diagonal and diagonal in its Kronecker eigenbasis."
    assert whole["Kronecker-eigenbasis"].endswith(wanted)
    assert found.row("one", "low-rank").sentence().endswith("the price of being of rank 3.")
    assert "price" not in found.row("one", "dense").sentence()


def test_scale_errors_are_one_warning_per_approximation() -> None:
    good = cases.block_diagonal("dense", seed=0)
    R = good.dense()
    found = compare(
        BlockDiagonalOperator(dict(good.blocks), cases.LAYOUT, cases.MEMBERS),
        {"ten times": good.scaled(10.0), "right": good},
    )
    texts = [text for text in found.warnings if "off in scale" in text]
    assert len(texts) == 1
    assert texts[0].startswith("ten times is off in scale on one, two and the whole matrix: ")
    assert "its trace is 10 times" in texts[0]
    assert "instead of 9" in texts[0]
    assert float(R.trace()) > 0


def test_an_uncovered_block_of_the_reference_is_not_compared() -> None:
    partial = BlockDiagonalOperator(
        {"one": cases.block_operators("dense")["one"]}, cases.LAYOUT, cases.MEMBERS
    )
    found = compare(partial, {"it": cases.block_diagonal("Kronecker")})
    assert found.row("two", "it").status == "uncovered"
    assert "not compared" in found.row("two", "it").note
    assert found.row("one", "it").status == "compared"
    whole = found.row("(all)", "it")
    dense = partial.with_uncovered("zero").dense()
    assert whole.error == pytest.approx(error(dense, cases.block_diagonal("Kronecker").dense()))
    assert whole.outside == 0.0
    assert any("does not define two" in text for text in found.warnings)


def test_the_share_outside_needs_all_blocks() -> None:
    found = compare(
        cases.reference(), {"it": cases.block_diagonal("Kronecker")}, blocks=["one", "(all)"]
    )
    row = found.row("(all)", "it")
    assert math.isnan(row.outside)
    assert "blocks=" in row.reasons["outside"]
    assert row.error > 0


def test_a_problem_with_other_parameters_is_no_gradient() -> None:
    class Stub:
        layout = Layout(reversed(cases.LAYOUT))

        def gradient(self) -> torch.Tensor:
            raise AssertionError("must not be asked")

    with pytest.raises(errors.ParameterMismatchError, match="gradient="):
        compare(cases.reference(), {"it": cases.block_diagonal("diagonal")}, gradient=Stub())
