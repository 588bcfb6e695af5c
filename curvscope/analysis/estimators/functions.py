"""Traces of functions of a matrix: log-determinant and effective dimension."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import NotDefinedError, OptionError, check_count, check_option, check_seed
from ...operators import Operator
from ..coerce import in_float64
from ..result import Cost, as_cpu
from .checkpoint import Keeper
from .common import (
    Meter,
    check_budget,
    check_confidence,
    check_tol,
    decomposable,
    matrix_of,
    title,
)
from .estimate import Estimate
from .sampling import Sampled, mean_of, sample_until
from .slq import Quadrature, quadrature, together, with_node
from .trace import estimate_of

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

_BUDGET = 2000
_STEPS = 100
_EVERY = 5
_SHARE = 0.1  # of the tolerance, which the change by further steps may take for two probes
_BIAS = 0.25  # and for all of them


def logdet(
    op: Operator | Tensor | np.ndarray | LinearOperator,
    *,
    damping: float = 0.0,
    method: str = "auto",
    tol: float = 0.02,
    budget: int = _BUDGET,
    steps: int = _STEPS,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The natural logarithm of the determinant of ``A + damping I``, with its standard error.

    By stochastic Lanczos quadrature: ``P`` times the mean over random signs of the Gauss
    quadrature of ``log(x + damping)``. The number of Lanczos steps (at most ``steps``) is where
    five more change nothing that matters beside ``tol``; if that is not reached, ``converged`` is
    ``False``, and the interval is wider on either side by what the last steps have changed. It
    stops when the interval at ``confidence`` is without that no wider than ``tol`` of the value on
    either side, or after ``budget`` products. ``method`` is ``"exact"`` (all eigenvalues),
    ``"slq"``, or ``"auto"``: exact where the structure gives the eigenvalues. ``seed`` gives the
    probes.

    Cost: the products it reports. Raises ``NotDefinedError`` where ``A + damping I`` has an
    eigenvalue that is not positive, with the damping that it needs, ``OptionError`` for a matrix
    that is not symmetric, a negative damping, and a budget below 30, ``NonFiniteError`` for
    products that are not finite.

    Source: Ubaru, Chen and Saad, "Fast estimation of tr f(A) via stochastic Lanczos quadrature"
    (SIAM J. Matrix Anal. 38, 2017).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    >>> round(cs.logdet(matrix).value, 4)  # log 8
    2.0794
    """
    op = matrix_of(op)
    shift = _damping(damping)

    def function(nodes: Tensor) -> Tensor:
        return (nodes + shift).log()

    return _spectral_sum(
        op,
        "log-determinant" + (f" with damping {shift:g}" if shift else ""),
        function,
        lambda exact: exact.logdet(shift),
        shift,
        method=method,
        tol=tol,
        budget=budget,
        steps=steps,
        confidence=confidence,
        seed=seed,
    )


