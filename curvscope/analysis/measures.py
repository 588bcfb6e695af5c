"""What several metrics need: steps, diagonals, eigenspaces, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import NotDefinedError
from ..operators import Operator
from .facts import Facts, TooLargeError
from .pairs import Pair
from .probes import sampling_error
from .quantity import Quantity, Value, jackknife, less_noisy, product_of_means
from .structure import as_numpy
from .unformed import of_spectra

_LEADING = 10  # eigenvectors compared
_VISIBLE = 3.0  # standard errors that a divisor must be away from zero
_CONSTANT = 1e-12  # relative spread of a diagonal that is all one number


def relative(rr: float, rb: float, bb: float, gap: float) -> float:
    """``||R - B|| / ||R||`` from the squared distance."""
    return math.sqrt(gap / rr) if rr else math.nan


def rescaled(rr: float, rb: float, bb: float, gap: float) -> float:
    """``sqrt(1 - cos^2)`` from the moments."""
    if not rr:
        return math.nan
    return math.sqrt(max(1.0 - (rb * rb / (rr * bb) if bb else 0.0), 0.0))


def norm(facts: Facts) -> float:
    """Frobenius norm, 0 where it is not known."""
    return math.sqrt(facts.norm2) if facts.known else 0.0


def need_nonzero(facts: Facts) -> None:
    """Refuse the zero matrix."""
    if facts.known and not facts.norm2:
        raise NotDefinedError(f"The {facts.name} is zero here.")


def need_definite(facts: Facts, damping: float) -> None:
    """Refuse a model without a minimum; large matrices are judged by conjugate gradients."""
    if facts.small and float(facts.eigenvalues[0]) + damping < -facts.tolerance:
        least = float(facts.eigenvalues[0])
        raise NotDefinedError(
            f"The {facts.name} with damping {damping:g} is indefinite (smallest eigenvalue "
            f"{least:.3g}), so its model has no minimum; a damping above {-least:.3g} gives it one."
        )


def trace_ratio(pair: Pair) -> Value:
    """``tr B / tr R``, of matrices known by products from the same probes."""
    below, above = pair.reference.traces, pair.approximation.traces
    found = jackknife(lambda r: r, below, method=pair.method)
    floor = 1e-14 * math.sqrt(pair.size) * norm(pair.reference)
    if abs(found.value) <= max(floor, _VISIBLE * found.stderr):
        shown = f" within its error ({found.value:.3g} ± {found.stderr:.2g})" * bool(found.stderr)
        raise NotDefinedError(f"The trace of the {pair.reference.name} is zero{shown}.")

    def divided(r: float, b: float) -> float:
        return b / r if r else math.nan

    def ratio(numerator: Quantity) -> Value:
        return jackknife(divided, below, numerator, method=pair.method)

    if isinstance(below, Tensor) and not isinstance(above, Tensor):
        return less_noisy(ratio(above), ratio(pair.sampled_traces))  # noise that both share cancels
    return ratio(above)


def diagonals(pair: Pair) -> tuple[np.ndarray, np.ndarray] | None:
    """Both diagonals, ``None`` if one has to be estimated; refuses a constant one."""
    found = []
    for facts in (pair.reference, pair.approximation):
        try:
            diagonal = as_numpy(facts.diagonal)
        except TooLargeError:
            continue
        require_spread(facts, diagonal)
        found.append(diagonal)
    return (found[0], found[1]) if len(found) == 2 else None


def require_spread(facts: Facts, diagonal: np.ndarray) -> None:
    """Refuse a constant diagonal, whose correlations are not defined."""
    spread = float(np.ptp(diagonal)) if diagonal.size else 0.0
    if spread <= _CONSTANT * float(np.abs(diagonal).max(initial=0.0)):
        raise NotDefinedError(f"The diagonal of the {facts.name} is constant.")


def estimated_correlation(pair: Pair) -> Value:
    """Pearson correlation of diagonals of which one at least is known by samples only.

    Variances and covariance are estimated without the bias that the noise of the samples has, so
    that noise does not make the correlation smaller.
    """
    size, parts = pair.size, []
    for facts in (pair.reference, pair.approximation):
        parts += [facts.diagonal_energy, facts.squared_trace]
    left, right = pair.reference.traces, pair.approximation.traces
    overlap = _overlap(pair)
    both: Quantity
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        ours, theirs = left.sum(), right.sum()
        both = product_of_means(float(ours * theirs), left * theirs, right * ours, left * right)
    else:
        both = left * right

    def correlation(rr: float, r2: float, bb: float, b2: float, rb: float, tt: float) -> float:
        spread = (rr - r2 / size) * (bb - b2 / size)
        return (rb - tt / size) / math.sqrt(spread) if spread > 0 and rr > r2 / size else math.nan

    found = jackknife(correlation, *parts, overlap, both)
    if math.isnan(found.value):
        raise NotDefinedError(
            f"The diagonal of the {pair.reference.name} is lost in the noise of "
            f"{pair.probes.count} probes. Raise budget= and set tol=."
        )
    return Value(min(1.0, max(-1.0, found.value)), found.stderr, "estimated")


def _overlap(pair: Pair) -> Quantity:
    """Inner product of the diagonals."""
    known: list[Tensor | None] = []
    for facts in (pair.reference, pair.approximation):
        try:
            known.append(facts.diagonal)
        except TooLargeError:
            known.append(None)
    left, right = known
    if left is not None and right is not None:
        return float(left @ right.to(left))
    if right is not None:
        return pair.reference.probes.diagonals.dots(right)
    if left is not None:
        return pair.approximation.probes.diagonals.dots(left)
    return pair.reference.probes.diagonals.times(pair.approximation.probes.diagonals)


def estimated_rank_correlation(pair: Pair) -> Value:
    """Spearman correlation over some rows drawn at random, the same for both matrices."""
    sides = []
    for facts in (pair.reference, pair.approximation):
        try:
            diagonal = as_numpy(facts.diagonal)
        except TooLargeError:
            facts.may_iterate()
            diagonal = None
        sides.append(diagonal)
    chosen = (pair.reference if sides[0] is None else pair.approximation).diagonal_rows[0].numpy()
    values = [
        as_numpy(facts.diagonal_rows[1]) if side is None else side[chosen]
        for facts, side in zip((pair.reference, pair.approximation), sides)
    ]
    for facts, diagonal in zip((pair.reference, pair.approximation), values):
        require_spread(facts, diagonal)
    value = pearson(ranks(values[0]), ranks(values[1]))
    count = len(chosen)
    if count == pair.size:
        return Value(value, 0.0, "exact")
    keep = ~np.eye(count, dtype=bool)
    left_out = [pearson(ranks(values[0][k]), ranks(values[1][k])) for k in keep]
    share = count / pair.size
    # where all rows agree in order, "none of n" still leaves about 1 / n of the others, and a row
    # at a random place among n costs 1 / n
    spread = max(sampling_error(left_out, share), (1 - share) / count)
    return Value(value, spread, "estimated")


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 of ``[n]``; equal values get the mean of theirs."""
    _, place, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return np.asarray((count.cumsum() - (count - 1) / 2)[place.reshape(-1)])


