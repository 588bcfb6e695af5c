"""Curvature on a plane: the restriction against dense matrices, level lines by their equation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope import errors
from curvscope import training as tr
from curvscope.operators import BlockDiagonalOperator, DenseOperator, FunctionOperator
from tests.truth import dense_hessian

from .nets import data, problem


def plane_of(p: cs.Problem, known: bool = True) -> tr.Plane:
    plane = tr.random_plane(p, seed=2, normalise="none")
    layout = p.layout if known else None
    return tr.plane_along(plane.origin, plane.directions, layout=layout)


def test_the_hessian_by_autograd() -> None:
    p = problem()
    plane = plane_of(p)
    (x0, y0), (x1, y1) = data()
    value = nn.CrossEntropyLoss()(p.model(torch.cat([x0, x1])), torch.cat([y0, y1]))
    H = dense_hessian(value, list(p.params.values()))
    expected = plane.directions.mT @ H @ plane.directions
    found = tr.ellipse(cs.hessian(p), plane)
    assert torch.allclose(found.matrix, expected, rtol=1e-10, atol=1e-13)
    values, axes = found.values, found.axes
    assert torch.allclose(axes @ torch.diag(values) @ axes.mT, expected, rtol=1e-10, atol=1e-13)
    for angle, axis in zip(found.angles, axes.mT, strict=True):
        direction = torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
        assert abs(float(direction.double() @ axis)) == pytest.approx(1.0, abs=1e-6)
        assert -90 < angle <= 90
    assert found.centre.tolist() == [0, 0] and found.uncovered == ()


@pytest.mark.parametrize("make", [cs.ggn, cs.kfac, cs.exact_diagonal], ids=["GGN", "K-FAC", "diag"])
def test_approximations_and_their_blocks(make) -> None:
    p = problem()
    op, plane = make(p), plane_of(p)
    D = plane.directions
    assert torch.allclose(tr.ellipse(op, plane).matrix, D.mT @ op.dense() @ D, atol=1e-13)
    total = torch.zeros(2, 2, dtype=torch.float64)
    for name in op.blocks:
        block = op.blocks[name]
        rows = p.layout.index(p.blocks[name])
        expected = D[rows].mT @ block.dense() @ D[rows]
        one = tr.ellipse(block, plane)
        assert torch.allclose(one.matrix, expected, rtol=1e-10, atol=1e-13)
        without = tr.ellipse(block, plane_of(p, known=False), layout=p.layout)
        assert torch.equal(without.matrix, one.matrix)
        total += one.matrix
    if make is not cs.ggn:
        assert torch.allclose(total, tr.ellipse(op, plane).matrix, atol=1e-13)


def test_uncovered_blocks_count_as_zero_and_are_named() -> None:
    p = problem()
    full, plane = cs.kfac(p), plane_of(p)
    half = BlockDiagonalOperator({"0": full.blocks["0"]}, p.layout, p.blocks)
    found = tr.ellipse(half, plane)
    assert found.uncovered == ("3",)
    assert torch.equal(found.matrix, tr.ellipse(full.blocks["0"], plane).matrix)
    with pytest.raises(errors.UncoveredError):
        half @ plane.directions  # the operator itself is as before


def test_centre_and_distance(randn64) -> None:
    p = problem()
    plane = plane_of(p)
    theta = randn64(plane.size, seed=8)
    found = tr.ellipse(cs.ggn(p), plane, at=theta)
    assert torch.equal(found.centre, plane.project(theta))
    assert found.distance == float(plane.distance(theta))


def quadratic(*entries: float) -> tr.Ellipse:
    """The ellipse of a symmetric matrix ``[[a, b], [b, c]]`` in its own plane."""
    a, b, c = entries
    matrix = torch.tensor([[a, b], [b, c]], dtype=torch.float64)
    plane = tr.plane_along(torch.zeros(2), torch.eye(2))
    return tr.ellipse(DenseOperator(matrix), plane, at=torch.tensor([0.5, -1.0]))


CURVES = {  # matrix -> kind, signs of the curves
    (2.0, 0.5, 1.0): ("positive", [1]),
    (-2.0, 0.5, -1.0): ("negative", [-1]),
    (2.0, 0.5, -1.0): ("indefinite", [-1, -1, 1, 1]),
    (1.0, 1.0, 1.0): ("semidefinite", [1, 1]),
    (-1.0, 1.0, -1.0): ("semidefinite", [-1, -1]),
    (0.0, 0.0, 0.0): ("zero", []),
}


@pytest.mark.parametrize("entries", list(CURVES), ids=[f"{v[0]} {k}" for k, v in CURVES.items()])
def test_curves_solve_their_equation(entries: tuple[float, float, float]) -> None:
    kind, signs = CURVES[entries]
    found = quadratic(*entries)
    assert found.kind == kind
    curves = found.curves(0.3, reach=5.0)
    assert sorted(sign for sign, _ in curves) == signs
    for sign, curve in curves:
        s = curve - found.centre
        heights = ((s @ found.matrix) * s).sum(1) / 2
        assert torch.allclose(heights, torch.full_like(heights, 0.3 * sign), rtol=1e-9, atol=1e-12)
        if kind in ("positive", "negative"):
            assert torch.allclose(curve[0], curve[-1])
        else:
            ends = s[[0, -1]].norm(dim=1)
            assert torch.allclose(ends, torch.full_like(ends, 5.0), rtol=1e-9)
            assert float(s.norm(dim=1).max()) < 5 * (1 + 1e-9)


def test_half_axes_and_what_lies_out_of_reach() -> None:
    found = quadratic(2.0, 0.0, 8.0)
    assert found.half_axes(1.0) == pytest.approx((1.0, 0.5))
    assert found.angles == pytest.approx((0.0, 90.0))
    singular = quadratic(2.0, 0.0, 0.0)
    assert singular.half_axes(1.0) == (math.inf, 1.0)
    assert singular.curves(1.0, reach=0.5) == []
    flat = quadratic(1.0, 0.0, 1e-14)
    assert flat.kind == "semidefinite"


def test_refusals(randn64) -> None:
    p = problem()
    plane, op = plane_of(p), cs.ggn(p)
    unnamed = plane_of(p, known=False)
    with pytest.raises(errors.ShapeError, match=r"layout=problem\.layout"):
        tr.ellipse(op.blocks["0"], unnamed)
    with pytest.raises(errors.ShapeError, match="For a block"):
        tr.ellipse(DenseOperator(torch.eye(3)), plane)
    other = cs.Problem(nn.Linear(4, 5).double(), nn.MSELoss(), (randn64(3, 4), randn64(3, 5)))
    with pytest.raises(errors.ParameterMismatchError, match="weight"):
        tr.ellipse(cs.ggn(other), plane)
    same_size = cs.Problem(
        nn.Linear(1, plane.size, bias=False).double(),
        nn.MSELoss(),
        (randn64(2, 1), randn64(2, plane.size)),
    )
    with pytest.raises(errors.ParameterMismatchError, match="plane is one of the parameters 0"):
        tr.ellipse(cs.ggn(same_size), plane)
    with pytest.raises(errors.ParameterMismatchError, match="the plane over"):
        tr.ellipse(cs.ggn(same_size), unnamed, layout=p.layout)
    broken = FunctionOperator(lambda v: v * torch.nan, plane.size, check=False)
    with pytest.raises(errors.NonFiniteError, match="not finite"):
        tr.ellipse(broken, plane)
    with pytest.raises(errors.ShapeError, match="one point"):
        tr.ellipse(op, plane, at=plane.directions)
    with pytest.raises(errors.OptionError, match="Operator"):
        tr.ellipse(op.dense(), plane)
    for level, reach in ((0.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(errors.OptionError, match="positive and finite"):
            tr.ellipse(op, plane).curves(level, reach=reach)
