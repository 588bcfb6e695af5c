"""The quadratic model along a direction: closed forms and the definition itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors
from curvscope.operators import DenseOperator


def problem(width: int = 5) -> cs.Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    return cs.Problem(net, nn.CrossEntropyLoss(), [(x[:7], torch.arange(7) % 3),
                                                    (x[7:], torch.arange(5) % 3)])  # fmt: skip


def linear() -> cs.Problem:
    """Squared error of a linear model: the objective is its own quadratic model."""
    torch.manual_seed(1)
    x = torch.randn(10, 3, dtype=torch.float64)
    return cs.Problem(nn.Linear(3, 2).double(), nn.MSELoss(), (x, x[:, :2].sin()))


def test_exact_for_a_quadratic() -> None:
    p = linear()
    found = cs.local_model(p, cs.hessian(p))
    assert math.isinf(found.radius)
    assert float(found.residuals.max()) < 1e-12 * found.gradient_norm
    assert torch.allclose(found.actual, found.predicted, rtol=1e-9)
    assert torch.allclose(found.ratios, torch.ones(12, dtype=torch.float64), rtol=1e-9)
    assert "at least" in str(found)


def test_radius_of_a_wrong_multiple() -> None:
    """``B = 0`` and a quadratic of curvature H: ``residual = t ||H d||``."""
    p = linear()
    H, zero = cs.hessian(p).dense(), DenseOperator(torch.zeros(8, 8, dtype=torch.float64))
    g = p.gradient()
    d = -g / g.norm()
    expected = float(g.norm() / (H @ d).norm())
    found = cs.local_model(p, zero, longest=20 * expected)
    assert found.radius == pytest.approx(expected, rel=2e-3)
    assert found.curvature == 0


def gradient_at(p: cs.Problem, step: Tensor) -> tuple[float, Tensor]:
    parameters = list(p.params.values())
    parts = step.split([q.numel() for q in parameters])
    before = [q.detach().clone() for q in parameters]
    with torch.no_grad():
        for q, part in zip(parameters, parts, strict=True):
            q.add_(part.reshape(q.shape))
    try:
        return p.objective(), p.gradient()
    finally:
        with torch.no_grad():
            for q, value in zip(parameters, before, strict=True):
                q.copy_(value)


@pytest.mark.parametrize("matrix", ["Hessian", "GGN", "K-FAC"])
def test_every_number_by_moving_the_parameters(matrix: str) -> None:
    p = problem()
    make = {"Hessian": cs.hessian, "GGN": cs.ggn, "K-FAC": cs.kfac}[matrix]
    op = make(p)
    torch.manual_seed(3)
    direction = torch.randn(p.layout.numel, dtype=torch.float64)
    values = [q.detach().clone() for q in p.params.values()]
    found = cs.local_model(p, op, direction, longest=8.0)
    assert all(torch.equal(q, v) for q, v in zip(p.params.values(), values, strict=True))
    f, g = p.objective(), p.gradient()
    d = direction / direction.norm()
    Bd = op @ d
    assert found.slope == pytest.approx(float(g @ d), rel=1e-10)
    for k, t in enumerate(found.lengths.tolist()):
        there, slope = gradient_at(p, t * d)
        assert float(found.residuals[k]) == pytest.approx(
            float((slope - g - t * Bd).norm()), rel=1e-9, abs=1e-13
        )
        assert float(found.actual[k]) == pytest.approx(f - there, rel=1e-8, abs=1e-13)
        model = -t * float(g @ d) - t * t * float(d @ Bd) / 2
        assert float(found.predicted[k]) == pytest.approx(model, rel=1e-9, abs=1e-13)
    # the radius: the condition holds on it and fails just beyond
    if math.isfinite(found.radius):

        def worst(r: float) -> float:
            steps = [r * k / 40 for k in range(1, 41)]
            return (
                max(float((gradient_at(p, t * d)[1] - g - t * Bd).norm()) / t for t in steps)
                * r
                / float(g.norm())
            )

        assert worst(found.radius) <= 1.005
        assert worst(1.02 * found.radius) > 1.0


def test_the_exact_hessian_reaches_further() -> None:
    p = problem()
    zero = DenseOperator(torch.zeros(p.layout.numel, p.layout.numel, dtype=torch.float64))
    exact = cs.local_model(p, cs.hessian(p), longest=50.0)
    none = cs.local_model(p, zero, longest=50.0)
    assert none.radius < exact.radius
    frame = exact.to_frame()
    assert list(frame) == ["length", "residual", "actual_decrease", "predicted_decrease", "ratio"]


def test_refusals() -> None:
    p = problem()
    H = cs.hessian(p)
    with pytest.raises(errors.ShapeError, match="all parameters"):
        cs.local_model(p, H.blocks["0"])
    with pytest.raises(errors.ShapeError, match="direction"):
        cs.local_model(p, H, torch.ones(3))
    with pytest.raises(errors.OptionError, match="direction"):
        cs.local_model(p, H, torch.zeros(p.layout.numel))
    with pytest.raises(errors.OptionError, match="points"):
        cs.local_model(p, H, points=0)
