"""Small numerical helpers that all operators share: checks of input, sums, chunks, inverses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    NonFiniteError,
    NotDefinedError,
    OptionError,
    ShapeError,
    SingularError,
    check_option,
)

CHUNK = 2**24
_TILE = 256  # rows of a tile that a processor keeps at hand
"""Numbers that one temporary of a chunked computation may hold (128 MiB in float64)."""


def as_float(name: str, tensor: Tensor, ndim: int | tuple[int, ...]) -> Tensor:
    """``tensor`` without its graph, after checking type, number of axes and finiteness."""
    if not isinstance(tensor, Tensor):
        raise OptionError(f"{name} must be a torch tensor, not {type(tensor).__name__}.")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise OptionError(
            f"{name} is {tensor.dtype}; operators are float32 or float64. "
            "Convert it with .float() or .double()."
        )
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if tensor.ndim not in allowed:
        raise ShapeError(
            f"{name} must have {' or '.join(map(str, allowed))} axes, not shape "
            f"{list(tensor.shape)}."
        )
    tensor = tensor.detach()
    # aminmax propagates NaN and needs no temporary of the tensor's size, as isfinite() would
    if tensor.numel() and not all(math.isfinite(float(x)) for x in torch.aminmax(tensor)):
        count = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{name} has {count} NaN or infinite {'entry' if count == 1 else 'entries'} "
            f"of {tensor.numel()}; "
            "look for the first layer whose output is not finite."
        )
    return tensor


def same_kind(**tensors: Tensor) -> tuple[torch.dtype, torch.device]:
    """The one dtype and device of all ``tensors``; raises ``OptionError`` if they differ."""
    kinds = {name: (t.dtype, t.device) for name, t in tensors.items()}
    if len(set(kinds.values())) > 1:
        listing = ", ".join(f"{name} {d} on {dev}" for name, (d, dev) in kinds.items())
        raise OptionError(f"Tensors of one operator must agree in dtype and device: {listing}.")
    return next(iter(kinds.values()))


def symmetric(name: str, matrix: Tensor) -> Tensor:
    """``matrix`` ``[..., d, d]``, symmetrised if rounding made it unsymmetric.

    Raises ``OptionError`` if the asymmetry exceeds ``sqrt(eps)`` of the largest entry. An exactly
    symmetric matrix is returned as it is, not copied.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ShapeError(f"{name} must be square, not of shape {list(matrix.shape)}.")
    if not matrix.numel():
        return matrix
    gap = _asymmetry(matrix)
    if gap == 0:
        return matrix
    size = max(abs(float(x)) for x in torch.aminmax(matrix))
    if gap > math.sqrt(torch.finfo(matrix.dtype).eps) * size:
        raise OptionError(
            f"{name} is not symmetric: entries differ from their mirror image by up to {gap:.3g}, "
            f"with entries up to {size:.3g}. Curvature matrices are symmetric; "
            "pass (M + M.T) / 2 if that is what you mean."
        )
    return (matrix + matrix.mT) / 2


