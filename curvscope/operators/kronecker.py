"""Kronecker products of two factors, full or diagonal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import NotDefinedError, OptionError, ShapeError, SingularError
from .base import Layout, Operator, Provenance
from .dense import DenseOperator, set_parameters
from .diagonal import DiagonalOperator
from .numerics import as_float, check_damping_rule, same_kind, symmetric, total
from .view import MatrixView

if TYPE_CHECKING:
    from .eigenkronecker import EigenKroneckerOperator


class KroneckerOperator(Operator):
    """``G (x) A``: output factor ``G`` ``[out, out]`` and input factor ``A`` ``[inp, inp]``.

    It acts on the matrix view ``W`` of a vector as ``G W A``. With a leading group axis
    (``[groups, out, out]`` and ``[groups, inp, inp]``) it is the block diagonal of one product per
    group, as in a grouped convolution.

    Products cost ``O(out^2 inp + out inp^2)``; eigenvalues, inverses and determinants one
    eigen-decomposition of each factor. Source: Martens and Grosse, "Optimizing neural networks
    with Kronecker-factored approximate curvature", ICML 2015.
    """

    _stored = True
    view: MatrixView

    def __init__(
        self,
        G: Tensor,
        A: Tensor,
        view: MatrixView | None = None,
        *,
        layout: Layout | None = None,
        info: Provenance | None = None,
        positive_semidefinite: bool | None = None,
    ) -> None:
        self._G, self._A, view = _stack("G", G, "A", A, view)
        self._G, self._A = symmetric("G", self._G), symmetric("A", self._A)
        self.shape = (view.numel, view.numel)
        self.dtype, self.device = same_kind(G=self._G, A=self._A)
        set_parameters(self, layout, view, info)
        self.positive_semidefinite = positive_semidefinite

    @property
    def G(self) -> Tensor:
        """The output factor ``[out, out]``, or ``[groups, out, out]``."""
        return self._G if self.view.groups > 1 else self._G[0]

    @property
    def A(self) -> Tensor:
        """The input factor ``[inp, inp]``, or ``[groups, inp, inp]``."""
        return self._A if self.view.groups > 1 else self._A[0]

    @property
    def factors(self) -> dict[str, Tensor]:
        """``{"G": output factor, "A": input factor}``."""
        return {"G": self.G, "A": self.A}

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self.view.from_stack(two_sided(self._G, self.view.to_stack(vectors), self._A))

    def _dense(self) -> Tensor:
        groups, out, inp = self.view.shape
        dense = self._G.new_zeros(self.shape)
        for g in range(groups):
            rows = slice(g * out * inp, (g + 1) * out * inp)
            # torch.kron fails on factors of different memory layouts
            dense[rows, rows] = torch.kron(self._G[g].contiguous(), self._A[g].contiguous())
        return self.view.dense_from_matrix(dense)

    def diagonal(self) -> Tensor:
        return self.view.vector(_outer(_diag(self._G), _diag(self._A)))

    def trace(self) -> float:
        return total(_diag(self._G).sum(-1) * _diag(self._A).sum(-1))

    def frobenius_norm(self) -> float:
        squares = self._G.double().square().sum((-1, -2)) * self._A.double().square().sum((-1, -2))
        return math.sqrt(float(squares.sum()))

    def eigenvalues(self) -> Tensor:
        products = _outer(torch.linalg.eigvalsh(self._G), torch.linalg.eigvalsh(self._A))
        return products.flatten().sort().values

    def eigh(self) -> tuple[Tensor, Tensor]:
        return self.eigenform().eigh()

    def eigenform(self) -> EigenKroneckerOperator:
        """The same matrix as ``(U_G (x) U_A) diag(S) (U_G (x) U_A)^T``."""
        from .eigenkronecker import EigenKroneckerOperator

        outer, U_G = torch.linalg.eigh(self._G)
        inner, U_A = torch.linalg.eigh(self._A)
        return EigenKroneckerOperator(
            U_G, U_A, _outer(outer, inner), self.view, layout=self.layout, info=self.info
        )

    def split_damped(self, damping: float, how: str = "trace") -> KroneckerOperator:
        """``(G + sqrt(damping)/pi I) (x) (A + pi sqrt(damping) I)``: damping factor by factor.

        ``how="plain"`` takes ``pi = 1``; ``how="trace"`` the ``pi`` that Martens and Grosse (2015,
        section 6.3) derive, ``sqrt((tr A / inp) / (tr G / out))`` per group, or 1 where a trace is
        zero. Unlike :meth:`damped` this is not ``self + damping I``: the cross terms differ.
        """
        check_damping_rule(damping, how)
        root = math.sqrt(damping)
        pi = self._G.new_ones(self.view.groups)
        if how == "trace":
            inner = _diag(self._A).mean(-1)
            outer = _diag(self._G).mean(-1)
            if bool((inner < 0).any()) or bool((outer < 0).any()):
                raise NotDefinedError(
                    "how='trace' needs factors with non-negative traces; use how='plain'."
                )
            ratio = (inner / outer).sqrt()
            pi = torch.where((inner > 0) & (outer > 0), ratio, pi)
        G, A = self._G.clone(), self._A.clone()
        _diag(G).add_((root / pi).unsqueeze(-1))
        _diag(A).add_((root * pi).unsqueeze(-1))
        what = f"{self.info.what}, factors damped by {damping:g} ({how})"
        return KroneckerOperator(
            G,
            A,
            self.view,
            layout=self.layout,
            info=self.info.with_(what=what),
            positive_semidefinite=self.positive_semidefinite,
        )

    def _inverse(self, damping: float) -> Operator:
        if damping != 0:
            return self.eigenform()._inverse(damping)
        try:
            G, A = (
                torch.stack([DenseOperator(factor).inverse().dense() for factor in stack])
                for stack in (self._G, self._A)
            )
        except SingularError as error:
            raise SingularError(
                f"A factor of the {self.info.what} is singular. Pass a positive damping."
            ) from error
        return KroneckerOperator(G, A, self.view, positive_semidefinite=self.positive_semidefinite)

    def _scaled(self, factor: float) -> Operator:
        return KroneckerOperator(factor * self._G, self._A, self.view)


class DiagonalKroneckerOperator(Operator):
    """``diag(s) (x) diag(h)``: output factor ``s`` ``[out]``, input factor ``h`` ``[inp]``.

    With a leading group axis one product per group. A diagonal matrix of rank one in the matrix
    view; AdaFisher's factors are of this form (Martins Gomes et al., ICLR 2025).
    """

    _stored = True
    view: MatrixView

    def __init__(
        self,
        s: Tensor,
        h: Tensor,
        view: MatrixView | None = None,
        *,
        layout: Layout | None = None,
        info: Provenance | None = None,
    ) -> None:
        self._s, self._h, view = _stack("s", s, "h", h, view)
        self.shape = (view.numel, view.numel)
        self.dtype, self.device = same_kind(s=self._s, h=self._h)
        set_parameters(self, layout, view, info)
        definite = bool((self._s >= 0).all()) and bool((self._h >= 0).all())
        self.positive_semidefinite = True if definite else None

    @property
    def s(self) -> Tensor:
        """The output factor's diagonal ``[out]``, or ``[groups, out]``."""
        return self._s if self.view.groups > 1 else self._s[0]

    @property
    def h(self) -> Tensor:
        """The input factor's diagonal ``[inp]``, or ``[groups, inp]``."""
        return self._h if self.view.groups > 1 else self._h[0]

    @property
    def factors(self) -> dict[str, Tensor]:
        """``{"G": diagonal of the output factor, "A": diagonal of the input factor}``."""
        return {"G": self.s, "A": self.h}

    def _matmat(self, vectors: Tensor) -> Tensor:
        scales = _outer(self._s, self._h).unsqueeze(-1)
        return self.view.from_stack(scales * self.view.to_stack(vectors))

    def _dense(self) -> Tensor:
        return torch.diag(self.diagonal())

    def diagonal(self) -> Tensor:
        return self.view.vector(_outer(self._s, self._h))

    def trace(self) -> float:
        return total(self._s.sum(-1) * self._h.sum(-1))

    def frobenius_norm(self) -> float:
        squares = self._s.double().square().sum(-1) * self._h.double().square().sum(-1)
        return math.sqrt(float(squares.sum()))

    def eigenvalues(self) -> Tensor:
        return self.diagonal().sort().values

    def eigh(self) -> tuple[Tensor, Tensor]:
        return self.as_diagonal().eigh()

    def logdet(self, damping: float = 0.0) -> float:
        return self.as_diagonal().logdet(damping)

    def as_diagonal(self) -> DiagonalOperator:
        """The same matrix as a :class:`DiagonalOperator`."""
        return DiagonalOperator(self.diagonal(), layout=self.layout, view=self.view, info=self.info)

    def _inverse(self, damping: float) -> Operator:
        inverse = self.as_diagonal()._inverse(damping)
        if damping != 0:
            return inverse
        return DiagonalKroneckerOperator(1.0 / self._s, 1.0 / self._h, self.view)

    def _scaled(self, factor: float) -> Operator:
        return DiagonalKroneckerOperator(factor * self._s, self._h, self.view)

    def _damped(self, damping: float) -> Operator:
        return self.as_diagonal()._damped(damping)

    def _plus(self, other: Operator) -> Operator | None:
        if isinstance(other, DiagonalKroneckerOperator):
            other = other.as_diagonal()
        return self.as_diagonal()._plus(other)

    def _restricted(self, index: Tensor, layout: Layout) -> Operator:
        return self.as_diagonal()._restricted(index, layout)


