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
    """The last pairs: ``pairs`` ``[groups, 2, m, n]``, ``S`` and ``Y``, written in turns.

    ``slot`` ``[groups, 1]`` is where the next pair goes, in place of the oldest one once all are
    ``filled`` ``[groups, 1]``; slots that are not yet hold zeros. A pair and its multiples give the
    same matrix; they are kept with ``s`` of length one. What products need is kept with them, in
    the order of their age, the newest last: ``SY`` (upper triangle of ``S Y^T``) and
    ``YY = Y Y^T`` ``[groups, m, m]`` in float64, or, for small ``n``, the matrix ``H`` itself.
    """

    pairs: Tensor
    slot: Tensor
    filled: Tensor
    SY: Tensor | None
    YY: Tensor | None
    H: Tensor | None

    @classmethod
    def empty(cls, m: int, like: Tensor) -> Memory:
        """Room for ``m`` pairs of vectors like ``like`` ``[groups, n]``."""
        groups, n = like.shape
        pairs = like.new_zeros(groups, 2, m, n)
        slot = torch.zeros(groups, 1, dtype=torch.long, device=like.device)
        if n <= _SMALL * m:
            return cls(pairs, slot, slot.clone(), None, None, identity(like))
        grams = like.new_zeros(groups, m, m, dtype=torch.float64)
        return cls(pairs, slot, slot.clone(), grams, grams.clone(), None)

    def used(self) -> tuple[Tensor, Tensor]:
        """``pairs`` without slots that no group has filled, and the slots in the order of age."""
        count = int(self.filled.max())
        order = (self.slot + torch.arange(count, device=self.slot.device)) % max(count, 1)
        return self.pairs[:, :, :count], order


def remember(memory: Memory, s: Tensor, y: Tensor, norm: Tensor) -> tuple[Memory, Tensor]:
    """Append a pair, dropping the oldest, in place; returns the memory and where that was done."""
    accepted = acceptable(s, y, norm)
    length = torch.where(accepted, s.norm(dim=-1, keepdim=True), 1.0)
    pairs, m = memory.pairs, memory.pairs.shape[2]
    pair = torch.stack([s / length, y / length], 1).unsqueeze(2)
    where = memory.slot[:, :, None, None].expand_as(pair)
    mask = accepted.unsqueeze(-1)
    pairs.scatter_(2, where, torch.where(mask.unsqueeze(-1), pair, pairs.gather(2, where)))
    slot = (memory.slot + accepted) % m
    twin = memory._replace(slot=slot, filled=(memory.filled + accepted).clamp(max=m))
    if memory.H is not None:
        return twin._replace(H=dense(twin).to(s.dtype)), accepted
    assert memory.SY is not None and memory.YY is not None
    aged = (slot + torch.arange(m, device=slot.device)) % m
    products = times(pairs.flatten(1, 2), pair[:, 1, 0]).double().split(m, 1)
    columns = (column.gather(1, aged) for column in products)
    SY, YY = (
        torch.where(mask, _shifted(gram, column, mirror), gram)
        for gram, column, mirror in zip((memory.SY, memory.YY), columns, (False, True), strict=True)
    )
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
    pairs, order = memory.used()
    used = order.shape[1]
    SY, YY = memory.SY[:, -used:, -used:], memory.YY[:, -used:, -used:]
    return compact_times(pairs, order, SY, YY, memory.filled, V)


def compact_times(
    pairs: Tensor, order: Tensor, SY: Tensor, YY: Tensor, filled: Tensor, V: Tensor
) -> Tensor:
    """``H V`` by the compact form of Byrd, Nocedal and Schnabel (1994, theorem 2.2).

    With the pairs in columns, ``R`` the upper triangle of ``S^T Y`` and ``D`` its diagonal,
    ``H = I + S R^-T (D + Y^T Y) R^-1 S^T - S R^-T Y^T - Y R^-1 S^T``. The small systems are solved
    in float64, with the pairs in ``order`` of age. Cost: O(m n k).
    """
    groups, used = order.shape
    if used == 0:
        return V.clone()
    age = torch.arange(used, device=V.device)
    R, W = SY.clone(), YY.clone()
    W.diagonal(dim1=-2, dim2=-1).add_(R.diagonal(dim1=-2, dim2=-1))
    # an empty slot's row and column are zero; a one on the diagonal makes it count for nothing
    R.diagonal(dim1=-2, dim2=-1).add_((age < used - filled).to(R))
    both = pairs.reshape(groups, 2 * used, -1)
    first = 2 * used * torch.arange(groups, device=V.device)[:, None]
    aged = torch.cat([first + order, first + order + used], 1).flatten()
    products = matmul(both, V)
    products = products.reshape(-1, V.shape[-1])[aged].double()
    products = products.reshape(groups, 2 * used, -1)
    weights = torch.empty_like(products, dtype=V.dtype).reshape(-1, V.shape[-1])
    weights[aged] = _weights(R, W, products).to(V.dtype).reshape(weights.shape)
    return torch.baddbmm(V, both.mT, weights.reshape(groups, 2 * used, -1))


def _weights(R: Tensor, W: Tensor, products: Tensor) -> Tensor:
    """``(p, -q)`` with ``q = R^-1 S^T V`` and ``p = R^-T (W q - Y^T V)`` from both products."""
    used = R.shape[-1]
    if products.shape[-1] > 2 * used:  # then the matrix between them is cheaper than solving
        inverse = torch.linalg.solve_triangular(R, identity(R[..., 0]), upper=True)
        first = torch.cat([matmul(inverse.mT, matmul(W, inverse)), -inverse.mT], 2)
        second = torch.cat([-inverse, torch.zeros_like(inverse)], 2)
        return matmul(torch.cat([first, second], 1), products)
    SV, YV = products.split(used, 1)
    # solved from the right of the transposes, which the rows of SV and YV are without a copy
    q = torch.linalg.solve_triangular(R.mT, SV.mT, upper=False, left=False).mT
    p = torch.linalg.solve_triangular(R, (matmul(W, q) - YV).mT, upper=True, left=False).mT
    return torch.cat([p, -q], 1)


def dense(memory: Memory) -> Tensor:
    """The L-BFGS matrix ``[groups, n, n]`` in float64.

    With more than n / 2 pairs, which are then close to linearly dependent, the compact form loses
    its accuracy; the matrix is built pair by pair. Cost: O(m n^2).
    """
    pairs, order = memory.used()
    H = identity(memory.pairs[:, 0, 0].double())
    used = order.shape[1]
    if used == 0:
        return H
    aged = order[:, None, :, None].expand_as(pairs)
    pairs = pairs.gather(2, aged).double()
    S, Y = pairs[:, 0], pairs[:, 1]
    if 2 * used < S.shape[2]:
        in_order = torch.arange(used, device=order.device).expand_as(order)
        SY, YY = (S @ Y.mT).triu(), Y @ Y.mT
        H = compact_times(pairs, in_order, SY, YY, memory.filled, H)
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
