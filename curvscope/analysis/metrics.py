"""The metrics of a comparison. A new one is a new function here, with :func:`metric` above it.

Each takes a :class:`~curvscope.analysis.pairs.Pair` with the reference ``R`` and the approximation
``B`` of one block, and returns a number, or a :class:`~curvscope.analysis.pairs.Value` where it
knows better how the number was got. What is not defined raises ``NotDefinedError`` with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ..errors import NotDefinedError
from .facts import Facts, TooLargeError
from .pairs import Pair, Value
from .spectrum import condition_of
from .structure import as_numpy

_LEADING = 10  # eigenvectors compared
_ITERATED = 200_000  # rows beyond which a metric that iterates must be asked for by name
_CONSTANT = 1e-12  # relative spread of a diagonal that is all one number

Function = Callable[[Pair], "float | Value"]


@dataclass(frozen=True)
class Metric:
    """A metric: its name (a column), a title for people, and which values are good.

    ``better`` is ``"low"`` (best at 0), ``"high"`` (at most 1), ``"one"`` (best at 1) or ``None``
    (a fact, not a score). Scores do not change when everything is multiplied by one number.
    """

    name: str
    title: str
    better: str | None
    function: Function
    doc: str

    def badness(self, value: float) -> float:
        """A number that grows the worse ``value`` is."""
        if self.better == "high":
            return -value
        if self.better == "one":
            return abs(value - 1)
        return value


METRICS: dict[str, Metric] = {}
"""All metrics by name, in the order of the frame's columns."""


def metric(title: str, better: str | None = None) -> Callable[[Function], Function]:
    """Register a function as a metric under its own name; its docstring is the definition."""

    def register(function: Function) -> Function:
        name, doc = function.__name__, function.__doc__ or ""
        METRICS[name] = Metric(name, title, better, function, doc)
        return function

    return register


# -- entries -------------------------------------------------------------------------------------


@metric("relative error", better="low")
def error(pair: Pair) -> Value:
    """``||R - B||_F / ||R||_F``."""
    _need_nonzero(pair.reference)
    return pair.moments.apply(lambda rr, rb, bb, gap: math.sqrt(gap / rr) if rr else math.nan)


@metric("relative error, best scale", better="low")
def error_rescaled(pair: Pair) -> Value:
    """``min_c ||R - c B||_F / ||R||_F``: what is left when only the scale is wrong."""
    _need_nonzero(pair.reference)
    found = pair.moments.apply(_rescaled)
    if pair.moments.method == "exact" and found.value < 1e-3:  # 1 - cos^2 has cancelled
        dense = pair.approximation.dense
        best = float((pair.reference.dense * dense).sum()) / pair.approximation.norm2
        left = float(torch.linalg.vector_norm(pair.reference.dense - best * dense))
        return Value(left / math.sqrt(pair.reference.norm2))
    return found


@metric("best scale", better="one")
def scale(pair: Pair) -> Value:
    """The ``c`` that minimises ``||R - c B||_F``, ``<R, B> / <B, B>``."""
    _need_nonzero(pair.approximation)
    return pair.moments.apply(lambda rr, rb, bb, gap: rb / bb if bb else math.nan)


@metric("cosine", better="high")
def cosine(pair: Pair) -> Value:
    """``<R, B> / (||R||_F ||B||_F)``."""
    _need_nonzero(pair.reference)
    _need_nonzero(pair.approximation)
    return pair.moments.apply(
        lambda rr, rb, bb, gap: rb / math.sqrt(rr * bb) if rr * bb else math.nan
    )


@metric("relative spectral error", better="low")
def spectral_error(pair: Pair) -> Value:
    """``||R - B||_2 / ||R||_2`` (largest singular values)."""
    _need_nonzero(pair.reference)
    _affordable(pair)
    if pair.method != "exact" and pair.size > _ITERATED and not pair.thorough:
        raise TooLargeError(
            f"Lanczos iteration on {pair.size:,} rows takes seconds: ask for it with "
            "metrics=['spectral_error', ...]."
        )
    top, slack = pair.difference_norm
    whole, more = pair.reference.spectral_norm
    spread = (slack + more * top / whole) / whole
    return Value(top / whole, spread, "estimated" if spread else pair.method)


@metric("trace ratio", better="one")
def trace_ratio(pair: Pair) -> Value:
    """``tr B / tr R``."""
    below, above = _trace(pair.reference, pair), _trace(pair.approximation, pair)
    floor = 1e-14 * math.sqrt(pair.size) * _norm(pair.reference)
    if abs(below.value) <= floor:
        raise NotDefinedError(f"The trace of the {pair.reference.name} is zero.")
    value = above.value / below.value
    spread = math.hypot(above.stderr, value * below.stderr) / abs(below.value)
    return Value(value, spread, "estimated" if spread else pair.method)


# -- diagonals -----------------------------------------------------------------------------------


@metric("diagonal correlation", better="high")
def diagonal_correlation(pair: Pair) -> Value:
    """Pearson correlation of the two diagonals."""
    left, right = _diagonals(pair)
    return Value(_pearson(left, right), 0.0, pair.method)


