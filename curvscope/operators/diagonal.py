"""Diagonal matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Layout, Operator, Provenance
from .dense import DenseOperator, IdentityOperator, set_parameters
from .numerics import as_float, dot, log_determinant, reciprocals
from .view import MatrixView


class DiagonalOperator(Operator):
    """The diagonal matrix of a vector ``[P]``."""

    _stored = True

    def __init__(
        self,
        diagonal: Tensor,
        *,
        layout: Layout | None = None,
        view: MatrixView | None = None,
        info: Provenance | None = None,
    ) -> None:
        self._diagonal = as_float("The diagonal", diagonal, 1)
        self.shape = (diagonal.numel(), diagonal.numel())
        self.dtype, self.device = diagonal.dtype, diagonal.device
        set_parameters(self, layout, view, info)
        self.positive_semidefinite = True if bool((self._diagonal >= 0).all()) else None

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self._diagonal.unsqueeze(1) * vectors

    def _dense(self) -> Tensor:
        return torch.diag(self._diagonal)

    def diagonal(self) -> Tensor:
        return self._diagonal.clone()

    def frobenius_norm(self) -> float:
        return math.sqrt(dot(self._diagonal, self._diagonal))

    def eigenvalues(self) -> Tensor:
        return self._diagonal.sort().values

    def eigh(self) -> tuple[Tensor, Tensor]:
        values, order = self._diagonal.sort()
        one = IdentityOperator(self.shape[0], dtype=self.dtype, device=self.device)
        return values, one.dense()[:, order]

    def logdet(self, damping: float = 0.0) -> float:
        damping = self._number(damping, "damping")
        return log_determinant(self._diagonal, damping, self.info.what, dim=1)

    def _inverse(self, damping: float) -> Operator:
        return DiagonalOperator(reciprocals(self._diagonal, damping, self.info.what, dim=1))

    def _scaled(self, factor: float) -> Operator:
        return DiagonalOperator(factor * self._diagonal)

    def _damped(self, damping: float) -> Operator:
        return DiagonalOperator(self._diagonal + damping)

    def _plus(self, other: Operator) -> Operator | None:
        if isinstance(other, DiagonalOperator):
            return DiagonalOperator(self._diagonal + other._diagonal)
        if isinstance(other, DenseOperator):
            dense = other.dense()
            dense.diagonal().add_(self._diagonal)
            return DenseOperator(dense)
        return None

    def _restricted(self, index: Tensor, layout: Layout) -> Operator:
        return DiagonalOperator(self._diagonal[index.to(self.device)])
