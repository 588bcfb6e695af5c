"""Matrices that are diagonal in a Kronecker-product basis: EKFAC, and damped Kronecker inverses."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from ..errors import OptionError, ShapeError
from .base import Layout, Operator, Provenance
from .dense import set_parameters
from .kronecker import two_sided
from .numerics import as_float, dot, log_determinant, reciprocals, same_kind, total
from .view import MatrixView


class EigenKroneckerOperator(Operator):
    """``(U_G (x) U_A) diag(S) (U_G (x) U_A)^T`` with orthogonal ``U_G`` ``[out, out]``,
    ``U_A`` ``[inp, inp]`` and eigenvalues ``S`` ``[out, inp]``.

    With a leading group axis one such matrix per group. ``K-FAC + damping I`` and its inverse have
    this form exactly, with ``S_ij = l_i m_j + damping``; EKFAC replaces ``S`` by the second moments
    of the gradient in this basis (George et al., "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis", NeurIPS 2018).
    """

    _stored = True
    view: MatrixView

    def __init__(
        self,
        U_G: Tensor,
        U_A: Tensor,
        S: Tensor,
        view: MatrixView | None = None,
        *,
        layout: Layout | None = None,
        info: Provenance | None = None,
    ) -> None:
        U_G, U_A = as_float("U_G", U_G, (2, 3)), as_float("U_A", U_A, (2, 3))
        S = as_float("S", S, (2, 3))
        if not U_G.ndim == U_A.ndim == S.ndim:
            raise ShapeError("Either all or none of U_G, U_A and S have a group axis.")
        if S.ndim == 2:
            U_G, U_A, S = U_G.unsqueeze(0), U_A.unsqueeze(0), S.unsqueeze(0)
        view = view or MatrixView(*S.shape)
        groups, out, inp = view.shape
        for name, tensor, wanted in (
            ("U_G", U_G, (groups, out, out)),
            ("U_A", U_A, (groups, inp, inp)),
            ("S", S, (groups, out, inp)),
        ):
            if tuple(tensor.shape) != wanted:
                raise ShapeError(f"{name} has shape {list(tensor.shape)}, not {list(wanted)}.")
        for name, basis in (("U_G", U_G), ("U_A", U_A)):
            one = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
            gap = float((basis.mT @ basis - one).abs().amax())
            if gap > math.sqrt(torch.finfo(basis.dtype).eps):
                raise OptionError(
                    f"{name} is not orthogonal (deviation {gap:.2g}); pass the eigenvectors that "
                    "torch.linalg.eigh returns."
                )
        self._U_G, self._U_A, self._S = U_G, U_A, S
        self.shape = (view.numel, view.numel)
        self.dtype, self.device = same_kind(U_G=U_G, U_A=U_A, S=S)
        set_parameters(self, layout, view, info)
        self.positive_semidefinite = True if bool((S >= 0).all()) else None

    @property
    def factors(self) -> dict[str, Tensor]:
        """``{"U_G": ..., "U_A": ..., "S": ...}``, without the group axis for one group."""
        parts = {"U_G": self._U_G, "U_A": self._U_A, "S": self._S}
        return parts if self.view.groups > 1 else {name: part[0] for name, part in parts.items()}

    def _matmat(self, vectors: Tensor) -> Tensor:
        rotated = two_sided(self._U_G.mT, self.view.to_stack(vectors), self._U_A)
        rotated = self._S.unsqueeze(-1) * rotated
        return self.view.from_stack(two_sided(self._U_G, rotated, self._U_A.mT))

    def _dense(self) -> Tensor:
        groups, out, inp = self.view.shape
        dense = self._S.new_zeros(self.shape)
        for g in range(groups):
            rows = slice(g * out * inp, (g + 1) * out * inp)
            basis = torch.kron(self._U_G[g], self._U_A[g])
            dense[rows, rows] = (basis * self._S[g].flatten()) @ basis.mT
        return self.view.dense_from_matrix(dense)

    def diagonal(self) -> Tensor:
        return self.view.vector(self._U_G.square() @ self._S @ self._U_A.square().mT)

    def trace(self) -> float:
        return total(self._S)

    def frobenius_norm(self) -> float:
        return math.sqrt(dot(self._S, self._S))

    def eigenvalues(self) -> Tensor:
        return self._S.flatten().sort().values

    def eigh(self) -> tuple[Tensor, Tensor]:
        values, order = self._S.flatten().sort()
        return values, self.eigenvectors()[:, order]

    def eigenvectors(self) -> Tensor:
        """The basis ``U_G (x) U_A`` ``[P, P]``, its columns in the order of ``S.flatten()``."""
        groups, out, inp = self.view.shape
        basis = self._S.new_zeros(self.shape)
        for g in range(groups):
            rows = slice(g * out * inp, (g + 1) * out * inp)
            basis[rows, rows] = torch.kron(self._U_G[g], self._U_A[g])
        return self.view.from_stack(basis.reshape(*self.view.shape, self.shape[0]))

    def logdet(self, damping: float = 0.0) -> float:
        damping = self._number(damping, "damping")
        return log_determinant(self._S, damping, self.info.what, dim=self._factor_size())

    def _inverse(self, damping: float) -> Operator:
        values = reciprocals(self._S, damping, self.info.what, dim=self._factor_size())
        return self._with(values)

    def _scaled(self, factor: float) -> Operator:
        return self._with(factor * self._S)

    def _damped(self, damping: float) -> Operator:
        return self._with(self._S + damping)

    def _with(self, S: Tensor) -> EigenKroneckerOperator:
        # a copy: bases converted from float32 are orthogonal to float32's precision only, and a new
        # object would refuse them
        twin = copy.copy(self)
        twin._S = S
        twin.positive_semidefinite = True if bool((S >= 0).all()) else None
        return twin

    def _factor_size(self) -> int:
        return max(self.view.out, self.view.inp)
