"""SciPy's solvers behind the same call, with products counted and true residuals."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...operators import Operator
from ...operators.scipy_bridge import to_scipy
from .common import Meter, normals
from .eigsh import Found
from .krylov import Ritz, thresholds, wanted


class _Counted:
    """A stand-in for the matrix whose products go through the meter."""

    def __init__(self, meter: Meter) -> None:
        self.op = meter.op
        self.meter = meter
        self.shape, self.dtype = meter.op.shape, meter.op.dtype

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if vectors.ndim == 1:
            vectors = vectors.unsqueeze(1)
            return self.meter(vectors.to(self.op.device))[:, 0]
        return self.meter(vectors.to(self.op.device))


def by_scipy(
    meter: Meter, start: Tensor, k: int, which: str, tol: float, most: int, seed: int
) -> Found:
    """``scipy.sparse.linalg.eigsh``, that is ARPACK's implicitly restarted Lanczos."""
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh

    from ...errors import NotDefinedError

    size = meter.size
    if k >= size:
        from .eigsh import _exact

        return _exact(meter.op, k, which)
    linear = to_scipy(_operator(meter))
    krylov = min(size, max(2 * k + 1, 20))
    rounds = max(1, (most - krylov - k) // max(1, krylov - k))
    reason = "SciPy's eigsh has converged."
    try:
        values, vectors = eigsh(
            linear,
            k=k,
            which=which,
            tol=tol,
            v0=start[:, 0].double().cpu().numpy().astype(linear.dtype),
            maxiter=rounds,
            ncv=krylov,
        )
    except ArpackNoConvergence as stopped:
        values, vectors = stopped.eigenvalues, stopped.eigenvectors
        reason = f"SciPy's eigsh stopped at its budget with {len(values)} of {k} pairs."
    except ArpackError as error:  # of a zero matrix, for one
        raise NotDefinedError(
            f"SciPy's eigsh cannot go on ({error}). Use method='lanczos'."
        ) from error
    return _checked(meter, values, vectors, k, which, tol, reason)


def by_lobpcg(
    meter: Meter, start: Tensor, k: int, which: str, tol: float, most: int, seed: int
) -> Found:
    """``scipy.sparse.linalg.lobpcg`` from random vectors, largest or smallest end only."""
    import warnings

    from scipy.sparse.linalg import lobpcg

    from ...errors import OptionError

    if which not in ("LA", "SA"):
        raise OptionError(
            f"which={which!r} is not possible with method='lobpcg', which finds one end: pass "
            "'LA' or 'SA', or method='lanczos'."
        )
    if 5 * k > meter.size:
        raise OptionError(
            f"method='lobpcg' needs at least 5 k = {5 * k} rows, not {meter.size}; "
            "use method='exact'."
        )
    linear = to_scipy(_operator(meter))
    block = normals(meter.op, seed, 0, k, stream=4).double().cpu().numpy().astype(linear.dtype)
    scale = float(meter(start[:, :1]).norm()) / float(start[:, :1].norm())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, which the residuals tell
        values, vectors = lobpcg(
            linear,
            block,
            largest=which == "LA",
            tol=max(tol * scale, math.ulp(0.0)),
            maxiter=max(1, (most - k) // k - 1),
        )
    return _checked(meter, values, vectors, k, which, tol, "SciPy's lobpcg has ended.")


def _operator(meter: Meter) -> Operator:
    return _Counted(meter)  # type: ignore[return-value]


def _checked(
    meter: Meter,
    values: np.ndarray,
    vectors: np.ndarray,
    k: int,
    which: str,
    tol: float,
    reason: str,
) -> Found:
    op = meter.op
    warned: tuple[str, ...] = ()
    if not len(values):
        warned = ("Nothing has converged; the start vector is returned. Pass a larger budget=.",)
        columns = normals(op, 0, 0, 1, stream=2)
        columns /= columns.norm()
    else:
        columns = torch.as_tensor(np.ascontiguousarray(vectors)).to(op.device, op.dtype)
    images = meter(columns)
    found = (columns.double() * images.double()).sum(0) / columns.double().square().sum(0)
    found = found.cpu()
    order = found.argsort()
    order = order[wanted(found[order], k, which)]
    found, columns, images = found[order], columns[:, order], images[:, order]
    residuals = (images.double() - columns.double() * found.to(op.device)).norm(dim=0).cpu()
    scale = float(found.abs().max())
    pairs = Ritz(found, torch.zeros(0), residuals, scale)
    good = tuple((residuals <= thresholds(pairs, tol, torch.finfo(op.dtype).eps)).tolist())
    good = good if len(found) == k else tuple(False for _ in good)
    if not all(good) and not warned:
        warned = (f"{good.count(False)} of {k} pairs have not converged.",)
    return Found(found, columns, residuals, good, reason, warned)
