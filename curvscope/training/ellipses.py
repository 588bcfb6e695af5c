"""Curvature on a plane: the two-by-two restriction of a matrix and its level lines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError, OptionError, ParameterMismatchError, ShapeError
from ..operators import Layout, Operator
from .planes import Plane

_ZERO = 1e-12  # eigenvalues below this share of the larger one are zero


@dataclass(frozen=True, eq=False)
class Ellipse:
    """The curvature of a matrix ``B`` on a plane with directions ``D`` ``[P, 2]``.

    ``matrix`` is ``D^T B D`` ``[2, 2]``, ``values`` ``[2]`` its eigenvalues, ascending, ``axes``
    ``[2, 2]`` its eigenvectors as columns, ``angles`` their angles to the first axis in degrees,
    within (-90, 90]; ``centre`` ``[2]`` the coordinates of the point it belongs to, and
    ``distance`` that point's distance from the plane. ``uncovered`` names the parameters or blocks
    on which the matrix is not defined and was taken as zero.
    """

    of: str
    matrix: Tensor
    values: Tensor
    axes: Tensor
    angles: tuple[float, float]
    centre: Tensor
    distance: float = 0.0
    uncovered: tuple[str, ...] = field(default=())

    @property
    def kind(self) -> str:
        """``"positive"``, ``"negative"``, ``"indefinite"``, ``"semidefinite"`` or ``"zero"``."""
        signs = {self._sign(0), self._sign(1)}
        if signs == {0}:
            return "zero"
        if 0 in signs:
            return "semidefinite"
        if len(signs) == 2:
            return "indefinite"
        return "positive" if signs == {1} else "negative"

    def _sign(self, k: int) -> int:
        value = float(self.values[k])
        small = abs(value) <= _ZERO * float(self.values.abs().max())
        return 0 if small else (1 if value > 0 else -1)

    def half_axes(self, level: float) -> tuple[float, float]:
        """``sqrt(2 level / |lambda|)`` for both eigenvalues; infinite where there is no curvature.

        That far along each axis the quadratic term changes the objective by ``level``.
        """
        lengths = [
            math.sqrt(2 * level / abs(float(v))) if self._sign(k) else math.inf
            for k, v in enumerate(self.values)
        ]
        return lengths[0], lengths[1]

    def curves(self, level: float, *, reach: float, count: int = 181) -> list[tuple[int, Tensor]]:
        """Where the quadratic term ``s^T D^T B D s / 2`` equals ``level`` or ``-level``.

        Pairs ``(sign, points [n, 2])`` in the plane's coordinates: one closed curve for a definite
        matrix, two branches per sign for an indefinite one (hyperbolas), two lines for a singular
        one, nothing for zero. Open curves end at the distance ``reach`` from the centre. Raises
        ``OptionError`` unless ``level`` and ``reach`` are positive and finite.
        """
        for name, value in (("level", level), ("reach", reach)):
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"{name}={value!r} must be positive and finite.")
        signs = (self._sign(0), self._sign(1))
        lengths = self.half_axes(level)
        found: list[tuple[int, np.ndarray]] = []
        if signs[0] == signs[1] != 0:
            t = np.linspace(0, 2 * math.pi, count)
            found.append((signs[0], np.stack([lengths[0] * np.cos(t), lengths[1] * np.sin(t)], 1)))
        else:
            for k in (0, 1):
                if signs[k]:
                    found += [(signs[k], part) for part in _branches(k, lengths, reach, count)]
        axes, centre = self.axes.numpy(), self.centre.numpy()
        return [(sign, torch.from_numpy(centre + part @ axes.T)) for sign, part in found]


def ellipse(
    op: Operator, plane: Plane, *, at: Tensor | None = None, layout: Layout | None = None
) -> Ellipse:
    """The curvature of a matrix on a plane: ``D^T B D`` with its eigenvalues and axes.

    ``op`` is an exact or approximate matrix over the plane's parameters, or over some of them (a
    block), which is taken as zero elsewhere, as are the blocks that an approximation leaves
    uncovered. A block needs to know where it lies: ``layout`` is ``problem.layout`` for planes that
    were made without it. ``at`` ``[P]`` is the point at which the matrix was taken, for the place
    in pictures (default: the plane's origin); nothing is computed there.

    Source: the second-order term of Taylor's expansion, restricted to the plane.
    Cost: two products with the matrix. Raises ``ShapeError`` and ``ParameterMismatchError`` for a
    matrix or point of other parameters, ``NonFiniteError`` if the products are not finite.
    """
    if not isinstance(op, Operator):
        raise OptionError(f"An Operator is needed, not {type(op).__name__}: cs.hessian(problem).")
    rows = _rows(op, plane, layout)
    directions = plane.directions if rows is None else plane.directions[rows]
    uncovered = tuple(op.uncovered)
    fill = getattr(op, "with_uncovered", None)
    if uncovered and fill is not None:
        op = fill("zero")
    image = (op @ directions.to(op.dtype)).to("cpu", torch.float64)
    matrix = directions.mT @ image
    matrix = (matrix + matrix.mT) / 2
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"The {op.info.what} times the plane's directions is not finite.")
    values, axes = torch.linalg.eigh(matrix)
    angles = [_angle(*column) for column in axes.mT.tolist()]
    centre = torch.zeros(2, dtype=torch.float64) if at is None else plane.project(at)
    if centre.ndim != 1:
        raise ShapeError(f"at= is one point [{plane.size}], not several.")
    return Ellipse(
        of=op.info.what,
        matrix=matrix,
        values=values,
        axes=axes,
        angles=(angles[0], angles[1]),
        centre=centre,
        distance=0.0 if at is None else float(plane.distance(at)),
        uncovered=uncovered,
    )


def _rows(op: Operator, plane: Plane, layout: Layout | None) -> Tensor | None:
    """Rows of the plane's directions that the matrix acts on; ``None`` for all."""
    whole = layout if layout is not None else plane.layout
    if whole is not None:
        plane.require(whole.numel, whole, "layout=")
    own = op.layout
    if op.shape[0] == plane.size:
        if own is not None and whole is not None:
            plane.require(own.numel, own, f"the {op.info.what}")
            if own != whole:
                raise ParameterMismatchError(
                    f"The {op.info.what} is over {list(own.names)}, the plane over "
                    f"{list(whole.names)}."
                )
        return None
    if own is None or whole is None:
        raise ShapeError(
            f"The {op.info.what} has {op.shape[0]} rows, the plane lies in a space of {plane.size} "
            "parameters. For a block pass layout=problem.layout."
        )
    shapes = {spec.name: spec.shape for spec in whole}
    strangers = [spec.name for spec in own if shapes.get(spec.name) != spec.shape]
    if strangers or whole.restrict(own.names) != own:
        raise ParameterMismatchError(
            f"The {op.info.what} is over {strangers or list(own.names)}, which the plane's "
            "parameters do not hold in this shape and order."
        )
    return whole.index(own.names)


def _branches(k: int, lengths: tuple[float, float], reach: float, count: int) -> list[np.ndarray]:
    """Both branches that cross axis ``k``, within ``reach`` of the centre."""
    a, b = lengths[k], lengths[1 - k]
    if a >= reach:
        return []
    if math.isinf(b):
        side = math.sqrt(reach**2 - a**2)
        v = np.linspace(-side, side, count)
        u = np.full(count, a)
    else:
        # |(a cosh t, b sinh t)| = reach
        end = math.asinh(math.sqrt((reach**2 - a**2) / (a**2 + b**2)))
        t = np.linspace(-end, end, count)
        u, v = a * np.cosh(t), b * np.sinh(t)
    branches = []
    for sign in (1.0, -1.0):
        points = np.empty((count, 2))
        points[:, k], points[:, 1 - k] = sign * u, v
        branches.append(points)
    return branches


def _angle(x: float, y: float) -> float:
    angle = math.degrees(math.atan2(y, x))
    if angle <= -90:
        return angle + 180
    return angle - 180 if angle > 90 else angle
