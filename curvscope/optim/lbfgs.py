"""L-BFGS on the inverse of a factor: the matrix that the last pairs make of the identity.

Shapes and masks as in ``bfgs.py``: vectors ``[groups, n]``, matrices ``[groups, n, n]``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bfgs import acceptable, matmul, times

_SMALL = 2  # up to so many times the memory, the matrix itself is cheaper than its compact form


class Memory(NamedTuple):
    """The last pairs, the newest last: ``S``, ``Y`` ``[groups, m, n]``, ``filled`` ``[groups, 1]``.

    A pair and its multiples give the same matrix; they are kept with ``s`` of length one. Slots in
    front that are not filled yet hold zeros. What products need is kept with them: ``SY``
    (upper triangle of ``S Y^T``) and ``YY = Y Y^T`` ``[groups, m, m]`` in float64, or, for small
    ``n``, the matrix ``H`` itself.
    """

    S: Tensor
    Y: Tensor
    filled: Tensor
    SY: Tensor | None
    YY: Tensor | None
    H: Tensor | None

    @classmethod
    def empty(cls, m: int, like: Tensor) -> Memory:
        """Room for ``m`` pairs of vectors like ``like`` ``[groups, n]``."""
        groups, n = like.shape
        slots = like.new_zeros(groups, m, n)
        filled = torch.zeros(groups, 1, dtype=torch.long, device=like.device)
        if n <= _SMALL * m:
            return cls(slots, slots.clone(), filled, None, None, identity(like))
        grams = like.new_zeros(groups, m, m, dtype=torch.float64)
        return cls(slots, slots.clone(), filled, grams, grams.clone(), None)


def remember(memory: Memory, s: Tensor, y: Tensor, norm: Tensor) -> tuple[Memory, Tensor]:
    """Append a pair, dropping the oldest; returns the memory and where that was done."""
    accepted = acceptable(s, y, norm)
    length = torch.where(accepted, s.norm(dim=-1, keepdim=True), 1.0)
    mask = accepted.unsqueeze(-1)
    S, Y = (
        torch.where(mask, torch.cat([slots[:, 1:], (new / length).unsqueeze(1)], 1), slots)
        for slots, new in ((memory.S, s), (memory.Y, y))
    )
    filled = (memory.filled + accepted).clamp(max=S.shape[1])
    twin = Memory(S, Y, filled, None, None, None)
    if memory.H is not None:
        return twin._replace(H=dense(twin).to(S.dtype)), accepted
    assert memory.SY is not None and memory.YY is not None
    new_y = Y[:, -1].double()
    SY = torch.where(mask, _shifted(memory.SY, times(S.double(), new_y)), memory.SY)
    YY = torch.where(mask, _shifted(memory.YY, times(Y.double(), new_y), mirror=True), memory.YY)
    return twin._replace(SY=SY, YY=YY), accepted


def _shifted(gram: Tensor, column: Tensor, mirror: bool = False) -> Tensor:
    """``gram`` without its first row and column, and with a new last column (and row)."""
    shifted = torch.zeros_like(gram)
    shifted[:, :-1, :-1] = gram[:, 1:, 1:]
    shifted[:, :, -1] = column
    if mirror:
        shifted[:, -1, :] = column
    return shifted


def memory_times(memory: Memory, V: Tensor) -> Tensor:
    """``H V`` for ``V`` ``[groups, n, k]`` with the L-BFGS matrix ``H`` of initial matrix I."""
    if memory.H is not None:
        return matmul(memory.H, V)
    assert memory.SY is not None and memory.YY is not None
    return compact_times(memory.S, memory.Y, memory.SY, memory.YY, memory.filled, V)


def compact_times(
    S: Tensor, Y: Tensor, SY: Tensor, YY: Tensor, filled: Tensor, V: Tensor
) -> Tensor:
    """``H V`` by the compact form of Byrd, Nocedal and Schnabel (1994, theorem 2.2).

    With the pairs in columns, ``R`` the upper triangle of ``S^T Y`` and ``D`` its diagonal,
    ``H = I + S R^-T (D + Y^T Y) R^-1 S^T - S R^-T Y^T - Y R^-1 S^T``. The small systems are solved
    in float64. Cost: O(m n k).
    """
    used = int(filled.max())
    if used == 0:
        return V.clone()
    R, YY = SY[:, -used:, -used:].clone(), YY[:, -used:, -used:]
    D = R.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clone()
    # an empty slot's row and column are zero; a one on the diagonal makes it count for nothing
    empty = torch.arange(used, device=V.device) < used - filled
    R.diagonal(dim1=-2, dim2=-1).add_(empty.to(R))
    both = torch.cat([S[:, -used:], Y[:, -used:]], 1)
    SV, YV = matmul(both, V).double().split(used, 1)
    q = torch.linalg.solve_triangular(R, SV, upper=True)
    p = torch.linalg.solve_triangular(R.mT, D * q + YY @ q - YV, upper=False)
    return torch.baddbmm(V, both.mT, torch.cat([p, -q], 1).to(V.dtype))


def dense(memory: Memory) -> Tensor:
    """The L-BFGS matrix ``[groups, n, n]`` in float64.

    With more than n / 2 pairs, which are then close to linearly dependent, the compact form loses
    its accuracy; the matrix is built pair by pair. Cost: O(m n^2).
    """
    used = int(memory.filled.max())
    S, Y = memory.S[:, -used:].double(), memory.Y[:, -used:].double()
    H = identity(memory.S[:, 0].double())
    if used == 0:
        return H
    if 2 * used < S.shape[2]:
        H = compact_times(S, Y, (S @ Y.mT).triu(), Y @ Y.mT, memory.filled, H)
        return (H + H.mT) / 2
    sy = (S * Y).sum(-1, keepdim=True)
    rho = torch.where(sy > 0, 1 / sy, 0.0)  # an empty slot changes nothing
    groups = (_by_pairs(*(t.cpu().numpy() for t in group)) for group in zip(S, Y, rho, strict=True))
    return torch.stack([torch.from_numpy(group) for group in groups]).to(H.device)


def _by_pairs(S: np.ndarray, Y: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """The identity after the BFGS updates with the rows of ``S``, ``Y``, one after the other.

    In NumPy, whose calls cost less than the arithmetic of such small matrices.
    """
    H = np.eye(S.shape[1])
    for s, y, scale in zip(S, Y, rho[:, 0], strict=True):
        r = s - H @ y
        u = scale * r - (0.5 * scale * scale * (r @ y)) * s
        product = s[:, None] * u
        H += product
        H += product.T
    return (H + H.T) / 2


def identity(like: Tensor) -> Tensor:
    """Identities ``[groups, n, n]`` for vectors like ``[groups, n]``."""
    groups, n = like.shape
    return torch.eye(n, dtype=like.dtype, device=like.device).repeat(groups, 1, 1)