@metric("diagonal rank correlation", better="high")
def diagonal_rank_correlation(pair: Pair) -> Value:
    """Spearman correlation of the two diagonals: agreement in order alone."""
    left, right = _diagonals(pair)
    return Value(_pearson(rankdata(left), rankdata(right)), 0.0, pair.method)


# -- spectrum ------------------------------------------------------------------------------------


@metric("leading eigenspace overlap", better="high")
def eigenspace_overlap(pair: Pair) -> Value:
    """Mean squared cosine of the principal angles between the leading eigenspaces.

    By magnitude of the eigenvalues; the dimension ``k`` is ``eigenspace_k``. Two random subspaces
    have ``k / P``.
    """
    count = _leading_count(pair.reference)
    _affordable(pair)
    _, ours, slack = _leading(pair.reference)
    values, vectors, more = _leading(pair.approximation)
    if _gap(values, count, pair.size) <= 0:
        raise NotDefinedError(
            f"Eigenvalues {count} and {count + 1} of the {pair.approximation.name} coincide: its "
            f"leading space of dimension {count} is not unique."
        )
    cosines = ours[:, :count].mT @ vectors[:, :count].to(ours.device)
    slack += more
    method = "estimated" if slack else pair.method
    return Value(float(cosines.square().sum()) / count, slack, method)


@metric("dimension of the eigenspaces")
def eigenspace_k(pair: Pair) -> Value:
    """The ``k`` of ``eigenspace_overlap``: up to 10, where the reference's spectrum has a gap."""
    _affordable(pair)
    return Value(float(_leading_count(pair.reference)), 0.0, pair.method)


@metric("condition number")
def condition_number(pair: Pair) -> Value:
    """Condition number of the approximation under its damping; infinite if singular."""
    return _condition(pair.approximation, pair.own_damping)


@metric("condition number of the reference")
def reference_condition_number(pair: Pair) -> Value:
    """Condition number of the reference under the same damping; infinite if singular."""
    return _condition(pair.reference, pair.damping)


@metric("distance of spectra", better="low")
def spectrum_distance(pair: Pair) -> Value:
    """``||l(R) - l(B)||_2 / ||l(R)||_2`` of the sorted eigenvalues.

    Never more than the relative error (Hoffman and Wielandt 1953): the part of it that no change
    of eigenvectors could mend.
    """
    _need_nonzero(pair.reference)
    ours, theirs = _spectra(pair)
    distance = float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(ours))
    return Value(distance, 0.0, pair.method)


@metric("Wasserstein distance of spectra", better="low")
def spectrum_wasserstein(pair: Pair) -> Value:
    """Mean ``|l_i(R) - l_i(B)|`` over the mean ``|l_i(R)|``, sorted: relative 1-Wasserstein."""
    _need_nonzero(pair.reference)
    ours, theirs = _spectra(pair)
    return Value(float((ours - theirs).abs().sum() / ours.abs().sum()), 0.0, pair.method)


# -- steps ---------------------------------------------------------------------------------------


@metric("angle of the steps (degrees)", better="low")
def step_angle(pair: Pair) -> Value:
    """Angle between ``(R + damping I)^-1 g`` and ``(B + damping I)^-1 g`` in degrees."""
    ours, slack = pair.reference.solve(pair.gradient, pair.damping)
    theirs, more = _step(pair)
    slack += more
    ours, theirs = ours / ours.norm(), theirs / theirs.norm()
    # accurate for small angles, where the arc cosine is not (Kahan)
    angle = 2 * math.atan2(float((ours - theirs).norm()), float((ours + theirs).norm()))
    return Value(math.degrees(angle), math.degrees(slack), _solved(pair, slack))


@metric("predicted decrease")
def predicted_decrease(pair: Pair) -> Value:
    """``g^T (B + damping I)^-1 g / 2``: what the approximation's own quadratic model promises."""
    return _predicted(pair)


@metric("actual decrease")
def actual_decrease(pair: Pair) -> Value:
    """Decrease of the reference's damped quadratic model along ``s = -(B + damping I)^-1 g``.

    ``-g^T s - s^T (R + damping I) s / 2``; negative where the step goes too far.
    """
    return _actual(pair)


@metric("actual over predicted decrease", better="one")
def decrease_ratio(pair: Pair) -> Value:
    """``actual_decrease / predicted_decrease``: 1 where the model is right along its step."""
    predicted, actual = _predicted(pair), _actual(pair)
    if not predicted.value:
        raise NotDefinedError("The predicted decrease is zero.")
    return Value(
        actual.value / predicted.value, actual.stderr / abs(predicted.value), actual.method
    )


@metric("share of the possible decrease", better="high")
def step_efficiency(pair: Pair) -> Value:
    """``actual_decrease`` over ``g^T (R + damping I)^-1 g / 2``, the most that is possible."""
    _need_definite(pair.reference, pair.damping)
    best, slack = pair.reference.solve(pair.gradient, pair.damping)
    most = 0.5 * float(pair.gradient @ best)
    value = _actual(pair).value / most
    return Value(value, abs(value) * slack, _solved(pair, slack))


