"""Snapshots of the parameters along a training: in full, thinned out, or randomly projected.

A projection is a count sketch (Charikar, Chen, Farach-Colton 2002; Weinberger et al. 2009): entry i
of the vector is added with a random sign to a random one of ``size`` buckets. It is linear and
takes one pass; for any fixed vectors ``E <Sx, Sy> = <x, y>`` and
``Var <Sx, Sy> <= (||x||^2 ||y||^2 + <x, y>^2) / size``, so a squared distance has a relative
standard error of at most ``sqrt(2 / size)``, whatever the number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import OptionError, check_count, check_option
from .measures import Measure
from .schedules import schedule

if TYPE_CHECKING:
    import pandas as pd

    from ..problem import Problem

_EVERY = 50
KINDS = ("full", "strided", "projection")


@dataclass(frozen=True)
class Snapshots:
    """Which snapshots a monitor keeps.

    ``kind``: ``"full"`` (all entries), ``"strided"`` (every ``stride``-th entry of the flat vector)
    or ``"projection"`` (a count sketch of ``size`` numbers, drawn from ``seed``). ``schedule`` is
    when, as for measures: a number n for every n-th step, or a schedule; ``None`` is the monitor's
    ``every=``, or every 50th step. ``budgeted=False`` takes all of them, and does not count their
    time as the monitor's.
    """

    kind: str = "projection"
    schedule: Any = None
    stride: int = 100
    size: int = 4096
    seed: int = 0
    budgeted: bool = True

    def __post_init__(self) -> None:
        check_option("snapshots (kind)", self.kind, KINDS)
        for name in ("stride", "size"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))

    def describe(self) -> dict[str, Any]:
        """What reads the snapshots again."""
        extra = {"strided": {"stride": self.stride}, "projection": {"size": self.size}}
        seed = {"seed": self.seed} if self.kind == "projection" else {}
        return {"kind": self.kind, **extra.get(self.kind, {}), **seed}

    def take(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors to be stored."""
        parameters = {name: p.detach() for name, p in named}
        if self.kind == "full":
            return {name: p.clone() for name, p in parameters.items()}
        flat = torch.cat([p.reshape(-1).cpu() for p in parameters.values()])
        if self.kind == "strided":
            return {"entries": flat[:: self.stride].clone()}
        return {"sketch": sketch(flat, self.size, self.seed)}


def sketch(vector: Tensor, size: int, seed: int) -> Tensor:
    """Count sketch ``[size]`` of ``[P]`` in float64; linear in the vector for a fixed seed."""
    generator = torch.Generator().manual_seed(seed)
    count = vector.numel()
    buckets = torch.randint(0, size, (count,), generator=generator)
    signs = torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8) * 2 - 1
    result = torch.zeros(size, dtype=torch.float64)
    return result.index_add_(0, buckets, vector.double() * signs)


class SnapshotSet(Sequence[int]):
    """The snapshots of a run: a sequence of steps, each loaded when it is asked for.

    ``kind`` is ``"full"``, ``"strided"``, ``"projection"`` or ``""`` (no snapshots); ``error`` the
    relative standard error of a squared distance: 0 for full ones, at most ``sqrt(2/size)`` for
    projections, NaN for strided ones, whose distances are only those of the entries kept.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        load: Callable[[Mapping[str, Any]], dict[str, Tensor]],
        settings: Mapping[str, Any] | None,
        order: Sequence[str] = (),
    ) -> None:
        self._rows = {int(row["step"]): row for row in rows}
        self._load = load
        self.settings = dict(settings or {})
        self._order = {name: k for k, name in enumerate(order)}
        self.kind = str(self.settings.get("kind", "")) if rows else ""
        size = float(self.settings.get("size", math.nan))
        self.error = {"full": 0.0, "projection": math.sqrt(2 / size)}.get(self.kind, math.nan)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps with a snapshot."""
        return tuple(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self.steps[index]

    def load(self, step: int) -> dict[str, Tensor]:
        """The tensors of one snapshot: parameters by name, ``"entries"`` or ``"sketch"``."""
        if step not in self._rows:
            raise OptionError(f"There is no snapshot of step {step}; there are {list(self.steps)}.")
        return self._load(self._rows[step])

    def vector(self, step: int) -> Tensor:
        """One snapshot as one float64 vector: of all entries, those kept, or the projection.

        Full ones are in the order of the problem's parameters.
        """
        tensors = self.load(step)  # a file keeps its own order
        names = sorted(tensors, key=lambda name: self._order.get(name, 0))
        return torch.cat([tensors[name].reshape(-1).double() for name in names])

    def distances(self, start: int | None = None) -> pd.DataFrame:
        """Distances from the snapshot of step ``start`` (default: the first) to the others.

        Columns ``step``, ``distance``, ``stderr`` (of the distance: half the relative standard
        error of its square, times it). Of strided snapshots only the entries kept are compared.
        """
        import pandas as pd

        rows = []
        if self._rows:
            origin = self.vector(self.steps[0] if start is None else start)
            for step in self.steps:
                distance = float((self.vector(step) - origin).norm())
                rows.append((step, distance, distance * self.error / 2))
        return pd.DataFrame.from_records(rows, columns=["step", "distance", "stderr"])


class SnapshotMeasure(Measure):
    """The measure behind ``cs.Monitor(..., snapshots=...)``; step 0 is where it begins."""

    name = "snapshot"
    about = "snapshots of the parameters"
    weight = 0.5
    disturbs = False

    def __init__(self, config: Snapshots, every: Any = None) -> None:
        self.config = config
        own = every if config.schedule is None else config.schedule
        self.when = schedule(_EVERY if own is None else own)
        self._initial: list[dict[str, Any]] = []

    def settings(self) -> dict[str, Any]:
        """Kind and size."""
        return self.config.describe()

    def start(self, problem: Problem) -> None:
        """Keep the parameters at which the training begins, until the run has begun."""
        self._initial = [self._row(problem)]

    def initial(self) -> list[dict[str, Any]]:
        """The row of step 0."""
        rows, self._initial = self._initial, []
        return rows

    def take(self, moment: Any) -> list[dict[str, Any]]:
        """One row with tensors."""
        return [self._row(moment.problem)]

    def _row(self, problem: Problem) -> dict[str, Any]:
        named = problem.user_model.named_parameters()
        mine = ((n, p) for n, p in named if n in problem.params)
        return {"kind": self.config.kind, "tensors": self.config.take(mine)}
