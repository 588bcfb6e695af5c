"""The diagonal of an operator in a Kronecker-product basis: EKFAC's eigenvalues."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from .. import memory
from ..errors import ShapeError
from .algebra import Damped, Scaled, Sum
from .base import Operator
from .dense import IdentityOperator
from .diagonal import DiagonalOperator
from .eigenkronecker import EigenKroneckerOperator
from .kronecker import DiagonalKroneckerOperator, KroneckerOperator, two_sided
from .lowrank import LowRankOperator
from .numerics import chunks, unit_columns
from .rearrange import seen, view_of
from .rowgram import RowGramOperator
from .rowhessian import RowHessianOperator
from .view import MatrixView


def kronecker_eigenvalue_correction(
    op: Operator, U_G: Tensor, U_A: Tensor, view: MatrixView | None = None
) -> Tensor:
    """The diagonal of ``(U_G (x) U_A)^T op (U_G (x) U_A)``: ``S`` ``[o, i]`` or ``[g, o, i]``.

    ``U_G`` ``[o, o]`` and ``U_A`` ``[i, i]`` are orthogonal, with a group axis where the view has
    more than one group. In this basis ``S`` is the diagonal nearest to ``op``, hence EKFAC's
    eigenvalues (George et al., NeurIPS 2018, theorem 2). A row form with several positions sums
    over them before squaring.
    """
    view = view_of(op, view)
    grouped = U_G.ndim == 3
    if not grouped:
        U_G, U_A = U_G.unsqueeze(0), U_A.unsqueeze(0)
    wanted = ((view.groups, view.out, view.out), (view.groups, view.inp, view.inp))
    if (tuple(U_G.shape), tuple(U_A.shape)) != wanted:
        raise ShapeError(
            f"The bases are {list(U_G.shape)} and {list(U_A.shape)}; {view!r} needs "
            f"{list(wanted[0])} and {list(wanted[1])}."
        )
    U_G, U_A = (basis.to(dtype=op.dtype, device=op.device) for basis in (U_G, U_A))
    found = _correction(seen(op, view), U_G, U_A, view)
    return found if grouped else found[0]


@singledispatch
def _correction(op: Operator, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    """``sum_k B_k * (op B_k)`` over the basis vectors, some at a time."""
    memory.require(
        op.shape[0] ** 2 * op.dtype.itemsize,
        f"The change of basis of a {type(op).__name__} of shape {op.shape}",
        "It takes as many products as there are rows; use an operator with structure.",
        device=op.device,
    )
    rows = op.shape[0]
    found = U_G.new_empty(rows)
    for columns in chunks(rows, 3 * rows):
        unit = unit_columns(rows, columns, U_G).reshape(*view.shape, -1)
        basis = view.from_stack(two_sided(U_G, unit, U_A.mT))
        found[columns] = (basis * (op @ basis)).sum(0)
    return found.reshape(view.shape)


@_correction.register
def _(op: DiagonalOperator, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    return U_G.square().mT @ view.matrix(op.diagonal()) @ U_A.square()


@_correction.register
def _(op: DiagonalKroneckerOperator, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    return U_G.square().mT @ view.matrix(op.diagonal()) @ U_A.square()


@_correction.register
def _(op: IdentityOperator, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    return U_G.new_full(view.shape, op.scale)


@_correction.register
def _(op: KroneckerOperator, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    outer = (U_G * (op._G @ U_G)).sum(-2)
    inner = (U_A * (op._A @ U_A)).sum(-2)
    return outer.unsqueeze(-1) * inner.unsqueeze(-2)


@_correction.register
def _(op: EigenKroneckerOperator, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    outer, inner = (U_G.mT @ op._U_G).square(), (op._U_A.mT @ U_A).square()
    return outer @ op._S @ inner


@_correction.register
def _(op: LowRankOperator, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    found = U_G.new_zeros(view.shape)
    for columns in chunks(op.rank, 3 * op.shape[0]):
        rotated = U_G.mT @ view.to_matrix(op._V[:, columns]) @ U_A
        found += torch.tensordot(op._weights[columns], rotated.square_(), dims=1)
    return found


@_correction.register
def _(op: RowGramOperator, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    return op.rotated(U_G, U_A).diagonal_matrix()


@_correction.register
def _(op: RowHessianOperator, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    return op.rotated(U_G, U_A).diagonal_matrix()


@_correction.register
def _(op: Scaled, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    return op.factor * _correction(seen(op.base, view), U_G, U_A, view)


@_correction.register
def _(op: Damped, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    return _correction(seen(op.base, view), U_G, U_A, view) + op.damping


@_correction.register
def _(op: Sum, U_G: Tensor, U_A: Tensor, view: MatrixView) -> Tensor:
    found = U_G.new_zeros(view.shape)
    for term in op.terms:
        found += _correction(seen(term.to(op.dtype), view), U_G, U_A, view)
    return found
