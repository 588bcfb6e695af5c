"""The diagonal of a matrix from its products: Hutchinson and XDiag."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...display import spark
from ...errors import check_option, check_seed
from ...operators import Operator
from ...progress import track
from ..result import Cost, as_cpu, number
from .checkpoint import Keeper
from .common import (
    Meter,
    check_budget,
    check_confidence,
    check_tol,
    diagonal_known,
    matrix_of,
    quantile,
    signs,
    title,
)
from .estimate import Estimated
from .leave_one_out import FEW, freedom, leave_one_out

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

_BUDGET = 512
_FIRST = 16


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DiagonalEstimate(Estimated):
    """The diagonal ``value`` ``[P]`` with standard errors ``stderr`` ``[P]``, entry by entry.

    ``error`` is the root of the sum of squared standard errors over the length of ``value``: the
    expected relative error of the whole. ``low`` and ``high`` are intervals at ``confidence`` for
    each entry alone.
    """

    value: Tensor = field(repr=False)
    stderr: Tensor = field(repr=False)
    error: float
    confidence: float
    probes: int

    @property
    def low(self) -> Tensor:
        """Lower ends of the intervals ``[P]``."""
        return self.value - self._width * self.stderr

    @property
    def high(self) -> Tensor:
        """Upper ends of the intervals ``[P]``."""
        return self.value + self._width * self.stderr

    @property
    def _width(self) -> float:
        """Half width of an interval in standard errors."""
        shared = self.method == "xdiag"
        return quantile(
            self.confidence, freedom(self.probes) if shared else max(1, self.probes - 1)
        )

    def summary(self) -> str:
        """Range, sum and error."""
        low, high = number(float(self.value.min())), number(float(self.value.max()))
        return (
            f"Diagonal of the {self.of} ({self.size:,} rows): from {low} to {high}, "
            f"sum {number(float(self.value.sum()))}, relative error about {number(self.error, 2)} "
            f"(method {self.method!r}, {self.cost}). {self.reason}"
        ).rstrip()

    def _pictures(self) -> list[tuple[str, str]]:
        ordered = self.value.sort(descending=True).values
        return [("entries, sorted", spark(ordered.tolist(), "entries, sorted"))]

    def _shown_rows(self, most: int) -> tuple[list[dict[str, Any]], int]:
        """The first entries, without making records of all."""
        part = zip(self.value[:most].tolist(), self.stderr[:most].tolist(), strict=True)
        rows = [{"entry": k, "value": v, "stderr": e} for k, (v, e) in enumerate(part)]
        return rows, len(self.value)

    def records(self) -> list[dict[str, Any]]:
        """A row per entry."""
        return [
            {"entry": place, "value": value, "stderr": stderr}
            for place, (value, stderr) in enumerate(
                zip(self.value.tolist(), self.stderr.tolist(), strict=True)
            )
        ]


def diagonal(
    op: Operator | Tensor | np.ndarray | LinearOperator,
    *,
    method: str = "auto",
    tol: float = 0.1,
    budget: int = _BUDGET,
    confidence: float = 0.95,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> DiagonalEstimate:
    """The diagonal ``[P]`` from products, with a standard error for every entry.

    ``method``: ``"hutchinson"`` averages ``z * (A z)`` over random signs ``z``; ``"xdiag"`` takes
    the diagonal within a random subspace exactly and leaves one probe out at a time, better for
    spectra that decay; ``"exact"`` is what the operator gives (for a Hessian block by block, which
    may need memory); ``"auto"`` is exact for stored matrices and those whose blocks have
    been computed before, and ``"hutchinson"`` otherwise.

    It stops when the expected relative error of the whole vector (``.error``) is below ``tol``, or
    after ``budget`` products. Intervals at ``confidence`` are those of Student's t, for each entry
    alone. ``seed`` gives the probes, the same on every device. ``checkpoint`` names a file from
    which the same call goes on after an interruption, with the same result; it takes one more
    product.

    Cost: the products it reports; ``"xdiag"`` keeps three ``[P, n]`` for ``n`` probes of two
    products each. Raises ``OptionError`` for a matrix that is not symmetric and a budget too small
    for the method, ``NonFiniteError`` for products that are not finite, ``DataError`` for a
    checkpoint of another computation.

    Source: Bekas, Kokiopoulou and Saad 2007; Epperly, Tropp and Webber, "XTrace", section 2.2, 2024
    (arXiv 2301.07825).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    >>> cs.diagonal(matrix).value
    tensor([4., 2., 1.], dtype=torch.float64)
    """
    begun = time.perf_counter()
    op = matrix_of(op)
    check_option("method", method, ("auto", "hutchinson", "xdiag", "exact"))
    tol, confidence, seed = check_tol(tol), check_confidence(confidence), check_seed(seed)
    if method == "auto":
        method = "exact" if diagonal_known(op) else "hutchinson"
    needed = {"hutchinson": 2, "xdiag": 8, "exact": 1}[method]
    if method == "xdiag" and op.shape[0] <= FEW:
        needed = op.shape[0]
    budget = check_budget(budget, needed, f"method={method!r}")
    settings = {"method": method, "seed": seed}
    meter = Meter(op)
    if method == "exact":
        value = op.diagonal()
        stderr, probes, reason = torch.zeros_like(value), 0, "The diagonal is known."
    else:
        keeper = Keeper(checkpoint, meter, settings)
        with keeper.kept():
            run = _hutchinson if method == "hutchinson" else _xdiag
            value, stderr, probes = run(meter, tol, budget, seed, keeper)
        reason = ""
    value, stderr = as_cpu(value), as_cpu(stderr)
    length, off = float(value.norm()), float(stderr.norm())
    error = off / length if length else (0.0 if not off else float("inf"))
    converged = off <= tol * length
    if method != "exact":
        reason = (
            f"It stopped as the error is below tol={tol:g}."
            if converged
            else f"It stopped as the budget is spent; {probes} probes do not reach tol={tol:g}."
        )
    return DiagonalEstimate(
        of=title(op),
        size=op.shape[0],
        method=method,
        reason=reason,
        value=value,
        stderr=stderr,
        error=error,
        confidence=confidence,
        probes=probes,
        converged=converged,
        cost=Cost(meter.used, time.perf_counter() - begun),
        settings={**settings, "tol": tol, "budget": budget, "confidence": confidence},
        warnings=() if converged else (f"The diagonal has not converged to tol={tol:g}.",),
    )


def _hutchinson(
    meter: Meter, tol: float, budget: int, seed: int, keeper: Keeper
) -> tuple[Tensor, Tensor, int]:
    mean = torch.zeros(meter.size, dtype=torch.float64, device=meter.op.device)
    squares = torch.zeros_like(mean)
    done, target = 0, min(_FIRST, budget)
    state = keeper.load()
    if state is not None:
        mean, squares = state["mean"].to(mean.device), state["squares"].to(mean.device)
        done, target, meter.used = state["done"], state["target"], state["used"]
    block = meter.columns()
    while True:
        label = f"Diagonal of the {title(meter.op)}"
        for start in track(range(done, target, block), label):
            probes = signs(meter.op, seed, start, min(block, target - start))
            images = meter(probes)
            # new tensors (Welford's update): a state that was handed out is never changed
            for column in range(probes.shape[1]):
                value = probes[:, column].double() * images[:, column].double()
                gap = value - mean
                done += 1
                mean = mean + gap / done
                squares = squares + gap * (value - mean)
            keeper.hold(mean=mean, squares=squares, done=done, target=target, used=meter.used)
        stderr = (squares / ((done - 1) * done)).sqrt()
        off, length = float(stderr.norm()), float(mean.norm())
        if off <= tol * length or done >= budget:
            return mean, stderr, done
        needed = done * (off / (tol * length)) ** 2 if tol * length else budget
        target = int(min(budget, max(1.3 * done + 1, min(needed + 1, budget))))


def _xdiag(
    meter: Meter, tol: float, budget: int, seed: int, keeper: Keeper
) -> tuple[Tensor, Tensor, int]:
    if meter.size <= FEW:
        value = meter(torch.eye(meter.size).to(meter.op.device, meter.op.dtype)).diagonal()
        return value, torch.zeros_like(value), meter.size
    parts = leave_one_out(
        meter,
        lambda parts: _lengths(parts.diagonals()),
        most=min(budget // 2, meter.size),
        tol=tol,
        seed=seed,
        keeper=keeper,
        label=f"Diagonal of the {title(meter.op)}",
    )
    value, stderr = parts.diagonals()
    return value, stderr, parts.count


def _lengths(found: tuple[Tensor, Tensor]) -> tuple[float, float]:
    return float(found[0].norm()), float(found[1].norm())
