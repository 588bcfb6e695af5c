"""Contractions of a block with one Kronecker factor.

Van Loan and Pitsianis ("Approximation with Kronecker products", 1993) rearrange a matrix ``B`` in
the view ``[o, i]`` into ``R(B)`` ``[o^2, i^2]`` such that ``<G (x) A, B> = <G, R(B) A>``. The two
functions here are the products with ``R(B)`` and its transpose, by the structure of ``B`` and per
group; nothing of the size of ``B`` is formed unless it is stored that way.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from ..errors import ShapeError
from . import row_algebra as rows_
from .algebra import Damped, Scaled, Sum
from .base import Operator
from .dense import IdentityOperator
from .diagonal import DiagonalOperator
from .eigenkronecker import EigenKroneckerOperator
from .kronecker import DiagonalKroneckerOperator, KroneckerOperator
from .lowrank import LowRankOperator
from .numerics import chunks
from .rowgram import RowGramOperator
from .rowhessian import RowHessianOperator
from .view import MatrixView

_OWN_VIEW = (
    KroneckerOperator,
    DiagonalKroneckerOperator,
    EigenKroneckerOperator,
    RowGramOperator,
    RowHessianOperator,
)


def view_of(op: Operator, view: MatrixView | None) -> MatrixView:
    """``view``, or the operator's own; raises ``ShapeError`` where there is none."""
    view = view or op.view
    if view is None:
        raise ShapeError(
            f"This {type(op).__name__} does not know how its {op.shape[0]} rows form a weight "
            "matrix. Pass view=MatrixView(...), for example MatrixView.for_weight_and_bias."
        )
    if view.numel != op.shape[0]:
        raise ShapeError(f"{view!r} has {view.numel} entries, the operator {op.shape[0]} rows.")
    return view


def output_contraction(op: Operator, A: Tensor, view: MatrixView) -> Tensor:
    """``R(B) A``: ``sum_ij B[(g,o,i),(g,p,j)] A[g,i,j]`` as ``[g, o, o]``, ``A`` symmetric."""
    found = _output(seen(op, view), A, view)
    return (found + found.mT) / 2


def input_contraction(op: Operator, G: Tensor, view: MatrixView) -> Tensor:
    """``R(B)^T G``: ``sum_op B[(g,o,i),(g,p,j)] G[g,o,p]`` as ``[g, i, i]``, ``G`` symmetric."""
    found = _input(seen(op, view), G, view)
    return (found + found.mT) / 2


def seen(op: Operator, view: MatrixView) -> Operator:
    """``op``, or if its structure belongs to another view, the same without its structure."""
    if isinstance(op, _OWN_VIEW) and op.view != view:
        from .dense import DenseOperator

        return DenseOperator(op.dense(), info=op.info)
    return op


# -- R(B) A --------------------------------------------------------------------------------------


@singledispatch
def _output(op: Operator, A: Tensor, view: MatrixView) -> Tensor:
    groups, out, inp = view.shape
    dense = view.dense_to_matrix(op.dense()).reshape(groups, out, inp, groups, out, inp)
    return torch.stack(
        [torch.einsum("oipj,ij->op", dense[g, :, :, g], A[g]) for g in range(groups)]
    )


@_output.register
def _(op: DiagonalOperator, A: Tensor, view: MatrixView) -> Tensor:
    return _from_diagonal(op.diagonal(), A, view, rows=True)


@_output.register
def _(op: IdentityOperator, A: Tensor, view: MatrixView) -> Tensor:
    return _from_diagonal(op.diagonal(), A, view, rows=True)


@_output.register
def _(op: DiagonalKroneckerOperator, A: Tensor, view: MatrixView) -> Tensor:
    return _from_diagonal(op.diagonal(), A, view, rows=True)


@_output.register
def _(op: KroneckerOperator, A: Tensor, view: MatrixView) -> Tensor:
    return op._G * (op._A * A).sum((-1, -2), keepdim=True)


@_output.register
def _(op: EigenKroneckerOperator, A: Tensor, view: MatrixView) -> Tensor:
    inner = (op._U_A * (A @ op._U_A)).sum(-2)  # u_j^T A u_j
    return (op._U_G * (op._S @ inner.unsqueeze(-1)).mT) @ op._U_G.mT


@_output.register
def _(op: LowRankOperator, A: Tensor, view: MatrixView) -> Tensor:
    found = A.new_zeros(view.groups, view.out, view.out)
    for columns in chunks(op.rank, 3 * op.shape[0]):
        vectors = view.to_matrix(op._V[:, columns])
        found += _from_vectors(vectors, op._weights[columns], A)
    return found


@_output.register
def _(op: RowGramOperator, A: Tensor, view: MatrixView) -> Tensor:
    found = A.new_zeros(view.groups, view.out, view.out)
    if op.positions > view.inp:  # the sums over positions are smaller than the rows
        for samples in op.vector_chunks():
            vectors = op.vectors(samples).flatten(0, 1)
            found += _from_vectors(vectors, op.weights(samples).flatten(), A)
        return found
    for part in op.parts():
        found += part.output_moments(rows_.input_forms(part._a, A))
    return found


@_output.register
def _(op: RowHessianOperator, A: Tensor, view: MatrixView) -> Tensor:
    found = A.new_zeros(view.groups, view.out, view.out)
    for part in op.parts():
        found += part.output_moments(rows_.input_forms(part._a, A))
    return found


