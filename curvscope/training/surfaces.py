"""The objective evaluated on a plane of parameter space, never interpolated."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..analysis.result import Cost, Result, number
from ..display import thumbnail
from ..errors import OptionError, TargetError
from ..modes import plain_mode
from ..problem import Problem, Snapshot, require_problem
from ..problem.state import is_batch_norm
from ..progress import track
from .grid_file import GridFile
from .planes import Extent, Plane

_MOST = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LossSurface(Result):
    """What :func:`loss_surface` found: ``loss`` ``[ny, nx]`` at ``x`` ``[nx]`` and ``y`` ``[ny]``.

    ``loss[j, i]`` is the objective at ``plane.lift([x[i], y[j]])``; NaN and infinity are kept.
    ``origin_loss`` is the objective at the plane's origin.
    """

    of: str
    names: tuple[str, str]
    origin_loss: float
    x: Tensor = field(repr=False)
    y: Tensor = field(repr=False)
    loss: Tensor = field(repr=False)
    plane: Plane = field(repr=False, metadata={"json": False})

    @property
    def finite(self) -> Tensor:
        """Which points of the grid have a finite objective."""
        return torch.isfinite(self.loss)

    @property
    def lowest(self) -> tuple[float, float, float]:
        """Coordinates and value of the smallest finite objective on the grid; NaN without one."""
        if not bool(self.finite.any()):
            return math.nan, math.nan, math.nan
        shown = torch.where(self.finite, self.loss, torch.inf)
        j, i = divmod(int(shown.argmin()), len(self.x))
        return float(self.x[i]), float(self.y[j]), float(self.loss[j, i])

    def summary(self) -> str:
        """Range of the objective on the grid and where it is lowest."""
        count = f"{len(self.x)} x {len(self.y)} points"
        if not bool(self.finite.any()):
            return f"{self.of}: the objective is not finite at any of {count} ({self.cost})."
        x, y, low = self.lowest
        high = float(self.loss[self.finite].max())
        return (
            f"{self.of}: the objective evaluated at {count} lies between {number(low)}, at "
            f"({number(x)}, {number(y)}), and {number(high)} ({self.cost})."
        )

    def _pictures(self) -> list[tuple[str, str]]:
        if not bool(self.finite.any()):
            return []
        known = self.loss[self.finite]
        heights = torch.where(self.finite, self.loss, known.max()) - known.min()
        caption = "height above the lowest point"
        return [(caption, thumbnail(heights.flip(0), caption))]

    def _shown_rows(self, most: int) -> tuple[list[dict[str, Any]], int]:
        """The first rows of a grid say little: none are shown."""
        return [], self.loss.numel()

    def records(self) -> list[dict[str, float]]:
        """One row per point."""
        return [
            {"x": x, "y": y, "loss": value}
            for y, row in zip(self.y.tolist(), self.loss.tolist(), strict=True)
            for x, value in zip(self.x.tolist(), row, strict=True)
        ]


def loss_surface(
    problem: Problem,
    plane: Plane,
    *,
    extent: Extent | None = None,
    points: int | tuple[int, int] = (25, 25),
    checkpoint: str | os.PathLike[str] | None = None,
) -> LossSurface:
    """The objective at every point of a grid on a plane, each evaluated over the whole data.

    ``extent`` ``((x_0, x_1), (y_0, y_1))`` is in the plane's coordinates, by default the plane's
    own; ``points`` is the number of grid points along each axis. Parameters that do not take part
    in the problem, and buffers such as BatchNorm's running statistics, keep their current values at
    every point. The model's parameters are as before afterwards. A bar shows the progress inside
    ``cs.show_progress()``. With ``checkpoint``, a file, every value is kept as soon as it is
    known, and the same call after an interruption goes on from there.

    Source: Goodfellow, Vinyals and Saxe 2015 (arXiv 1412.6544) along lines, Li et al. 2018
    (arXiv 1712.09913) on planes.
    Cost: one forward pass over the data per point and one at the origin. For a quick look take
    ``problem.subset(n)`` or fewer points. Raises ``ShapeError`` or ``ParameterMismatchError`` for
    a plane of other parameters, ``OptionError`` for an empty extent, ``DataError`` for a
    checkpoint of another surface, ``OutputError`` for one that cannot be written, and
    ``NonFiniteError`` if the model's present parameters are not finite (load a snapshot first).
    """
    require_problem(problem)
    start = time.perf_counter()
    plane.require(problem.layout.numel, problem.layout, "the problem")
    columns, rows = _counts(points)
    (x0, x1), (y0, y1) = _checked(plane.extent if extent is None else extent)
    x = torch.linspace(x0, x1, columns, dtype=torch.float64)
    y = torch.linspace(y0, y1, rows, dtype=torch.float64)
    problem.check()
    at = problem.snapshot()
    origin_loss = objective_at(problem, plane.origin, at)
    values = torch.full((rows, columns), math.nan, dtype=torch.float64)
    settings: dict[str, Any] = {"extent": ((x0, x1), (y0, y1)), "points": (columns, rows)}
    known: dict[int, float] = {}
    with GridFile(checkpoint, plane, settings, origin_loss) as file:
        known = file.known
        todo = [k for k in range(rows * columns) if k not in known]
        for k, value in known.items():
            values[divmod(k, columns)] = value
        for k in track(todo, "loss surface", total=len(todo)):
            j, i = divmod(k, columns)
            value = objective_at(problem, plane.lift(torch.stack([x[i], y[j]])), at)
            values[j, i] = value
            file.add(k, value)
    return LossSurface(
        of=problem.name,
        names=plane.names,
        origin_loss=origin_loss,
        x=x,
        y=y,
        loss=values,
        plane=plane,
        cost=Cost(seconds=time.perf_counter() - start),
        settings={**settings, "evaluated": len(todo), "from_checkpoint": len(known)},
        warnings=_warnings(problem, values, origin_loss),
    )


@plain_mode()
def objective_at(problem: Problem, theta: Tensor, at: Snapshot | None = None) -> float:
    """The objective at parameters ``theta`` ``[P]``, NaN and infinity included.

    Everything else is as in the snapshot ``at`` (default: now), and nothing stays changed.
    Cost: one forward pass over the data.
    """
    at = problem.snapshot() if at is None else at
    parts = problem.layout.split(theta)
    places = {id(p): parts[name] for name, p in problem.params.items()}
    values = [
        places[id(p)].to(value).contiguous() if id(p) in places else value
        for p, value in zip(problem.model.parameters(), at.parameters, strict=True)
    ]
    broken = torch.tensor(math.nan, dtype=torch.float64)

    def one(inputs: Any, targets: Any) -> Tensor:
        outputs = problem.outputs(inputs).detach()
        try:
            return problem.batch_total(outputs, targets).detach().double().cpu()
        except TargetError:
            # some losses refuse NaN instead of returning it
            if bool(torch.isfinite(outputs).all()):
                raise
            return broken

    total = problem.sum_over_batches(one, at=Snapshot(values, at.buffers))
    return float(total) * problem.scale


def _counts(points: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(points) if isinstance(points, Sequence) else (points, points)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in pair):
        raise OptionError(f"points={points!r} must be two whole numbers of at least 2.")
    if pair[0] * pair[1] > _MOST:
        raise OptionError(f"points={points!r} are more than {_MOST:,} evaluations.")
    return pair[0], pair[1]


def _checked(extent: Sequence[Sequence[float]]) -> Extent:
    try:
        (x0, x1), (y0, y1) = ((float(a), float(b)) for a, b in extent)
    except (TypeError, ValueError) as error:
        raise OptionError(f"extent={extent!r} is not ((x_0, x_1), (y_0, y_1)).") from error
    if not all(map(math.isfinite, (x0, x1, y0, y1))) or x0 >= x1 or y0 >= y1:
        raise OptionError(
            f"extent={extent!r} is empty or not finite: give ((x_0, x_1), (y_0, y_1)) with "
            "x_0 < x_1 and y_0 < y_1."
        )
    return (x0, x1), (y0, y1)


def _warnings(problem: Problem, values: Tensor, origin_loss: float) -> tuple[str, ...]:
    found = []
    broken = int((~torch.isfinite(values)).sum())
    if broken:
        found.append(
            f"The objective is NaN or infinite at {broken} of {values.numel()} points; they are "
            "kept as they are. A smaller extent= may avoid them."
        )
    if not math.isfinite(origin_loss):
        found.append("The objective is NaN or infinite at the plane's origin.")
    modules = problem.model.modules()
    if problem.batchnorm == "eval" and any(map(is_batch_norm, modules)):
        found.append(
            "BatchNorm uses the model's present running statistics at every point, which are those "
            "of one place only; a problem with batchnorm='batch' takes those of the data instead."
        )
    return tuple(found)
