"""The condition number of a damped matrix."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import NotDefinedError, check_option, check_seed
from ...operators import Operator
from ..coerce import in_float64
from ..result import Cost, as_cpu
from ..spectrum import condition_of
from .beside import bounds
from .checkpoint import Keeper
from .common import (
    Meter,
    check_budget,
    check_confidence,
    check_tol,
    decomposable,
    matrix_of,
    normals,
)
from .common import title as title_of
from .eigsh import solve
from .estimate import Estimate
from .functions import _damping
from .krylov import Krylov, Ritz

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator


def condition_number(
    op: Operator | Tensor | np.ndarray | LinearOperator,
    *,
    damping: float = 0.0,
    method: str = "auto",
    tol: float = 0.01,
    budget: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Largest over smallest magnitude of the eigenvalues of ``A + damping I``.

    By products it is defined here for positive definite matrices, whose smallest magnitude lies at
    an end of the spectrum: both ends come from one Lanczos iteration. ``low`` and ``value`` are
    lower bounds (Ritz values lie inside the spectrum); ``high`` is exceeded with a probability
    below ``1 - confidence`` over the random start from ``seed``. It stops when ``high`` is at most
    ``tol`` above ``value``, or after ``budget`` products. Where the matrix is positive
    semi-definite by construction, ``damping`` bounds its smallest eigenvalue too. ``method`` is
    ``"exact"`` (all eigenvalues, of any matrix), ``"lanczos"``, or ``"auto"``: exact where the
    structure gives the eigenvalues.

    Cost: the products it reports, about the root of the condition number times a logarithm.
    Raises ``NotDefinedError`` by products where ``A + damping I`` has an eigenvalue that is not
    positive, ``OptionError`` for a matrix that is not symmetric, a negative damping and a budget
    below 3, ``NonFiniteError`` for products that are not finite.

    Source: Golub and Van Loan, "Matrix Computations", 2.6.2; bounds as in
    :func:`norm`.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    >>> round(cs.condition_number(matrix, damping=1.0).value, 4)  # 5/2
    2.5
    """
    begun = time.perf_counter()
    op = matrix_of(op)
    shift, tol, seed = _damping(damping), check_tol(tol), check_seed(seed)
    confidence = check_confidence(confidence)
    check_option("method", method, ("auto", "lanczos", "exact"))
    if method == "auto":
        method = "exact" if decomposable(op) else "lanczos"
    quantity = "condition number" + (f" with damping {shift:g}" if shift else "")
    settings = {"damping": shift, "method": method, "tol": tol, "budget": budget, "seed": seed}
    settings["confidence"] = confidence
    if method == "exact":
        values = as_cpu(in_float64(op).eigenvalues())
        noise = len(values) * torch.finfo(op.dtype).eps * float(values.abs().max())
        value = condition_of(values, shift, noise)
        return Estimate(
            of=title_of(op),
            size=op.shape[0],
            method="exact",
            quantity=quantity,
            value=value,
            low=value,
            high=value,
            cost=Cost(seconds=time.perf_counter() - begun),
            settings=settings,
            reason="All eigenvalues are known.",
        )
    budget = check_budget(budget, min(3, op.shape[0]), "both ends of the spectrum")
    meter = Meter(op.damped(shift))
    least = shift if op.positive_semidefinite else 0.0

    def upper(chain: list[tuple[float, float]] | None) -> float:
        low, high = bounds(chain or [], op.shape[0], confidence)
        return high / max(low, least) if max(low, least) > 0 else math.inf

    def settled(krylov: Krylov, pairs: Ritz) -> bool:
        low = max(float(pairs.values[-1]), least)
        return low <= 0 or upper(krylov.chain) <= (1 + tol) * float(pairs.values[0]) / low

    found = solve(
        meter,
        normals(meter.op, seed, 0, 1, stream=2),
        min(2, op.shape[0]),
        which="BE",
        tol=0.1,
        most=budget,
        keeper=Keeper(None, meter, {}),
        seed=seed,
        slack=0.0,
        copies=False,
        settled=settled,
    )
    high, low = float(found.values[0]), float(found.values[-1])
    noise = 50 * torch.finfo(op.dtype).eps * abs(high)
    if op.positive_semidefinite and shift > 0:
        low = max(low, shift)  # below it there is only rounding
    elif low <= noise:
        kind = "indefinite" if low < -noise else "singular to working precision"
        raise NotDefinedError(
            f"The {title_of(op)} with damping {shift:g} is {kind}: it has an eigenvalue of at most "
            f"{low - shift:.3g}. Pass a damping above {max(shift - low, 0) + noise:.3g}, or "
            "method='exact', which finds the smallest magnitude of an indefinite matrix."
        )
    value, most = high / low, upper(found.chain)
    good = most <= (1 + tol) * value
    warnings: tuple[str, ...] = ()
    if not good:
        warnings = (
            f"The condition number has not converged to tol={tol:g}: it may be larger. Pass a "
            "larger budget= or damping=.",
        )
    return Estimate(
        of=title_of(op),
        size=op.shape[0],
        method="lanczos",
        quantity=quantity,
        value=value,
        low=value,
        high=max(value, most),
        confidence=confidence,
        converged=good,
        reason="It stopped as the interval is short enough." if good else found.reason,
        warnings=warnings,
        cost=Cost(meter.used, time.perf_counter() - begun),
        settings=settings,
    )