@_output.register
def _(op: Scaled, A: Tensor, view: MatrixView) -> Tensor:
    return op.factor * output_contraction(op.base, A, view)


@_output.register
def _(op: Damped, A: Tensor, view: MatrixView) -> Tensor:
    eye = torch.eye(view.out, dtype=A.dtype, device=A.device)
    traces = op.damping * A.diagonal(dim1=-2, dim2=-1).sum(-1)
    return output_contraction(op.base, A, view) + traces[:, None, None] * eye


@_output.register
def _(op: Sum, A: Tensor, view: MatrixView) -> Tensor:
    parts = [output_contraction(term, A.to(term.dtype), view) for term in op.terms]
    return torch.stack([part.to(op.dtype) for part in parts]).sum(0)


# -- R(B)^T G ------------------------------------------------------------------------------------


@singledispatch
def _input(op: Operator, G: Tensor, view: MatrixView) -> Tensor:
    groups, out, inp = view.shape
    dense = view.dense_to_matrix(op.dense()).reshape(groups, out, inp, groups, out, inp)
    return torch.stack(
        [torch.einsum("oipj,op->ij", dense[g, :, :, g], G[g]) for g in range(groups)]
    )


@_input.register
def _(op: DiagonalOperator, G: Tensor, view: MatrixView) -> Tensor:
    return _from_diagonal(op.diagonal(), G, view, rows=False)


@_input.register
def _(op: IdentityOperator, G: Tensor, view: MatrixView) -> Tensor:
    return _from_diagonal(op.diagonal(), G, view, rows=False)


@_input.register
def _(op: DiagonalKroneckerOperator, G: Tensor, view: MatrixView) -> Tensor:
    return _from_diagonal(op.diagonal(), G, view, rows=False)


@_input.register
def _(op: KroneckerOperator, G: Tensor, view: MatrixView) -> Tensor:
    return op._A * (op._G * G).sum((-1, -2), keepdim=True)


@_input.register
def _(op: EigenKroneckerOperator, G: Tensor, view: MatrixView) -> Tensor:
    outer = (op._U_G * (G @ op._U_G)).sum(-2)
    return (op._U_A * (outer.unsqueeze(-2) @ op._S)) @ op._U_A.mT


@_input.register
def _(op: LowRankOperator, G: Tensor, view: MatrixView) -> Tensor:
    found = G.new_zeros(view.groups, view.inp, view.inp)
    for columns in chunks(op.rank, 3 * op.shape[0]):
        vectors = view.to_matrix(op._V[:, columns]).mT
        found += _from_vectors(vectors, op._weights[columns], G)
    return found


@_input.register
def _(op: RowGramOperator, G: Tensor, view: MatrixView) -> Tensor:
    found = G.new_zeros(view.groups, view.inp, view.inp)
    if op.positions > view.inp:  # the sums over positions are smaller than the rows
        for samples in op.vector_chunks():
            vectors = op.vectors(samples).flatten(0, 1).mT
            found += _from_vectors(vectors, op.weights(samples).flatten(), G)
        return found
    for part in op.parts():
        found += rows_.input_moments(part._a, part.output_forms(G))
    return found


@_input.register
def _(op: RowHessianOperator, G: Tensor, view: MatrixView) -> Tensor:
    found = G.new_zeros(view.groups, view.inp, view.inp)
    for part in op.parts():
        found += rows_.input_moments(part._a, part.output_forms(G))
    return found


@_input.register
def _(op: Scaled, G: Tensor, view: MatrixView) -> Tensor:
    return op.factor * input_contraction(op.base, G, view)


@_input.register
def _(op: Damped, G: Tensor, view: MatrixView) -> Tensor:
    eye = torch.eye(view.inp, dtype=G.dtype, device=G.device)
    traces = op.damping * G.diagonal(dim1=-2, dim2=-1).sum(-1)
    return input_contraction(op.base, G, view) + traces[:, None, None] * eye


@_input.register
def _(op: Sum, G: Tensor, view: MatrixView) -> Tensor:
    parts = [input_contraction(term, G.to(term.dtype), view) for term in op.terms]
    return torch.stack([part.to(op.dtype) for part in parts]).sum(0)


# -- helpers -------------------------------------------------------------------------------------


def _from_diagonal(diagonal: Tensor, factor: Tensor, view: MatrixView, *, rows: bool) -> Tensor:
    """Contraction of a diagonal matrix: the result is diagonal as well."""
    matrix = view.matrix(diagonal)
    other = factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return torch.diag_embed(((matrix if rows else matrix.mT) @ other).squeeze(-1))


def _from_vectors(matrices: Tensor, weights: Tensor, factor: Tensor) -> Tensor:
    """``sum_k w_k M_k F M_k^T`` per group: ``[k, g, p, q]`` and ``[g, q, q]`` -> ``[g, p, p]``."""
    left = (matrices @ factor) * weights[:, None, None, None]
    return _stacked(left) @ _stacked(matrices).mT


def _stacked(matrices: Tensor) -> Tensor:
    """``[k, g, p, q]`` -> ``[g, p, k q]``."""
    count, groups, rows, columns = matrices.shape
    return matrices.permute(1, 2, 0, 3).reshape(groups, rows, count * columns)
