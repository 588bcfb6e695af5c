"""What several metrics need: steps, diagonals, eigenspaces, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ..errors import NotDefinedError
from .facts import Facts, TooLargeError
from .pairs import Pair, Value
from .spectrum import condition_of
from .structure import as_numpy

_LEADING = 10  # eigenvectors compared
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
        raise NotDefinedError(
            f"The {facts.name} with damping {damping:g} is indefinite (smallest eigenvalue "
            f"{float(facts.eigenvalues[0]):.3g}), so its model has no minimum."
        )


def affordable(pair: Pair) -> None:
    """Refuse matrices that are large and known by their products only."""
    for facts in (pair.reference, pair.approximation):
        if not facts.known:
            raise facts.too_large("The leading spectrum", "Use cs.eigsh(op, k).")


def trace(facts: Facts, pair: Pair) -> Value:
    """Trace, of a large reference estimated with the probes."""
    try:
        return Value(facts.trace, 0.0, facts.method)
    except TooLargeError:
        if facts is not pair.reference:
            raise
        return pair.probes.trace


def diagonals(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Both diagonals; refuses a constant one, whose correlations are not defined."""
    found = []
    for facts in (pair.reference, pair.approximation):
        diagonal = as_numpy(facts.diagonal)
        spread = float(np.ptp(diagonal)) if diagonal.size else 0.0
        if spread <= _CONSTANT * float(np.abs(diagonal).max(initial=0.0)):
            raise NotDefinedError(f"The diagonal of the {facts.name} is constant.")
        found.append(diagonal)
    return found[0], found[1]


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


def leading(facts: Facts) -> tuple[Tensor, Tensor, float]:
    """Leading eigenpairs, one more than are compared, and their residual."""
    return facts.leading(min(_LEADING + 1, facts.size))


def leading_count(reference: Facts) -> int:
    """The largest dimension up to 10 behind which the reference's spectrum has a gap."""
    most = min(_LEADING, max(1, reference.size - 1))
    values = leading(reference)[0]
    for count in range(most, 0, -1):
        if gap(values, count, reference.size) > 0:
            return count
    raise NotDefinedError(f"The leading eigenvalues of the {reference.name} coincide.")


def condition(facts: Facts, damping: float) -> Value:
    """Condition number of a damped matrix."""
    value = condition_of(facts.eigenvalues, damping, facts.tolerance)
    return Value(value, 0.0, facts.method)


def spectra(pair: Pair) -> tuple[Tensor, Tensor]:
    """Eigenvalues of both matrices, ascending."""
    ours, theirs = pair.reference.eigenvalues, pair.approximation.eigenvalues
    return ours.cpu(), theirs.cpu()


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
