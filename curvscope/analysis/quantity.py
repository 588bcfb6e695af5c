"""Numbers that are exact or known by samples, and what follows from them with its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Quantity = float | Tensor
"""A number, or one sample of it ``[k]`` per random probe."""


@dataclass(frozen=True)
class Value:
    """A number with its standard error or residual, and how it was got."""

    value: float
    stderr: float = 0.0
    method: str = "exact"


@dataclass(frozen=True)
class Moments:
    """``<R, R>``, ``<R, B>``, ``<B, B>`` and ``||R - B||^2`` (kept apart: it cancels).

    ``sampled`` are samples of ``<B, B>`` where that is known, too: their noise is that of the
    others where B is near R, and cancels in ratios.
    """

    rr: Quantity
    rb: Quantity
    bb: Quantity
    gap: Quantity
    method: str
    sampled: Tensor | None = None

    def apply(self, function: Callable[[float, float, float, float], float]) -> Value:
        """``function(rr, rb, bb, gap)``, with its standard error by the jackknife."""
        others = self.rr, self.rb, self.gap

        def with_bb(bb: Quantity) -> Value:
            rr, rb, gap = others
            return jackknife(function, rr, rb, bb, gap, method=self.method)

        if self.sampled is None:
            return with_bb(self.bb)
        return less_noisy(with_bb(self.bb), with_bb(self.sampled))


def jackknife(
    function: Callable[..., float], *parts: Quantity, method: str = "structured"
) -> Value:
    """``function`` of the means of ``parts``, with its standard error by leaving out one probe.

    ``method`` says how the number was got if none of the parts that matter is random.
    """
    means = [float(part.mean()) if isinstance(part, Tensor) else part for part in parts]
    value = function(*means)
    counts = [len(part) for part in parts if isinstance(part, Tensor)]
    if not counts or math.isnan(value):
        return Value(value, 0.0, method)
    count = min(counts)
    columns = [_means_without(part, count) for part in parts]
    left_out = [function(*(column[i] for column in columns)) for i in range(count)]
    if any(math.isnan(one) for one in left_out):  # one probe decides whether it is defined
        return Value(math.nan, 0.0, "estimated")
    if max(left_out) == min(left_out):  # what is random does not enter
        return Value(value, 0.0, "structured" if method == "estimated" else method)
    return Value(value, spread_of(left_out), "estimated")


def less_noisy(one: Value, two: Value) -> Value:
    """The one of two estimates of the same number that has the smaller error.

    One without any error beside one that has it was cut off at the end of its range.
    """
    if math.isnan(one.value) or not one.stderr:
        return two
    return two if 0 < two.stderr < one.stderr else one


def spread_of(left_out: list[float]) -> float:
    """The jackknife's standard error from values that leave out one probe each."""
    count = len(left_out)
    centre = math.fsum(left_out) / count
    return math.sqrt(math.fsum((one - centre) ** 2 for one in left_out) * (count - 1) / count)


def estimate(samples: Quantity) -> Value:
    """Mean and standard error of independent samples ``[k]``."""
    if not isinstance(samples, Tensor):
        return Value(samples, 0.0, "structured")
    spread = float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.inf
    return Value(float(samples.mean()), spread, "estimated")


def add(left: Quantity, right: Quantity) -> Quantity:
    """The sum of two quantities; samples are paired, the longer ones cut."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        count = min(len(left), len(right))
        return left[:count] + right[:count]
    return left + right


def square_of_mean(total: float, overlaps: Tensor, squares: Tensor) -> Tensor:
    """Samples ``[n]`` whose mean is ``(|S|^2 - sum_k |s_k|^2) / (n (n - 1))``.

    It is the unbiased estimate of the squared length of the mean of vectors ``s_k`` with sum ``S``,
    from ``total = |S|^2``, ``overlaps[k] = s_k . S`` and ``squares[k] = |s_k|^2``. The samples are
    the jackknife's pseudo-values, so that their spread is its standard error.
    """
    return product_of_means(total, overlaps, overlaps, squares)


def product_of_means(total: float, left: Tensor, right: Tensor, pairs: Tensor) -> Tensor:
    """The same for the inner product of the means of ``s_k`` (sum S) and ``t_k`` (sum T).

    ``total = S . T``, ``left[k] = s_k . T``, ``right[k] = S . t_k``, ``pairs[k] = s_k . t_k``.
    """
    n = len(pairs)
    if n < 3:
        return torch.full((n,), math.nan, dtype=torch.float64)
    diagonal = pairs.sum()
    whole = (total - diagonal) / (n * (n - 1))
    without = (total - left - right + pairs) - (diagonal - pairs)
    return n * whole - (n - 1) * without / ((n - 1) * (n - 2))


def _means_without(part: Quantity, count: int) -> list[float]:
    """The means that leave out one sample each, of the first ``count``."""
    if not isinstance(part, Tensor):
        return [part] * count
    return ((part.sum() - part[:count]) / max(1, len(part) - 1)).tolist()