def pearson(left: np.ndarray, right: np.ndarray) -> float:
    """Correlation of two vectors that are not constant."""
    left, right = left - left.mean(), right - right.mean()
    value = float(left @ right) / math.sqrt(float(left @ left) * float(right @ right))
    return min(1.0, max(-1.0, value))


def gap(values: Tensor, count: int, size: int) -> float:
    """Gap in magnitude behind the first ``count`` eigenvalues, 0 where it may be rounding."""
    if count >= size:
        return math.inf
    sizes = values.abs()
    if len(sizes) <= count:  # an iteration that has found an invariant subspace, and no more
        return 0.0
    gap = float(sizes[count - 1] - sizes[count])
    noise = max(1e-6 * float(sizes[count - 1]), 1e-9 * float(sizes[0]))
    return gap if gap > noise else 0.0


def leading(facts: Facts) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigenpairs, one more than are compared, and the norms of their residuals."""
    return facts.leading(min(_LEADING + 1, facts.size))


def turned(facts: Facts, count: int) -> float:
    """How far the overlap of the leading space with another may be off (Davis and Kahan)."""
    values, _, residuals = leading(facts)
    size = float(residuals[:count].norm())
    if not size:
        return 0.0
    slack = 2 * size / gap(values, count, facts.size)
    if slack > 1:
        raise TooLargeError(
            f"The leading eigenvectors of the {facts.name} have not converged in "
            f"{facts.limits.products} products. Raise budget=."
        )
    return slack


def leading_count(reference: Facts) -> int:
    """The largest dimension up to 10 behind which the reference's spectrum has a gap."""
    most = min(_LEADING, max(1, reference.size - 1))
    values = leading(reference)[0]
    for count in range(most, 0, -1):
        if gap(values, count, reference.size) > 0:
            return count
    raise NotDefinedError(f"The leading eigenvalues of the {reference.name} coincide.")


def spectra(pair: Pair, function: Callable[[Tensor, Tensor], float]) -> Value:
    """``function`` of the eigenvalues of both matrices, ascending."""
    found = of_spectra(pair.reference, pair.approximation, function)
    return found if found.method == "estimated" else Value(found.value, 0.0, pair.method)


def inner_with(pair: Pair, inverse: Operator) -> Quantity:
    """``<R, B^-1>``, or samples of it."""
    reference = pair.reference
    if reference.small:
        return inverse.inner(reference.formed)
    if reference.structured:
        return inverse.inner(reference.op)
    samples = [(images * (inverse @ vectors)).sum(0) for vectors, images in reference.probes]
    return torch.cat(samples).cpu()


def step(pair: Pair) -> tuple[Tensor, float]:
    """``(B + damping I)^-1 g`` and its relative residual."""
    return pair.approximation.solve(pair.gradient, pair.own_damping)


def predicted(pair: Pair) -> Value:
    """Decrease that the approximation's own model promises."""
    direction, slack = step(pair)
    value = 0.5 * float(pair.gradient @ direction)
    return Value(value, abs(value) * slack, solved(pair, slack))


def actual(pair: Pair) -> Value:
    """Decrease of the reference's model along the approximation's step."""
    direction, slack = step(pair)
    curved = pair.reference_image(direction) + pair.damping * direction
    value = float(pair.gradient @ direction) - 0.5 * float(direction @ curved)
    return Value(value, abs(value) * slack, solved(pair, slack))


def solved(pair: Pair, residual: float) -> str:
    """How a number that needs a linear system was got."""
    return "estimated" if residual else pair.method
