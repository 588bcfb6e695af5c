"""The metrics of a comparison. A new one is a new function here, with :func:`metric` above it.

Each takes a :class:`~curvscope.analysis.pairs.Pair` with the reference ``R`` and the approximation
``B`` of one block, and returns a number, or a :class:`~curvscope.analysis.pairs.Value` where it
knows better how the number was got. What is not defined raises ``NotDefinedError`` with the reason.
"""

from __future__ import annotations

import math

import torch

from ..errors import NotDefinedError
from . import measures
from .pairs import Pair
from .quantity import Value
from .registry import METRICS, metric
from .unformed import total

__all__ = ["METRICS", "metric"]


# -- entries -------------------------------------------------------------------------------------


@metric("relative error", better="low")
def error(pair: Pair) -> Value:
    """``||R - B||_F / ||R||_F``."""
    measures.need_nonzero(pair.reference)
    return pair.moments.apply(measures.relative)


@metric("relative error, best scale", better="low")
def error_rescaled(pair: Pair) -> Value:
    """``min_c ||R - c B||_F / ||R||_F``: what is left when only the scale is wrong."""
    measures.need_nonzero(pair.reference)
    found = pair.moments.apply(measures.rescaled)
    if pair.moments.method == "exact" and found.value < 1e-3:  # 1 - cos^2 has cancelled
        dense = pair.approximation.dense
        best = float((pair.reference.dense * dense).sum()) / pair.approximation.norm2
        left = float(torch.linalg.vector_norm(pair.reference.dense - best * dense))
        return Value(left / math.sqrt(pair.reference.norm2))
    if pair.moments.method == "estimated":  # noisy apart, but the best scale is never worse than 1
        plain = pair.moments.apply(measures.relative)
        return plain if found.value > plain.value else found
    return found


@metric("best scale", better="one")
def scale(pair: Pair) -> Value:
    """The ``c`` that minimises ``||R - c B||_F``, ``<R, B> / <B, B>``."""
    measures.need_nonzero(pair.approximation)
    return pair.moments.apply(lambda rr, rb, bb, gap: rb / bb if bb else math.nan)


@metric("cosine", better="high")
def cosine(pair: Pair) -> Value:
    """``<R, B> / (||R||_F ||B||_F)``."""
    measures.need_nonzero(pair.reference)
    measures.need_nonzero(pair.approximation)
    return pair.moments.apply(
        lambda rr, rb, bb, gap: rb / math.sqrt(rr * bb) if rr * bb else math.nan
    )


@metric("relative spectral error", better="low")
def spectral_error(pair: Pair) -> Value:
    """``||R - B||_2 / ||R||_2`` (largest singular values)."""
    measures.need_nonzero(pair.reference)
    if pair.method != "exact":
        pair.reference.may_iterate()
    top, slack = pair.difference_norm
    whole, more = pair.reference.spectral_norm
    if not whole:  # entries so small that their squares vanish
        raise NotDefinedError(f"The {pair.reference.name} is zero to rounding here.")
    spread = (slack + more * top / whole) / whole
    return Value(top / whole, spread, "estimated" if spread else pair.method)


@metric("trace ratio", better="one")
def trace_ratio(pair: Pair) -> Value:
    """``tr B / tr R``."""
    return measures.trace_ratio(pair)


# -- diagonals -----------------------------------------------------------------------------------


@metric("diagonal correlation", better="high")
def diagonal_correlation(pair: Pair) -> Value:
    """Pearson correlation of the two diagonals."""
    known = measures.diagonals(pair)
    if known is None:
        return measures.estimated_correlation(pair)
    return Value(measures.pearson(*known), 0.0, pair.method)


@metric("diagonal rank correlation", better="high")
def diagonal_rank_correlation(pair: Pair) -> Value:
    """Spearman correlation of the two diagonals: agreement in order alone."""
    known = measures.diagonals(pair)
    if known is None:
        return measures.estimated_rank_correlation(pair)
    left, right = known
    return Value(measures.pearson(measures.ranks(left), measures.ranks(right)), 0.0, pair.method)


# -- spectrum ------------------------------------------------------------------------------------


@metric("leading eigenspace overlap", better="high")
def eigenspace_overlap(pair: Pair) -> Value:
    """Mean squared cosine of the principal angles between the leading eigenspaces.

    By magnitude of the eigenvalues; the dimension ``k`` is ``eigenspace_k``. Two random subspaces
    have ``k / P``.
    """
    count = measures.leading_count(pair.reference)
    ours = measures.leading(pair.reference)[1]
    values, vectors, _ = measures.leading(pair.approximation)
    if measures.gap(values, count, pair.size) <= 0:
        raise NotDefinedError(
            f"Eigenvalues {count} and {count + 1} of the {pair.approximation.name} coincide: its "
            f"leading space of dimension {count} is not unique."
        )
    cosines = ours[:, :count].mT @ vectors[:, :count].to(ours.device)
    slack = measures.turned(pair.reference, count) + measures.turned(pair.approximation, count)
    method = "estimated" if slack else pair.method
    return Value(float(cosines.square().sum()) / count, slack, method)


