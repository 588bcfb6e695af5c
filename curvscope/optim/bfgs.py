"""BFGS on the inverse of a factor: damping and updates.

Vectors have shape ``[groups, n]`` and matrices ``[groups, n, n]``; groups are those of a grouped
convolution (one otherwise) and are updated side by side. All decisions are taken by masks
``[groups, 1]``, without a look at the numbers, so that nothing waits for a GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SingularError

_ROOT_HALF = math.sqrt(0.5)
_ROUNDINGS, _REPEATS = 20, 4  # a secant residual above so many roundings is removed
LEAST = _ROUNDINGS / 4  # eigenvalues below so many roundings of the largest are raised to that
_SHRUNK = 2  # a matrix that was larger by this factor may have lost definiteness to rounding
_ASKEW = 30  # so may one that learned from s and y with ||s|| ||y|| above so many s^T y
SKIP = 1e-4  # an update is skipped if s^T y <= SKIP * s^T s * ||gradient||


class Pair(NamedTuple):
    """A pair of vectors to be learned from, and what was done to it."""

    s: Tensor
    y: Tensor
    damped_on_inverse: Tensor  # [groups, 1], bool
    damped_on_identity: Tensor
    before: Tensor  # s^T y / s^T s as it came, [groups, 1]
    after: Tensor


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products ``[groups, 1]``."""
    return (x * y).sum(-1, keepdim=True)


def times(H: Tensor, x: Tensor) -> Tensor:
    """``H x`` for vectors ``[groups, n]``."""
    return matmul(H, x.unsqueeze(-1)).squeeze(-1)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of stacks of matrices; a single one goes the faster way."""
    return (left[0] @ right[0]).unsqueeze(0) if left.shape[0] == 1 else left @ right


def damp_on_inverse(s: Tensor, y: Tensor, Hy: Tensor, mu: float = 0.2) -> tuple[Tensor, Tensor]:
    """Powell's damping on H: returns ``s`` with ``s^T y >= mu y^T H y``, and where it fired.

    ``theta = (1 - mu) y^T H y / (y^T H y - s^T y)``, ``s <- theta s + (1 - theta) H y``.
    """
    sy, yHy = dot(s, y), dot(y, Hy)
    fires = (sy <= mu * yHy) & (yHy > 0)
    theta = (1 - mu) * yHy / (yHy - sy)
    return torch.where(fires, theta * s + (1 - theta) * Hy, s), fires


def damp_on_identity(s: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Powell's damping with ``B = I``: ``y`` with ``s^T y >= eps s^T s``, and where it fired.

    ``theta = (1 - eps) s^T s / (s^T s - s^T y)``, ``y <- theta y + (1 - theta) s``. From
    ``eps = 1`` on no such mixture exists; then the missing multiple of ``s`` is added to ``y``.
    """
    sy, ss = dot(s, y), dot(s, s)
    fires = (sy <= eps * ss) & (ss > 0)
    if eps < 1:
        theta = (1 - eps) * ss / (ss - sy)
        mixed = theta * y + (1 - theta) * s
    else:
        mixed = y + (eps - sy / ss) * s
    return torch.where(fires, mixed, y), fires


def double_damping(s: Tensor, y: Tensor, Hy: Tensor, eps: float) -> Pair:
    """Both dampings, one after the other (Goldfarb, Ren, Bahamou 2020, algorithm 2)."""
    before = dot(s, y) / dot(s, s)
    s, on_inverse = damp_on_inverse(s, y, Hy)
    y, on_identity = damp_on_identity(s, y, eps)
    return Pair(s, y, on_inverse, on_identity, before, dot(s, y) / dot(s, s))


