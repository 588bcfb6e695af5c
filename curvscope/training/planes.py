"""Planes in parameter space: on which paths are projected and the loss is evaluated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import (
    NonFiniteError,
    NotDefinedError,
    ParameterMismatchError,
    ShapeError,
    check_option,
)
from ..operators import Layout
from ..problem import Problem, require_problem
from .paths import flat_parameters, products, read_paths

Extent = tuple[tuple[float, float], tuple[float, float]]
_MARGIN = 0.2
_FLAT = 1e-10  # a second direction shorter than this share of the first is none


@dataclass(frozen=True, eq=False)
class Plane:
    """The points ``origin + x d_1 + y d_2``, with ``d_1`` and ``d_2`` of length one, orthogonal.

    ``origin`` ``[P]`` and ``directions`` ``[P, 2]`` are float64 on the CPU (24 P bytes); ``names``
    say what the axes are; ``explained`` is the share of the snapshots' variance along each axis
    (NaN for other planes); ``extent`` ``((x_0, x_1), (y_0, y_1))`` the part that pictures show by
    default. ``layout`` names the parameters, where that is known.
    """

    origin: Tensor = field(repr=False)
    directions: Tensor = field(repr=False)
    names: tuple[str, str] = ("x", "y")
    explained: tuple[float, float] = (math.nan, math.nan)
    extent: Extent = ((-1.0, 1.0), (-1.0, 1.0))
    layout: Layout | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return self.origin.numel()

    def project(self, theta: Tensor) -> Tensor:
        """Coordinates ``[2]`` of the point of the plane nearest to ``theta`` ``[P]``.

        ``[P, k]`` gives ``[2, k]``. Raises ``ShapeError`` for another number of entries.
        """
        return self.directions.mT @ self._from_origin(theta)

    def lift(self, xy: Tensor | Sequence[float]) -> Tensor:
        """The parameters ``[P]`` (float64) at coordinates ``[2]``; ``[2, k]`` gives ``[P, k]``."""
        coordinates = torch.as_tensor(xy, dtype=torch.float64).detach().cpu()
        if coordinates.ndim not in (1, 2) or coordinates.shape[0] != 2:
            raise ShapeError(f"Coordinates are [2] or [2, k], not {list(coordinates.shape)}.")
        origin = self.origin if coordinates.ndim == 1 else self.origin.unsqueeze(1)
        return origin + self.directions @ coordinates

    def distance(self, theta: Tensor) -> Tensor:
        """Distance of ``theta`` ``[P]`` from the plane, a scalar; ``[P, k]`` gives ``[k]``."""
        moved = self._from_origin(theta)
        return (moved - self.directions @ (self.directions.mT @ moved)).norm(dim=0)

    def inside(self, movement: Tensor) -> Tensor:
        """Share of the squared length of ``movement`` ``[P]`` that lies along the plane."""
        movement = self._checked(movement)
        total = movement.square().sum(0)
        along = (self.directions.mT @ movement).square().sum(0)
        return torch.where(total > 0, along / total, torch.nan)

    def require(self, size: int, layout: Layout | None, whose: str) -> None:
        """Raise unless the plane is one of these parameters (``layout``, if both know theirs)."""
        if size != self.size:
            raise ShapeError(
                f"The plane lies in a space of {self.size} parameters, {whose} has {size}: make it "
                "of full snapshots of the same parameters."
            )
        if layout is not None and self.layout is not None and layout != self.layout:
            raise ParameterMismatchError(
                f"The plane is one of the parameters {_short(self.layout)}, {whose} of "
                f"{_short(layout)}."
            )

    def _checked(self, theta: Tensor) -> Tensor:
        if not isinstance(theta, Tensor) or theta.ndim not in (1, 2):
            raise ShapeError(f"Parameters are a tensor [{self.size}] or [{self.size}, k].")
        if theta.shape[0] != self.size:
            raise ShapeError(
                f"The vector has {theta.shape[0]} entries, the plane lies in a space of {self.size}"
                " parameters: it is a snapshot of another problem."
            )
        return theta.detach().to("cpu", torch.float64)

    def _from_origin(self, theta: Tensor) -> Tensor:
        theta = self._checked(theta)
        return theta - (self.origin if theta.ndim == 1 else self.origin.unsqueeze(1))


def plane_of_paths(
    runs: Any, *, origin: Tensor | None = None, layout: Layout | None = None
) -> Plane:
    """The plane of the first two principal components of one or several runs' snapshots.

    With the snapshots as rows of ``X`` ``[n, P]``, centred at their mean, the directions are the
    first two right singular vectors of ``X``, got from ``X X^T`` ``[n, n]``; ``explained`` is
    ``s_i^2 / sum_j s_j^2``. All snapshots weigh the same, so a run with more of them counts more.

    ``runs`` is ``{"name": [(step, tensor [P]), ...]}``, one such list, or objects with
    ``snapshots()``. ``origin`` ``[P]`` takes another centre than the mean: with the final
    parameters of a training this is the construction of Li et al. ``layout`` (``problem.layout``)
    names the parameters. Snapshots with NaN or infinity are left out, and ``notes`` says so.

    Source: Li, Xu, Taylor, Studer and Goldstein 2018 (arXiv 1712.09913), section 7.2.
    Cost: ``O(n^2 P)`` operations, 24 P bytes beside the snapshots. Raises ``NotDefinedError`` if
    the snapshots lie on a line, ``ShapeError`` and ``OptionError`` for snapshots that do not fit.
    """
    paths = read_paths(runs)
    rows = [v for p in paths for v, good in zip(p.vectors, p.finite, strict=True) if good]
    lost = sum(len(path.vectors) for path in paths) - len(rows)
    notes = (f"{lost} snapshots with NaN or infinity are left out.",) if lost else ()
    if not rows:
        raise NonFiniteError("Every snapshot holds NaN or infinity: there is no plane.")
    size = rows[0].numel()
    if origin is None:
        centre = torch.zeros(size, dtype=torch.float64)
        for row in rows:
            centre += row.double() / len(rows)
    else:
        centre = _vector("origin", origin, size)
    gram = products(rows, rows, centre)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # below this the Gram matrix holds rounding only: of the snapshots, and of the products
    resolution = max(torch.finfo(rows[0].dtype).eps * float(centre.norm()), 0.0) ** 2
    floor = max(1e-14 * float(values[0]), resolution)
    if len(rows) < 2 or float(values[1]) <= floor:
        raise NotDefinedError(
            f"{len(rows)} snapshots lie on one line (or are all the same), so two principal "
            "components are not defined: keep at least three different ones, or take "
            "plane_along(origin, [direction, another])."
        )
    directions = torch.zeros(size, 2, dtype=torch.float64)
    for k in range(2):
        weights = vectors[:, k] / values[k].sqrt()
        weights = weights * weights[weights.abs().argmax()].sign()
        for weight, row in zip(weights.tolist(), rows, strict=True):
            directions[:, k] += weight * (row.double() - centre)
    directions = _orthonormal(directions)
    coordinates = torch.stack([directions.mT @ (row.double() - centre) for row in rows], 1)
    shares = values[:2] / values.sum()
    return Plane(
        origin=centre,
        directions=directions,
        names=("principal component 1", "principal component 2"),
        explained=(float(shares[0]), float(shares[1])),
        extent=around(coordinates),
        layout=layout,
        notes=notes,
    )


def plane_through(a: Tensor, b: Tensor, c: Tensor, *, layout: Layout | None = None) -> Plane:
    """The plane through three points ``[P]``: ``a`` at (0, 0), ``b`` on the positive first axis.

    ``layout`` (``problem.layout``) names the parameters.

    Source: Garipov, Izmailov, Podoprikhin, Vetrov and Wilson 2018 (arXiv 1802.10026), appendix A.2.
    Cost: none to speak of. Raises ``NotDefinedError`` if the points lie on a line, ``ShapeError``
    for points of different sizes, ``NonFiniteError`` for NaN or infinity.
    """
    origin = _vector("a", a, a.numel())
    sides = [_vector(n, v, a.numel()) - origin for n, v in (("b", b), ("c", c))]
    directions = _orthonormal(torch.stack(sides, 1))
    corners = torch.stack([torch.zeros_like(origin), *sides], 1)
    return Plane(
        origin=origin,
        directions=directions,
        names=("from the first point to the second", "towards the third"),
        extent=around(directions.mT @ corners),
        layout=layout,
    )


def plane_along(
    origin: Tensor,
    vectors: Tensor | Sequence[Tensor],
    *,
    names: tuple[str, str] = ("direction 1", "direction 2"),
    layout: Layout | None = None,
) -> Plane:
    """The plane through ``origin`` ``[P]`` along two vectors, ``[P, 2]`` or a pair of ``[P]``.

    For example two eigenvectors of the Hessian. The vectors are made orthonormal in their order
    (those that are stay as they are); the extent is one length of each to either side. ``names``
    go on the axes; ``layout`` (``problem.layout``) names the parameters.

    Cost: none to speak of. Raises ``NotDefinedError`` for parallel or zero vectors,
    ``ShapeError`` for vectors of another size, ``NonFiniteError`` for NaN or infinity.
    """
    columns = list(vectors.unbind(1)) if isinstance(vectors, Tensor) else list(vectors)
    if len(columns) != 2:
        raise ShapeError(
            f"A plane lies along two vectors, not {len(columns)}: pass [P, 2], such as "
            "eigenvectors[:, :2]."
        )
    start = _vector("origin", origin, origin.numel())
    stacked = torch.stack([_vector("a direction", v, start.numel()) for v in columns], 1)
    directions = _orthonormal(stacked)
    first, second = (float(v) for v in (directions.mT @ stacked).diagonal())
    return Plane(
        origin=start,
        directions=directions,
        names=names,
        extent=((-first, first), (-second, second)),
        layout=layout,
    )


def random_plane(
    problem: Problem, *, seed: int = 0, normalise: str = "filter", origin: Tensor | None = None
) -> Plane:
    """The plane through the problem's parameters along two random directions.

    ``normalise="filter"``: normal entries drawn from ``seed``, then every filter (the weights
    behind one output: a row of a Linear's weight, a convolution's ``[in, kh, kw]``) is given the
    length of the parameters' own, and parameters with one axis or none (biases, scales) stay
    still; ``"layer"``: the same per parameter; ``"none"``: normal entries everywhere. The second
    direction is then made orthogonal to the first, which it is already up to ``1/sqrt(P)``.
    ``origin`` ``[P]`` replaces the current parameters. The extent is one length of each direction
    to either side, which is [-1, 1] in the units of Li et al.

    Source: Li, Xu, Taylor, Studer and Goldstein 2018 (arXiv 1712.09913), section 4.
    Cost: none to speak of. Raises ``OptionError`` for an unknown ``normalise``,
    ``NotDefinedError`` where the directions vanish, ``ShapeError`` for another origin's size.
    """
    require_problem(problem)
    check_option("normalise", normalise, ("filter", "layer", "none"))
    size = problem.layout.numel
    start = flat_parameters(problem) if origin is None else origin
    start = _vector("origin", start, size)
    generator = torch.Generator().manual_seed(seed)
    axes = _filter_axes(problem.model)
    columns = []
    for _ in range(2):
        draw = torch.randn(size, generator=generator, dtype=torch.float64)
        own = problem.layout.split(start)
        parts = problem.layout.split(draw)
        if normalise != "none":
            for name, part in parts.items():
                axis = axes.get(id(problem.params[name]), 0)
                parts[name] = _normalised(part, own[name], axis if normalise == "filter" else None)
        columns.append(torch.cat([part.reshape(-1) for part in parts.values()]))
    if not all(bool(column.any()) for column in columns):
        raise NotDefinedError(
            f"Every direction vanishes with normalise={normalise!r}: the problem has only "
            'parameters with one axis, or all are zero. Take normalise="none".'
        )
    return plane_along(
        start,
        columns,
        names=("random direction 1", "random direction 2"),
        layout=problem.layout,
    )


def around(coordinates: Tensor) -> Extent:
    """The box around points ``[2, n]`` with a margin; no side is shorter than a fifth of both."""
    low, high = coordinates.min(1).values, coordinates.max(1).values
    side = torch.maximum(high - low, (high - low).max() / 5)
    middle, half = (low + high) / 2, side * (0.5 + _MARGIN)
    (x0, y0), (x1, y1) = (middle - half).tolist(), (middle + half).tolist()
    return (x0, x1), (y0, y1)


def _normalised(part: Tensor, own: Tensor, axis: int | None) -> Tensor:
    """``part`` with the norms of ``own``, along every index of ``axis`` or as a whole."""
    if part.ndim < 2:
        return torch.zeros_like(part)
    over = [k for k in range(part.ndim) if k != axis]
    norms = [torch.linalg.vector_norm(t, dim=over, keepdim=True) for t in (own, part)]
    return part * norms[0] / norms[1]


def _filter_axes(model: nn.Module) -> dict[int, int]:
    """The axis of the outputs where it is not the first, by the parameter's id."""
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    weights = (m._parameters.get("weight") for m in model.modules() if isinstance(m, kinds))
    return {id(weight): 1 for weight in weights if weight is not None}


def _orthonormal(vectors: Tensor) -> Tensor:
    """Gram and Schmidt, twice, on two columns; the first keeps its direction, both their sign."""
    first, second = vectors.unbind(1)
    length = float(first.norm())
    if length > 0:
        first = first / length
        before = float(second.norm())
        for _ in range(2):
            second = second - (first @ second) * first
        if before > 0 and float(second.norm()) > _FLAT * before:
            return torch.stack([first, second / second.norm()], 1)
    raise NotDefinedError(
        "The plane's two directions are zero or parallel: choose points that do not lie on a line."
    )


def _vector(name: str, value: Tensor, size: int) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 1 or value.numel() != size:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(f"{name} is {shape}, not a flat tensor [{size}].")
    vector = value.detach().to("cpu", torch.float64, copy=True)
    if not bool(torch.isfinite(vector).all()):
        raise NonFiniteError(f"{name} holds NaN or infinity, so no plane goes through it.")
    return vector


def _short(layout: Layout) -> str:
    named = ", ".join(f"{spec.name}{list(spec.shape)}" for spec in layout[:3])
    return named + (", ..." if len(layout) > 3 else "")
