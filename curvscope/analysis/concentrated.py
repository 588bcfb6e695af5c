"""The result of an analysis of concentration: shares, discs and counts, beside a null model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..display import spark
from .comparison import WHOLE
from .null_model import NullModel
from .result import Result, number

NOISE = math.sqrt(1e-3)
"""Standard deviation of the noise; the variance is that of the AdaFisher paper."""
_ROUNDING = 1e-12
_SIGMAS = 3.0  # how far from the null model counts as a difference


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Concentration(Result):
    """How a matrix is concentrated on its diagonal; returned by :func:`concentration`.

    Shares are of the energy, the sum of squared entries. ``band_shares[k]`` is the share with
    ``|i - j| <= k``. ``centres`` and ``radii`` are the Gershgorin discs, ``disjoint`` how many of
    them touch no other; ``dominant`` the share of rows whose diagonal entry exceeds the sum of
    magnitudes of the others. ``eigenvalues`` and ``noisy_eigenvalues``, descending, belong to the
    matrix divided by ``scale``, its mean diagonal, without and with normal noise of standard
    deviation ``noise`` off the diagonal; ``kaiser`` and ``kaiser_noisy`` count those above one.
    ``snr`` and ``noisy_snr`` are in decibel. ``fourier`` is the magnitude of the two-dimensional
    Fourier transform, zero frequency first, averaged over tiles to at most 128 x 128.

    ``null`` says what random orthogonal eigenvectors with the same spectrum give. ``energy`` is the
    squared Frobenius norm. ``factors`` holds the factors of a Kronecker product, ``blocks`` the
    diagonal blocks.

    Of a matrix too large to form (``method="estimated"``), ``diagonal_share``, ``snr``,
    ``noisy_snr``, ``scale`` and what the null model expects come from its structure or from random
    probes, ``kaiser`` from its spectrum or Lanczos quadrature, ``dominant``, ``centres``,
    ``radii`` and ``band_shares`` from ``rows`` drawn at random. ``stderr`` has the standard errors
    (``"excess"`` that of the share beyond the null model), ``band_stderr`` those of the bands, and
    ``reasons`` says why others are missing: those tensors are empty, counts ``None``.
    """

    of: str
    size: int
    diagonal_share: float
    null: NullModel
    band_shares: Tensor = field(default_factory=_none)
    centres: Tensor = field(default_factory=_none)
    radii: Tensor = field(default_factory=_none)
    disjoint: int | None = None
    dominant: float = math.nan
    scale: float = math.nan
    eigenvalues: Tensor = field(default_factory=_none)
    noisy_eigenvalues: Tensor = field(default_factory=_none)
    kaiser: float | None = None
    kaiser_noisy: int | None = None
    snr: float = math.nan
    noisy_snr: float = math.nan
    fourier: Tensor = field(default_factory=_none, metadata={"json": False})
    noise: float = NOISE
    energy: float = math.nan
    method: str = "exact"
    rows: Tensor = field(default_factory=_none)
    band_stderr: Tensor = field(default_factory=_none)
    stderr: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    factors: Mapping[str, Concentration] = field(default_factory=dict)
    blocks: Mapping[str, Concentration] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Standard deviations by which the diagonal share exceeds the null model; NaN unknown.

        Those of the null model and of an estimated share together.
        """
        known = [self.null.diagonal_share_std, self.stderr.get("excess", 0.0)]
        spread = math.hypot(*(s for s in known if not math.isnan(s)))
        if not spread > _ROUNDING:  # unknown, or the same share in every basis
            return math.nan
        return (self.diagonal_share - self.null.diagonal_share) / spread

    def verdict(self) -> str:
        """Whether the matrix is more concentrated than its null model, in words."""
        share, expected = self.diagonal_share, self.null.diagonal_share
        if math.isnan(share):
            return "the matrix is zero, so it has no energy to be concentrated"
        bars = self.null.diagonal_share_std
        shown = f" ± {number(bars, 2)}" if bars > _ROUNDING else ""
        error = self.stderr.get("diagonal_share", 0.0)
        noisy = f" ± {number(error, 2)}" if error else ""
        numbers = f"diagonal share {number(share)}{noisy}, null model {number(expected)}{shown}"
        if abs(share - expected) <= 1e-9:
            return f"no basis would make it more or less concentrated: {numbers}"
        if math.isnan(self.score):
            word = "larger" if share > expected else "smaller"
            return f"its diagonal share is {word} than the null model expects: {numbers}"
        if self.score > _SIGMAS:
            return f"more concentrated on its diagonal than the null model: {numbers}"
        if self.score < -_SIGMAS:
            return f"less concentrated on its diagonal than the null model: {numbers}"
        return f"not more concentrated on its diagonal than the null model: {numbers}"

    def facts(self) -> dict[str, Any]:
        """The numbers of :meth:`to_frame` for this matrix."""
        return {
            "size": self.size,
            "diagonal_share": self.diagonal_share,
            "diagonal_share_stderr": self.stderr.get("diagonal_share", 0.0),
            "null_share": self.null.diagonal_share,
            "null_share_std": self.null.diagonal_share_std,
            "score": self.score,
            "disjoint": self.disjoint,
            "null_disjoint": self.null.disjoint,
            "dominant": self.dominant,
            "dominant_stderr": self.stderr.get("dominant", 0.0),
            "null_dominant": self.null.dominant,
            "kaiser": self.kaiser,
            "kaiser_stderr": self.stderr.get("kaiser", 0.0),
            "kaiser_noisy": self.kaiser_noisy,
            "snr": self.snr,
            "snr_stderr": self.stderr.get("snr", 0.0),
            "noisy_snr": self.noisy_snr,
            "method": self.method,
        }

    def _pictures(self) -> list[tuple[str, str]]:
        parts = {"": self, **self.factors} if self.eigenvalues.numel() else self.factors
        return [
            (caption, spark(part.eigenvalues.tolist(), caption))
            for name, part in parts.items()
            if (caption := f"eigenvalues{' of ' * bool(name)}{name} over the mean diagonal")
        ]

    def records(self) -> list[dict[str, Any]]:
        """A record per block and factor, the matrix itself (``"(all)"``) last."""
        rows: list[dict[str, Any]] = []
        for name, block in {**self.blocks, WHOLE: self}.items():
            for factor, part in block.factors.items():
                rows.append({"block": name, "factor": factor, **part.facts()})
            rows.append({"block": name, "factor": "", **block.facts()})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The fields, the score, and the verdict in words."""
        known = self.score if math.isfinite(self.score) else None
        return {**super().to_dict(), "score": known, "verdict": self.verdict()}

    def summary(self) -> str:
        """The verdict, discs, dominance and Kaiser rule; a line per block and factor."""
        lines = [self._sentence()]
        for title, parts in (("Block", self.blocks), ("Factor", self.factors)):
            lines += [f"{title} {name}: {part.verdict()}." for name, part in parts.items()]
        return "\n".join(lines)

    def _sentence(self) -> str:
        text = f"The {self.of} ({self.size:,} rows): {self.verdict()}"
        if self.disjoint is not None:
            text += (
                f"; {self.disjoint} of {self.size} Gershgorin discs touch no other"
                f"{_beside(self.null.disjoint)}, {number(self.dominant)} of the rows are dominated "
                f"by their diagonal{_beside(self.null.dominant)}"
            )
        elif not math.isnan(self.dominant):
            text += f"; {self._shown('dominant')} of the rows are dominated by their diagonal"
        if self.kaiser is not None:
            count = (
                f"{self.kaiser:,.0f}" if not self.stderr.get("kaiser") else self._shown("kaiser")
            )
            text += f", {count} eigenvalues pass the Kaiser rule"
            if self.kaiser_noisy is not None:
                text += f" ({self.kaiser_noisy} with noise off the diagonal)"
        return text + "."

    def _shown(self, name: str) -> str:
        error = self.stderr.get(name, 0.0)
        return number(getattr(self, name)) + (f" ± {number(error, 2)}" if error else "")


def _beside(expected: float) -> str:
    return "" if math.isnan(expected) else f" (null model {number(expected)})"
