"""Matrices of low rank, given by their vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import memory
from ..errors import ShapeError, SingularError
from .algebra import Damped
from .base import Layout, Operator, Provenance
from .dense import DenseOperator, set_parameters
from .numerics import as_float, chunks, damped_values, dot, reciprocals, same_kind, total
from .view import MatrixView


class LowRankOperator(Operator):
    """``V diag(weights) V^T`` with vectors ``V`` ``[P, r]`` in columns.

    Weights default to one and may be negative. Eigenvalues and inverses cost ``O(P r^2)`` when
    ``r < P``. Inverses are Woodbury's: they need a damping unless the rank is full.
    """

    _stored = True

    def __init__(
        self,
        V: Tensor,
        weights: Tensor | None = None,
        view: MatrixView | None = None,
        *,
        layout: Layout | None = None,
        info: Provenance | None = None,
    ) -> None:
        V = as_float("V", V, 2)
        weights = V.new_ones(V.shape[1]) if weights is None else as_float("weights", weights, 1)
        if weights.shape[0] != V.shape[1]:
            raise ShapeError(f"V has {V.shape[1]} columns, but there are {len(weights)} weights.")
        self._V, self._weights = V, weights
        self.shape = (V.shape[0], V.shape[0])
        self.dtype, self.device = same_kind(V=V, weights=weights)
        set_parameters(self, layout, view, info)
        self.positive_semidefinite = True if bool((weights >= 0).all()) else None

    @property
    def factors(self) -> dict[str, Tensor]:
        """``{"V": vectors in columns, "weights": their weights}``."""
        return {"V": self._V, "weights": self._weights}

    @property
    def rank(self) -> int:
        """Number of vectors: an upper bound of the rank."""
        return self._V.shape[1]

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self._V @ (self._weights.unsqueeze(1) * (self._V.mT @ vectors))

    def _dense(self) -> Tensor:
        dense = (self._V * self._weights) @ self._V.mT
        return dense.add_(dense.mT.clone()).mul_(0.5)  # exactly symmetric, also where terms cancel

    def diagonal(self) -> Tensor:
        result = self._V.new_zeros(self.shape[0])
        for columns in chunks(self.rank, self.shape[0]):
            result += self._V[:, columns].square() @ self._weights[columns]
        return result

    def trace(self) -> float:
        return math.fsum(
            total(self._V[:, c].square().sum(0) * self._weights[c])
            for c in chunks(self.rank, self.shape[0])
        )

    def frobenius_norm(self) -> float:
        if self.rank >= self.shape[0]:
            return super().frobenius_norm()
        square = 0.0
        for columns in chunks(self.rank, self.rank):
            gram = (self._V[:, columns].mT @ self._V).square()
            square += dot(self._weights[columns], gram @ self._weights)
        return math.sqrt(max(square, 0.0))

    def eigenvalues(self) -> Tensor:
        if self.rank >= self.shape[0]:
            return super().eigenvalues()
        values = torch.linalg.eigvalsh(self._core(torch.linalg.qr(self._V, mode="r").R))
        return torch.cat([values, values.new_zeros(self.shape[0] - self.rank)]).sort().values

    def eigh(self) -> tuple[Tensor, Tensor]:
        if self.rank >= self.shape[0]:
            return super().eigh()
        rows = self.shape[0]
        memory.require(
            2 * rows * rows * self.dtype.itemsize,
            f"The eigenvectors of the {self.info.what} of shape {self.shape}",
            "Take the leading ones: cs.eigsh(op, k).",
            device=self.device,
        )
        basis, triangle = torch.linalg.qr(self._V, mode="complete")
        values, vectors = torch.linalg.eigh(self._core(triangle[: self.rank]))
        basis = torch.cat([basis[:, : self.rank] @ vectors, basis[:, self.rank :]], dim=1)
        values = torch.cat([values, values.new_zeros(rows - self.rank)])
        values, order = values.sort()
        return values, basis[:, order]

    def logdet(self, damping: float = 0.0) -> float:
        if self.rank >= self.shape[0]:
            return DenseOperator(self.dense(), info=self.info).logdet(damping)
        return super().logdet(damping)

    def _inverse(self, damping: float) -> Operator:
        """``(I - Q diag(l / (l + damping)) Q^T) / damping`` in the range's eigenvectors ``Q``."""
        if self.rank >= self.shape[0]:
            return super()._inverse(damping)
        if damping == 0:
            raise SingularError(
                f"The {self.info.what} has rank at most {self.rank} in {self.shape[0]} dimensions, "
                "so it has no inverse. Pass a positive damping."
            )
        basis, triangle = torch.linalg.qr(self._V)
        values, vectors = torch.linalg.eigh(self._core(triangle))
        inverse = reciprocals(values, damping, self.info.what)
        # -l / (damping (l + damping)), with rounding noise of l removed as in the denominator
        values = damped_values(values, damping, len(values)) - damping
        weights = -values * inverse / damping
        return Damped(LowRankOperator(basis @ vectors, weights, self.view), 1.0 / damping)

    def _scaled(self, factor: float) -> Operator:
        return LowRankOperator(self._V, factor * self._weights, self.view)

    def _plus(self, other: Operator) -> Operator | None:
        if not isinstance(other, LowRankOperator) or other.dtype != self.dtype:
            return None
        return LowRankOperator(
            torch.cat([self._V, other._V], dim=1), torch.cat([self._weights, other._weights])
        )

    def _restricted(self, index: Tensor, layout: Layout) -> Operator:
        return LowRankOperator(self._V[index.to(self.device)], self._weights)

    def _core(self, triangle: Tensor) -> Tensor:
        core = (triangle * self._weights) @ triangle.mT
        return (core + core.mT) / 2
