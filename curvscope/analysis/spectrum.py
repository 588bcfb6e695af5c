"""Eigenvalues of a matrix and what they say: signs, rank, conditioning, density."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import memory
from ..display import spark
from ..errors import NotDefinedError, OptionError, counted
from ..operators import Operator
from .coerce import as_operator, in_float64
from .comparison import WHOLE
from .result import Cost, Result, as_cpu, listing, number

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Spectrum(Result):
    """All eigenvalues of one matrix; returned by :func:`spectrum`.

    ``eigenvalues`` ``[P]`` ascend. Those of magnitude up to ``tolerance`` count as zero.
    ``blocks`` holds the spectrum of every diagonal block where that was asked for; the eigenvalues
    are then those of all blocks together, the spectrum of the block diagonal.
    """

    of: str
    size: int
    eigenvalues: Tensor
    tolerance: float
    blocks: Mapping[str, Spectrum] = field(default_factory=dict)

    @property
    def negative(self) -> int:
        """How many eigenvalues are below ``-tolerance``."""
        return int((self.eigenvalues < -self.tolerance).sum())

    @property
    def zero(self) -> int:
        """How many eigenvalues vanish up to ``tolerance``."""
        return int((self.eigenvalues.abs() <= self.tolerance).sum())

    @property
    def positive(self) -> int:
        """How many eigenvalues are above ``tolerance``."""
        return int((self.eigenvalues > self.tolerance).sum())

    @property
    def largest(self) -> float:
        """The largest eigenvalue, with its sign."""
        return float(self.eigenvalues[-1])

    @property
    def smallest(self) -> float:
        """The smallest (most negative) eigenvalue."""
        return float(self.eigenvalues[0])

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues."""
        return math.fsum(self.eigenvalues.tolist())

    @property
    def frobenius_norm(self) -> float:
        """Root of the sum of squared eigenvalues."""
        return float(torch.linalg.vector_norm(self.eigenvalues))

    @property
    def spectral_norm(self) -> float:
        """Largest magnitude of an eigenvalue."""
        return max(abs(self.largest), abs(self.smallest))

    @property
    def effective_rank(self) -> float:
        """``exp`` of the entropy of the magnitudes as shares of their sum; 0 for the zero matrix.

        Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
        """
        sizes = self.eigenvalues.abs()
        if not float(sizes.sum()):
            return 0.0
        shares = sizes / sizes.sum()
        return math.exp(-float(torch.special.xlogy(shares, shares).sum()))

    @property
    def stable_rank(self) -> float:
        """``||M||_F^2 / ||M||_2^2``; 0 for the zero matrix."""
        norm = self.spectral_norm
        return (self.frobenius_norm / norm) ** 2 if norm else 0.0

    @property
    def condition_number(self) -> float:
        """Largest over smallest magnitude; infinite where an eigenvalue vanishes."""
        return self.damped_condition_number(0.0)

    def damped_condition_number(self, damping: float) -> float:
        """Condition number of the matrix plus ``damping`` times the identity."""
        return condition_of(self.eigenvalues, damping, self.tolerance)

    def top(self, k: int = 10) -> Tensor:
        """The ``k`` eigenvalues of largest magnitude, largest first, with their signs."""
        order = self.eigenvalues.abs().argsort(descending=True, stable=True)
        return self.eigenvalues[order[:k]]

    def histogram(self, bins: int = 50, *, log: bool = False) -> tuple[Tensor, Tensor]:
        """Counts ``[bins]`` and edges ``[bins + 1]``.

        ``log=True`` counts the positive eigenvalues in bins of equal width in the logarithm.
        """
        values = self.eigenvalues.numpy()
        if log:
            values = values[values > self.tolerance]
            if not len(values):
                raise NotDefinedError(f"The {self.of} has no positive eigenvalue; use log=False.")
            low, high = math.log10(values.min()), math.log10(values.max())
            edges = np.logspace(low, high if high > low else low + 1, bins + 1)
            edges[0], edges[-1] = min(edges[0], values.min()), max(edges[-1], values.max())
            counts, edges = np.histogram(values, bins=edges)
        else:
            counts, edges = np.histogram(values, bins=bins)
        return torch.from_numpy(counts), torch.from_numpy(np.asarray(edges, dtype=np.float64))

    def density(self, points: int = 400, *, width: float | None = None) -> tuple[Tensor, Tensor]:
        """Grid ``[points]`` and the density there: a normal of ``width`` per eigenvalue, mean 1.

        The default width is a hundredth of the range of the spectrum.
        """
        span = self.largest - self.smallest
        width = width or (span / 100 or max(abs(self.largest), 1.0) / 100)
        grid = torch.linspace(
            self.smallest - 4 * width, self.largest + 4 * width, points, dtype=torch.float64
        )
        values = torch.zeros_like(grid)
        for chunk in self.eigenvalues.split(4096):
            values += torch.exp(-(((grid[:, None] - chunk) / width) ** 2) / 2).sum(1)
        return grid, values / (self.size * width * math.sqrt(2 * math.pi))

    def facts(self) -> dict[str, Any]:
        """The numbers of :meth:`to_frame` for this matrix."""
        return {
            "size": self.size,
            "trace": self.trace,
            "frobenius_norm": self.frobenius_norm,
            "largest": self.largest,
            "smallest": self.smallest,
            "negative": self.negative,
            "zero": self.zero,
            "positive": self.positive,
            "effective_rank": self.effective_rank,
            "stable_rank": self.stable_rank,
            "condition_number": self.condition_number,
        }

    def _pictures(self) -> list[tuple[str, str]]:
        sizes = self.eigenvalues.abs().sort(descending=True).values
        caption = "magnitudes of the eigenvalues, sorted"
        return [(caption, spark(sizes[sizes > self.tolerance].tolist(), caption))]

    def records(self) -> list[dict[str, Any]]:
        """A record per block, the whole matrix (``"(all)"``) last."""
        rows = [{"block": name, **block.facts()} for name, block in self.blocks.items()]
        return [*rows, {"block": WHOLE, **self.facts()}]

    def values_frame(self) -> pd.DataFrame:
        """A row per eigenvalue: ``block, index, eigenvalue`` (ascending within a block)."""
        import pandas as pd

        parts = self.blocks or {WHOLE: self}
        return pd.DataFrame.from_records(
            [
                {"block": name, "index": place, "eigenvalue": value}
                for name, part in parts.items()
                for place, value in enumerate(part.eigenvalues.tolist())
            ],
            columns=["block", "index", "eigenvalue"],
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the numbers of :meth:`facts`."""
        from .result import plain

        return {**super().to_dict(), **plain(self.facts())}

    def summary(self) -> str:
        """Range, signs and ranks in one sentence."""
        signs = f"{self.negative:,} negative, {self.zero:,} zero and {self.positive:,} positive"
        return (
            f"Spectrum of the {self.of} ({self.size:,} rows"
            + (f", {counted(len(self.blocks), 'block')}" if self.blocks else "")
            + f"): from {number(self.smallest)} to {number(self.largest)}, {signs} eigenvalues, "
            f"trace {number(self.trace)}, effective rank {number(self.effective_rank)}, "
            f"condition number {number(self.condition_number)}."
        )


def condition_of(values: Tensor, damping: float, tolerance: float) -> float:
    """Condition number of a matrix with these eigenvalues plus ``damping`` times the identity.

    Eigenvalues of magnitude up to ``tolerance`` count as zero; infinite where one then vanishes.
    """
    values = torch.where(values.abs() <= tolerance, 0.0, values) + damping
    sizes = values.abs()
    least, most = float(sizes.min()), float(sizes.max())
    crossing = damping != 0 and float(values.min()) < 0  # a difference: known to tolerance only
    return math.inf if least == 0 or (crossing and least <= tolerance) else most / least


def spectrum(
    op: Operator | Tensor | np.ndarray, *, blocks: bool = False, tol: float | None = None
) -> Spectrum:
    """All eigenvalues ``[P]`` of a symmetric matrix, by structure where it has one, else dense.

    ``blocks=True`` takes the diagonal blocks one by one: the eigenvalues are then those of the
    block-diagonal part of ``op``, and ``.blocks`` holds the spectrum of each. Eigenvalues of
    magnitude up to ``tol`` times the largest count as zero (default: rows times the machine
    epsilon of ``op``).

    Cost: ``O(P^3)`` for a dense matrix; the eigen-decompositions of the factors for a Kronecker
    product. Raises ``MemoryLimitError`` for a matrix that has no cheaper form and does not fit in
    memory, ``OptionError`` for one that is empty or not symmetric, and for ``blocks=True`` on one
    without blocks, ``ShapeError`` for one that is not square.

    Source: the eigenvalues of ``G (x) A`` are the products of those of ``G`` and ``A`` (Van Loan
    2000, section 1); effective rank as in Roy and Vetterli 2007.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> found = cs.spectrum(torch.diag(torch.tensor([4.0, -1.0, 0.0])))
    >>> found.largest, found.negative, found.zero
    (4.0, 1, 1)
    """
    start = time.perf_counter()
    op = as_operator(op)
    settings = {"blocks": blocks, "tol": tol}
    if not op.shape[0]:
        raise OptionError("The matrix is empty.")
    if not blocks:
        by_block = "cs.spectrum(op, blocks=True) takes one block at a time; " if op.blocks else ""
        with memory.advising(
            f"{by_block}cs.density(op) estimates the whole spectrum and cs.eigsh(op) its ends from "
            "products alone."
        ):
            values = as_cpu(in_float64(op).eigenvalues()).sort().values
        return _spectrum(op, values, tol, settings, time.perf_counter() - start)
    if not op.blocks:
        raise OptionError(f"The {op.info.what} has no blocks; leave out blocks=True.")
    parts: dict[str, Spectrum] = {}
    for name, block in op.blocks.items():
        begun = time.perf_counter()
        values = as_cpu(in_float64(block).eigenvalues()).sort().values
        seconds = time.perf_counter() - begun
        parts[name] = _spectrum(block, values, tol, {"tol": tol}, seconds)
    joint = torch.cat([part.eigenvalues for part in parts.values()]).sort().values
    warnings: tuple[str, ...] = ()
    if op.uncovered:
        warnings = (f"The {op.info.what} does not define {listing(op.uncovered)}.",)
    return _spectrum(
        op, joint, tol, settings, time.perf_counter() - start, blocks=parts, warnings=warnings
    )


def _spectrum(
    op: Operator,
    values: Tensor,
    tol: float | None,
    settings: dict[str, Any],
    seconds: float,
    *,
    blocks: Mapping[str, Spectrum] | None = None,
    warnings: tuple[str, ...] = (),
) -> Spectrum:
    share = len(values) * torch.finfo(op.dtype).eps if tol is None else tol
    tolerance = share * float(values.abs().max())
    of = f"block diagonal of the {op.info.what}" if blocks else op.info.what
    return Spectrum(
        of=of,
        size=len(values),
        eigenvalues=values,
        tolerance=tolerance,
        blocks=blocks or {},
        cost=Cost(seconds=seconds),
        settings=settings,
        warnings=warnings,
    )
