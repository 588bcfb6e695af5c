"""The trace of a matrix from its products: Hutchinson, Hutch++, XTrace."""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import check_option, check_seed
from ...operators import Operator
from ..result import Cost
from .checkpoint import Keeper
from .common import (
    Meter,
    check_budget,
    check_confidence,
    check_tol,
    column_dots,
    diagonal_known,
    matrix_of,
    quantile,
    signs,
    title,
)
from .estimate import Estimate
from .leave_one_out import FEW, LeaveOneOut, leave_one_out
from .sampling import Sampled, mean_of, sample_until

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

BUDGET = 512
_SKETCH = 32  # columns of the sketch of Hutch++ at most, unless the budget allows a third
_NEEDS = {"hutchinson": 2, "hutch++": 6, "xtrace": 8, "exact": 1}


def trace(
    op: Operator | Tensor | np.ndarray | LinearOperator,
    *,
    method: str = "auto",
    tol: float = 0.05,
    budget: int = BUDGET,
    confidence: float = 0.95,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """The sum of the diagonal (of the eigenvalues), with its standard error.

    ``method``: ``"hutchinson"`` averages ``z^T A z`` over random signs ``z``; ``"hutch++"`` takes
    the trace within a random subspace exactly and averages beside it, better for spectra that
    decay; ``"xtrace"`` leaves one probe out at a time, the best where a few hundred eigenvalues
    hold the trace; ``"exact"`` sums the diagonal that the operator gives (for a Hessian block by
    block, which may need memory); ``"auto"`` is exact for stored matrices and those
    whose blocks have been computed before, and ``"hutchinson"`` otherwise.

    It stops when the interval at ``confidence`` (Student's t) is no wider than ``tol`` of the value
    on either side, looked at a few times only, or after ``budget`` products. The standard error is
    that of the mean over probes; for Hutch++ given its subspace, for XTrace with the covariance of
    its leave-one-out values, estimated by leaving out two. ``seed`` gives the probes, the same on
    every device. ``checkpoint`` names a file from which the same call goes on after an
    interruption, with the same result; it takes one more product.

    Cost: the products it reports; a relative error of ``e`` takes about ``2 (|A|_F / (e tr A))^2``
    of them by Hutchinson. Raises ``OptionError`` for a matrix that is not symmetric and a budget
    too small for the method, ``NonFiniteError`` for products that are not finite, ``DataError`` for
    a checkpoint of another computation.

    Source: Hutchinson 1990; Meyer, Musco, Musco and Woodruff, "Hutch++", 2021 (arXiv 2010.09649);
    Epperly, Tropp and Webber, "XTrace", 2024 (arXiv 2301.07825).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    >>> found = cs.trace(matrix)
    >>> found.value, found.stderr, found.exact
    (7.0, 0.0, True)
    >>> rough = cs.trace(matrix, method="hutchinson", budget=20)
    >>> rough.low <= 7.0 <= rough.high
    True
    """
    begun = time.perf_counter()
    op = matrix_of(op)
    check_option("method", method, ("auto", "hutchinson", "hutch++", "xtrace", "exact"))
    tol, confidence, seed = check_tol(tol), check_confidence(confidence), check_seed(seed)
    if method == "auto":
        method = "exact" if diagonal_known(op) else "hutchinson"
    few = method == "xtrace" and op.shape[0] <= FEW
    budget = check_budget(budget, op.shape[0] if few else _NEEDS[method], f"method={method!r}")
    settings = {"method": method, "seed": seed}
    meter = Meter(op)
    if method == "exact":
        value = float(op.trace())
        found = Sampled(torch.zeros(0), value, 0.0, True, "The diagonal is known.")
    else:
        keeper = Keeper(checkpoint, meter, settings)
        with keeper.kept():
            run = {"hutchinson": _hutchinson, "hutch++": _hutch_plus, "xtrace": _xtrace}[method]
            found = run(meter, tol, budget, confidence, seed, keeper)
    return estimate_of(
        op,
        "trace",
        found,
        method=method,
        confidence=confidence,
        cost=Cost(meter.used, time.perf_counter() - begun),
        settings={**settings, "tol": tol, "budget": budget, "confidence": confidence},
    )


def estimate_of(
    op: Operator,
    quantity: str,
    found: Sampled,
    *,
    method: str,
    confidence: float,
    cost: Cost,
    settings: dict[str, object],
    least: float = -math.inf,
    most: float = math.inf,
    warnings: tuple[str, ...] = (),
) -> Estimate:
    """The result of sampling, its interval cut to what is possible at all."""
    half = 0.0
    if found.stderr:
        freedom = found.freedom or max(1, found.samples.shape[0] - 1)
        half = quantile(confidence, freedom) * found.stderr
    half += found.bias
    if not found.converged:
        warnings = (*warnings, f"The {quantity} has not converged to tol={settings['tol']:g}.")
    return Estimate(
        of=title(op),
        size=op.shape[0],
        method=method,
        reason=found.reason,
        quantity=quantity,
        value=found.value,
        stderr=found.stderr,
        low=min(found.value, max(least, found.value - half)),
        high=max(found.value, min(most, found.value + half)),
        confidence=confidence,
        samples=found.samples if found.samples.ndim == 1 else found.samples[:, 0],
        converged=found.converged,
        cost=cost,
        settings=settings,
        warnings=warnings,
    )


def _hutchinson(
    meter: Meter, tol: float, budget: int, confidence: float, seed: int, keeper: Keeper
) -> Sampled:
    def draw(start: int, count: int) -> Tensor:
        probes = signs(meter.op, seed, start, count)
        return column_dots(probes, meter(probes))

    return sample_until(
        draw,
        mean_of,
        most=budget,
        tol=tol,
        confidence=confidence,
        block=meter.columns(),
        keeper=keeper,
        meter=meter,
        label=f"Trace of the {title(meter.op)}",
    )


def _hutch_plus(
    meter: Meter, tol: float, budget: int, confidence: float, seed: int, keeper: Keeper
) -> Sampled:
    size = meter.size
    rank = min(budget // 3, _SKETCH if budget <= 6 * _SKETCH else budget // 6, size)
    state = keeper.load()
    if state is None:
        sketch = multiply(meter, signs(meter.op, seed, 0, rank, stream=5))
        basis = torch.linalg.qr(sketch)[0]
        inside = float(column_dots(basis, multiply(meter, basis)).sum())
    else:
        basis, inside = state["basis"].to(meter.op.device), state["inside"]
        meter.used = state["used"]
    if rank == size:
        return Sampled(torch.zeros(0), inside, 0.0, True, "Its subspace is the whole space.")
    keeper.hold(samples=torch.zeros(0), basis=basis, inside=inside, used=meter.used)

    def draw(start: int, count: int) -> Tensor:
        probes = signs(meter.op, seed, start, count)
        probes = probes - basis @ (basis.mT @ probes)
        probes -= basis @ (basis.mT @ probes)
        return inside + column_dots(probes, meter(probes))

    return sample_until(
        draw,
        mean_of,
        most=budget - 2 * rank,
        tol=tol,
        confidence=confidence,
        block=meter.columns(),
        keeper=keeper,
        meter=meter,
        label=f"Trace of the {title(meter.op)}",
        extra={"basis": basis, "inside": inside},
    )


def _xtrace(
    meter: Meter, tol: float, budget: int, confidence: float, seed: int, keeper: Keeper
) -> Sampled:
    if meter.size <= FEW:
        value = float(meter(torch.eye(meter.size).to(meter.op.device, meter.op.dtype)).trace())
        reason = "Its rows are few enough to multiply every unit vector."
        return Sampled(torch.zeros(0), value, 0.0, True, reason)

    def interval(parts: LeaveOneOut) -> tuple[float, float]:
        values, stderr = parts.traces()
        return float(values.mean()), quantile(confidence, parts.freedom) * stderr

    parts = leave_one_out(
        meter,
        interval,
        most=min(budget // 2, meter.size),
        tol=tol,
        seed=seed,
        keeper=keeper,
        label=f"Trace of the {title(meter.op)}",
    )
    values, stderr = parts.traces()
    value = float(values.mean())
    good = interval(parts)[1] <= tol * abs(value)
    reason = why(good, tol, f"{parts.count} probes")
    return Sampled(values, value, stderr, good, reason, parts.freedom)


def why(good: bool, tol: float, spent: str) -> str:
    """The sentence of methods that double their probes."""
    if good:
        return f"It stopped as the interval's half width is below {tol:g} of the value."
    return f"It stopped as the budget is spent; {spent} do not reach tol={tol:g}."


def multiply(meter: Meter, vectors: Tensor) -> Tensor:
    """Products with many columns, some at a time."""
    parts = vectors.split(meter.columns(), dim=1)
    return torch.cat([meter(part) for part in parts], 1)
