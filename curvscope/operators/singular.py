"""The leading singular pair of a linear map, by restarted Lanczos bidiagonalisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_RESTART = 16  # vectors kept on each side

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Space:
    """A linear map and its adjoint; metrics are given where coordinates are not orthonormal.

    ``forward`` takes right to left vectors, ``adjoint`` back. The inner product of left vectors is
    ``<u, left_metric(u')>``, of right ones ``<v, right_metric(v')>``.
    """

    forward: Map
    adjoint: Map
    left_metric: Map | None = None
    right_metric: Map | None = None


@dataclass(frozen=True)
class Pair:
    """``left`` and ``right`` with norm ``sqrt(value)`` each, and how well they are known.

    ``residual`` is ``|R^T u - value v| / value`` for the unit vectors ``u`` and ``v``.
    """

    value: float
    left: Tensor
    right: Tensor
    residual: float
    iterations: int
    converged: bool

    def with_positive(self, *indicators: Tensor) -> Pair:
        """Both vectors with the sign that makes the sum of the ``indicators`` non-negative."""
        if sum(float(x) for x in indicators) >= 0:
            return self
        return replace(self, left=-self.left, right=-self.right)

    def with_vectors(self, left: Tensor, right: Tensor) -> Pair:
        """The same pair in other coordinates."""
        return replace(self, left=left, right=right)


def leading_pair(space: Space, start: Tensor, *, tol: float, max_iter: int) -> Pair:
    """The largest singular value that ``start`` meets, with its vectors.

    Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation, restarted from the best
    vector every 16 steps: never worse than power iteration on the same products, and in exact
    arithmetic with the same limit. ``tol`` is relative; it is raised to what the dtype can give.
    ``iterations`` counts products with the map and its adjoint as one.
    """
    tol = max(tol, 16 * torch.finfo(start.dtype).eps)
    length = _norm(start, space.right_metric)
    if length == 0.0:
        return Pair(0.0, space.forward(start) * 0.0, start * 0.0, 0.0, 0, True)
    right_one = start / length
    iterations = 0
    while True:
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        alphas: list[float] = []
        betas: list[float] = []
        candidate = right_one
        while True:
            rights.append(candidate)
            image = _orthogonal(space.forward(candidate), lefts, space.left_metric)
            alpha = _norm(image, space.left_metric)
            iterations += 1
            size = max([alpha, *alphas, *betas])
            if alpha <= torch.finfo(start.dtype).eps * size or alpha == 0.0:
                beta = 0.0  # the image lies in the span of the others: one column more than rows
                break
            lefts.append(image / alpha)
            alphas.append(alpha)
            back = _orthogonal(space.adjoint(lefts[-1]), rights, space.right_metric)
            beta = _norm(back, space.right_metric)
            value, residual, *_ = _small(alphas, betas, beta)
            if residual <= tol * value or len(alphas) == _RESTART or iterations >= max_iter:
                break
            if beta <= torch.finfo(start.dtype).eps * value:
                break
            betas.append(beta)
            candidate = back / beta
        if not alphas:  # the start is mapped to zero
            zero = space.forward(right_one) * 0.0
            return Pair(0.0, zero, right_one * 0.0, 0.0, iterations, True)
        value, residual, left_mix, right_mix = _small(alphas, betas, beta)
        left = _mix(lefts, left_mix)
        right_one = _mix(rights, right_mix)
        converged = residual <= tol * value
        if converged or iterations >= max_iter:
            root = math.sqrt(value)
            return Pair(
                value, root * left, root * right_one, residual / value, iterations, converged
            )
        right_one = right_one / _norm(right_one, space.right_metric)


def _small(
    alphas: list[float], betas: list[float], beta: float
) -> tuple[float, float, Tensor, Tensor]:
    """Leading value, residual and mixing vectors of the upper bidiagonal matrix."""
    rows = len(alphas)
    matrix = torch.zeros(rows, max(rows, len(betas) + 1), dtype=torch.float64)
    for row, alpha in enumerate(alphas):
        matrix[row, row] = alpha
    for row, after in enumerate(betas):
        matrix[row, row + 1] = after
    left, values, right = torch.linalg.svd(matrix)
    return float(values[0]), beta * abs(float(left[-1, 0])), left[:, 0], right[0]


def _mix(vectors: list[Tensor], weights: Tensor) -> Tensor:
    mixed = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights.tolist(), strict=True):
        mixed += weight * vector
    return mixed


def _norm(vector: Tensor, metric: Map | None) -> float:
    if metric is None:
        return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    return math.sqrt(max(float((vector * metric(vector)).sum()), 0.0))


def _orthogonal(vector: Tensor, basis: list[Tensor], metric: Map | None) -> Tensor:
    """``vector`` minus its part in the span of ``basis``; twice, which is enough."""
    for _ in range(2):
        for other in basis:
            image = vector if metric is None else metric(vector)
            vector = vector - (other * image).sum() * other
    return vector
