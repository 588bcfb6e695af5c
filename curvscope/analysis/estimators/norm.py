"""Norms of a matrix and the angle between two, from products."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import NotDefinedError, ParameterMismatchError, ShapeError, check_option, check_seed
from ...operators import Operator, inner
from ..coerce import in_float64
from ..result import Cost
from .beside import bounds
from .checkpoint import Keeper
from .common import (
    Meter,
    check_budget,
    check_confidence,
    check_tol,
    column_dots,
    decomposable,
    matrix_of,
    normals,
    signs,
    stored,
    title,
)
from .eigsh import solve
from .estimate import Estimate
from .krylov import Krylov, Ritz
from .sampling import Sampled, mean_of, sample_until
from .trace import estimate_of

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

_BUDGET = 512
_TOL = {"fro": 0.05, "spectral": 1e-3}


def norm(
    op: Operator | Tensor | np.ndarray | LinearOperator,
    kind: str = "fro",
    *,
    method: str = "auto",
    tol: float | None = None,
    budget: int = _BUDGET,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The Frobenius norm (``kind="fro"``) or the spectral norm (``"spectral"``) of a matrix.

    ``norm(A - B)`` never forms either matrix. The squared Frobenius norm is the mean of
    ``|A z|^2`` over random signs ``z``; it stops when the interval at ``confidence`` is no wider
    than ``tol`` (default 0.05) of the value on either side, or after ``budget`` products. The
    spectral norm, the largest magnitude of an eigenvalue, comes from Lanczos iteration: ``value``
    is a lower bound, and ``high`` is exceeded with a probability below ``1 - confidence`` over
    the random start, at most ``tol`` (default 0.001) above it. ``method`` is ``"exact"`` (by
    structure or dense), ``"products"``, or ``"auto"``: exact for stored matrices. ``seed`` gives
    the probes and the start.

    Cost: the products it reports; for a relative error of ``e`` of the Frobenius norm about
    ``1 / (2 r e^2)`` of them, with ``r = |A|_F^4 / |A^2|_F^2`` the effective rank of ``A^2``.
    Raises ``OptionError`` for a matrix that is not symmetric and a budget too small,
    ``NonFiniteError`` for products that are not finite.

    Source: Hutchinson 1990 for ``A^2``; Lanczos as in :func:`eigsh`, its bound by the Christoffel
    function of the start (Golub and Meurant, "Matrices, Moments and Quadrature", 2010).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    >>> cs.norm(matrix, "fro").value == 21**0.5
    True
    >>> round(cs.norm(matrix, "spectral").value, 6)
    4.0
    """
    begun = time.perf_counter()
    op = matrix_of(op)
    check_option("kind", kind, _TOL)
    check_option("method", method, ("auto", "products", "exact"))
    tol = check_tol(_TOL[kind] if tol is None else tol)
    confidence, seed = check_confidence(confidence), check_seed(seed)
    if method == "auto":
        known = stored(op) if kind == "fro" else decomposable(op)
        method = "exact" if known else "products"
    settings = {"kind": kind, "method": method, "seed": seed, "tol": tol, "budget": budget}
    settings["confidence"] = confidence
    name = {"fro": "Frobenius norm", "spectral": "spectral norm"}[kind]
    if method == "exact":
        if kind == "fro":
            value = in_float64(op).frobenius_norm()
        else:
            value = float(in_float64(op).eigenvalues().abs().max())
        found = Sampled(torch.zeros(0), value, 0.0, True, "It follows from the structure.")
        cost = Cost(seconds=time.perf_counter() - begun)
        return estimate_of(
            op, name, found, method="exact", confidence=confidence, cost=cost, settings=settings
        )
    if kind == "spectral":
        return _spectral(op, tol, budget, confidence, seed, settings, begun)
    meter = Meter(op)
    check_budget(budget, 2, "the Frobenius norm")

    def draw(start: int, count: int) -> Tensor:
        images = meter(signs(op, seed, start, count))
        return column_dots(images, images)

    found = sample_until(
        draw,
        _root_of_mean,
        most=budget,
        tol=tol,
        confidence=confidence,
        block=meter.columns(),
        keeper=Keeper(None, meter, {}),
        meter=meter,
        label=f"Norm of the {title(op)}",
    )
    return estimate_of(
        op,
        name,
        found,
        method="hutchinson",
        confidence=confidence,
        cost=Cost(meter.used, time.perf_counter() - begun),
        settings=settings,
        least=0.0,
    )


def _root_of_mean(samples: Tensor) -> tuple[float, float]:
    mean, stderr = mean_of(samples)
    value = math.sqrt(max(mean, 0.0))
    return value, stderr / (2 * value) if value else 0.0


