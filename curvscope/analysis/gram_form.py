"""Spectrum and inverse of a large matrix ``V D V^T`` of low rank, through its Gram matrix."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..errors import SingularError
from ..operators import LowRankOperator, Operator, RowGramOperator
from .lanczos import leading_of_dense


class GramForm:
    """``V D V^T`` with ``D >= 0`` and ``r`` vectors, seen through ``D^1/2 V^T V D^1/2`` ``[r, r]``.

    The two have the same eigenvalues but for zeros, and an eigenvector ``q`` of the second gives
    ``V D^1/2 q`` of the first.
    """

    def __init__(self, op: LowRankOperator | RowGramOperator) -> None:
        self.op = op
        if isinstance(op, RowGramOperator):
            self.half = op.weights().flatten().sqrt()
        else:
            self.half = op.factors["weights"].sqrt()

    @classmethod
    def of(cls, op: Operator, rows: int) -> GramForm | None:
        """The form of ``op`` if it has one of at most ``rows`` rows and fewer than its own."""
        if not isinstance(op, LowRankOperator | RowGramOperator) or not op.positive_semidefinite:
            return None
        return cls(op) if op.rank < op.shape[0] and op.rank <= rows else None

    @cached_property
    def core(self) -> Tensor:
        """``D^1/2 V^T V D^1/2`` ``[r, r]``."""
        if isinstance(self.op, RowGramOperator):
            gram = self.op.gram()
        else:
            vectors = self.op.factors["V"]
            gram = vectors.mT @ vectors
        core = self.half * gram * self.half.unsqueeze(1)
        return (core + core.mT) / 2

    @cached_property
    def eigenvalues(self) -> Tensor:
        """All ``P`` eigenvalues, ascending."""
        values = torch.linalg.eigvalsh(self.core).clamp_min(0.0)
        zeros = values.new_zeros(self.op.shape[0] - len(values))
        return torch.cat([zeros, values])

    def leading(self, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest eigenvalues and their vectors ``[P, count]``.

        Where the rank is smaller, the rest are zeros, and so are their columns.
        """
        values, basis = leading_of_dense(self.core, min(count, len(self.half)))
        noise = len(self.half) * torch.finfo(values.dtype).eps * float(values.abs().max())
        good = values > noise
        scaled = torch.where(good, values, torch.inf).rsqrt()
        vectors = self._combine(basis * scaled)
        missing = count - len(values)
        values = torch.cat([torch.where(good, values, 0.0), values.new_zeros(missing)])
        return values, torch.cat([vectors, vectors.new_zeros(len(vectors), missing)], 1)

    def solve(self, vector: Tensor, damping: float) -> Tensor:
        """``(V D V^T + damping I)^-1 vector`` for a positive damping (Woodbury)."""
        if damping <= 0:
            raise SingularError(
                f"The {self.op.info.what} has rank at most {len(self.half)} in "
                f"{self.op.shape[0]} dimensions, so it has no inverse. Pass a positive damping."
            )
        shifted = self.core.clone()
        shifted.diagonal().add_(damping)
        inner = self.half * self._project(vector)
        inner = torch.cholesky_solve(inner.unsqueeze(1), torch.linalg.cholesky(shifted))
        return (vector - self._combine(inner).squeeze(1)) / damping

    def _combine(self, coefficients: Tensor) -> Tensor:
        """``V D^1/2 y`` for ``[r, k]``."""
        weighted = self.half.unsqueeze(1) * coefficients
        if isinstance(self.op, RowGramOperator):
            shape = self.op.factors["S"].shape[:2]
            return self.op.combine(weighted.reshape(*shape, -1))
        return self.op.factors["V"] @ weighted

    def _project(self, vector: Tensor) -> Tensor:
        if isinstance(self.op, RowGramOperator):
            return self.op.project(vector.unsqueeze(1)).reshape(-1)
        return self.op.factors["V"].mT @ vector
