"""What all estimators share: the matrix, its counted and checked products, random probes."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ...errors import NonFiniteError, OptionError, check_count
from ...operators import (
    BlockDiagonalOperator,
    Converted,
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
    from_scipy,
)
from ..coerce import as_operator
from ..iterations import dots

DIRECT = 2000
"""Rows up to which a stored matrix is decomposed rather than multiplied."""
_SPECTRAL = (
    IdentityOperator,
    DiagonalOperator,
    KroneckerOperator,
    DiagonalKroneckerOperator,
    EigenKroneckerOperator,
)
_STORED = (*_SPECTRAL, DenseOperator, LowRankOperator, RowGramOperator, RowHessianOperator)
_BLOCK_BYTES = 2**28  # one block of vectors; a constant, so that a resumed run takes the same steps
_BLOCK = 16
_ASYMMETRY = 30.0  # times sqrt(eps): rounding of float32 products stays far below


def matrix_of(matrix: Any, name: str = "The matrix") -> Operator:
    """``matrix`` as an Operator: tensors, arrays, SciPy operators and sparse matrices too."""
    if not isinstance(matrix, Operator):
        from scipy.sparse import issparse
        from scipy.sparse.linalg import LinearOperator

        if issparse(matrix) or isinstance(matrix, LinearOperator):
            matrix = from_scipy(matrix)
    op = as_operator(matrix, name)
    if not op.shape[0]:
        raise OptionError(f"{name} is empty.")
    return op


def title(op: Operator) -> str:
    """What the matrix is called in sentences."""
    return op.info.what or type(op).__name__


def stored(op: Operator) -> bool:
    """Whether diagonal and Frobenius norm come from the structure, without products."""
    if isinstance(op, _STORED):
        return True
    if isinstance(op, Scaled | Damped | Converted):
        return stored(op.base)
    if isinstance(op, Sum):
        return all(stored(term) for term in op.terms)
    if isinstance(op, BlockDiagonalOperator):
        return all(stored(block) for block in op.blocks.values())
    return getattr(op, "_kept", None) is not None


def diagonal_known(op: Operator) -> bool:
    """Whether the diagonal comes without products: it is stored, or has been computed before."""
    return stored(op) or getattr(op, "diagonal_is_known", False)


def decomposable(op: Operator) -> bool:
    """Whether all eigenvalues come from the structure at a cost that is small."""
    if isinstance(op, _SPECTRAL):
        return True
    if isinstance(op, Scaled | Damped):
        return decomposable(op.base)
    if isinstance(op, BlockDiagonalOperator):
        return all(decomposable(block) for block in op.blocks.values())
    if isinstance(op, LowRankOperator | RowGramOperator):
        return min(op.rank, op.shape[0]) <= DIRECT
    return stored(op) and op.shape[0] <= DIRECT


class Meter:
    """Products with a matrix: counted, checked for NaN, and once for symmetry at no extra cost."""

    def __init__(self, op: Operator) -> None:
        self.op = op
        self.size = op.shape[0]
        self.used = 0
        self._first: tuple[Tensor, Tensor] | None = None
        self._checked = self.size == 1

    def __call__(self, vectors: Tensor) -> Tensor:
        """The product with ``[P, k]``, in the type of the matrix."""
        images = self.op @ vectors
        self.used += vectors.shape[1]
        # a sum propagates NaN and infinity and needs no temporary of the block's size
        if not math.isfinite(float(images.sum(dtype=torch.float64))):
            bad = int((~torch.isfinite(images)).any(0).sum())
            if bad:
                raise NonFiniteError(
                    f"The product of the {title(self.op)} with {bad} of {vectors.shape[1]} finite "
                    "vectors is NaN or infinite. Look for the layer, the sample or the entry that "
                    "is not finite; float64 helps where float32 overflows."
                )
        if not self._checked:
            self._check(vectors, images)
        return images

    def _check(self, vectors: Tensor, images: Tensor) -> None:
        """``u.(A v) = v.(A u)`` for the first two vectors that were multiplied anyway."""
        if self._first is None:
            self._first = (vectors[:, 0].clone(), images[:, 0].clone())
            if vectors.shape[1] == 1:
                return
            v, Av = vectors[:, 1], images[:, 1]
        else:
            v, Av = vectors[:, 0], images[:, 0]
        u, Au = self._first
        self._first, self._checked = None, True
        there, back = dot(u, Av), dot(v, Au)
        sizes = [length(x) for x in (u, v, Au, Av)]
        # a random error of a product is nearly orthogonal to any one vector
        size = (sizes[0] * sizes[3] + sizes[1] * sizes[2]) / math.sqrt(self.size)
        size = max(size, abs(there), abs(back))
        limit = _ASYMMETRY * math.sqrt(torch.finfo(Av.dtype).eps)
        if abs(there - back) > limit * size:
            raise OptionError(
                f"The {title(self.op)} is not symmetric: u.(A v) = {there:.6g}, but v.(A u) = "
                f"{back:.6g}. Estimators need symmetric matrices; pass (A + A^T) / 2, or make its "
                "products deterministic (fixed batches, dropout off)."
            )

    def columns(self, most: int = _BLOCK) -> int:
        """How many vectors to multiply at once."""
        return max(1, min(most, _BLOCK_BYTES // (self.size * self.op.dtype.itemsize)))


def dot(u: Tensor, v: Tensor) -> float:
    """``u . v`` summed in float64."""
    return float((u.double() * v.double()).sum())


def lengths(rows: Tensor) -> Tensor:
    """``|x|`` of rows ``[k, P]``: ``[k]`` in float64, also where squares over- or underflow."""
    found = rows.norm(dim=1).double()
    if bool(((found > 1e-15) & (found < 1e18)).all()):
        return found
    peaks = rows.abs().amax(1, keepdim=True).double()
    fine = torch.where((peaks > 0) & peaks.isfinite(), peaks, 1.0)
    return (rows.double() / fine).norm(dim=1) * fine.squeeze(1)


def length(vector: Tensor) -> float:
    """``|x|`` of ``[P]``, as :func:`lengths`."""
    return float(lengths(vector.unsqueeze(0)))


def column_dots(u: Tensor, v: Tensor) -> Tensor:
    """Inner products of the columns of two ``[P, k]``: ``[k]`` in float64 on the CPU."""
    return dots(u, v).to("cpu")


def generator_for(seed: int, stream: int, index: int = 0) -> torch.Generator:
    """A generator of its own for every vector, so that no order of drawing matters."""
    mixed = (seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9 + index) % 2**64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
    return torch.Generator().manual_seed((mixed ^ (mixed >> 31)) % 2**63)


def signs(op: Operator, seed: int, start: int, count: int, *, stream: int = 0) -> Tensor:
    """Rademacher probes ``start`` to ``start + count`` as columns ``[P, count]``.

    Drawn on the CPU: the same on every device and however many are drawn at once.
    """
    rows = []
    for index in range(start, start + count):
        generator = generator_for(seed, stream, index)
        row = torch.randint(0, 2, (op.shape[0],), generator=generator, dtype=torch.int8)
        rows.append(row.mul_(2).sub_(1).to(op.dtype))
    return torch.stack(rows, 1).to(op.device)


def normals(op: Operator, seed: int, start: int, count: int, *, stream: int = 1) -> Tensor:
    """Gaussian vectors ``[P, count]``, drawn as :func:`signs` are."""
    rows = [
        torch.randn(op.shape[0], generator=generator_for(seed, stream, index), dtype=torch.float64)
        for index in range(start, start + count)
    ]
    return torch.stack(rows, 1).to(dtype=op.dtype, device=op.device)


def check_tol(tol: float) -> float:
    """A relative tolerance of at least zero."""
    if isinstance(tol, bool) or not isinstance(tol, numbers.Real) or not 0 <= float(tol) < math.inf:
        raise OptionError(f"tol={tol!r} must be a relative tolerance of at least 0, such as 0.01.")
    return float(tol)


def check_confidence(confidence: float) -> float:
    """A probability between 0 and 1."""
    if not isinstance(confidence, numbers.Real) or not 0 < float(confidence) < 1:
        raise OptionError(f"confidence={confidence!r} must lie between 0 and 1, such as 0.95.")
    return float(confidence)


def check_budget(budget: int, needed: int, method: str) -> int:
    """A number of products that is enough for the method at all."""
    budget = check_count("budget", budget)
    if budget < needed:
        raise OptionError(
            f"budget={budget} is too small: {method} needs at least {needed} products. "
            f"Pass budget={needed} or more."
        )
    return budget


def quantile(confidence: float, freedom: float) -> float:
    """Half width of a central interval of Student's t in standard errors."""
    from scipy.special import ndtri, stdtrit

    tail = (1 + confidence) / 2
    return float(ndtri(tail) if freedom > 1e4 else stdtrit(max(freedom, 1), tail))
