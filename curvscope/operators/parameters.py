"""The identity of the parameters behind a matrix, and where a matrix came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ParameterMismatchError


@dataclass(frozen=True)
class ParameterSpec:
    """Name and shape of one parameter: the identity by which operators are aligned."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Layout(tuple[ParameterSpec, ...]):
    """The parameters behind the rows of an operator, in order, each flattened row-major."""

    __slots__ = ()

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> Layout:
        return cls(ParameterSpec(name, tuple(p.shape)) for name, p in named)

    @property
    def numel(self) -> int:
        return sum(spec.numel for spec in self)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self)

    def slices(self) -> dict[str, slice]:
        """Rows of each parameter."""
        rows, start = {}, 0
        for spec in self:
            rows[spec.name] = slice(start, start + spec.numel)
            start += spec.numel
        return rows

    def restrict(self, names: Sequence[str]) -> Layout:
        """The layout of some of the parameters, in this layout's order."""
        missing = set(names) - set(self.names)
        if missing:
            raise ParameterMismatchError(
                f"The parameters {sorted(missing)} are not among {list(self.names)}."
            )
        return Layout(spec for spec in self if spec.name in set(names))

    def index(self, names: Sequence[str]) -> Tensor:  # type: ignore[override]
        """Row numbers ``[d]`` of the named parameters, in this layout's order."""
        rows = self.slices()
        wanted = set(self.restrict(names).names)
        parts = [
            torch.arange(r.start, r.stop, device="cpu") for n, r in rows.items() if n in wanted
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device="cpu")

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut ``[P]`` or ``[P, k]`` into the parameters' shapes (``k`` stays the last axis)."""
        return {
            spec.name: vector[rows].reshape((*spec.shape, *vector.shape[1:]))
            for spec, rows in zip(self, self.slices().values(), strict=True)
        }


@dataclass(frozen=True)
class Provenance:
    """Where a matrix came from and what it cost.

    ``what`` is the field's name of the matrix ("Hessian", "GGN", "K-FAC (exact Fisher)");
    ``route`` the algorithm that computed it; ``exact`` whether it is the matrix itself rather
    than an approximation or a sample; ``settings`` what gives it again; ``notes`` anything a
    reader of the numbers must know; ``seconds`` and ``passes`` (backward passes over the data,
    a double backward counting as two) the cost.
    """

    what: str = "matrix"
    route: str = "given"
    exact: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    passes: float = 0.0

    def with_(self, **changes: Any) -> Provenance:
        return replace(self, **changes)
