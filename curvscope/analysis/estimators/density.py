"""The spectral density of a matrix known by products."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...display import spark
from ...errors import OptionError, check_count, check_option, check_seed
from ...operators import Operator
from ..result import Cost, as_cpu, number
from ..spectrum import Spectrum
from .checkpoint import Keeper
from .common import (
    Meter,
    check_budget,
    check_confidence,
    decomposable,
    matrix_of,
    quantile,
    title,
)
from .estimate import Estimated
from .kpm import chebyshev
from .slq import MOMENTS, REORTHOGONALISE, Quadrature, quadrature, together

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Density(Estimated):
    """How the eigenvalues of a matrix are distributed; returned by :func:`density`.

    ``density`` on ``grid`` ``[points]`` has the integral one: the share of eigenvalues per unit,
    every one broadened to a normal of standard deviation ``width``. ``low`` and ``high`` are the
    band that the probes give at ``confidence``, point by point. ``moments`` are the means of the
    powers 1 to 4 of the eigenvalues, with ``moments_stderr``. ``nodes`` and ``weights``
    ``[probes, steps]`` are the quadratures (one row of all eigenvalues where they are known).
    """

    probes: int
    steps: int
    width: float
    confidence: float
    grid: Tensor = field(repr=False)
    density: Tensor = field(repr=False)
    low: Tensor = field(repr=False)
    high: Tensor = field(repr=False)
    moments: Tensor
    moments_stderr: Tensor
    nodes: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)

    def cdf(self, points: Tensor, *, width: float | None = None) -> Tensor:
        """Share of eigenvalues up to each of ``points`` ``[n]``, broadened to ``width``."""
        width = self.width if width is None else width
        weights = self.weights / len(self.weights)
        return _broadened_cdf(self.nodes.flatten(), weights.flatten(), points, width)

    def kolmogorov(self, spectrum: Spectrum, *, width: float | None = None) -> float:
        """Largest difference of the two distribution functions, both broadened to ``width``.

        The default width is that of the density. Without any, a node that is off by rounding from
        a multiple eigenvalue would count as far away.
        """
        width = self.width if width is None else width
        truth = spectrum.eigenvalues
        share = torch.full_like(truth, 1 / len(truth))
        places = torch.cat([self.nodes.flatten(), truth])
        points = torch.cat([places + c * width for c in (-2, -1, -0.5, 0, 0.5, 1, 2)])
        points = torch.cat([points.unique(), self.grid])
        exact = _broadened_cdf(truth, share, points, width)
        return float((self.cdf(points, width=width) - exact).abs().max())

    def summary(self) -> str:
        """Range, mean and spread."""
        used = self.weights > 0
        low, high = float(self.nodes[used].min()), float(self.nodes[used].max())
        spread = math.sqrt(max(0.0, float(self.moments[1] - self.moments[0] ** 2)))
        error = float(self.moments_stderr[0])
        mean = number(float(self.moments[0])) + (f" ± {number(error, 2)}" if error > 0 else "")
        taken = f"{self.probes} probe{'s' * (self.probes != 1)}"
        negative = float(self.weights[self.nodes < -self.width].sum()) / len(self.weights)
        return (
            f"Density of the {self.of} ({self.size:,} rows): eigenvalues from about {number(low)} "
            f"to {number(high)}, mean {mean}, standard deviation {number(spread)}, a share of "
            f"{number(negative, 2)} below {number(-self.width, 2)} ({taken} of "
            f"{self.steps} steps, method {self.method!r}, {self.cost}). {self.reason}"
        ).rstrip()

    def _pictures(self) -> list[tuple[str, str]]:
        caption = f"density from {number(float(self.grid[0]))} to {number(float(self.grid[-1]))}"
        shown = self.density.clamp_min(1e-4 * float(self.density.max()))  # the tails are endless
        return [(caption, spark(shown.tolist(), caption))]

    def records(self) -> list[dict[str, Any]]:
        """A row per grid point."""
        columns = {
            "eigenvalue": self.grid,
            "density": self.density,
            "low": self.low,
            "high": self.high,
        }
        rows = zip(*(c.tolist() for c in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]


def density(
    op: Operator | Tensor | np.ndarray | LinearOperator,
    *,
    method: str = "auto",
    probes: int = 8,
    steps: int = 64,
    width: float | None = None,
    points: int = 400,
    reorthogonalise: str = "full",
    budget: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Density:
    """The distribution of all eigenvalues, from a few random vectors.

    ``method``: ``"slq"`` (stochastic Lanczos quadrature) takes ``steps`` Lanczos steps from each of
    ``probes`` random signs, and broadens their Ritz values; ``"kpm"`` (kernel polynomial method)
    expands the density into ``2 steps`` Chebyshev polynomials, damped by Jackson's kernel, and
    needs no memory for bases; ``"exact"`` takes the eigenvalues; ``"auto"`` is exact where the
    structure gives them (stored matrices of up to 2,000 rows, Kronecker products, ...) and
    ``"slq"`` otherwise.

    The density is given at ``points`` places, every eigenvalue broadened to a normal of standard
    deviation ``width`` (default: a hundredth of the range; for ``"kpm"`` what its polynomials
    resolve). The band comes from the differences between probes at ``confidence`` (Student's t),
    so it is NaN with one probe, and holds for the broadened density. ``reorthogonalise`` is
    ``"full"``, ``"selective"`` (only when orthogonality is about to be lost) or ``"none"``.
    ``budget`` limits the products: fewer probes are taken if they do not fit. ``seed`` gives the
    probes. ``checkpoint`` names a file from which the same call goes on after an interruption, with
    the same result; it takes one more product.

    Cost: ``probes * steps`` products (``"kpm"``: 20 more), and memory for ``steps`` vectors per
    probe, in groups of up to 1 GiB. Raises ``OptionError`` for a matrix that is not symmetric and a
    budget below the steps of two probes, ``NonFiniteError`` for products that are not finite,
    ``DataError`` for a checkpoint of another computation.

    Source: Lin, Saad and Yang, "Approximating spectral densities of large matrices" (SIAM Review
    58, 2016); Ghorbani, Krishnan and Xiao 2019 (arXiv 1901.10159); kernel polynomials, Weisse et
    al. (Rev. Mod. Phys. 78, 2006).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    >>> found = cs.density(matrix, points=200)
    >>> round(float(torch.trapezoid(found.density, found.grid)), 2)
    1.0
    """
    begun = time.perf_counter()
    op = matrix_of(op)
    check_option("method", method, ("auto", "slq", "kpm", "exact"))
    check_option("reorthogonalise", reorthogonalise, REORTHOGONALISE)
    probes, steps = check_count("probes", probes), check_count("steps", steps, 2)
    points, seed = check_count("points", points, 2), check_seed(seed)
    confidence = check_confidence(confidence)
    if width is not None and not 0 < float(width) < math.inf:
        raise OptionError(f"width={width!r} must be positive.")
    settings: dict[str, Any] = {
        "method": method,
        "probes": probes,
        "steps": steps,
        "reorthogonalise": reorthogonalise,
        "seed": seed,
    }
    if method == "auto":
        method = "exact" if decomposable(op) else "slq"
    meter = Meter(op)
    steps = min(steps, op.shape[0])
    reason, warnings = f"It took the {probes} probe{'s' * (probes > 1)} asked for.", []
    if budget is not None and method != "exact":
        each = steps
        check_budget(
            budget, min(2, probes) * each + (20 if method == "kpm" else 0), f"method={method!r}"
        )
        fitting = (budget - (20 if method == "kpm" else 0)) // each
        if fitting < probes:
            probes = fitting
            reason = f"The budget allowed {probes} probes."
            warnings.append(f"{reason[:-1]}, not the {settings['probes']} asked for.")
    if method == "exact":
        values = as_cpu(op.eigenvalues()).sort().values.unsqueeze(0)
        found = Quadrature(values, torch.full_like(values, 1 / values.shape[1]))
        reason = "All eigenvalues are known."
        steps, probes = 0, 0
    else:
        keeper = Keeper(checkpoint, meter, {**settings, "probes": probes})
        with keeper.kept():
            if method == "slq":
                found = _lanczos(meter, seed, probes, steps, reorthogonalise, keeper)
            else:
                found, resolved = chebyshev(meter, seed, probes, steps, keeper)
                width = max(width or 0.0, resolved)
    used = found.nodes[found.weights > 0]
    low, high = float(used.min()), float(used.max())
    width = width or default_width(op, low, high)
    grid = torch.linspace(low - 4 * width, high + 4 * width, points, dtype=torch.float64)
    curves = torch.stack(
        [_broadened(n, w, grid, width) for n, w in zip(found.nodes, found.weights, strict=True)]
    )
    powers = found.moments if found.moments is not None else _powers(found.nodes, found.weights)
    mean, error = _mean(curves)
    half = quantile(confidence, probes - 1) * error if probes > 1 else error
    if probes == 1:
        warnings.append("One probe says nothing of its own error; probes=2 or more give a band.")
    moments, moments_stderr = _mean(powers)
    if probes == 1:
        half, moments_stderr = half.fill_(math.nan), moments_stderr.fill_(math.nan)
    return Density(
        of=title(op),
        size=op.shape[0],
        method=method,
        reason=reason,
        probes=probes,
        steps=steps,
        width=width,
        confidence=confidence,
        grid=grid,
        density=mean,
        low=(mean - half).clamp_min(0.0),
        high=mean + half,
        moments=moments,
        moments_stderr=moments_stderr,
        nodes=found.nodes,
        weights=found.weights,
        cost=Cost(meter.used, time.perf_counter() - begun),
        settings={**settings, "width": width, "budget": budget, "confidence": confidence},
        warnings=tuple(warnings),
    )


def _lanczos(
    meter: Meter, seed: int, probes: int, steps: int, reorthogonalise: str, keeper: Keeper
) -> Quadrature:
    group = together(meter, steps)
    nodes = torch.zeros(0, steps, dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    state = keeper.load()
    if state is not None:
        nodes, weights, meter.used = state["nodes"], state["weights"], state["used"]
    for start in range(len(nodes), probes, group):
        count = min(group, probes - start)

        def hold(nodes: Tensor = nodes, weights: Tensor = weights, **inner: Any) -> None:
            keeper.hold(nodes=nodes, weights=weights, used=meter.used, **inner)

        found = quadrature(
            meter,
            seed,
            start,
            count,
            steps,
            reorthogonalise=reorthogonalise,
            label=f"Density of the {title(meter.op)}, probes {start + 1} to {start + count}",
            hold=hold if keeper.path else None,
            state=state,
        )
        state = None
        missing = steps - found.nodes.shape[1]
        nodes = torch.cat([nodes, torch.nn.functional.pad(found.nodes, (0, missing))])
        weights = torch.cat([weights, torch.nn.functional.pad(found.weights, (0, missing))])
        keeper.hold(nodes=nodes, weights=weights, used=meter.used)
    return Quadrature(nodes, weights)


def default_width(op: Operator, low: float, high: float) -> float:
    """A hundredth of the range, or of the size where the range is rounding."""
    size = max(abs(low), abs(high))
    apart = high - low > 1e3 * torch.finfo(op.dtype).eps * size
    return (high - low) / 100 if apart else (size or 1.0) / 100


def _powers(nodes: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([(nodes**p * weights).sum(1) for p in range(1, MOMENTS + 1)], 1)


def _mean(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.mean(0)
    if len(rows) == 1:
        return mean, torch.zeros_like(mean)
    return mean, rows.std(0) / math.sqrt(len(rows))


def _broadened(nodes: Tensor, weights: Tensor, points: Tensor, width: float) -> Tensor:
    result = torch.zeros_like(points)
    scale = width * math.sqrt(2 * math.pi)
    for n, w in zip(nodes.split(4096), weights.split(4096), strict=True):
        result += torch.exp(-(((points[:, None] - n) / width) ** 2) / 2) @ w
    return result / scale


def _broadened_cdf(nodes: Tensor, weights: Tensor, points: Tensor, width: float) -> Tensor:
    result = torch.zeros_like(points)
    for n, w in zip(nodes.split(2048), weights.split(2048), strict=True):
        result += torch.special.ndtr((points[:, None] - n) / width) @ w
    return result
