"""How far a quadratic model of the objective can be trusted along a direction."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..display import spark
from ..errors import NonFiniteError, OptionError, ShapeError
from ..operators import Operator
from ..problem import Problem, require_problem
from .displaced import displaced, value_and_gradient
from .result import Cost, Result, number

_BISECTIONS = 30


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LocalModel(Result):
    """What :func:`local_model` found.

    With ``x`` the current parameters, ``d`` the direction of length one and ``B`` the matrix:

    ``lengths`` ``[n]`` are the steps ``t``; ``residuals`` the norms of
    ``grad f(x + t d) - grad f(x) - t B d``; ``actual`` the decrease ``f(x) - f(x + t d)``;
    ``predicted`` that of the model, ``-t g^T d - t^2 d^T B d / 2``. ``radius`` is the
    gradient-normalised smoothness along ``d``, the largest ``r`` with
    ``residual(t) <= ||grad f(x)|| t / r`` for all ``t <= r`` (0 where the gradient vanishes,
    infinity where the residual stays below that up to the longest step).
    """

    of: str
    gradient_norm: float
    slope: float
    curvature: float
    radius: float
    lengths: Tensor = field(repr=False)
    residuals: Tensor = field(repr=False)
    actual: Tensor = field(repr=False)
    predicted: Tensor = field(repr=False)

    @property
    def ratios(self) -> Tensor:
        """Actual over predicted decrease at every length; NaN where none is predicted."""
        return torch.where(self.predicted != 0, self.actual / self.predicted, torch.nan)

    def summary(self) -> str:
        """The radius, and what the model is worth at the given step."""
        reach = (
            f"at least {number(float(self.lengths[-1]))}, the longest step tried"
            if math.isinf(self.radius)
            else number(self.radius)
        )
        text = (
            f"{self.of} along this direction (curvature {number(self.curvature)}): its model of "
            f"the gradient holds within a radius of {reach}"
        )
        return f"{text} ({self.cost})."

    def _pictures(self) -> list[tuple[str, str]]:
        caption = "actual over predicted decrease, by length of the step"
        return [(caption, spark(self.ratios.tolist(), caption))]

    def records(self) -> list[dict[str, float]]:
        """One row per step length."""
        columns = {
            "length": self.lengths,
            "residual": self.residuals,
            "actual_decrease": self.actual,
            "predicted_decrease": self.predicted,
            "ratio": self.ratios,
        }
        rows = zip(*(c.tolist() for c in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]


def local_model(
    problem: Problem,
    matrix: Operator,
    direction: Tensor | None = None,
    *,
    longest: float | None = None,
    points: int = 12,
) -> LocalModel:
    """How well ``f(x) + g^T s + s^T B s / 2`` describes the objective along a direction.

    ``matrix`` is any (approximate) Hessian ``B`` over all parameters of the problem, taken at the
    current parameters. ``direction`` ``[P]`` is by default the negative gradient; only its
    direction counts. Steps are ``points`` lengths up to ``longest`` (by default ten times the
    model's own step ``-g^T d / |d^T B d|``, or the length of ``direction`` where that is given and
    longer), each half the one above it. The radius is then found by bisection.

    Source: gradient-normalised smoothness, Semenov, Jaggi and Doikov, "Gradient-normalized
    smoothness for optimization with approximate Hessians" (2025), here along one direction; ratio
    of actual to predicted decrease, the trust-region test (Nocedal and Wright 2006, eq. 4.4).

    Cost: one product with ``matrix`` and ``points + 31`` gradients at most. Raises
    ``ShapeError`` for a direction of another size, ``OptionError`` for a zero direction.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> found = cs.local_model(problem, cs.hessian(problem))
    >>> found.radius > 0
    True
    """
    require_problem(problem)
    start = time.perf_counter()
    size = problem.layout.numel
    if matrix.shape[0] != size:
        raise ShapeError(
            f"The matrix has {matrix.shape[0]} rows, but the problem {size} parameters: take a "
            "matrix over all parameters (not a block of it)."
        )
    if points < 1:
        raise OptionError(f"points={points} must be at least 1.")
    at = problem.snapshot()
    problem.check()
    value, gradient = value_and_gradient(problem, at)
    g = gradient.double()
    d = -g if direction is None else direction.detach().to(g).reshape(-1)
    if d.numel() != size:
        raise ShapeError(f"The direction has {d.numel()} entries, the problem {size} parameters.")
    length = float(d.norm())
    if not length > 0 or not math.isfinite(length):
        what = (
            "The gradient is zero, so a direction= is needed"
            if direction is None
            else ("The direction is zero or not finite")
        )
        raise OptionError(f"{what}: pass direction=, a vector of {size} entries.")
    d = d / length
    Bd = (matrix @ d.to(matrix.dtype)).double().to(g.device)
    if not bool(torch.isfinite(Bd).all()):
        raise NonFiniteError("The matrix times the direction is NaN or infinite.")
    norm, slope, curvature = float(g.norm()), float(g @ d), float(d @ Bd)
    if longest is None:
        newton = abs(slope) / abs(curvature) if curvature else 1.0
        longest = max(10 * newton, length if direction is not None else 0.0) or 1.0
    evaluations = 1

    def residual(t: float) -> tuple[float, float]:
        nonlocal evaluations
        evaluations += 1
        there, slope_there = value_and_gradient(problem, displaced(problem, at, t * d))
        gap = float((slope_there.double() - g - t * Bd).norm())
        return (gap if math.isfinite(gap) else math.inf), value - there

    lengths = [longest * 0.5**k for k in reversed(range(points))]
    found = [residual(t) for t in lengths]
    radius = _radius(lengths, [r for r, _ in found], norm, residual)
    return LocalModel(
        of=matrix.info.what or type(matrix).__name__,
        gradient_norm=norm,
        slope=slope,
        curvature=curvature,
        radius=radius,
        lengths=torch.tensor(lengths, dtype=torch.float64),
        residuals=torch.tensor([r for r, _ in found], dtype=torch.float64),
        actual=torch.tensor([a for _, a in found], dtype=torch.float64),
        predicted=torch.tensor(
            [-t * slope - t * t * curvature / 2 for t in lengths], dtype=torch.float64
        ),
        cost=Cost(1, time.perf_counter() - start),
        settings={"longest": longest, "points": points, "gradients": evaluations},
    )


def _radius(
    lengths: list[float],
    residuals: list[float],
    norm: float,
    residual: Callable[[float], tuple[float, float]],
) -> float:
    """The largest r with ``residual(t) <= norm t / r`` for all ``t <= r``, on the grid refined.

    With ``c(t) = max_{u <= t} residual(u) / u``, which grows with t, it solves ``r c(r) = norm``.
    """
    if norm == 0:
        return 0.0
    steepest, below = 0.0, 0.0
    for t, r in zip(lengths, residuals, strict=True):
        if t * max(steepest, r / t) > norm:
            break
        steepest, below = max(steepest, r / t), t
    else:
        return math.inf
    low, high = below, t
    for _ in range(_BISECTIONS):
        if high - low <= 1e-3 * high:
            break
        middle = (low + high) / 2
        ratio = residual(middle)[0] / middle
        if middle * max(steepest, ratio) > norm:
            high = middle
        else:
            low, steepest = middle, max(steepest, ratio)
    return low
