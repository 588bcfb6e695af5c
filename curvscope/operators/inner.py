"""The Frobenius inner product of any two operators, by what structure they have."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .. import memory
from ..errors import ParameterMismatchError, ShapeError
from .algebra import Damped, Scaled, Sum
from .base import Operator
from .blockdiag import BlockDiagonalOperator
from .dense import DenseOperator, IdentityOperator
from .diagonal import DiagonalOperator
from .eigenbasis import kronecker_eigenvalue_correction
from .eigenkronecker import EigenKroneckerOperator
from .kronecker import DiagonalKroneckerOperator, KroneckerOperator
from .lowrank import LowRankOperator
from .numerics import chunks, dot, total, unit_columns
from .rearrange import output_contraction
from .row_algebra import SMALL, sample_form_gram
from .rowgram import RowGramOperator
from .rowhessian import RowHessianOperator
from .wrappers import Restricted


def inner(left: Operator, right: Operator) -> float:
    """``sum_ij left_ij right_ij``, accumulated in float64.

    Structured pairs cost what their structure costs and never form a matrix. Where neither side
    has a structure that helps, columns are multiplied some at a time, after checking that the
    matrix would fit in memory. Raises ``ShapeError`` or ``ParameterMismatchError`` for operators
    of different parameters.
    """
    if left.shape != right.shape:
        raise ShapeError(f"Operators of shapes {left.shape} and {right.shape} have no product.")
    if left.layout is not None and right.layout is not None and left.layout != right.layout:
        raise ParameterMismatchError(
            f"The operators speak of different parameters: {list(left.layout.names)} and "
            f"{list(right.layout.names)}. Align them with op.restrict(names)."
        )
    dtype = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(dtype), right.to(dtype, left.device)
    for kind, rule in _RULES:
        for one, other in ((left, right), (right, left)):
            if isinstance(one, kind):
                value = rule(one, other)
                if value is not None:
                    return value
    return _by_columns(left, right)


def _sum(op: Sum, other: Operator) -> float:
    return math.fsum(inner(term, other) for term in op.terms)


def _scaled(op: Scaled, other: Operator) -> float:
    return op.factor * inner(op.base, other)


def _damped(op: Damped, other: Operator) -> float:
    return inner(op.base, other) + op.damping * other.trace()


def _blocks(op: BlockDiagonalOperator, other: Operator) -> float:
    if op._mode == "raise":
        op._require_covered("an inner product with all parameters")
    if isinstance(other, BlockDiagonalOperator) and other._mode == "raise":
        other._require_covered("an inner product with all parameters")
    parts = []
    for name, block in op._blocks.items():
        rows = op._rows[name]
        partner = other.blocks.get(name)
        if partner is None or partner.layout != block.layout:
            if other.layout is not None:
                partner = other.restrict(op.members[name])
            else:
                partner = Restricted(other, rows)
        parts.append(inner(block, partner))
    if op._rest and op._free_rows():
        parts.append(op._rest * total(other.diagonal()[op._free_index()]))
    return math.fsum(parts)


def _identity(op: IdentityOperator, other: Operator) -> float:
    return op.scale * other.trace()


def _diagonal(op: Operator, other: Operator) -> float:
    return dot(op.diagonal(), other.diagonal())


def _kronecker(op: KroneckerOperator, other: Operator) -> float | None:
    if not _takes(op, other):
        return None
    return dot(op._G, output_contraction(other, op._A, op.view))


def _eigen(op: EigenKroneckerOperator, other: Operator) -> float | None:
    if not _takes(op, other):
        return None
    return dot(op._S, kronecker_eigenvalue_correction(other, op._U_G, op._U_A, op.view))


def _takes(op: Operator, other: Operator) -> bool:
    """Whether ``other`` can be contracted with the factors of ``op`` by its own structure."""
    if isinstance(other, DenseOperator | LowRankOperator):
        return True
    structured = (
        KroneckerOperator,
        DiagonalKroneckerOperator,
        EigenKroneckerOperator,
        RowGramOperator,
        RowHessianOperator,
    )
    return isinstance(other, structured) and other.view == op.view


def _lowrank(op: LowRankOperator, other: Operator) -> float:
    parts = []
    for columns in chunks(op.rank, 2 * op.shape[0]):
        V = op._V[:, columns]
        parts.append(dot((V * op._weights[columns]), other @ V))
    return math.fsum(parts)


def _rows(op: RowGramOperator, other: Operator) -> float | None:
    alike = isinstance(other, RowGramOperator | RowHessianOperator) and op.view == other.view
    if alike and op.simple and other.simple:  # type: ignore[attr-defined]
        forms = sample_form_gram(op._a, other._a)  # type: ignore[attr-defined]
        if isinstance(other, RowGramOperator):
            return total(op.sample_gram(other) * forms)
        S, H = op._S[:, :, 0, 0], other._H[:, 0, 0, :, 0, 0]  # type: ignore[attr-defined]
        weights = op.weights()
        parts = []
        for samples in chunks(S.shape[1], S.shape[0] * H.shape[0] * S.shape[2]):
            half = torch.einsum("cno,mop->cnmp", S[:, samples], H)
            gram = torch.einsum("cnmp,cnp,cn->nm", half, S[:, samples], weights[:, samples])
            parts.append(total(gram * forms[samples]))
        return other.scale * math.fsum(parts)  # type: ignore[attr-defined]
    if op.shape[0] <= SMALL:
        return None
    parts = []
    for samples in op.vector_chunks():
        V = op.view.from_matrix(op.vectors(samples).flatten(0, 1))
        parts.append(dot(V * op.weights(samples).flatten(), other @ V))
    return math.fsum(parts)


def _hessian_rows(op: RowHessianOperator, other: Operator) -> float | None:
    if not isinstance(other, RowHessianOperator) or op.view != other.view:
        return None
    if op.shape[0] <= SMALL and not (op.simple and other.simple):
        return None
    return op.row_inner(other)


def _by_columns(left: Operator, right: Operator) -> float:
    rows = left.shape[0]
    memory.require(
        rows * rows * left.dtype.itemsize,
        f"An inner product of {type(left).__name__} and {type(right).__name__} of shape "
        f"{left.shape}, taken column by column,",
        "cs.compare(one, {'other': other}, method='estimated') has their error and cosine from "
        "products alone; or take the blocks (op.blocks[...]), or fewer parameters.",
        device=left.device,
    )
    if isinstance(left, DenseOperator) and isinstance(right, DenseOperator):
        return dot(left._matrix, right._matrix)
    if rows <= SMALL:
        return dot(left.dense(), right.dense())
    parts = []
    like = torch.empty(0, dtype=left.dtype, device=left.device)
    for columns in chunks(rows, 4 * rows):
        unit = unit_columns(rows, columns, like)
        parts.append(dot(left @ unit, right @ unit))
    return math.fsum(parts)


# the first rule that fits either side and gives a number is taken
_RULES: list[tuple[type | tuple[type, ...], Callable[..., float | None]]] = [
    (Scaled, _scaled),
    (Damped, _damped),
    (Sum, _sum),
    (BlockDiagonalOperator, _blocks),
    (IdentityOperator, _identity),
    ((DiagonalOperator, DiagonalKroneckerOperator), _diagonal),
    (EigenKroneckerOperator, _eigen),
    (KroneckerOperator, _kronecker),
    (LowRankOperator, _lowrank),
    (RowGramOperator, _rows),
    (RowHessianOperator, _hessian_rows),
]
