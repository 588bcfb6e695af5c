"""Matrices that are stored entry by entry, and multiples of the identity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import NotDefinedError, OptionError, SingularError
from .base import Layout, Operator, Provenance
from .numerics import as_float, dot, reciprocals, symmetric, total
from .view import MatrixView


class DenseOperator(Operator):
    """A symmetric matrix ``[P, P]``, stored.

    The tensor is kept, not copied, unless rounding made it unsymmetric; asymmetry beyond
    ``sqrt(eps)`` of its largest entry is refused. ``view`` lays the rows out as a weight matrix.
    """

    _stored = True

    def __init__(
        self,
        matrix: Tensor,
        *,
        layout: Layout | None = None,
        view: MatrixView | None = None,
        info: Provenance | None = None,
        positive_semidefinite: bool | None = None,
    ) -> None:
        matrix = symmetric("The matrix", as_float("The matrix", matrix, 2))
        self._matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device
        set_parameters(self, layout, view, info)
        self.positive_semidefinite = positive_semidefinite

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self._matrix @ vectors

    def dense(self) -> Tensor:
        """A copy of the matrix ``[P, P]``."""
        return self._matrix.clone()

    def diagonal(self) -> Tensor:
        return self._matrix.diagonal().clone()

    def frobenius_norm(self) -> float:
        return math.sqrt(dot(self._matrix, self._matrix))

    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self._matrix)

    def eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self._matrix)
        return values, vectors

    def logdet(self, damping: float = 0.0) -> float:
        """``log det(self + damping I)`` by Cholesky; the reason for a refusal by eigenvalues."""
        damping = self._number(damping, "damping")
        factor, failed = torch.linalg.cholesky_ex(_shift(self._matrix, damping))
        pivots = factor.diagonal()
        # pivots near rounding may belong to a singular matrix: the eigenvalues decide
        if bool(failed) or not self.shape[0] or float(pivots.amin() / pivots.amax()) < 1e-4:
            return super().logdet(damping)
        return 2.0 * total(pivots.log())

    def _inverse(self, damping: float) -> Operator:
        """By Cholesky if positive definite, else by LU."""
        shifted = _shift(self._matrix, damping)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        definite = not bool(failed)
        if definite:
            inverse = torch.cholesky_inverse(factor)
        else:
            inverse, singular = torch.linalg.inv_ex(shifted)
            if bool(singular):
                raise _singular(self.info.what, damping, math.inf)
        if not bool(torch.isfinite(inverse).all()):
            raise _singular(self.info.what, damping, math.inf)
        if shifted.numel():
            one = torch.linalg.matrix_norm
            condition = float(one(shifted, 1)) * float(one(inverse, 1))
            trusted = definite and damping > 0 and self.positive_semidefinite
            if condition * torch.finfo(self.dtype).eps > 0.05 and not trusted:
                raise _singular(self.info.what, damping, condition)
        return DenseOperator(
            (inverse + inverse.mT) / 2,
            view=self.view,
            positive_semidefinite=True if definite else None,
        )

    def _scaled(self, factor: float) -> Operator:
        return DenseOperator(factor * self._matrix, view=self.view)

    def _damped(self, damping: float) -> Operator:
        return DenseOperator(_shift(self._matrix, damping), view=self.view)

    def _plus(self, other: Operator) -> Operator | None:
        if not isinstance(other, DenseOperator):
            return None
        return DenseOperator(self._matrix + other._matrix, view=self.view)

    def _restricted(self, index: Tensor, layout: Layout) -> Operator:
        index = index.to(self.device)
        return DenseOperator(self._matrix[index][:, index])


class IdentityOperator(Operator):
    """``scale`` times the identity of ``size`` rows."""

    def __init__(
        self,
        size: int,
        scale: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        layout: Layout | None = None,
        view: MatrixView | None = None,
        info: Provenance | None = None,
    ) -> None:
        if size < 0 or int(size) != size:
            raise OptionError(f"size={size!r} is not a number of rows.")
        self.scale = self._number(scale, "scale")
        self.shape = (int(size), int(size))
        self.dtype = dtype or torch.get_default_dtype()
        self.device = torch.device(device)
        set_parameters(self, layout, view, info)
        self.positive_semidefinite = True if self.scale >= 0 else None

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self.scale * vectors

    def diagonal(self) -> Tensor:
        return torch.full((self.shape[0],), self.scale, dtype=self.dtype, device=self.device)

    def trace(self) -> float:
        return self.scale * self.shape[0]

    def frobenius_norm(self) -> float:
        return abs(self.scale) * math.sqrt(self.shape[0])

    def eigenvalues(self) -> Tensor:
        return self.diagonal()

    def eigh(self) -> tuple[Tensor, Tensor]:
        one = IdentityOperator(self.shape[0], dtype=self.dtype, device=self.device)
        return self.diagonal(), one.dense()

    def logdet(self, damping: float = 0.0) -> float:
        value = self.scale + self._number(damping, "damping")
        if value <= 0:
            raise NotDefinedError(
                f"The log-determinant of {value:g} times the identity is not defined; "
                f"pass a damping above {-self.scale:g}."
            )
        return self.shape[0] * math.log(value)

    def _inverse(self, damping: float) -> Operator:
        exact = torch.tensor([self.scale], dtype=torch.float64)
        return self._like(float(reciprocals(exact, damping, self.info.what, dim=1)))

    def _scaled(self, factor: float) -> Operator:
        return self._like(factor * self.scale)

    def _damped(self, damping: float) -> Operator:
        return self._like(self.scale + damping)

    def _plus(self, other: Operator) -> Operator | None:
        return other._shifted(self.scale)

    def _restricted(self, index: Tensor, layout: Layout) -> Operator:
        return IdentityOperator(len(index), self.scale, dtype=self.dtype, device=self.device)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Operator:
        twin = self._like(self.scale, dtype, device)
        return self._derived(twin, self.info.what)

    def _like(
        self,
        scale: float,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> IdentityOperator:
        return IdentityOperator(
            self.shape[0], scale, dtype=dtype or self.dtype, device=device or self.device
        )


def set_parameters(
    op: Operator, layout: Layout | None, view: MatrixView | None, info: Provenance | None
) -> None:
    """Store layout, view and provenance after checking that they fit the shape of ``op``."""
    for name, size in (("layout", layout and layout.numel), ("view", view and view.numel)):
        if size is not None and size != op.shape[0]:
            raise OptionError(
                f"The {name} describes {size} parameters, the matrix has {op.shape[0]} rows."
            )
    op.layout, op.view = layout, view
    op.info = info or Provenance()


def _shift(matrix: Tensor, damping: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(damping)
    return shifted


def _singular(what: str, damping: float, condition: float) -> SingularError:
    return SingularError(
        f"The {what} with damping {damping:g} is singular to working precision "
        f"(condition number {condition:.2g}). Pass a larger damping."
    )