def acceptable(s: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    """Whether a pair may be learned from, ``[groups, 1]``: ``s^T y > max(0, SKIP s^T s norm)``.

    NaN and infinity anywhere in the pair make it unacceptable.
    """
    sy, ss = dot(s, y), dot(s, s)
    finite = torch.isfinite(sy) & torch.isfinite(dot(y, y)) & torch.isfinite(norm)
    return finite & (sy > 0) & (sy > SKIP * ss * norm)


def bfgs_update(H: Tensor, s: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    """The BFGS update of ``H``, in place; returns where it was done.

    ``H <- H + (rho^2 y^T H y + rho) s s^T - rho (s (Hy)^T + (Hy) s^T)``, ``rho = 1 / s^T y``, which
    is ``H + s u^T + u s^T`` with ``u = rho r - rho^2 r^T y / 2 s``, ``r = s - H y``. Skipped (a
    group stays as it is) unless :func:`acceptable` and finite. Cost: O(n^2).
    """
    return _add_correction(H, s, y, acceptable(s, y, norm))


def _add_correction(H: Tensor, s: Tensor, y: Tensor, where: Tensor) -> Tensor:
    """``H += s u^T + u s^T`` in the groups of the mask, unless not finite; returns where."""
    length = s.norm(dim=-1, keepdim=True)
    s, y = s / length, y / length  # the same update, without over- and underflow
    r, rho = s - times(H, y), 1 / dot(s, y)
    u = rho * r - rho * (rho * dot(r, y)) / 2 * s
    ratio = u.norm(dim=-1, keepdim=True).sqrt()  # balances p and q below
    where = where & torch.isfinite(ratio)
    change = where & (ratio > 0)
    s, u = torch.where(change, s * ratio, 0), torch.where(change, u / ratio, 0)
    # p p^T - q q^T with p, q = (s +- u) / sqrt(2): symmetric to the last bit, entry by entry, which
    # s u^T plus its transpose would only be with a slow transposed addition
    p, q = (s + u) * _ROOT_HALF, (s - u) * _ROOT_HALF
    H.addcmul_(p.unsqueeze(-1), p.unsqueeze(-2))
    H.addcmul_(q.unsqueeze(-1), q.unsqueeze(-2), value=-1)
    return where


def largest_diagonal(H: Tensor) -> Tensor:
    """The largest diagonal entry ``[groups, 1]``; the largest eigenvalue is at least that."""
    return H.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)


def guarded_update(
    H: Tensor, s: Tensor, y: Tensor, norm: Tensor, peak: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`bfgs_update`, kept sound in floating point; returns where it was done, and ``peak``.

    Where ``H`` was much larger before, its rounding errors are not small beside what is left of it,
    and where ``s`` and ``y`` are nearly orthogonal, the update multiplies them by the square of
    ``||s|| ||y|| / s^T y``. Negative eigenvalues that they bring are removed
    (:func:`keep_definite`), and where they leave ``H y = s`` unmet, the same update again takes
    that away. Usually there is nothing to do.
    """
    accepted = left = bfgs_update(H, s, y, norm)
    length = s.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True)
    askew = accepted & (length > _ASKEW * dot(s, y))
    for _ in range(_REPEATS):
        peak = keep_definite(H, peak, askew)
        size = largest_diagonal(H) * y.norm(dim=-1, keepdim=True)
        limit = _ROUNDINGS * torch.finfo(H.dtype).eps * size
        left = left & ((s - times(H, y)).norm(dim=-1, keepdim=True) > limit)
        if not bool(left.any()):
            break
        _add_correction(H, s, y, left)
    return accepted, peak


def keep_definite(H: Tensor, peak: Tensor, doubtful: Tensor | bool = False) -> Tensor:
    """Remove negative eigenvalues that rounding has left behind, in place; returns the new peak.

    ``peak`` ``[groups, 1]`` is the largest diagonal entry since the last time it was looked. The
    errors in ``H`` are of the size of the rounding of ``peak``: as long as ``H`` is not much
    smaller, nothing is done, except to groups that are ``doubtful`` ``[groups, 1]`` for another
    reason. Cost: one Cholesky decomposition where it has become so, one
    eigen-decomposition where that fails.
    """
    now = largest_diagonal(H)
    shrunk = (now < peak / _SHRUNK) | doubtful
    if not bool(shrunk.any()):
        return torch.maximum(peak, now)
    for g in shrunk.flatten().nonzero().flatten().tolist():
        exact = H[g].double()
        least = LEAST * torch.finfo(H.dtype).eps * float(now[g])
        one = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
        if int(torch.linalg.cholesky_ex(exact - least * one).info):
            values, vectors = torch.linalg.eigh(exact)
            clipped = (vectors * values.clamp(min=least)) @ vectors.mT
            H[g] = ((clipped + clipped.mT) / 2).to(H.dtype)
    return torch.where(shrunk, largest_diagonal(H), torch.maximum(peak, now))


def hessian_action(H: Tensor, A: Tensor, eps: float, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The pair ``s = H a``, ``y = (A + eps I) s`` of "Hessian-action BFGS" (section 3.2)."""
    s = times(H, mean)
    return s, times(A, s) + eps * s


def symmetric_inverse(matrix: Tensor, shift: float | Tensor, what: str = "The factor") -> Tensor:
    """``(matrix + shift I)^-1`` by Cholesky, exactly symmetric; ``shift`` may be ``[groups, 1]``.

    Raises ``SingularError`` if the sum is not positive definite to working precision.
    """
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    triangle, failed = torch.linalg.cholesky_ex(shifted)
    inverse = torch.cholesky_inverse(triangle)
    if bool(failed.any()) or not bool(torch.isfinite(inverse).all()):
        least = float(torch.as_tensor(shift).amin())
        raise SingularError(
            f"{what} with {least:.3g} on its diagonal is not positive definite to working "
            "precision; raise damping."
        )
    return (inverse + inverse.mT) / 2
