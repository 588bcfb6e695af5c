"""Trainings as paths through parameter space: lengths, turns, distances, and their projections."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..analysis.result import Cost, Result, listing, number
from ..display import spark
from ..errors import UnknownBlockError, nearest
from .paths import Path, read_paths
from .planes import Plane, plane_of_paths

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class ProjectedPath:
    """One training: n snapshots and the n - 1 movements between them.

    ``points`` ``[n, 2]`` are coordinates in the plane and ``off_plane`` ``[n]`` the distances from
    it; ``from_start`` ``[n]`` is ``||theta_k - theta_0||``; ``movements`` ``[n - 1]`` the lengths
    ``||theta_{k+1} - theta_k||`` (lower bounds of the way between: the training may have turned
    inbetween); ``turns`` ``[n - 2]`` the angles in degrees between successive movements;
    ``inside`` ``[n - 1]`` the share of each movement's squared length along the plane. NaN where a
    snapshot is not finite, or an angle not defined because nothing moved.
    """

    name: str
    steps: tuple[int, ...]
    points: Tensor = field(repr=False)
    off_plane: Tensor = field(repr=False)
    from_start: Tensor = field(repr=False)
    movements: Tensor = field(repr=False)
    turns: Tensor = field(repr=False)
    inside: Tensor = field(repr=False)

    @property
    def length(self) -> float:
        """Sum of all movements."""
        return float(self.movements.nansum())

    @property
    def straightness(self) -> float:
        """Distance between the ends over the length: 1 on a straight line; NaN without movement."""
        return float(self.from_start[-1]) / self.length if self.length > 0 else math.nan

    @property
    def share_inside(self) -> float:
        """Share of the summed squared movements that lies along the plane."""
        squares = self.movements.square()
        total = float(squares.nansum())
        return float((squares * self.inside).nansum()) / total if total > 0 else math.nan


@dataclass(frozen=True, eq=False)
class PairOfPaths:
    """Two trainings at their common ``steps`` ``[n]``.

    ``distances`` ``[n]`` are ``||theta_a - theta_b||``; ``angles`` ``[n]`` those in degrees between
    ``theta_a - theta_a(start)`` and ``theta_b - theta_b(start)``, NaN where one has not moved.
    """

    first: str
    second: str
    steps: tuple[int, ...]
    distances: Tensor = field(repr=False)
    angles: Tensor = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Trajectories(Result):
    """What :func:`trajectories` found: ``paths`` by name, and ``pairs`` of them."""

    paths: dict[str, ProjectedPath]
    pairs: tuple[PairOfPaths, ...]
    plane: Plane = field(repr=False, metadata={"json": False})

    @property
    def names(self) -> tuple[str, ...]:
        """The runs' names, in order."""
        return tuple(self.paths)

    def pair(self, first: str, second: str) -> PairOfPaths:
        """Two runs side by side, in either order. Raises ``UnknownBlockError`` for other names."""
        for pair in self.pairs:
            if {pair.first, pair.second} == {first, second}:
                return pair
        wrong = next((name for name in (first, second) if name not in self.paths), first)
        raise UnknownBlockError(
            f"There is no pair {first!r}, {second!r}.{nearest(wrong, self.paths)} "
            f"Runs: {', '.join(self.paths)}."
        )

    def summary(self) -> str:
        """How far each run went, how straight, and what of it the plane shows."""
        lines = []
        for path in self.paths.values():
            lines.append(
                f"{path.name}: {len(path.steps)} snapshots, length {number(path.length)}, "
                f"straightness {number(path.straightness)}, "
                f"{_percent(path.share_inside)} of the movement along the plane."
            )
        for pair in self.pairs:
            if pair.steps:
                lines.append(
                    f"{pair.first} and {pair.second} at step {pair.steps[-1]}: distance "
                    f"{number(float(pair.distances[-1]))}, displacements at "
                    f"{number(float(pair.angles[-1]))} degrees."
                )
        return "\n".join(lines)

    def _pictures(self) -> list[tuple[str, str]]:
        return [
            (caption, spark(path.from_start.tolist(), caption))
            for path in self.paths.values()
            if (caption := f"{path.name}: distance from the start, by snapshot")
        ]

    def records(self) -> list[dict[str, Any]]:
        """One row per run and step; movement, turn and share are those that led to the step."""
        rows = []
        for path in self.paths.values():
            gone = torch.cat([torch.zeros(1, dtype=torch.float64), path.movements.cumsum(0)])
            for k, step in enumerate(path.steps):
                x, y = path.points[k].tolist()
                rows.append(
                    {
                        "run": path.name,
                        "step": step,
                        "x": x,
                        "y": y,
                        "off_plane": float(path.off_plane[k]),
                        "length": float(gone[k]),
                        "from_start": float(path.from_start[k]),
                        "movement": float(path.movements[k - 1]) if k else math.nan,
                        "turn": float(path.turns[k - 2]) if k > 1 else math.nan,
                        "inside": float(path.inside[k - 1]) if k else math.nan,
                    }
                )
        return rows

    def pairs_frame(self) -> pd.DataFrame:
        """One row per pair and common step: ``first``, ``second``, ``step``, ``distance``,
        ``angle``."""
        import pandas as pd

        rows = [
            (pair.first, pair.second, step, float(pair.distances[k]), float(pair.angles[k]))
            for pair in self.pairs
            for k, step in enumerate(pair.steps)
        ]
        columns = ["first", "second", "step", "distance", "angle"]
        return pd.DataFrame.from_records(rows, columns=columns)


