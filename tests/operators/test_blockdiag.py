"""Block-diagonal operators: blocks out of order, missing blocks, and refusals."""

from __future__ import annotations

import pytest
import torch

from curvscope.errors import (
    OptionError,
    ParameterMismatchError,
    ShapeError,
    UncoveredError,
    UnknownBlockError,
)
from curvscope.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    FunctionOperator,
    IdentityOperator,
    KroneckerOperator,
    Layout,
    MatrixView,
    ParameterSpec,
    Sum,
    inner,
)
from tests.operators.cases import randn, spd

LAYOUT = Layout(
    [
        ParameterSpec("fc1.weight", (2, 3)),
        ParameterSpec("fc1.bias", (2,)),
        ParameterSpec("norm.weight", (3,)),
        ParameterSpec("fc2.weight", (1, 2)),
    ]
)
MEMBERS = {"fc1": ("fc1.weight", "fc1.bias"), "norm": ("norm.weight",), "fc2": ("fc2.weight",)}


def partial(uncovered: str = "raise") -> BlockDiagonalOperator:
    blocks = {"fc1": DenseOperator(spd(8)), "fc2": DenseOperator(spd(2, seed=1))}
    return BlockDiagonalOperator(blocks, LAYOUT, MEMBERS, uncovered=uncovered)


def test_an_undefined_block_is_absent_and_listed() -> None:
    op = partial()
    assert list(op.blocks) == ["fc1", "fc2"]
    assert op.uncovered == ("norm",)
    assert op.blocks["fc1"].layout == LAYOUT.restrict(MEMBERS["fc1"])


def test_whatever_needs_an_undefined_block_raises_and_names_it() -> None:
    op = partial()
    other = IdentityOperator(13, dtype=torch.float64)
    actions = [
        lambda: op @ randn(13),
        lambda: op @ randn(13, 2),
        op.dense,
        op.diagonal,
        op.trace,
        op.frobenius_norm,
        op.eigenvalues,
        op.eigh,
        op.logdet,
        lambda: inner(op, op),
        lambda: inner(op, DenseOperator(spd(13))),
        lambda: inner(DenseOperator(spd(13)), op),
        lambda: inner(op, other),
        lambda: inner(other, op),
        lambda: (op + DenseOperator(spd(13))) @ randn(13),
        lambda: (2 * op) @ randn(13),
        lambda: op.damped(1.0) @ randn(13),
        lambda: op.inverse(1.0) @ randn(13),
    ]
    for action in actions:
        with pytest.raises(UncoveredError, match="'norm'") as caught:
            action()
        assert "with_uncovered('zero')" in str(caught.value)
    assert (2 * op).uncovered == op.damped(1.0).uncovered == op.inverse(1.0).uncovered == ("norm",)
    assert (op + DenseOperator(spd(13))).uncovered == ("norm",)


def test_uncovered_rows_are_zero_on_request() -> None:
    op = partial().with_uncovered("zero")
    rows = LAYOUT.index(["norm.weight"])
    dense = op.dense()
    assert float(dense[rows].abs().max()) == float(dense[:, rows].abs().max()) == 0.0
    assert torch.equal(op.diagonal(), dense.diagonal())
    assert torch.equal((op @ torch.ones(13))[rows], torch.zeros(3, dtype=torch.float64))
    assert op.uncovered == ("norm",)
    covered = LAYOUT.index(["fc1.weight", "fc1.bias", "fc2.weight"])
    assert torch.equal(
        dense[covered][:, covered],
        partial().restrict(["fc1.weight", "fc1.bias", "fc2.weight"]).dense(),
    )
    with pytest.raises(UncoveredError):  # the original is what it was
        partial().dense()
    assert partial("zero").with_uncovered("raise").uncovered == ("norm",)
    with pytest.raises(OptionError, match="zero"):
        partial("ignore")


def test_damping_reaches_the_uncovered_rows() -> None:
    op = partial("zero").damped(0.5)
    rows = LAYOUT.index(["norm.weight"])
    assert torch.equal(op.diagonal()[rows], torch.full((3,), 0.5, dtype=torch.float64))
    inverse = partial("zero").inverse(0.5)
    assert torch.allclose(inverse.dense(), torch.linalg.inv(op.dense()), atol=1e-12)
    later = partial().inverse(0.5)
    assert isinstance(later, BlockDiagonalOperator)
    assert torch.equal(later.with_uncovered("zero").dense(), inverse.dense())
    assert torch.allclose((2 * op).dense(), 2 * op.dense())
    assert torch.allclose((op + op).dense(), 2 * op.dense())


def test_unknown_blocks_are_refused_with_the_nearest_names() -> None:
    op = partial()
    with pytest.raises(UnknownBlockError, match=r"Did you mean .*'fc1'"):
        op.blocks["fc"]
    with pytest.raises(KeyError):
        op.blocks["something else"]
    with pytest.raises(UnknownBlockError, match="not defined"):
        op.blocks["norm"]
    assert op.blocks.get("norm") is None and "norm" not in op.blocks and len(op.blocks) == 2


