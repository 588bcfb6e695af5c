"""The factored Gauss-Newton form: a sum of outer products of per-sample weight gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import memory
from ..errors import OptionError, ShapeError
from . import row_algebra as rows_
from .base import Layout, Operator, Provenance
from .dense import set_parameters
from .gram import gram_eigenvalues, gram_norm, gram_rows
from .lowrank import LowRankOperator
from .numerics import as_float, chunks, same_kind, total
from .row_algebra import SMALL
from .rowhessian import RowHessianOperator
from .view import MatrixView


class RowGramOperator(Operator):
    """``scale * sum_n sum_c sign_cn v_cn v_cn^T`` with ``v_cn = vec(sum_t S_cnt a_nt^T)``.

    ``S`` ``[C, N, T, o]`` holds ``C`` output-gradient rows per sample and position, ``a``
    ``[N, T, i]`` the input rows (with a 1 appended for a bias), ``signs`` ``[C, N]`` optional
    weights. With groups, ``S`` is ``[C, N, T, g, o]`` and ``a`` ``[N, T, g, i]``; unlike in a
    grouped Kronecker product the blocks between groups are not zero. Rows of zeros are padding
    and change nothing.

    Nothing of the size of the matrix, nor ``[d, C N]``, is held where a closed form exists. With
    ``T = 1`` products cost ``O(N o (i + C))`` per column, the diagonal ``O(N o i)``, the norm
    ``O(C^2 N^2 o)``.
    """

    _stored = True
    view: MatrixView

    def __init__(
        self,
        S: Tensor,
        a: Tensor,
        scale: float = 1.0,
        *,
        signs: Tensor | None = None,
        view: MatrixView | None = None,
        layout: Layout | None = None,
        info: Provenance | None = None,
    ) -> None:
        self._a = rows_.input_rows(a)
        samples, positions, groups, inp = self._a.shape
        S = as_float("S", S, (4, 5))
        if S.ndim == 4:
            if S.shape[-1] % groups:
                raise ShapeError(
                    f"{S.shape[-1]} outputs of S do not fall into the {groups} groups of a."
                )
            S = S.reshape(*S.shape[:3], groups, -1)
        rows_.check_rows("S", tuple(S.shape[1:3]), (samples, positions))
        if S.shape[3] != groups:
            raise ShapeError(f"S has {S.shape[3]} groups, a has {groups}.")
        self._S = S
        self._signs = None if signs is None else as_float("signs", signs, 2)
        if self._signs is not None and self._signs.shape != S.shape[:2]:
            raise OptionError(
                f"signs must be [C, N] = {list(S.shape[:2])}, not {list(self._signs.shape)}."
            )
        self._scale = self._number(scale, "scale")
        view = rows_.fitting_view(view, groups, S.shape[-1], inp)
        self.shape = (view.numel, view.numel)
        self.dtype, self.device = same_kind(S=self._S, a=self._a)
        set_parameters(self, layout, view, info)
        definite = self._signs is None or bool((self._signs >= 0).all())
        self.positive_semidefinite = True if definite and scale >= 0 else None

    @property
    def factors(self) -> dict[str, Tensor]:
        """``{"S": output rows [C, N, T, g, o], "a": input rows [N, T, g, i]}``."""
        return {"S": self._S, "a": self._a}

    @property
    def scale(self) -> float:
        """The factor in front of the sum."""
        return self._scale

    @property
    def rank(self) -> int:
        """Number of vectors ``C N``: an upper bound of the rank."""
        return self._S.shape[0] * self._S.shape[1]

    @property
    def positions(self) -> int:
        """Rows per sample, ``T``."""
        return self._a.shape[1]

    # -- products --------------------------------------------------------------------------------

    def _matmat(self, vectors: Tensor) -> Tensor:
        result = torch.empty_like(vectors, memory_format=torch.contiguous_format)
        # one column takes N T g o numbers for its outputs, and d for itself
        for columns in chunks(vectors.shape[1], self._S[0].numel() + self.shape[0]):
            y = self._scale * self.project(vectors[:, columns])
            if self._signs is not None:
                y = y * self._signs.unsqueeze(-1)
            result[:, columns] = self.combine(y)
        return result

    def project(self, vectors: Tensor) -> Tensor:
        """``v_cn . x`` for the columns ``x`` of ``[P, k]``: ``[C, N, k]``."""
        z = rows_.outputs(self._a, self.view.to_stack(vectors))
        z = z.reshape(z.shape[0], -1, z.shape[-1])
        return (self._by_sample() @ z).transpose(0, 1)

    def combine(self, coefficients: Tensor) -> Tensor:
        """``sum_cn y_cn v_cn`` for coefficients ``[C, N, k]``: ``[P, k]``, adjoint to project."""
        z = self._by_sample().mT @ coefficients.transpose(0, 1)  # [N, Tgo, k]
        z = z.reshape(*self._S.shape[1:], z.shape[-1])
        return self.view.from_stack(rows_.weights(self._a, z))

    def vectors(self, samples: slice) -> Tensor:
        """``v_cn`` of some samples in the matrix view: ``[C, n, g, o, i]``."""
        count, positions = self._S.shape[0], self.positions
        S = self._S[:, samples].permute(1, 3, 0, 4, 2)  # [n, g, C, o, T]
        a = self._a[samples].transpose(1, 2)  # [n, g, T, i]
        n, groups, out = S.shape[0], self.view.groups, self.view.out
        v = S.reshape(n, groups, count * out, positions) @ a
        return v.reshape(n, groups, count, out, -1).permute(2, 0, 1, 3, 4)

    def vector_chunks(self, budget: int | None = None) -> list[slice]:
        """Slices of samples whose vectors fit into one temporary of ``budget`` numbers."""
        return list(chunks(self._S.shape[1], 2 * self._S.shape[0] * self.shape[0], budget))

    def weights(self, samples: slice = slice(None)) -> Tensor:
        """``scale * sign_cn`` ``[C, n]``."""
        if self._signs is None:
            ones = self._S.new_ones(self._S.shape[:2])
            return self._scale * ones[:, samples]
        return self._scale * self._signs[:, samples]

    # -- numbers ---------------------------------------------------------------------------------

    def _dense(self) -> Tensor:
        if self.simple:  # C times fewer operations than by the vectors
            S, weights = self._S[:, :, 0, 0], self.weights()
            dense = rows_.dense_sum(
                lambda part: rows_.outer_sums(S[:, part], weights[:, part]),
                self._a[:, 0, 0],
                self.view.out,
            )
            return self.view.dense_from_matrix(dense)
        dense = self._S.new_zeros(self.shape)
        for samples in self.vector_chunks():
            v = self.vectors(samples).reshape(-1, self.shape[0])
            weighted = v * self.weights(samples).reshape(-1, 1)
            dense.addmm_(v.mT, weighted)
        return self.view.dense_from_matrix(dense)

    def diagonal(self) -> Tensor:
        return self.view.vector(self.diagonal_matrix())

    def diagonal_matrix(self) -> Tensor:
        """The diagonal in the matrix view ``[g, o, i]``."""
        if self.positions == 1:
            moments = torch.einsum("cngo,cn->ngo", self._S[:, :, 0].square(), self.weights())
            return torch.einsum("ngo,ngi->goi", moments, self._a[:, 0].square())
        result = self._S.new_zeros(self.view.shape)
        for samples in self.vector_chunks():
            squares = self.vectors(samples).square_().flatten(0, 1)
            result += torch.tensordot(self.weights(samples).flatten(), squares, dims=1)
        return result

    def trace(self) -> float:
        return math.fsum(
            total((part.output_forms(None) * rows_.input_forms(part._a, None)).sum((1, 2, 3)))
            for part in self.parts()
        )

    def parts(self) -> Iterator[RowGramOperator]:
        """The sum cut into samples whose forms ``[T, T]`` fit into one temporary."""
        count, samples, positions, groups, out = self._S.shape
        if positions == 1:
            yield self
            return
        for rows in chunks(samples, count * groups * positions * (positions + out)):
            twin = copy.copy(self)
            twin._S, twin._a = self._S[:, rows], self._a[rows]
            twin._signs = None if self._signs is None else self._signs[:, rows]
            yield twin

    def output_forms(self, G: Tensor | None) -> Tensor:
        """``scale * sum_c sign s_cnt^T G_g s_cnu``: ``[N, g, T, T]``; ``None`` is the identity."""
        S = self._S.permute(1, 3, 0, 2, 4)  # [N, g, C, T, o]
        right = S if G is None else S @ G.unsqueeze(1)
        if self.positions == 1:
            values = (S * right).sum((-1, -2)) * self.weights().mT.unsqueeze(1)
            return values.sum(-1)[..., None, None]
        right = right * self.weights().mT[:, None, :, None, None]
        return torch.einsum("ngcto,ngcuo->ngtu", S, right)

    def output_moments(self, forms: Tensor) -> Tensor:
        """``scale * sum_cn sign sum_tu forms_n[t, u] s_cnt s_cnu^T``: ``[g, o, o]``."""
        S = self._S.permute(3, 0, 1, 2, 4)  # [g, C, N, T, o]
        right = forms.transpose(0, 1).unsqueeze(1) @ S
        right = right * self.weights()[:, :, None, None]
        groups, out = self.view.groups, self.view.out
        return S.reshape(groups, -1, out).mT @ right.reshape(groups, -1, out)

    def rotated(self, U_G: Tensor, U_A: Tensor) -> RowGramOperator:
        """``(U_G (x) U_A)^T self (U_G (x) U_A)`` for bases ``[g, o, o]`` and ``[g, i, i]``."""
        S = (self._S.transpose(2, 3) @ U_G).transpose(2, 3)
        a = (self._a.transpose(1, 2) @ U_A).transpose(1, 2)
        return RowGramOperator(S, a, self._scale, signs=self._signs, view=self.view)

    def frobenius_norm(self) -> float:
        if self.simple:
            gram = self.sample_gram(self) * rows_.sample_form_gram(self._a, self._a)
            return math.sqrt(max(total(gram), 0.0))
        if self.shape[0] <= max(SMALL, self.rank):
            return super().frobenius_norm()
        return gram_norm(self)

    @property
    def simple(self) -> bool:
        """Whether there is one position and one group: the case with the cheapest formulas."""
        return self.positions == 1 and self.view.groups == 1

    def sample_gram(self, other: RowGramOperator) -> Tensor:
        """``<H_n, H_m>`` of the samples' output matrices ``H_n = scale sum_c sign s s^T``."""
        left, right = self._S[:, :, 0, 0], other._S[:, :, 0, 0]
        signs = self._signs
        if other is self:
            gram = rows_.outer_gram(left, signs, left, signs)
        else:
            gram = rows_.outer_gram(left, signs, right, other._signs)
        return self._scale * other._scale * gram

    def gram(self) -> Tensor:
        """The Gram matrix ``v_k . v_l`` ``[C N, C N]`` of the vectors, without weights."""
        return gram_rows(self, slice(None))

    def eigenvalues(self) -> Tensor:
        """All eigenvalues ``[P]``, through the Gram matrix of the vectors if ``C N < P``."""
        if self.rank >= self.shape[0]:
            return super().eigenvalues()
        return gram_eigenvalues(self)

    def eigh(self) -> tuple[Tensor, Tensor]:
        return self.to_lowrank().eigh() if self.rank < self.shape[0] else super().eigh()

    def to_lowrank(self) -> LowRankOperator:
        """The same matrix with its vectors written out, ``[P, C N]``; refused if too large."""
        memory.require(
            3 * self.shape[0] * self.rank * self.dtype.itemsize,
            f"The {self.rank} vectors of the {self.info.what}",
            "Keep the factored form, or take fewer samples with problem.subset(n, seed).",
            device=self.device,
        )
        V = self.view.from_matrix(self.vectors(slice(None)).flatten(0, 1))
        return LowRankOperator(
            V, self.weights().flatten(), self.view, layout=self.layout, info=self.info
        )

    def to_row_hessian(self) -> RowHessianOperator:
        """The same matrix with ``H_n = sum_c sign s_nc s_nc^T`` written out.

        It takes ``T o`` rows per sample instead of ``C``.
        """
        positions, out = self.positions, self.view.groups * self.view.out
        size = positions * out
        memory.require(
            2 * self._S.shape[1] * size**2 * self.dtype.itemsize,
            f"The output matrices of the {self.info.what}",
            "Keep the rows, or take fewer samples with problem.subset(n, seed).",
            device=self.device,
        )
        H = rows_.outer_sums(self._S.flatten(2), self._signs)
        return RowHessianOperator(
            H.reshape(-1, positions, out, positions, out),
            self._a,
            self._scale,
            view=self.view,
            layout=self.layout,
            info=self.info,
            positive_semidefinite=self.positive_semidefinite,
        )

    def _inverse(self, damping: float) -> Operator:
        return (
            self.to_lowrank()._inverse(damping)
            if self.rank < self.shape[0]
            else (super()._inverse(damping))
        )

    def _scaled(self, factor: float) -> Operator:
        return RowGramOperator(
            self._S, self._a, factor * self._scale, signs=self._signs, view=self.view
        )

    def _by_sample(self) -> Tensor:
        """``S`` as ``[N, C, T g o]``."""
        return self._S.transpose(0, 1).flatten(2)
