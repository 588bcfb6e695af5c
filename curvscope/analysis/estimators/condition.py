"""The condition number of a damped matrix."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import NotDefinedError, check_option
from ...operators import Operator
from ..coerce import in_float64
from ..result import Cost, as_cpu
from ..spectrum import condition_of
from .checkpoint import Keeper
from .common import Meter, check_budget, check_seed, check_tol, decomposable, matrix_of, normals
from .common import title as title_of
from .eigsh import solve
from .estimate import Estimate
from .functions import _damping

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
    seed: int = 0,
) -> Estimate:
    """Largest over smallest magnitude of the eigenvalues of ``A + damping I``.

    By products it is defined here for positive definite matrices, whose smallest magnitude lies at
    an end of the spectrum: both ends come from one Lanczos iteration, up to residuals of ``tol``
    of each, or as far as ``budget`` products go. ``low`` is then a lower bound to rounding (Ritz
    values lie inside the spectrum), and ``high`` is what the residuals allow; where the matrix is
    positive semi-definite by construction, ``damping`` bounds it too. ``method`` is ``"exact"``
    (all eigenvalues, of any matrix), ``"lanczos"``, or ``"auto"``: exact where the structure gives
    the eigenvalues. ``seed`` gives the start.

    Cost: the products it reports, about the root of the condition number times a logarithm.
    Raises ``NotDefinedError`` by products where ``A + damping I`` has an eigenvalue that is not
    positive, ``OptionError`` for a matrix that is not symmetric, a negative damping and a budget
    below 3, ``NonFiniteError`` for products that are not finite.

    Source: Golub and Van Loan, "Matrix Computations", 2.6.2; Lanczos as in :func:`eigsh`.
    """
    begun = time.perf_counter()
    op = matrix_of(op)
    shift, tol, seed = _damping(damping), check_tol(tol), check_seed(seed)
    check_option("method", method, ("auto", "lanczos", "exact"))
    if method == "auto":
        method = "exact" if decomposable(op) else "lanczos"
    quantity = "condition number" + (f" with damping {shift:g}" if shift else "")
    settings = {"damping": shift, "method": method, "tol": tol, "budget": budget, "seed": seed}
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
    check_budget(budget, min(3, op.shape[0]), "both ends of the spectrum")
    meter = Meter(op.damped(shift))
    found = solve(
        meter,
        normals(meter.op, seed, 0, 1, stream=2),
        min(2, op.shape[0]),
        which="BE",
        tol=tol,
        most=budget,
        keeper=Keeper(None, meter, {}),
        seed=seed,
        slack=0.0,
        copies=False,
    )
    high, low = float(found.values[0]), float(found.values[-1])
    up, down = float(found.residuals[0]), float(found.residuals[-1])
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
    value = high / low
    floor = max(low - down, shift if op.positive_semidefinite else 0.0)
    most = (high + up) / floor if floor > 0 else math.inf
    good = most <= (1 + 3 * tol) * value
    warnings = tuple(w for w in found.warnings if "converged" not in w)
    if not good:
        warnings = (
            *warnings,
            f"The smallest eigenvalue has not converged: it is at most {low:.3g}, with a residual "
            f"of {down:.2g}, so the condition number may be larger. Pass a larger budget=.",
        )
    return Estimate(
        of=title_of(op),
        size=op.shape[0],
        method="lanczos",
        quantity=quantity,
        value=value,
        low=value,
        high=most,
        converged=good,
        reason=found.reason,
        warnings=warnings,
        cost=Cost(meter.used, time.perf_counter() - begun),
        settings=settings,
    )