def two_sided(left: Tensor, stack: Tensor, right: Tensor) -> Tensor:
    """``left W right`` per column: ``[g,p,o]``, ``[g,o,i,k]``, ``[g,i,j]`` -> ``[g,p,j,k]``."""
    groups, out, inp, count = stack.shape
    half = (left @ stack.reshape(groups, out, inp * count)).reshape(groups, -1, inp, count)
    rows = half.shape[1]
    half = half.transpose(-1, -2).reshape(groups, rows * count, inp) @ right
    return half.reshape(groups, rows, count, -1).transpose(-1, -2)


def _diag(stack: Tensor) -> Tensor:
    return stack.diagonal(dim1=-2, dim2=-1)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """``[g, o]`` and ``[g, i]`` -> ``[g, o, i]``."""
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _stack(
    left_name: str, left: Tensor, right_name: str, right: Tensor, view: MatrixView | None
) -> tuple[Tensor, Tensor, MatrixView]:
    """Both factors with a leading group axis, and a view that fits them."""
    ndim = 2 if left_name.isupper() else 1
    left = as_float(left_name, left, (ndim, ndim + 1))
    right = as_float(right_name, right, (ndim, ndim + 1))
    if left.ndim != right.ndim:
        raise ShapeError(f"Either both or none of {left_name} and {right_name} has a group axis.")
    if left.ndim == ndim:
        left, right = left.unsqueeze(0), right.unsqueeze(0)
    if left.shape[0] != right.shape[0]:
        raise ShapeError(
            f"{left_name} has {left.shape[0]} groups, {right_name} has {right.shape[0]}."
        )
    view = view or MatrixView(left.shape[0], left.shape[-1], right.shape[-1])
    if view.shape != (left.shape[0], left.shape[-1], right.shape[-1]):
        raise OptionError(
            f"{left_name} {list(left.shape)} and {right_name} {list(right.shape)} do not fit the "
            f"view of {view.groups} groups, {view.out} outputs and {view.inp} inputs."
        )
    return left, right, view
