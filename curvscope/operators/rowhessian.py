"""The factored Hessian of one layer: Hessians in the layer's output between input rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import ShapeError
from . import row_algebra as rows_
from .base import Layout, Operator, Provenance
from .dense import set_parameters
from .numerics import as_float, chunks, same_kind, symmetric, total
from .row_algebra import SMALL
from .view import MatrixView


class RowHessianOperator(Operator):
    """``scale * sum_n sum_tu H_n[t, :, u, :] (x) a_nt a_nu^T``.

    ``H`` ``[N, T, o, T, o]`` is the Hessian of each sample's loss in the layer's outputs (``o``
    counting the outputs of all groups), ``a`` ``[N, T, i]`` or ``[N, T, g, i]`` the input rows,
    with a 1 appended for a bias. This is the exact Hessian block of a layer that acts once per
    sample, in any network without coupling between samples. Rows of zeros are padding.

    Products cost ``O(N T o (i + T o))`` per column; with ``T = 1`` the diagonal costs ``O(N o i)``
    and the norm ``O(N^2 o^2)``. The matrix itself is not formed where it would be large.
    """

    _stored = True
    view: MatrixView

    def __init__(
        self,
        H: Tensor,
        a: Tensor,
        scale: float = 1.0,
        *,
        view: MatrixView | None = None,
        layout: Layout | None = None,
        info: Provenance | None = None,
        positive_semidefinite: bool | None = None,
    ) -> None:
        self._a = rows_.input_rows(a)
        samples, positions, groups, inp = self._a.shape
        H = as_float("H", H, 5)
        if H.shape[1:3] != H.shape[3:] or H.shape[2] % groups:
            raise ShapeError(
                f"H must be [N, T, o, T, o] with o a multiple of {groups} groups, not "
                f"{list(H.shape)}."
            )
        rows_.check_rows("H", tuple(H.shape[:2]), (samples, positions))
        size = positions * H.shape[2]
        flat = symmetric("H (per sample)", H.reshape(samples, size, size))
        out = H.shape[2] // groups
        self._H = flat.reshape(samples, positions, groups, out, positions, groups, out)
        self._scale = self._number(scale, "scale")
        view = rows_.fitting_view(view, groups, out, inp)
        self.shape = (view.numel, view.numel)
        self.dtype, self.device = same_kind(H=self._H, a=self._a)
        set_parameters(self, layout, view, info)
        self.positive_semidefinite = positive_semidefinite if self._scale >= 0 else None

    @property
    def factors(self) -> dict[str, Tensor]:
        """``{"H": output Hessians [N, T, g, o, T, g, o], "a": input rows [N, T, g, i]}``."""
        return {"H": self._H, "a": self._a}

    @property
    def scale(self) -> float:
        """The factor in front of the sum."""
        return self._scale

    @property
    def positions(self) -> int:
        """Rows per sample, ``T``."""
        return self._a.shape[1]

    @property
    def simple(self) -> bool:
        """Whether there is one position and one group: the case with the cheapest formulas."""
        return self.positions == 1 and self.view.groups == 1

    # -- products --------------------------------------------------------------------------------

    def _matmat(self, vectors: Tensor) -> Tensor:
        result = torch.empty_like(vectors, memory_format=torch.contiguous_format)
        samples, positions = self._a.shape[:2]
        size = positions * self.view.groups * self.view.out
        flat = self._H.reshape(samples, size, size)
        for columns in chunks(vectors.shape[1], 2 * samples * size + self.shape[0]):
            z = rows_.outputs(self._a, self.view.to_stack(vectors[:, columns]))
            y = self._scale * (flat @ z.reshape(samples, size, -1))
            result[:, columns] = self.view.from_stack(rows_.weights(self._a, y.reshape(z.shape)))
        return result

    # -- numbers ---------------------------------------------------------------------------------

    def _dense(self) -> Tensor:
        groups, out, inp = self.view.shape
        samples, positions = self._a.shape[:2]
        if self.simple:
            H = self._H.reshape(samples, out, out)
            dense = rows_.dense_sum(H.__getitem__, self._a[:, 0, 0], out)
            return self.view.dense_from_matrix(dense.mul_(self._scale))
        dense = self._a.new_zeros(groups, inp, out * self.shape[0])
        for part in chunks(samples, 2 * positions * groups * out * self.shape[0]):
            a = self._a[part]
            half = torch.einsum("ntgouhp,nuhj->gntohpj", self._H[part], a)
            half = half.reshape(groups, -1, out * self.shape[0])
            rows = a.permute(2, 0, 1, 3).reshape(groups, -1, inp)
            dense.baddbmm_(rows.mT, half, alpha=self._scale)
        dense = dense.reshape(groups, inp, out, -1).transpose(1, 2).reshape(self.shape)
        return self.view.dense_from_matrix((dense + dense.mT) / 2)

    def diagonal(self) -> Tensor:
        return self.view.vector(self.diagonal_matrix())

    def diagonal_matrix(self) -> Tensor:
        """The diagonal in the matrix view ``[g, o, i]``."""
        own = self._H.diagonal(dim1=3, dim2=6).diagonal(dim1=2, dim2=4)  # [N, T, T, o, g]
        own = own.permute(0, 4, 3, 1, 2)  # [N, g, o, T, T]
        rows = self._a.transpose(1, 2)  # [N, g, T, i]
        if self.positions == 1:
            return self._scale * torch.einsum(
                "ngo,ngi->goi", own[..., 0, 0], rows[:, :, 0].square()
            )
        result = self._a.new_zeros(self.view.shape)
        for part in chunks(self._a.shape[0], 2 * self.positions * self.shape[0]):
            right = own[part] @ rows[part].unsqueeze(2)  # [n, g, o, T, i]
            result += (right * rows[part].unsqueeze(2)).sum((0, 3))
        return self._scale * result

    def trace(self) -> float:
        return math.fsum(
            total((part.output_forms(None) * rows_.input_forms(part._a, None)).sum((1, 2, 3)))
            for part in self.parts()
        )

    def parts(self) -> Iterator[RowHessianOperator]:
        """The sum cut into samples whose temporaries are small."""
        if self.positions == 1:
            yield self
            return
        for rows in chunks(self._a.shape[0], 2 * self._H[0].numel()):
            twin = copy.copy(self)
            twin._H, twin._a = self._H[rows], self._a[rows]
            yield twin

    def output_forms(self, G: Tensor | None) -> Tensor:
        """``scale * <G_g, H_n[t, g, :, u, g, :]>``: ``[N, g, T, T]``; ``None`` is the identity."""
        if self.simple and G is not None:  # without a copy of H
            return self._scale * (self._H.flatten(1) @ G.flatten())[:, None, None, None]
        within = self._H.diagonal(dim1=2, dim2=5)  # [N, T, o, T, o, g]
        if G is None:
            forms = within.diagonal(dim1=2, dim2=4).sum(-1)
        else:
            forms = torch.einsum("ntoupg,gop->ntug", within, G)
        return self._scale * forms.permute(0, 3, 1, 2)

    def output_moments(self, forms: Tensor) -> Tensor:
        """``scale * sum_n sum_tu forms_n[t, u] H_n[t, g, :, u, g, :]``: ``[g, o, o]``."""
        if self.simple:
            flat = forms.flatten() @ self._H.flatten(1)
            return self._scale * flat.reshape(1, self.view.out, self.view.out)
        within = self._H.diagonal(dim1=2, dim2=5)
        return self._scale * torch.einsum("ntoupg,ngtu->gop", within, forms)

    def rotated(self, U_G: Tensor, U_A: Tensor) -> RowHessianOperator:
        """``(U_G (x) U_A)^T self (U_G (x) U_A)`` for bases ``[g, o, o]`` and ``[g, i, i]``."""
        H = torch.einsum("ntgouhp,goq,hpr->ntgquhr", self._H, U_G, U_G)
        a = (self._a.transpose(1, 2) @ U_A).transpose(1, 2)
        size = self.view.groups * self.view.out
        samples, positions = a.shape[:2]
        H = H.reshape(samples, positions, size, positions, size)
        return RowHessianOperator(H, a, self._scale, view=self.view)

    def frobenius_norm(self) -> float:
        if not self.simple and self.shape[0] <= SMALL:
            return super().frobenius_norm()
        return math.sqrt(max(self.row_inner(self), 0.0))

    def row_inner(self, other: RowHessianOperator) -> float:
        """Inner product with another of the same view, by pairs of samples: ``O(N M T^3 o^2)``."""
        factor = self._scale * other._scale
        if self.simple and other.simple:
            left, right = self._H.flatten(1), other._H.flatten(1)
            gram = (left @ right.mT) * rows_.sample_form_gram(self._a, other._a)
            return factor * total(gram)
        square = 0.0
        for m in range(other._a.shape[0]):
            for part in chunks(self._a.shape[0], 3 * self._H[0].numel()):
                between = torch.einsum("ntgi,sgi->ntgs", self._a[part], other._a[m])
                half = torch.einsum("ntgouhp,ntgs->nsgouhp", self._H[part], between)
                full = torch.einsum("nsgouhp,nuhv->nsgovhp", half, between)
                square += total(torch.tensordot(full, other._H[m], dims=6))
        return factor * square

    def eigenvalues(self) -> Tensor:
        """All eigenvalues ``[P]``; if ``N T < i`` within the span of the input rows, and padded."""
        count = self._a.shape[0] * self._a.shape[1]
        if self.view.groups > 1 or count >= self.view.inp:
            return super().eigenvalues()
        triangle = torch.linalg.qr(self._a.reshape(count, -1).mT, mode="r").R
        a = triangle.mT.reshape(*self._a.shape[:2], 1, count)
        samples, positions, out = a.shape[0], a.shape[1], self.view.out
        H = self._H.reshape(samples, positions, out, positions, out)
        values = RowHessianOperator(H, a, self._scale, info=self.info).eigenvalues()
        zeros = values.new_zeros(self.shape[0] - len(values))
        return torch.cat([values, zeros]).sort().values

    def _scaled(self, factor: float) -> Operator:
        size = self.view.groups * self.view.out
        samples, positions = self._a.shape[:2]
        H = self._H.reshape(samples, positions, size, positions, size)
        return RowHessianOperator(H, self._a, factor * self._scale, view=self.view)