def effective_dimension(
    op: Operator | Tensor | np.ndarray | LinearOperator,
    *,
    damping: float,
    method: str = "auto",
    tol: float = 0.02,
    budget: int = _BUDGET,
    steps: int = _STEPS,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """How many directions the matrix determines against ``damping``: ``tr A (A + damping I)^-1``.

    The number of eigenvalues far above ``damping`` plus shares of those near it, for a matrix
    without eigenvalues at or below ``-damping``. Lanczos steps that have not reached eigenvalues
    below ``damping`` overestimate it; a lower bound by Gauss-Radau quadrature says by how much at
    most, and counts as the change by the last steps does in :func:`logdet`. ``method``, ``tol``,
    ``budget``, ``steps``, ``confidence`` and ``seed`` are those of :func:`logdet`.

    Cost: the products it reports. Raises ``NotDefinedError`` where ``A + damping I`` has an
    eigenvalue that is not positive, ``OptionError`` for a matrix that is not symmetric, a damping
    that is not positive, and a budget below 30, ``NonFiniteError`` for products that are not
    finite.

    Source: MacKay, "Bayesian interpolation", 1992 (eq. 4.9); quadrature as in :func:`logdet`.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    >>> round(cs.effective_dimension(matrix, damping=1.0).value, 4)  # 4/5 + 2/3 + 1/2
    1.9667
    """
    op = matrix_of(op)
    shift = _damping(damping)
    if not shift:
        raise OptionError("damping=0 makes the effective dimension the rank; pass a positive one.")

    def function(nodes: Tensor) -> Tensor:
        return nodes / (nodes + shift)

    def exact(known: Operator) -> float:
        values = as_cpu(known.eigenvalues())
        _require_positive(known, values, shift)
        return math.fsum(function(values).tolist())

    return _spectral_sum(
        op,
        f"effective dimension with damping {shift:g}",
        function,
        exact,
        shift,
        method=method,
        tol=tol,
        budget=budget,
        steps=steps,
        confidence=confidence,
        seed=seed,
        most=float(op.shape[0]),
        bounded=True,
    )


def _damping(damping: float) -> float:
    if not (isinstance(damping, Real) and math.isfinite(damping) and damping >= 0):
        raise OptionError(f"damping={damping!r} must be a finite number of at least 0.")
    return float(damping)


def _require_positive(op: Operator, nodes: Tensor, damping: float) -> None:
    """Refuse a matrix that has a Ritz value, and so an eigenvalue, at or below ``-damping``."""
    least, scale = float(nodes.min()), float(nodes.abs().max())
    noise = 20 * torch.finfo(op.dtype).eps * scale
    if op.positive_semidefinite and damping > 0 and least > -noise:
        return
    if least + damping <= noise:
        kind = "indefinite" if least + damping < -noise else "singular to working precision"
        raise NotDefinedError(
            f"The {title(op)} with damping {damping:g} is {kind}: it has an eigenvalue of at most "
            f"{least:.3g}. A damping above {max(-least, 0.0) + noise:.3g} makes it positive "
            "definite as far as was seen."
        )


def _spectral_sum(
    op: Operator,
    quantity: str,
    function: Callable[[Tensor], Tensor],
    exact: Callable[[Operator], float],
    damping: float,
    *,
    method: str,
    tol: float,
    budget: int,
    steps: int,
    confidence: float,
    seed: int,
    most: float = math.inf,
    bounded: bool = False,
) -> Estimate:
    begun = time.perf_counter()
    check_option("method", method, ("auto", "slq", "exact"))
    tol, confidence, seed = check_tol(tol), check_confidence(confidence), check_seed(seed)
    steps = check_count("steps", steps, 2)
    if method == "auto":
        method = "exact" if decomposable(op) else "slq"
    settings = {"damping": damping, "method": method, "seed": seed, "tol": tol, "budget": budget}
    settings |= {"steps": steps, "confidence": confidence}
    meter = Meter(op)
    warnings: tuple[str, ...] = ()
    if method == "exact":
        value = exact(in_float64(op))
        found = Sampled(torch.zeros(0), value, 0.0, True, "All eigenvalues are known.")
    else:
        budget = check_budget(budget, 30, "stochastic Lanczos quadrature")
        found, change = _sampled(
            meter, function, damping, tol, budget, steps, confidence, seed, quantity, bounded
        )
        if change > _BIAS * tol * abs(found.value):
            warnings = (
                f"The Lanczos steps allowed were not enough: the value may change by {change:.2g} "
                "with more; pass a larger steps= or budget=, or a larger damping=.",
            )
            found = replace(found, converged=False)
        found = replace(found, bias=change)
    return estimate_of(
        op,
        quantity,
        found,
        method=method,
        confidence=confidence,
        cost=Cost(meter.used, time.perf_counter() - begun),
        settings=settings,
        most=most,
        warnings=warnings,
    )


def _sampled(
    meter: Meter,
    function: Callable[[Tensor], Tensor],
    damping: float,
    tol: float,
    budget: int,
    steps: int,
    confidence: float,
    seed: int,
    label: str,
    bounded: bool,
) -> tuple[Sampled, float]:
    """The estimate, and by how much the last Lanczos steps have changed it.

    ``bounded``: or how far it is from its bound on the other side, by Gauss-Radau quadrature. Of a
    function that is flat above ``damping`` steps change nothing before they reach the eigenvalues
    down there.
    """
    op, size = meter.op, meter.size
    noise = 20 * torch.finfo(op.dtype).eps
    changes: list[Tensor] = []
    gaps: list[Tensor] = []

    def values(found: Quadrature) -> Tensor:
        nodes = found.nodes
        if op.positive_semidefinite:
            floor = -noise * nodes.abs().amax()
            nodes = torch.where((nodes < 0) & (nodes > floor), 0.0, nodes)
        used = found.weights > 0
        _require_positive(op, nodes[used], damping)
        terms = torch.where(used, function(torch.where(used, nodes, 1.0)), 0.0)
        return size * (terms * found.weights).sum(1)

    def gap(found: Quadrature) -> Tensor:
        """From the Gauss to the Gauss-Radau quadrature ``[probes]``; zero where there is none."""
        nodes = found.nodes[found.weights > 0]
        least, rounding = float(nodes.min()), noise * float(nodes.abs().max())
        node = min(0.0, 1.02 * least) - rounding
        if not bounded or node + damping <= rounding:
            return torch.zeros(len(found.nodes))
        other = with_node(found, node)
        low = size * (function(other.nodes.clamp_min(node)) * other.weights).sum(1)
        return (values(found) - low).abs()

    def watched(start: int, count: int, most: int, stop: bool) -> tuple[Tensor, int]:
        """Values per probe; what the last steps have changed goes into ``changes``."""
        seen: list[tuple[int, Tensor]] = [(0, torch.full((count,), math.inf))]
        every = min(_EVERY, max(1, most // 2))

        def enough(found: Quadrature) -> bool:
            seen.append((found.nodes.shape[1], values(found)))
            change = float((seen[-1][1] - seen[-2][1]).abs().mean())
            change = max(change, float(gap(found).mean())) if stop else change
            return stop and change <= _SHARE * tol * float(seen[-1][1].mean().abs())

        found = quadrature(meter, seed, start, count, most, enough=enough, every=every, label=label)
        final, taken = values(found), found.nodes.shape[1]
        before = [v for place, v in seen if place < taken][-1]
        complete = found.ended or taken >= size
        changes.append(torch.zeros(count) if complete else final - before)
        gaps.append(torch.zeros(count) if complete else gap(found))
        return final, taken

    # two probes tell how many steps are enough; all others then take some more
    _, taken = watched(0, 2, max(2, min(steps, size, budget // 6)), True)
    steps = min(steps, size, taken + _EVERY, max(2, budget // 6))
    changes.clear()
    gaps.clear()
    found = sample_until(
        lambda start, count: watched(start, count, steps, False)[0],
        mean_of,
        most=(budget - meter.used) // steps,
        tol=tol,
        confidence=confidence,
        block=min(8, together(meter, steps)),
        keeper=Keeper(None, meter, {}),
        meter=meter,
        label=label,
    )
    change = float(torch.cat(changes).mean().abs())
    return found, max(change, float(torch.cat(gaps).mean()))
