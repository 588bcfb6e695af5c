"""The largest eigenvalue of ``P H``: what limits the learning rate of a preconditioned method."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..analysis.lanczos import of_tridiagonal
from ..operators import Operator


def preconditioned_sharpness(
    product: Callable[[Tensor], Tensor],
    P: Operator,
    *,
    steps: int = 12,
    seed: int = 0,
    tol: float = 0.0,
) -> float:
    """The largest eigenvalue of ``P H`` for positive definite ``P`` and symmetric ``H``.

    Lanczos in the inner product of ``P^-1``, in which ``P H`` is symmetric: with ``q_j``
    orthonormal in it and ``m_j = P^-1 q_j`` it needs products with ``H`` and ``P`` only, ``steps``
    of each; fewer once the residual is below ``tol`` of the value. Source: Parlett, *The Symmetric
    Eigenvalue Problem*, section 15.11; the result is a Ritz value, at most the eigenvalue. NaN if
    ``P`` is not positive definite.
    """

    def apply(vector: Tensor) -> Tensor:
        return (P @ vector.to(P.dtype)).double()

    size = P.shape[0]
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randn(size, generator=generator, dtype=torch.float64).to(P.device)
    image = apply(rest)
    diagonal: list[float] = []
    beside: list[float] = []
    duals: list[Tensor] = []
    basis: list[Tensor] = []
    largest = last = math.nan
    for _ in range(min(steps, size)):
        square = float(rest @ image)
        if not square > 0:
            break
        length = math.sqrt(square)
        if diagonal:
            if length <= 1e-12 * max(map(abs, diagonal)) or length * last <= tol * abs(largest):
                break
            beside.append(length)
        duals.append(rest / length)
        basis.append(image / length)
        rest = product(basis[-1])
        diagonal.append(float(basis[-1] @ rest))
        M, Q = torch.stack(duals), torch.stack(basis)
        for _ in range(2):
            rest = rest - M.mT @ (Q @ rest)
        image = apply(rest)
        values, rotation = of_tridiagonal(diagonal, beside)
        largest, last = float(values[-1]), float(rotation[-1, -1].abs())
    return largest