def test_algebra_keeps_the_blocks() -> None:
    op = partial("zero")
    for other in (2 * op, op.damped(0.1), op + op, op - 0.5 * op, op.inverse(0.1), -op):
        assert isinstance(other, BlockDiagonalOperator)
        assert list(other.blocks) == ["fc1", "fc2"]
        assert other.members == op.members
    layout = Layout([ParameterSpec("w", (3, 4))])
    kron = BlockDiagonalOperator({"w": KroneckerOperator(spd(3), spd(4))}, layout, {"w": ("w",)})
    assert isinstance((2 * kron).blocks["w"], KroneckerOperator)
    mixed = kron + DenseOperator(spd(12), layout=layout)
    assert isinstance(mixed, Sum) and not mixed.blocks


def test_sum_of_different_divisions_has_no_blocks_but_is_right() -> None:
    one = BlockDiagonalOperator({"all": DenseOperator(spd(13))}, LAYOUT, {"all": LAYOUT.names})
    two = partial("zero")
    total = one + two
    assert torch.allclose(total.dense(), one.dense() + two.dense())
    assert abs(inner(one, two) - float((one.dense() * two.dense()).sum())) < 1e-12
    unlaid = FunctionOperator(lambda v: one.dense() @ v, 13)
    assert abs(inner(two, unlaid) - float((one.dense() * two.dense()).sum())) < 1e-11


def test_restriction_cuts_blocks() -> None:
    op = partial()
    part = op.restrict(["fc1.bias", "fc2.weight"])
    index = LAYOUT.index(["fc1.bias", "fc2.weight"])
    assert torch.equal(part.dense(), op.with_uncovered("zero").dense()[index][:, index])
    assert op.restrict("norm.weight").uncovered == ("norm",)
    only = op.restrict(["norm.weight"])
    assert only.shape == (3, 3) and only.dtype == torch.float64
    with pytest.raises(UncoveredError):
        only.dense()


def test_ill_fitting_blocks_are_refused() -> None:
    good = {"fc1": DenseOperator(spd(8))}
    with pytest.raises(ShapeError, match="'fc1' has 8 rows"):
        BlockDiagonalOperator(good, LAYOUT, {"fc1": ("fc1.weight",)})
    with pytest.raises(ParameterMismatchError, match="two blocks"):
        BlockDiagonalOperator(good, LAYOUT, {"fc1": MEMBERS["fc1"], "again": ("fc1.bias",)})
    with pytest.raises(ParameterMismatchError, match="not among"):
        BlockDiagonalOperator(good, LAYOUT, {"fc1": ("fc1.weights",)})
    with pytest.raises(OptionError, match="members"):
        BlockDiagonalOperator(good, LAYOUT)
    with pytest.raises(OptionError, match="members"):
        BlockDiagonalOperator(good, LAYOUT, {"fc2": ("fc2.weight",)})
    other = DenseOperator(spd(8), layout=Layout([ParameterSpec("x", (8,))]))
    with pytest.raises(ParameterMismatchError, match="'fc1'"):
        BlockDiagonalOperator({"fc1": other}, LAYOUT, MEMBERS)
    mixed = {"fc1": DenseOperator(spd(8)), "fc2": DenseOperator(spd(2).float())}
    with pytest.raises(OptionError, match="dtype"):
        BlockDiagonalOperator(mixed, LAYOUT, MEMBERS)
    with pytest.raises(OptionError, match="uncovered"):
        BlockDiagonalOperator(good, LAYOUT, MEMBERS, uncovered_names=["fc1"])


def test_blocks_with_layouts_need_no_members() -> None:
    block = DenseOperator(spd(8), layout=LAYOUT.restrict(MEMBERS["fc1"]))
    op = BlockDiagonalOperator({"fc1": block}, LAYOUT)
    assert op.members == {"fc1": MEMBERS["fc1"]}
    assert op.uncovered == ("norm.weight", "fc2.weight")
    named = BlockDiagonalOperator({"fc1": block}, LAYOUT, uncovered_names=["norm", "fc2"])
    assert named.uncovered == ("norm", "fc2")


def test_the_given_block_is_not_changed() -> None:
    block = DiagonalOperator(randn(3))
    BlockDiagonalOperator({"norm": block}, LAYOUT, {"norm": ("norm.weight",)})
    assert block.layout is None


def test_without_any_block() -> None:
    op = BlockDiagonalOperator({}, LAYOUT, MEMBERS, uncovered="zero")
    assert op.uncovered == ("fc1", "norm", "fc2")
    assert op.trace() == 0.0 and float((op @ torch.ones(13)).abs().max()) == 0.0


def test_what_is_no_operator_and_factors_in_another_order_are_refused() -> None:
    layout = Layout([ParameterSpec("w", (4, 2)), ParameterSpec("b", (4,))])
    with pytest.raises(OptionError, match="'layer' must be an Operator, not NoneType"):
        BlockDiagonalOperator({"layer": None}, layout)  # type: ignore[dict-item]
    with pytest.raises(OptionError, match=r"view=MatrixView.for_weight_and_bias\(4, 2\)"):
        BlockDiagonalOperator({"layer": KroneckerOperator(spd(4), spd(3))}, layout, {"layer": "wb"})
    view = MatrixView.for_weight_and_bias(4, 2)
    block = KroneckerOperator(spd(4), spd(3), view)
    assert torch.equal(
        BlockDiagonalOperator({"layer": block}, layout, {"layer": "wb"}).dense(), block.dense()
    )