def _spectral(
    op: Operator,
    tol: float,
    budget: int,
    confidence: float,
    seed: int,
    settings: dict[str, object],
    begun: float,
) -> Estimate:
    check_budget(budget, 2, "the spectral norm")
    meter = Meter(op)

    def upper(chain: list[tuple[float, float]] | None) -> float:
        return max(abs(x) for x in bounds(chain or [], op.shape[0], confidence))

    def settled(krylov: Krylov, pairs: Ritz) -> bool:
        return upper(krylov.chain) <= (1 + tol) * float(pairs.values[0].abs())

    found = solve(
        meter,
        normals(op, seed, 0, 1, stream=2),
        1,
        which="LM",
        tol=tol,
        most=budget,
        keeper=Keeper(None, meter, {}),
        seed=seed,
        copies=False,
        settled=settled,
    )
    value, high = float(found.values[0].abs()), upper(found.chain)
    good = high <= (1 + tol) * value or op.shape[0] == 1
    warnings = () if good else (f"The spectral norm has not converged to tol={tol:g}.",)
    return Estimate(
        of=title(op),
        size=op.shape[0],
        method="lanczos",
        reason="It stopped as the interval is short enough." if good else found.reason,
        quantity="spectral norm",
        value=value,
        low=value,
        high=max(high, value),
        confidence=confidence,
        converged=good,
        cost=Cost(meter.used, time.perf_counter() - begun),
        settings=settings,
        warnings=warnings,
    )


def cosine(
    first: Operator | Tensor | np.ndarray | LinearOperator,
    second: Operator | Tensor | np.ndarray | LinearOperator,
    *,
    method: str = "auto",
    tol: float = 0.02,
    budget: int = 2 * _BUDGET,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The cosine of the angle between two matrices, ``tr(A B) / (|A|_F |B|_F)``, forming neither.

    Inner product and both norms are means over the same random signs ``z`` of ``(A z).(B z)``,
    ``|A z|^2`` and ``|B z|^2``; the standard error of their ratio is that of its linearisation.
    It stops when the interval at ``confidence`` is no wider than ``tol`` (absolute: a cosine is at
    most 1) on either side, or after ``budget`` products, those with ``A`` and with ``B`` both
    counted. ``method`` is ``"exact"`` (by structure), ``"products"``, or ``"auto"``: exact where
    both are stored. ``seed`` gives the probes.

    Cost: two products per probe. Raises ``ShapeError`` or ``ParameterMismatchError`` for matrices
    of different parameters, ``NotDefinedError`` if one of them is zero, ``OptionError`` for one
    that is not symmetric and a budget below 4, ``NonFiniteError`` for products that are not finite.

    Source: Hutchinson 1990 for ``A B``; linearisation of a ratio (delta method).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    >>> round(cs.cosine(matrix, torch.eye(3, dtype=torch.float64)).value, 4)
    0.8819
    """
    begun = time.perf_counter()
    one, two = matrix_of(first, "The first matrix"), matrix_of(second, "The second matrix")
    check_option("method", method, ("auto", "products", "exact"))
    tol, confidence, seed = check_tol(tol), check_confidence(confidence), check_seed(seed)
    budget = check_budget(budget, 4, "a cosine")
    if one.shape != two.shape:
        raise ShapeError(f"The matrices have {one.shape[0]} and {two.shape[0]} rows.")
    if one.layout is not None and two.layout is not None and one.layout != two.layout:
        raise ParameterMismatchError(
            f"The matrices speak of different parameters: {list(one.layout.names)} and "
            f"{list(two.layout.names)}. Align them with op.restrict(names)."
        )
    if method == "auto":
        method = "exact" if stored(one) and stored(two) else "products"
    settings: dict[str, object] = {"method": method, "seed": seed, "tol": tol, "budget": budget}
    settings["confidence"] = confidence
    meters = Meter(one), Meter(two)
    if method == "exact":
        left, right = in_float64(one), in_float64(two)
        lengths = left.frobenius_norm(), right.frobenius_norm()
        _require_nonzero(one, two, *lengths)
        value = inner(left, right) / (lengths[0] * lengths[1])
        found = Sampled(torch.zeros(0), value, 0.0, True, "It follows from the structure.")
    else:

        def draw(start: int, count: int) -> Tensor:
            probes = signs(one, seed, start, count)
            left = meters[0](probes)
            right = meters[1](probes.to(two.dtype)).to(left.device)
            pairs = ((left, right), (left, left), (right, right))
            return torch.stack([column_dots(u, v) for u, v in pairs], 1)

        def ratio(samples: Tensor) -> tuple[float, float]:
            product, left, right = samples.mean(0).tolist()
            _require_nonzero(one, two, left, right)
            scale = math.sqrt(left) * math.sqrt(right)
            value = product / scale
            effect = samples[:, 0] / scale
            effect = effect - value / 2 * (samples[:, 1] / left + samples[:, 2] / right)
            return value, mean_of(effect)[1]

        found = sample_until(
            draw,
            ratio,
            most=budget // 2,
            tol=tol,
            confidence=confidence,
            block=min(meters[0].columns(), meters[1].columns()),
            keeper=Keeper(None, meters[0], {}),
            meter=meters[0],
            label=f"Cosine of {title(one)} and {title(two)}",
            absolute=True,
        )
    return estimate_of(
        one,
        f"cosine with the {title(two)}",
        found,
        method="exact" if method == "exact" else "hutchinson",
        confidence=confidence,
        cost=Cost(meters[0].used + meters[1].used, time.perf_counter() - begun),
        settings=settings,
        least=-1.0,
        most=1.0,
    )


def _require_nonzero(one: Operator, two: Operator, *lengths: float) -> None:
    for op, length in zip((one, two), lengths, strict=True):
        if not length:
            raise NotDefinedError(f"The {title(op)} is zero, so it has no angle with a matrix.")