@metric("log-determinant divergence", better="low")
def stein_divergence(pair: Pair) -> Value:
    """``tr(R' B'^-1) - log det(R' B'^-1) - P`` of the damped matrices ``R'`` and ``B'``.

    Stein's loss: twice the Kullback-Leibler divergence of N(0, R') from N(0, B'). Both matrices
    must be positive definite.
    """
    ours = pair.reference.logdet(pair.damping)
    theirs = pair.approximation.logdet(pair.own_damping)
    inverse = pair.approximation.inverse(pair.own_damping)
    reference = pair.reference.formed if pair.reference.small else pair.reference.op
    overlap = inverse.inner(reference) + pair.damping * inverse.trace()
    value = overlap - (ours - theirs) - pair.size
    return Value(max(value, 0.0), 0.0, pair.method)


# -- shared --------------------------------------------------------------------------------------


def _rescaled(rr: float, rb: float, bb: float, gap: float) -> float:
    if not rr:
        return math.nan
    return math.sqrt(max(1.0 - (rb * rb / (rr * bb) if bb else 0.0), 0.0))


def _norm(facts: Facts) -> float:
    return math.sqrt(facts.norm2) if facts.known else 0.0


def _need_nonzero(facts: Facts) -> None:
    if facts.known and not facts.norm2:
        raise NotDefinedError(f"The {facts.name} is zero here.")


def _need_definite(facts: Facts, damping: float) -> None:
    """Refuse a model without a minimum; large matrices are judged by conjugate gradients."""
    if facts.small and float(facts.eigenvalues[0]) + damping < -facts.tolerance:
        raise NotDefinedError(
            f"The {facts.name} with damping {damping:g} is indefinite (smallest eigenvalue "
            f"{float(facts.eigenvalues[0]):.3g}), so its model has no minimum."
        )


def _affordable(pair: Pair) -> None:
    for facts in (pair.reference, pair.approximation):
        if not facts.known:
            raise facts.too_large("This", "Use cs.eigsh(op, k) on the reference.")


def _trace(facts: Facts, pair: Pair) -> Value:
    try:
        return Value(facts.trace, 0.0, facts.method)
    except TooLargeError:
        if facts is not pair.reference:
            raise
        return pair.probes.trace


def _diagonals(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for facts in (pair.reference, pair.approximation):
        diagonal = as_numpy(facts.diagonal)
        spread = float(np.ptp(diagonal)) if diagonal.size else 0.0
        if spread <= _CONSTANT * float(np.abs(diagonal).max(initial=0.0)):
            raise NotDefinedError(f"The diagonal of the {facts.name} is constant.")
        found.append(diagonal)
    return found[0], found[1]


def _pearson(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left - left.mean(), right - right.mean()
    value = float(left @ right) / math.sqrt(float(left @ left) * float(right @ right))
    return min(1.0, max(-1.0, value))


def _gap(values: Tensor, count: int, size: int) -> float:
    """Gap in magnitude behind the first ``count`` eigenvalues, 0 where it may be rounding."""
    if count >= size:
        return math.inf
    sizes = values.abs()
    behind = float(sizes[count]) if len(sizes) > count else 0.0
    gap = float(sizes[count - 1]) - behind
    noise = max(1e-6 * float(sizes[count - 1]), 1e-9 * float(sizes[0]))
    return gap if gap > noise else 0.0


def _leading(facts: Facts) -> tuple[Tensor, Tensor, float]:
    return facts.leading(min(_LEADING + 1, facts.size))


def _leading_count(reference: Facts) -> int:
    """The largest dimension up to 10 behind which the reference's spectrum has a gap."""
    most = min(_LEADING, max(1, reference.size - 1))
    values = _leading(reference)[0]
    for count in range(most, 0, -1):
        if _gap(values, count, reference.size) > 0:
            return count
    raise NotDefinedError(f"The leading eigenvalues of the {reference.name} coincide.")


def _condition(facts: Facts, damping: float) -> Value:
    value = condition_of(facts.eigenvalues, damping, facts.tolerance)
    return Value(value, 0.0, facts.method)


def _spectra(pair: Pair) -> tuple[Tensor, Tensor]:
    ours, theirs = pair.reference.eigenvalues, pair.approximation.eigenvalues
    return ours.cpu(), theirs.cpu()


def _step(pair: Pair) -> tuple[Tensor, float]:
    """``(B + damping I)^-1 g`` and its relative residual."""
    return pair.approximation.solve(pair.gradient, pair.own_damping)


def _predicted(pair: Pair) -> Value:
    step, slack = _step(pair)
    value = 0.5 * float(pair.gradient @ step)
    return Value(value, abs(value) * slack, _solved(pair, slack))


def _actual(pair: Pair) -> Value:
    step, slack = _step(pair)
    curved = pair.reference_image(step) + pair.damping * step
    value = float(pair.gradient @ step) - 0.5 * float(step @ curved)
    return Value(value, abs(value) * slack, _solved(pair, slack))


def _solved(pair: Pair, residual: float) -> str:
    return "estimated" if residual else pair.method