@metric("dimension of the eigenspaces")
def eigenspace_k(pair: Pair) -> Value:
    """The ``k`` of ``eigenspace_overlap``: up to 10, where the reference's spectrum has a gap."""
    count = measures.leading_count(pair.reference)
    iterated = bool(measures.leading(pair.reference)[2].any())
    return Value(float(count), 0.0, "estimated" if iterated else pair.method)


@metric("condition number")
def condition_number(pair: Pair) -> Value:
    """Condition number of the approximation under its damping; infinite if singular."""
    return pair.approximation.condition(pair.own_damping)


@metric("condition number of the reference")
def reference_condition_number(pair: Pair) -> Value:
    """Condition number of the reference under the same damping; infinite if singular."""
    return pair.reference.condition(pair.damping)


@metric("distance of spectra", better="low")
def spectrum_distance(pair: Pair) -> Value:
    """``||l(R) - l(B)||_2 / ||l(R)||_2`` of the sorted eigenvalues.

    Never more than the relative error (Hoffman and Wielandt 1953): the part of it that no change
    of eigenvectors could mend.
    """
    measures.need_nonzero(pair.reference)
    return measures.spectra(pair, lambda ours, theirs: float((ours - theirs).norm() / ours.norm()))


@metric("Wasserstein distance of spectra", better="low")
def spectrum_wasserstein(pair: Pair) -> Value:
    """Mean ``|l_i(R) - l_i(B)|`` over the mean ``|l_i(R)|``, sorted: relative 1-Wasserstein."""
    measures.need_nonzero(pair.reference)
    return measures.spectra(
        pair, lambda ours, theirs: float((ours - theirs).abs().sum() / ours.abs().sum())
    )


# -- steps ---------------------------------------------------------------------------------------


@metric("angle of the steps (degrees)", better="low")
def step_angle(pair: Pair) -> Value:
    """Angle between ``(R + damping I)^-1 g`` and ``(B + damping I)^-1 g`` in degrees."""
    ours, slack = pair.reference.solve(pair.gradient, pair.damping)
    theirs, more = measures.step(pair)
    slack += more
    ours, theirs = ours / ours.norm(), theirs / theirs.norm()
    # accurate for small angles, where the arc cosine is not (Kahan)
    angle = 2 * math.atan2(float((ours - theirs).norm()), float((ours + theirs).norm()))
    return Value(math.degrees(angle), math.degrees(slack), measures.solved(pair, slack))


@metric("predicted decrease")
def predicted_decrease(pair: Pair) -> Value:
    """``g^T (B + damping I)^-1 g / 2``: what the approximation's own quadratic model promises."""
    return measures.predicted(pair)


@metric("actual decrease")
def actual_decrease(pair: Pair) -> Value:
    """Decrease of the reference's damped quadratic model along ``s = -(B + damping I)^-1 g``.

    ``-g^T s - s^T (R + damping I) s / 2``; negative where the step goes too far.
    """
    return measures.actual(pair)


@metric("actual over predicted decrease", better="one")
def decrease_ratio(pair: Pair) -> Value:
    """``actual_decrease / predicted_decrease``: 1 where the model is right along its step."""
    predicted, actual = measures.predicted(pair), measures.actual(pair)
    if not predicted.value:
        raise NotDefinedError("The predicted decrease is zero.")
    return Value(
        actual.value / predicted.value, actual.stderr / abs(predicted.value), actual.method
    )


@metric("share of the possible decrease", better="high")
def step_efficiency(pair: Pair) -> Value:
    """``actual_decrease`` over ``g^T (R + damping I)^-1 g / 2``, the most that is possible."""
    measures.need_definite(pair.reference, pair.damping)
    best, slack = pair.reference.solve(pair.gradient, pair.damping)
    most = 0.5 * float(pair.gradient @ best)
    value = measures.actual(pair).value / most
    return Value(value, abs(value) * slack, measures.solved(pair, slack))


@metric("log-determinant divergence", better="low")
def stein_divergence(pair: Pair) -> Value:
    """``tr(R' B'^-1) - log det(R' B'^-1) - P`` of the damped matrices ``R'`` and ``B'``.

    Stein's loss: twice the Kullback-Leibler divergence of N(0, R') from N(0, B'). Both matrices
    must be positive definite.
    """
    ours = pair.reference.logdet(pair.damping)
    theirs = pair.approximation.logdet(pair.own_damping)
    inverse = pair.approximation.inverse(pair.own_damping)
    overlap = measures.inner_with(pair, inverse)
    shift = pair.damping * inverse.trace() - pair.size
    found = total((overlap, 0.0), (-ours[0], ours[1]), theirs, (shift, 0.0))
    method = "estimated" if found.stderr else pair.method
    return Value(max(found.value, 0.0), found.stderr, method)
