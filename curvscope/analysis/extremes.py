"""Both ends of the spectrum of a matrix that is known by its products only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operators import Operator
from .lanczos import leading_by_products
from .result import Cost, Result, as_cpu, number

_SMALL = 200  # rows up to which the matrix is formed
_BYTES = 256 * 2**20  # for the basis
_SHOWN = 1e-5  # residual relative to the largest magnitude that a sentence has
_CLOSE = 0.01  # residual relative to the largest magnitude that counts as converged


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Extremes(Result):
    """The largest and the smallest eigenvalues of a matrix; returned by :func:`extremes`.

    ``largest`` descends, ``smallest`` ascends. An eigenvalue lies within the residual
    (``largest_residuals``, ``smallest_residuals``) of each; none is below the rounding of the
    matrix's type, its machine epsilon times the largest magnitude. They are Ritz
    values, so the smallest eigenvalue of all is at most ``smallest[0]``, and the largest at least
    ``largest[0]``.
    """

    of: str
    size: int
    largest: tuple[float, ...]
    smallest: tuple[float, ...]
    largest_residuals: tuple[float, ...]
    smallest_residuals: tuple[float, ...]

    def records(self) -> list[dict[str, Any]]:
        """A row per eigenvalue: ``end``, ``rank``, ``eigenvalue`` and ``residual``."""
        ends = (
            ("largest", self.largest, self.largest_residuals),
            ("smallest", self.smallest, self.smallest_residuals),
        )
        return [
            {"end": end, "rank": rank + 1, "eigenvalue": value, "residual": residual}
            for end, values, residuals in ends
            for rank, (value, residual) in enumerate(zip(values, residuals, strict=True))
        ]

    def summary(self) -> str:
        """Both ends in a sentence."""
        shown = _SHOWN * max(abs(self.smallest[0]), abs(self.largest[0]))
        low, high = (
            number(value) + (f" ± {number(residual, 2)}" if residual > shown else "")
            for value, residual in (
                (self.smallest[0], self.smallest_residuals[0]),
                (self.largest[0], self.largest_residuals[0]),
            )
        )
        return f"The {self.of} ({self.size:,} rows) has eigenvalues from {low} to {high}."


def extremes(op: Operator, count: int = 3, *, steps: int = 48) -> Extremes:
    """``count`` eigenvalues at both ends, by ``steps`` of Lanczos with full reorthogonalisation.

    Matrices of up to 200 rows are formed instead. Fewer steps are taken where the basis
    ``[steps, P]`` would need more than 256 MiB. ``converged`` says whether the outermost eigenvalue
    at either end has a residual below a hundredth of the largest magnitude.
    """
    start = time.perf_counter()
    size, eps = op.shape[0], float(torch.finfo(op.dtype).eps)
    settings = {"count": count, "steps": steps}
    used = 0
    if size <= _SMALL:
        values = as_cpu(op.eigenvalues()).sort().values
        residuals = values.new_full((size,), float(values.abs().max()) * eps)
    else:
        steps = max(8, min(steps, size, _BYTES // (16 * size)))

        def product(vector: Tensor) -> Tensor:
            nonlocal used
            used += 1
            return (op @ vector).to(vector)

        values, _, residuals = leading_by_products(
            product, size, steps, device=op.device, steps=steps, tol=0.0, dtype=op.dtype
        )
        order = values.argsort()
        values, residuals = as_cpu(values[order]), as_cpu(residuals[order])
    scale = float(values.abs().max())
    converged = float(max(residuals[0], residuals[-1])) <= _CLOSE * scale
    return Extremes(
        of=op.info.what,
        size=size,
        largest=tuple(values.flip(0)[:count].tolist()),
        smallest=tuple(values[:count].tolist()),
        largest_residuals=tuple(residuals.flip(0)[:count].tolist()),
        smallest_residuals=tuple(residuals[:count].tolist()),
        cost=Cost(used, time.perf_counter() - start),
        settings=settings,
        converged=converged,
        warnings=()
        if converged
        else (
            f"The ends of the spectrum of the {op.info.what} have not converged in {used} "
            "products; the residuals say how far they may be off.",
        ),
    )
