"""What every matrix of curvscope has in common: shape, parameters, provenance, algebra."""

from __future__ import annotations

import copy
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import memory
from ..display import Card, Readable, Shown
from ..errors import (
    NonFiniteError,
    OptionError,
    ParameterMismatchError,
    ShapeError,
    UncoveredError,
    counted,
    nearest,
)
from ..modes import plain_mode
from .parameters import Layout, ParameterSpec, Provenance

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from .view import MatrixView

__all__ = ["Layout", "Operator", "ParameterSpec", "Provenance"]


class Operator(Shown, ABC):
    """A symmetric matrix ``[P, P]`` that knows how to act on vectors.

    Subclasses set ``shape``, ``dtype`` and ``device`` and define :meth:`_matmat`; everything else
    has a correct default, which they replace where their structure gives it cheaper.

    ``layout`` names the parameters behind the rows (``None`` for a bare matrix), ``view`` lays
    them out as the weight matrix on which Kronecker factors act (``None`` where there is none),
    ``info`` says where the matrix came from, ``positive_semidefinite`` is ``True`` where that is
    known by construction and ``None`` where it is not known.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> op = cs.operators.DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    >>> op @ torch.tensor([1.0, 0.0])
    tensor([2., 1.])
    >>> op.trace(), op.damped(1.0).diagonal().tolist()
    (5.0, [3.0, 4.0])
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    layout: Layout | None = None
    view: MatrixView | None = None
    info: Provenance = Provenance()
    positive_semidefinite: bool | None = None

    _stored = False  # whether tensors and operators among the attributes are the whole matrix
    __array_ufunc__ = None  # NumPy scalars leave ``scalar * operator`` to the operator

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls).get("blocks")
        if isinstance(own, property):  # so that op.blocks["... completes
            cls.blocks = Readable(own)  # type: ignore[method-assign, assignment]

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
        return float(torch.linalg.vector_norm(self.dense(), dtype=torch.float64))

    def eigenvalues(self) -> Tensor:
        """All eigenvalues ``[P]`` in ascending order. Cost: O(P^3) unless the structure helps."""
        return torch.linalg.eigvalsh(self._finite())

    def eigh(self) -> tuple[Tensor, Tensor]:
        """All eigenvalues ``[P]``, ascending, and eigenvectors as columns ``[P, P]``."""
        values, vectors = torch.linalg.eigh(self._finite())
        return values, vectors

    def _finite(self) -> Tensor:
        """The matrix, refused where the solvers' own message would not say what is wrong."""
        dense = self.dense()
        if not bool(torch.isfinite(dense).all()):
            raise NonFiniteError(
                f"The {self.info.what} has NaN or infinite entries, so it has no eigenvalues. "
                "Check the parameters and the data that it was computed from."
            )
        return dense

    def _inverse(self, damping: float) -> Operator:
        from .dense import DenseOperator

        return DenseOperator(self.dense())._inverse(damping)

    def _scaled(self, factor: float) -> Operator:
        from .algebra import Scaled

        return Scaled(self, factor)

    def _damped(self, damping: float) -> Operator:
        from .algebra import Damped

        return Damped(self, damping)

    def _plus(self, other: Operator) -> Operator | None:
        """``self + other`` in a simpler form than a list of terms, or ``None``."""
        return None

    def _restricted(self, index: Tensor, layout: Layout) -> Operator:
        from .wrappers import Restricted

        return Restricted(self, index)

    # -- the same for all ------------------------------------------------------------------------

    @property
    def blocks(self) -> Mapping[str, Operator]:
        """Diagonal blocks by name, in order; empty for a matrix without blocks."""
        from .blocks import Blocks

        return Blocks({})

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
        with plain_mode(self.device.type):
            if vectors.ndim == 1:
                return self._matmat(vectors.unsqueeze(1)).squeeze(1)
            return self._matmat(vectors) if vectors.shape[1] else vectors.clone()

    def dense(self) -> Tensor:
        """The matrix itself ``[P, P]``.

        Raises ``MemoryLimitError`` before allocating what would not fit.
        """
        rows = self.shape[0]
        blocks = "op.blocks[...], " if len(self.blocks) else ""  # a block has none
        memory.require(
            2 * rows * rows * self.dtype.itemsize,
            f"The dense {self.info.what} of shape {self.shape}",
            memory.advice(
                f"Work matrix-free instead: op @ v, op.diagonal(), {blocks}cs.density, cs.eigsh, "
                "cs.solve, cs.compare, or take fewer parameters with Problem(..., params=...)."
            ),
            device=self.device,
        )
        with plain_mode(self.device.type):
            return self._dense()

    def trace(self) -> float:
        """Sum of the diagonal."""
        from .numerics import total

        return total(self.diagonal())

    def inner(self, other: Operator) -> float:
        """Frobenius inner product ``sum_ij self_ij other_ij``."""
        from .inner import inner

        return inner(self, other)

    def logdet(self, damping: float = 0.0) -> float:
        """Natural logarithm of the determinant of ``self + damping I``.

        Raises ``NotDefinedError`` unless that matrix is positive definite to working precision.
        """
        from .numerics import log_determinant

        return log_determinant(self.eigenvalues(), self._number(damping, "damping"), self.info.what)

    def inverse(self, damping: float = 0.0) -> Operator:
        """``(self + damping I)^-1`` as an Operator.

        From the structure, or by forming the matrix, which takes ``O(P^3)``; ``cs.solve``
        multiplies with the inverse by products alone.

        Raises ``SingularError`` if there is none, ``OptionError`` for a negative damping.
        """
        return self._inverted(self._damping(damping))

    def _inverted(self, damping: float) -> Operator:
        """:meth:`inverse` for a shift of either sign, which sums and multiples give."""
        twin = self._inverse(self._number(damping, "damping"))
        shift = f" + {damping:g} I" if damping else ""
        twin = self._derived(twin, f"inverse of ({self.info.what}{shift})")
        if damping >= 0 and self.positive_semidefinite:
            twin.positive_semidefinite = True
        return twin

    def damped(self, damping: float) -> Operator:
        """``self + damping I``. Raises ``OptionError`` for a negative damping."""
        return self._shifted(self._damping(damping))

    def _shifted(self, damping: float) -> Operator:
        """:meth:`damped` for a shift of either sign, which sums and multiples give."""
        damping = self._number(damping, "damping")
        if damping == 0:
            return self
        twin = self._derived(self._damped(damping), f"{self.info.what} + {damping:g} I")
        if damping > 0 and self.positive_semidefinite:
            twin.positive_semidefinite = True
        return twin

    def scaled(self, factor: float) -> Operator:
        """``factor * self``, of the same class where that can be."""
        factor = self._number(factor, "factor")
        twin = self._derived(self._scaled(factor), f"{factor:g} * ({self.info.what})")
        if factor >= 0 and self.positive_semidefinite:
            twin.positive_semidefinite = True
        return twin

    def restrict(self, names: Sequence[str]) -> Operator:
        """The principal submatrix of some of the parameters, in this operator's order.

        Raises ``ParameterMismatchError`` for unknown names and for an operator without layout.
        """
        if self.layout is None:
            raise ParameterMismatchError(
                f"This {type(self).__name__} does not know its parameters; "
                "give it a layout (op.layout = Layout.of(model.named_parameters()))."
            )
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.layout.names:
                raise ParameterMismatchError(
                    f"This operator has no parameter {name!r}.{nearest(name, self.layout.names)}"
                )
        layout = self.layout.restrict(names)
        if layout == self.layout:
            return self
        twin = copy.copy(self._restricted(self.layout.index(names), layout))
        if self.positive_semidefinite:
            twin.positive_semidefinite = True
        twin.layout, twin.info = layout, self.info
        return twin

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Operator:
        """The same matrix in another floating-point type or on another device."""
        dtype = dtype or self.dtype
        device = torch.device(device) if device is not None else self.device
        if dtype == self.dtype and device == self.device:
            return self
        if not self._stored:
            from .wrappers import Converted

            return self._derived(Converted(self, dtype, device), self.info.what)
        from .numerics import convert

        twin = copy.copy(self)
        for name, value in vars(self).items():
            setattr(twin, name, convert(value, dtype, device))
        twin.dtype, twin.device = dtype, device
        return twin

    def __add__(self, other: Operator) -> Operator:
        from .algebra import add

        return add(self, other) if isinstance(other, Operator) else NotImplemented

    def __radd__(self, other: Any) -> Operator:
        return self if other == 0 else NotImplemented  # sum() begins with 0

    def __sub__(self, other: Operator) -> Operator:
        return self + (-1.0) * other if isinstance(other, Operator) else NotImplemented

    def __mul__(self, factor: float) -> Operator:
        if isinstance(factor, Tensor) and factor.ndim == 0:
            factor = float(factor)
        return self.scaled(factor) if isinstance(factor, numbers.Real) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> Operator:
        return self.scaled(-1.0)

    def __truediv__(self, factor: float) -> Operator:
        if factor == 0:
            raise OptionError("An operator cannot be divided by zero.")
        return self * (1.0 / factor)

    def to_scipy(self) -> LinearOperator:
        """The same matrix as a ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays."""
        from .scipy_bridge import to_scipy

        return to_scipy(self)

    def plot(self, **options: Any) -> Any:
        """Draw the matrix, or its factors, with :func:`curvscope.plot.plot`; returns the axes."""
        from .. import plot

        return plot.plot(self, **options)

    def with_info(self, **changes: Any) -> Operator:
        """A shallow copy whose provenance is changed."""
        twin = copy.copy(self)
        twin.info = self.info.with_(**changes)
        return twin

    def _derived(self, twin: Operator, what: str) -> Operator:
        """A copy of ``twin`` with this operator's parameters and provenance, under another name."""
        twin = copy.copy(twin)
        twin.layout, twin.info = self.layout, self.info.with_(what=what)
        twin.view = self.view if twin.view is None else twin.view
        return twin

    @staticmethod
    def _number(value: float, argument: str) -> float:
        number = float(value)
        if not math.isfinite(number):
            raise NonFiniteError(f"{argument}={value!r} is not a finite number.")
        return number

    def _damping(self, value: float) -> float:
        damping = self._number(value, "damping")
        if damping < 0:
            raise OptionError(
                f"damping={value!r} is negative; damping keeps a matrix away from zero and is at "
                f"least 0. For a shift write op + IdentityOperator({self.shape[0]}, {damping:g})."
            )
        return damping

    def _require_covered(self, action: str) -> None:
        if self.uncovered:
            raise UncoveredError(
                f"The {self.info.what} does not define {', '.join(map(repr, self.uncovered))}, so "
                f"{action} is not defined. Take op.blocks[...] or op.restrict(...), or treat the "
                "missing rows as zero with op.with_uncovered('zero')."
            )

    def _card_(self) -> Card:
        from .card import operator_card

        return operator_card(self)

    def __repr__(self) -> str:
        exact = ", exact" if self.info.exact else ", approximate"
        if self.info == Provenance():  # nothing was said of it
            exact = ""
        route = f", route {self.info.route!r}" if self.info.route != "given" else ""
        blocks = f", {counted(len(self.blocks), 'block')}" if self.blocks else ""
        return (
            f"{type(self).__name__}({self.info.what}{exact}, "
            f"{self.shape[0]} x {self.shape[1]}{blocks}{route}, {str(self.dtype)[6:]})"
        )
