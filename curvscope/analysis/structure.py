"""What the structure of an operator gives without forming it: its class, spectrum, eigenvectors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..operators import (
    BlockDiagonalOperator,
    Damped,
    DenseOperator,
    DiagonalKroneckerOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    IdentityOperator,
    KroneckerOperator,
    LowRankOperator,
    Operator,
    RowGramOperator,
    RowHessianOperator,
    Scaled,
    Sum,
)

_LEAVES = (
    DenseOperator,
    DiagonalKroneckerOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    IdentityOperator,
    KroneckerOperator,
    LowRankOperator,
    RowGramOperator,
    RowHessianOperator,
)
_NORM_FLOPS = 2e12  # a norm that would take more is estimated


def is_structured(op: Operator) -> bool:
    """Whether norm, trace, diagonal and inner products cost little, however many rows."""
    if isinstance(op, Scaled | Damped):
        return is_structured(op.base)
    if isinstance(op, Sum):
        return all(is_structured(term) for term in op.terms)
    if isinstance(op, BlockDiagonalOperator):
        return all(is_structured(block) for block in op.blocks.values())
    if isinstance(op, RowGramOperator) and not op.simple:
        return float(op.rank) ** 2 * op.shape[0] <= _NORM_FLOPS
    if isinstance(op, RowHessianOperator) and not op.simple:
        samples, positions = op.factors["a"].shape[:2]
        outputs = op.view.groups * op.view.out
        return float(samples) ** 2 * positions**3 * outputs**2 <= _NORM_FLOPS
    return isinstance(op, _LEAVES)


def eigen_rows(op: Operator) -> int:
    """Rows of the largest dense eigenproblem that ``op.eigenvalues()`` solves."""
    rows = op.shape[0]
    if isinstance(op, Scaled | Damped):
        return eigen_rows(op.base)
    if isinstance(op, BlockDiagonalOperator):
        return max((eigen_rows(block) for block in op.blocks.values()), default=0)
    if isinstance(op, DiagonalOperator | DiagonalKroneckerOperator | IdentityOperator):
        return 0
    if isinstance(op, EigenKroneckerOperator):
        return 0
    if isinstance(op, KroneckerOperator):
        return max(op.view.out, op.view.inp)
    if isinstance(op, LowRankOperator | RowGramOperator):
        return min(op.rank, rows)
    if isinstance(op, RowHessianOperator) and op.view.groups == 1:
        samples, positions = op.factors["a"].shape[:2]
        return min(samples * positions, op.view.inp) * op.view.out
    return rows


def has_inverse_form(op: Operator) -> bool:
    """Whether ``op.inverse(damping)`` costs no more than eigen-decompositions of factors."""
    if isinstance(op, Scaled | Damped):
        return has_inverse_form(op.base)
    if isinstance(op, BlockDiagonalOperator):
        return all(has_inverse_form(block) for block in op.blocks.values())
    return isinstance(
        op,
        DiagonalOperator
        | DiagonalKroneckerOperator
        | IdentityOperator
        | KroneckerOperator
        | EigenKroneckerOperator,
    )


def diagonal_form(op: Operator) -> Tensor | None:
    """The diagonal of an operator that is nothing else, or ``None``."""
    if isinstance(op, Scaled | Damped):
        return None if diagonal_form(op.base) is None else op.diagonal()
    if isinstance(op, DiagonalOperator | DiagonalKroneckerOperator | IdentityOperator):
        return op.diagonal()
    return None


def eigen_form(op: Operator) -> EigenKroneckerOperator | None:
    """The same matrix in a Kronecker-product eigenbasis, or ``None`` where it has none."""
    found: Operator | None = None
    if isinstance(op, KroneckerOperator):
        return op.eigenform()
    if isinstance(op, Scaled | Damped):
        base = eigen_form(op.base)
        if base is not None:
            found = base.scaled(op.factor) if isinstance(op, Scaled) else base._shifted(op.damping)
    else:
        found = op
    return found if isinstance(found, EigenKroneckerOperator) else None


def leading_by_structure(op: Operator, count: int) -> tuple[Tensor, Tensor] | None:
    """The ``count`` eigenvalues of largest magnitude and their vectors ``[P, count]``.

    ``None`` where the structure does not give them.
    """
    vector = diagonal_form(op)
    if vector is not None:
        order = _largest(vector, count)
        units = vector.new_zeros(op.shape[0], len(order))
        units[order, torch.arange(len(order), device=vector.device)] = 1.0
        return vector[order], units
    eigen = eigen_form(op)
    if eigen is not None:
        return _leading_kronecker(eigen, count)
    if isinstance(op, BlockDiagonalOperator):
        return _leading_blocks(op, count)
    return None


def _leading_kronecker(op: EigenKroneckerOperator, count: int) -> tuple[Tensor, Tensor]:
    """Vectors ``vec(u_i v_j^T)`` of the leading places of ``S``; others are never formed."""
    groups, out, inp = op.view.shape
    parts = op.factors
    U_G, U_A, S = (
        parts[name].reshape(groups, *parts[name].shape[-2:]) for name in ("U_G", "U_A", "S")
    )
    order = _largest(S.flatten(), count)
    g, rest = order // (out * inp), order % (out * inp)
    i, j = rest // inp, rest % inp
    stack = S.new_zeros(groups, out, inp, len(order))
    for place in range(len(order)):
        left, right = U_G[g[place], :, i[place]], U_A[g[place], :, j[place]]
        stack[g[place], :, :, place] = torch.outer(left, right)
    return S.flatten()[order], op.view.from_stack(stack)


def _leading_blocks(op: BlockDiagonalOperator, count: int) -> tuple[Tensor, Tensor] | None:
    assert op.layout is not None
    values, columns = [], []
    for name, block in op.blocks.items():
        found = leading_by_structure(block, min(count, block.shape[0]))
        if found is None:
            return None
        rows = op.layout.index(op.members[name]).to(op.device)
        wide = found[1].new_zeros(op.shape[0], found[1].shape[1])
        wide[rows] = found[1]
        values.append(found[0])
        columns.append(wide)
    if not values or (op.uncovered and op._rest):
        return None
    missing = max(0, count - sum(map(len, values)))  # uncovered rows have eigenvalue zero
    values.append(values[0].new_zeros(missing))
    columns.append(columns[0].new_zeros(op.shape[0], missing))
    joint, basis = torch.cat(values), torch.cat(columns, 1)
    order = _largest(joint, count)
    return joint[order], basis[:, order]


def _largest(values: Tensor, count: int) -> Tensor:
    return values.abs().argsort(descending=True, stable=True)[:count]


def family(op: Operator) -> str:
    """The class of matrices that an operator belongs to by its structure, in words."""
    if isinstance(op, Scaled):
        return family(op.base)
    if isinstance(op, Damped):
        base = family(op.base)
        same = base in ("identity", "diagonal", "Kronecker-eigenbasis", "dense")
        if base == "Kronecker":
            return "Kronecker-eigenbasis"
        if base == "diagonal-Kronecker":
            return "diagonal"
        return base if same else f"damped {base}"
    for kind, name in (
        (IdentityOperator, "identity"),
        (DiagonalOperator, "diagonal"),
        (DiagonalKroneckerOperator, "diagonal-Kronecker"),
        (KroneckerOperator, "Kronecker"),
        (EigenKroneckerOperator, "Kronecker-eigenbasis"),
        (LowRankOperator, "low-rank"),
        (Sum, "sum"),
    ):
        if isinstance(op, kind):
            return name
    if isinstance(op, BlockDiagonalOperator):
        parts = list(dict.fromkeys(family(block) for block in op.blocks.values()))
        if parts == ["diagonal"]:
            return "diagonal"
        return "block-diagonal " + " or ".join(parts) if parts else "block-diagonal"
    return "dense"


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A float64 array on the CPU."""
    return tensor.detach().to(dtype=torch.float64, device="cpu").numpy()