def _asymmetry(matrix: Tensor) -> float:
    """The largest difference of an entry and its mirror image, tile by tile of one half.

    Tiles stay in the cache, where whole rows against whole columns are read at random.
    """
    size, each = matrix.shape[-1], max(1, matrix.numel() // matrix.shape[-1] ** 2)
    side = max(1, math.isqrt(CHUNK // each))
    if matrix.device.type == "cpu":
        side = min(side, _TILE)
    found = [
        (matrix[..., above, beside] - matrix[..., beside, above].mT).abs().amax()
        for start in range(0, size, side)
        for above in (slice(start, start + side),)
        for beside in (slice(left, left + side) for left in range(start, size, side))
    ]
    return float(torch.stack(found).amax())  # NaN if any is


def total(values: Tensor) -> float:
    """Sum of all entries, accumulated in float64."""
    if values.device.type == "mps":  # has no float64
        values = values.cpu()
    return float(values.sum(dtype=torch.float64))


def dot(left: Tensor, right: Tensor) -> float:
    """Sum of products of all entries, accumulated in float64 in chunks."""
    left, right = left.reshape(-1), right.reshape(-1)
    return math.fsum(total(left[rows] * right[rows]) for rows in chunks(left.numel(), 1))


def chunks(size: int, numbers_each: int, budget: int | None = None) -> Iterator[slice]:
    """Slices of ``range(size)`` such that ``numbers_each`` times their length stays in budget."""
    step = max(1, (CHUNK if budget is None else budget) // max(1, numbers_each))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def unit_columns(size: int, columns: slice, like: Tensor) -> Tensor:
    """Some columns of the identity ``[size, size]``."""
    count = columns.stop - columns.start
    eye = like.new_zeros(size, count)
    eye[columns.start : columns.stop] = torch.eye(count, dtype=like.dtype, device=like.device)
    return eye


def convert(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Move the tensors and operators in ``value`` (also inside tuples and mappings)."""
    from .base import Operator

    if isinstance(value, Operator):
        return value.to(dtype, device)
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
    if type(value) is tuple and any(isinstance(v, Tensor | Operator) for v in value):
        return tuple(convert(v, dtype, device) for v in value)
    if isinstance(value, Mapping) and any(isinstance(v, Operator) for v in value.values()):
        return type(value)({k: convert(v, dtype, device) for k, v in value.items()})  # type: ignore[call-arg]
    return value


def noise_level(values: Tensor, dim: int, eps: float = 0.0) -> float:
    """How far from zero an eigenvalue that is zero may be computed, for factors of size ``dim``.

    ``eps`` is the rounding of the matrix where it is coarser than that of the eigenvalues.
    """
    if not values.numel() or dim <= 1:
        return 0.0
    eps = max(eps, torch.finfo(values.dtype).eps)
    return max(8.0, math.sqrt(dim)) * eps * float(values.abs().amax())


def damped_values(values: Tensor, damping: float, dim: int) -> Tensor:
    """``values + damping`` with negative rounding noise of ``values`` removed first.

    A positive-semidefinite matrix has computed eigenvalues like ``-1e-17``; with the noise
    removed, every positive damping makes it positive definite, however small.
    """
    if damping > 0:
        noise = noise_level(values, dim)
        values = torch.where((values < 0) & (values >= -noise), 0.0, values)
    return values + damping


def reciprocals(values: Tensor, damping: float, what: str, *, dim: int | None = None) -> Tensor:
    """``1 / (values + damping)`` for eigenvalues of a symmetric matrix.

    ``dim`` is the size of the matrix whose eigenvalues were computed (1: they are exact). Raises
    ``SingularError`` where a denominator is zero to working precision.
    """
    dim = values.numel() if dim is None else dim
    shifted = damped_values(values, damping, dim)
    tiny = shifted.abs() <= noise_level(values, dim)
    if damping > 0:  # a sum of two positive numbers is known to full precision
        tiny &= shifted < damping
    bad = tiny | (shifted == 0) | ~torch.isfinite(1.0 / shifted)
    if bool(bad.any()):
        raise SingularError(
            f"The {what} with damping {damping:g} is singular: {int(bad.sum())} of "
            f"{values.numel()} eigenvalues vanish to working precision (largest magnitude "
            f"{float(values.abs().amax()):.3g}). Pass a larger damping."
        )
    return 1.0 / shifted


def log_determinant(
    values: Tensor, damping: float, what: str, *, dim: int | None = None, eps: float = 0.0
) -> float:
    """``sum(log(values + damping))``; raises ``NotDefinedError`` unless all are positive.

    ``eps`` as in :func:`noise_level`: with it a zero that was rounded below zero is not indefinite.
    """
    dim = values.numel() if dim is None else dim
    shifted = damped_values(values, damping, dim)
    if not shifted.numel():
        return 0.0
    least = float(shifted.amin())
    # non-negative eigenvalues plus a positive damping are positive however small the damping is
    floor = 0.0 if least >= damping > 0 else noise_level(values, dim)
    if least <= floor:
        floor = noise_level(values, dim, eps)
        kind = "indefinite" if least < -floor else "singular to working precision"
        raise NotDefinedError(
            f"The log-determinant of the {what} with damping {damping:g} is not defined: the "
            f"matrix is {kind} (smallest eigenvalue {least:.3g}). "
            f"A damping above {damping - least:.3g} makes it positive definite."
        )
    return total(shifted.log())


def check_damping_rule(damping: float, how: str) -> None:
    """Refuse a negative damping, and a rule other than ``"plain"`` or ``"trace"``."""
    check_option("how", how, ("plain", "trace"))
    if not (math.isfinite(damping) and damping >= 0):
        raise OptionError(f"damping={damping!r} must be a finite number that is not negative.")
