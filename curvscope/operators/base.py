"""What every matrix of curvscope has in common: shape, parameters, provenance, algebra."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import memory
from ..errors import OptionError, ParameterMismatchError, ShapeError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

_NO_BLOCKS: Mapping[str, Operator] = MappingProxyType({})


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

    def index(self, names: Sequence[str]) -> Tensor:
        """Row numbers ``[d]`` of the named parameters, in this layout's order."""
        rows = self.slices()
        wanted = set(self.restrict(names).names)
        parts = [torch.arange(r.start, r.stop) for n, r in rows.items() if n in wanted]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut ``[P]`` or ``[P, k]`` into the parameters' shapes (``k`` stays the last axis)."""
        return {
            spec.name: vector[rows].reshape(*spec.shape, *vector.shape[1:])
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


class Operator(ABC):
    """A symmetric matrix ``[P, P]`` that knows how to act on vectors.

    Subclasses set ``shape``, ``dtype`` and ``device`` and define :meth:`_matmat`; everything else
    has a correct default, which they replace where their structure gives it cheaper.

    ``layout`` names the parameters behind the rows (``None`` for a bare matrix), ``info`` says
    where the matrix came from, ``positive_semidefinite`` is ``True`` where that is known by
    construction and ``None`` where it is not known.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    layout: Layout | None = None
    info: Provenance = Provenance()
    positive_semidefinite: bool | None = None

    # -- to be given by subclasses ---------------------------------------------------------------

    @abstractmethod
    def _matmat(self, vectors: Tensor) -> Tensor:
        """Product with ``[P, k]``, contiguous or not, already of the right dtype and device."""

    def _dense(self) -> Tensor:
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return self._matmat(eye)

    def diagonal(self) -> Tensor:
        """The diagonal ``[P]``."""
        return self.dense().diagonal().clone()

    def frobenius_norm(self) -> float:
        """``sqrt(sum of squared entries)``."""
        return float(torch.linalg.matrix_norm(self.dense()))

    def eigenvalues(self) -> Tensor:
        """All eigenvalues ``[P]`` in ascending order. Cost: O(P^3) unless the structure helps."""
        return torch.linalg.eigvalsh(self.dense())

    def eigh(self) -> tuple[Tensor, Tensor]:
        """All eigenvalues ``[P]``, ascending, and orthonormal eigenvectors ``[P, P]`` in columns."""
        values, vectors = torch.linalg.eigh(self.dense())
        return values, vectors

    def inverse(self, damping: float = 0.0) -> Operator:
        """``(self + damping I)^-1`` as an Operator. Raises ``SingularError`` where there is none."""
        from .dense import DenseOperator

        return self._copy_facts(DenseOperator(self.dense()).inverse(damping))

    # -- the same for all ------------------------------------------------------------------------

    @property
    def blocks(self) -> Mapping[str, Operator]:
        """Diagonal blocks by name, in order; empty for a matrix without blocks."""
        return _NO_BLOCKS

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Names of the blocks or parameters that this matrix does not define."""
        return ()

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Product with a vector ``[P]`` or with the columns of ``[P, k]``."""
        if not isinstance(vectors, Tensor):
            raise ShapeError(
                f"An operator multiplies torch tensors, not {type(vectors).__name__}; "
                "convert with torch.as_tensor, or use op.to_scipy() for NumPy arrays."
            )
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.shape[1]:
            raise ShapeError(
                f"This operator of shape {self.shape} multiplies tensors of shape "
                f"[{self.shape[1]}] or [{self.shape[1]}, k], not {list(vectors.shape)}."
            )
        if vectors.is_complex():
            raise ShapeError("Operators are real; multiply the real and imaginary parts apart.")
        vectors = vectors.detach().to(dtype=self.dtype, device=self.device)
        if vectors.ndim == 1:
            return self._matmat(vectors.unsqueeze(1)).squeeze(1)
        return self._matmat(vectors)

    def dense(self) -> Tensor:
        """The matrix itself ``[P, P]``.

        Raises ``MemoryLimitError`` before allocating what would not fit.
        """
        rows = self.shape[0]
        memory.require(
            2 * rows * rows * self.dtype.itemsize,
            f"The dense {self.info.what} of shape {self.shape}",
            "Work matrix-free instead: op @ v, op.diagonal(), op.blocks[...], cs.compare, "
            "or take fewer parameters with Problem(..., params=...).",
            device=self.device,
        )
        return self._dense()

    def trace(self) -> float:
        """Sum of the diagonal."""
        return float(self.diagonal().sum())

    def inner(self, other: Operator) -> float:
        """Frobenius inner product ``sum_ij self_ij other_ij``."""
        from .inner import inner

        return inner(self, other)

    def damped(self, damping: float) -> Operator:
        """``self + damping I``."""
        from .algebra import Damped

        return Damped(self, damping)

    def __add__(self, other: Operator) -> Operator:
        from .algebra import Sum

        if not isinstance(other, Operator):
            return NotImplemented
        return Sum([self, other])

    def __sub__(self, other: Operator) -> Operator:
        if not isinstance(other, Operator):
            return NotImplemented
        return self + (-1.0) * other

    def __mul__(self, factor: float) -> Operator:
        from .algebra import Scaled

        if isinstance(factor, Tensor) and factor.ndim == 0:
            factor = float(factor)
        if not isinstance(factor, int | float):
            return NotImplemented
        return Scaled(self, float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> Operator:
        return self * -1.0

    def __truediv__(self, factor: float) -> Operator:
        if factor == 0:
            raise OptionError("An operator cannot be divided by zero.")
        return self * (1.0 / factor)

    def to_scipy(self) -> LinearOperator:
        """The same matrix as a ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays."""
        from .scipy_bridge import to_scipy

        return to_scipy(self)

    def with_info(self, **changes: Any) -> Operator:
        """A shallow copy whose provenance is changed."""
        import copy

        twin = copy.copy(self)
        twin.info = self.info.with_(**changes)
        return twin

    def _copy_facts(self, twin: Operator) -> Operator:
        """Give ``twin`` this operator's layout and provenance; returns ``twin``."""
        twin.layout, twin.info = self.layout, self.info
        return twin

    def __repr__(self) -> str:
        exact = "exact" if self.info.exact else "approximate"
        route = f", route {self.info.route!r}" if self.info.route != "given" else ""
        blocks = f", {len(self.blocks)} blocks" if self.blocks else ""
        return (
            f"{type(self).__name__}({self.info.what}, {exact}, "
            f"{self.shape[0]} x {self.shape[1]}{blocks}{route}, {str(self.dtype)[6:]})"
        )
