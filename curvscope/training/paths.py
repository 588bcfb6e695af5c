"""The parameters of one or several trainings over the steps, in whatever form they were kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError, ShapeError
from ..problem import Problem, require_problem

_KEPT = ("kind", "stride", "size", "seed")  # what has to agree between projected snapshots
_CHUNK = 1 << 20  # entries of a vector that are taken in double precision at a time


@dataclass(frozen=True)
class Path:
    """Snapshots ``[P]`` of one training, by increasing step.

    ``kept`` says how, where that is known; ``error`` is the relative standard error of a squared
    distance between two (0 for whole snapshots, NaN for some of the entries).
    """

    name: str
    steps: tuple[int, ...]
    vectors: tuple[Tensor, ...]
    kept: tuple[tuple[str, Any], ...] = ()
    error: float = 0.0

    @property
    def finite(self) -> tuple[bool, ...]:
        """Which snapshots hold neither NaN nor infinity."""
        return tuple(bool(torch.isfinite(v).all()) for v in self.vectors)


def flat_parameters(problem: Problem) -> Tensor:
    """The problem's parameters as they are now, one vector ``[P]`` in the order of operators.

    A copy on the CPU, which later training does not change: the snapshot of a plain loop is
    ``snapshots.append((step, flat_parameters(problem)))``. Raises ``OptionError`` for anything but
    a Problem.
    """
    require_problem(problem)
    at = problem.snapshot()
    values = dict(zip(map(id, problem.model.parameters()), at.parameters, strict=True))
    return torch.cat([values[id(p)].reshape(-1).cpu() for p in problem.params.values()])


def read_paths(runs: Any) -> list[Path]:
    """Snapshots as :class:`Path` objects, checked.

    ``runs`` maps names to snapshots, or is the snapshots of one training. Snapshots are pairs
    ``(step, tensor [P])``, or an object with ``snapshots()`` that gives them (a ``Run``).

    Raises ``OptionError`` for steps that do not increase, for no snapshots and for projections of
    different kinds, ``ShapeError`` for vectors of different sizes.
    """
    named = runs if isinstance(runs, Mapping) else {"run": runs}
    if not named:
        raise OptionError('There are no runs: pass {"name": snapshots}.')
    paths = [_read(str(name), snapshots) for name, snapshots in named.items()]
    sizes = {path.name: path.vectors[0].numel() for path in paths}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name!r} {size}" for name, size in sizes.items())
        raise ShapeError(
            f"The runs' snapshots differ in size ({listed} entries): paths can be compared only "
            "between trainings of the same parameters, kept in the same way."
        )
    for path in paths[1:]:
        if path.kept != paths[0].kept:
            raise OptionError(
                f"The snapshots of {path.name!r} are kept in another way ({_said(path.kept)}) than "
                f"those of {paths[0].name!r} ({_said(paths[0].kept)}), so they cannot be compared: "
                "train again with the same snapshots=."
            )
    return paths


def _said(kept: tuple[tuple[str, Any], ...]) -> str:
    return ", ".join(f"{key} {value}" for key, value in kept) or "whole"


def _read(name: str, source: Any) -> Path:
    steps: list[int] = []
    vectors: list[Tensor] = []
    if callable(getattr(source, "snapshots", None)):
        source = source.snapshots()
    error = float(getattr(source, "error", 0.0))
    settings = getattr(source, "settings", None) if error else None  # NaN counts as an error
    how = [(k, settings[k]) for k in _KEPT if k in settings] if settings else []
    for step, vector in _pairs(name, source):
        if not isinstance(vector, Tensor) or vector.ndim != 1 or not vector.is_floating_point():
            shape = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ShapeError(
                f"The snapshot of {name!r} at step {step} is {shape}, not a flat tensor [P]: take "
                "flat_parameters(problem)."
            )
        if vectors and vector.numel() != vectors[0].numel():
            raise ShapeError(
                f"The snapshot of {name!r} at step {step} has {vector.numel()} entries, those "
                f"before it {vectors[0].numel()}: they are of different models."
            )
        if steps and step <= steps[-1]:
            raise OptionError(
                f"The steps of {name!r} do not increase: {step} comes after {steps[-1]}. Leave out "
                "what a restart has repeated, and sort by step."
            )
        steps.append(int(step))
        vectors.append(vector.detach().cpu())
    if not vectors:
        raise OptionError(f"The run {name!r} has no snapshots.")
    return Path(name, tuple(steps), tuple(vectors), tuple(how), error)


def _pairs(name: str, source: Any) -> Iterator[tuple[int, Any]]:
    if hasattr(source, "steps") and callable(getattr(source, "vector", None)):
        for step in source.steps:
            yield step, source.vector(step)
        return
    if isinstance(source, Mapping):
        source = list(source.items())
    try:
        for step, vector in source:
            yield int(step), vector
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"The snapshots of {name!r} are no sequence of pairs (step, tensor) ({error})."
        ) from error


def products(
    left: Sequence[Tensor], right: Sequence[Tensor], origin: Tensor | None = None
) -> Tensor:
    """``[len(left), len(right)]`` inner products in double precision, relative to ``origin``.

    Cut along the entries, so that no float64 copy of everything is made.
    """
    size = left[0].numel()
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    same = left is right
    for start in range(0, size, _CHUNK):
        part = slice(start, start + _CHUNK)
        shift = 0.0 if origin is None else origin[part].double()
        a = torch.stack([v[part].double() for v in left]) - shift
        b = a if same else torch.stack([v[part].double() for v in right]) - shift
        total += a @ b.mT
    return total