def trajectories(runs: Any, *, plane: Plane | None = None) -> Trajectories:
    """Several trainings as paths: projected on a plane, with lengths, turns, distances and angles.

    ``runs`` maps names to snapshots, ``{"K-BFGS": [(step, tensor [P]), ...], ...}``, or to objects
    with ``snapshots()`` that give them. ``plane`` is by default that of the snapshots' first two
    principal components (:func:`plane_of_paths`). Lengths, turns, distances and angles are those in
    the whole parameter space; only ``points`` depends on the plane. Two runs are compared at the
    steps of which both have a snapshot. Randomly projected snapshots give all of it up to their
    own error, but no plane on which a loss could be evaluated.

    In high dimension paths of almost any process look smooth and curved in their first principal
    components; ``inside`` says how little of the movement that may be.

    Source: Li et al. 2018 (arXiv 1712.09913), section 7; Antognini and Sohl-Dickstein 2018
    (arXiv 1806.08805) on what principal components of random walks look like.
    Cost: ``O(n^2 P)`` for the plane, ``O(n P)`` for the rest; all snapshots are in memory. Raises
    ``ShapeError`` and ``OptionError`` for snapshots that do not fit together or the plane,
    ``NotDefinedError`` if they lie on a line and no plane is given.
    """
    start = time.perf_counter()
    paths = read_paths(runs)
    if plane is None:
        plane = plane_of_paths({p.name: list(zip(p.steps, p.vectors, strict=True)) for p in paths})
    else:
        plane.require(paths[0].vectors[0].numel(), None, f"the run {paths[0].name!r}")
    warnings = []
    for path in paths:
        lost = [step for step, good in zip(path.steps, path.finite, strict=True) if not good]
        if lost:
            warnings.append(
                f"The snapshots of {path.name} at steps {listing([str(s) for s in lost])} hold NaN "
                "or infinity; they are kept as NaN."
            )
    if paths[0].error:
        bound = paths[0].error / 2
        warnings.append(
            "The snapshots hold some of the parameters' entries only, and so do lengths and angles."
            if math.isnan(bound)
            else "The snapshots are random projections: distances have a relative standard error "
            f"of at most {_percent(bound)}."
        )
    pairs = []
    for first, second in itertools.combinations(paths, 2):
        pairs.append(_pair(first, second))
        if not pairs[-1].steps:
            warnings.append(
                f"{first.name} and {second.name} have no step in common, so they are not compared."
            )
    return Trajectories(
        paths={path.name: _projected(path, plane) for path in paths},
        pairs=tuple(pairs),
        plane=plane,
        cost=Cost(seconds=time.perf_counter() - start),
        settings={"plane": plane.names, "explained": plane.explained},
        warnings=tuple(warnings),
    )


def _projected(path: Path, plane: Plane) -> ProjectedPath:
    points, off, from_start, movements, turns, inside = [], [], [], [], [], []
    first = path.vectors[0].double()
    before: Tensor | None = None
    last_move: Tensor | None = None
    for vector in path.vectors:
        theta = vector.double()
        if not bool(torch.isfinite(theta).all()):
            theta = torch.full_like(theta, torch.nan)  # infinity would not stay apart from NaN
        points.append(plane.project(theta))
        off.append(plane.distance(theta))
        from_start.append((theta - first).norm())
        if before is not None:
            move = theta - before
            movements.append(move.norm())
            inside.append(plane.inside(move))
            if last_move is not None:
                turns.append(_angle(last_move, move))
            last_move = move
        before = theta
    return ProjectedPath(
        name=path.name,
        steps=path.steps,
        points=torch.stack(points),
        off_plane=torch.stack(off),
        from_start=torch.stack(from_start),
        movements=_stacked(movements),
        turns=_stacked(turns),
        inside=_stacked(inside),
    )


def _pair(first: Path, second: Path) -> PairOfPaths:
    own = dict(zip(first.steps, first.vectors, strict=True))
    other = dict(zip(second.steps, second.vectors, strict=True))
    common = tuple(step for step in first.steps if step in other)
    starts = first.vectors[0].double(), second.vectors[0].double()
    distances, angles = [], []
    for step in common:
        a, b = own[step].double(), other[step].double()
        distances.append((a - b).norm())
        angles.append(_angle(a - starts[0], b - starts[1]))
    return PairOfPaths(first.name, second.name, common, _stacked(distances), _stacked(angles))


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between two vectors, accurate at all angles; NaN if one of them vanishes."""
    na, nb = a.norm(), b.norm()
    if not (bool(na > 0) and bool(nb > 0)) or not bool(torch.isfinite(na * nb)):
        return torch.tensor(torch.nan, dtype=torch.float64)
    a, b = a / na, b / nb
    # Kahan: the arc cosine of a product would lose half of the digits near 0 and 180 degrees
    return torch.rad2deg(2 * torch.atan2((a - b).norm(), (a + b).norm()))


def _stacked(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values else torch.empty(0, dtype=torch.float64)


def _percent(share: float) -> str:
    return "an undefined share" if math.isnan(share) else f"{100 * share:.3g} %"
