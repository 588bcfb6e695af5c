"""How much of a matrix lies on its diagonal, always beside what a random eigenbasis would give."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..display import spark
from ..errors import OptionError
from ..operators import KroneckerOperator, Operator
from .coerce import as_operator, in_float64
from .comparison import WHOLE
from .diagonality import (
    band_shares,
    count_above_one,
    diagonal_share,
    disjoint_discs,
    dominant_share,
    fourier_magnitude,
    off_diagonal_noise,
    signal_to_noise,
)
from .null_model import NullModel, null_model
from .result import Cost, Result, as_cpu, listing, number

_NOISE = math.sqrt(1e-3)  # the variance that the AdaFisher paper perturbs with
_LIMIT = 2000
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

    ``null`` says what random orthogonal eigenvectors with the same spectrum give. Of a matrix too
    large to form, only ``diagonal_share`` and its expectation under the null model are known: the
    tensors are then empty, counts ``None``, other numbers NaN. ``factors`` holds the factors of a
    Kronecker product, ``blocks`` the diagonal blocks.
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
    kaiser: int | None = None
    kaiser_noisy: int | None = None
    snr: float = math.nan
    noisy_snr: float = math.nan
    fourier: Tensor = field(default_factory=_none, metadata={"json": False})
    noise: float = _NOISE
    factors: Mapping[str, Concentration] = field(default_factory=dict)
    blocks: Mapping[str, Concentration] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Standard deviations by which the diagonal share exceeds the null model; NaN unknown."""
        spread = self.null.diagonal_share_std
        if not spread > _ROUNDING:  # NaN, or the same share in every basis
            return math.nan
        return (self.diagonal_share - self.null.diagonal_share) / spread

    def verdict(self) -> str:
        """Whether the matrix is more concentrated than its null model, in words."""
        share, expected = self.diagonal_share, self.null.diagonal_share
        if math.isnan(share):
            return "the matrix is zero, so it has no energy to be concentrated"
        bars = self.null.diagonal_share_std
        shown = f" ± {number(bars, 2)}" if bars > _ROUNDING else ""
        numbers = f"diagonal share {number(share)}, null model {number(expected)}{shown}"
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
            "null_share": self.null.diagonal_share,
            "null_share_std": self.null.diagonal_share_std,
            "score": self.score,
            "disjoint": self.disjoint,
            "null_disjoint": self.null.disjoint,
            "dominant": self.dominant,
            "null_dominant": self.null.dominant,
            "kaiser": self.kaiser,
            "kaiser_noisy": self.kaiser_noisy,
            "snr": self.snr,
            "noisy_snr": self.noisy_snr,
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
        if self.kaiser is not None:
            text += (
                f", {self.kaiser} eigenvalues pass the Kaiser rule "
                f"({self.kaiser_noisy} with noise off the diagonal)"
            )
        return text + "."


def _beside(expected: float) -> str:
    return "" if math.isnan(expected) else f" (null model {number(expected)})"


def concentration(
    matrix: Operator | Tensor | np.ndarray,
    *,
    noise: float = _NOISE,
    samples: int = 16,
    seed: int = 0,
    limit: int = _LIMIT,
) -> Concentration:
    """Diagonal concentration of a symmetric matrix, of Kronecker factors, or block by block.

    A Kronecker product is described with both of its factors; an operator with blocks block by
    block, the outer result then being that of its block-diagonal part.

    The analysis (Gershgorin discs, Kaiser rule under noise off the diagonal, Fourier spectrum,
    signal-to-noise ratio) is that of Martins Gomes et al., "AdaFisher: Adaptive second order
    optimization via Fisher information", ICLR 2025 (arXiv 2405.16397, section 3.1), with two
    differences: the Kaiser rule (count eigenvalues above one) depends on scale, so it is applied to
    the matrix divided by its mean diagonal, and ``noise``, the standard deviation of the symmetric
    normal noise, is in the same unit; and everything stands beside a null model, since a random
    positive-definite matrix concentrates on its diagonal as well.

    Parameters
    ----------
    matrix
        An Operator, or a symmetric tensor or array ``[d, d]``.
    noise
        Standard deviation of the noise relative to the mean diagonal; the paper's variance of
        1e-3 by default.
    samples
        Random eigenbases drawn for the null model's spread and counts; fewer or none for large
        matrices. The expected diagonal share is exact at any size.
    seed
        Seed of noise and null model.
    limit
        Operators with more rows are not formed: only their diagonal share is given.

    Cost: ``O(d^3)`` per matrix formed and per sample.

    Raises ``OptionError`` for a matrix that is empty or not symmetric and for options that do not
    fit, ``ShapeError`` for one that is not square.
    """
    start = time.perf_counter()
    if noise < 0 or not math.isfinite(noise):
        raise OptionError(f"noise={noise!r} must be a finite number that is not negative.")
    settings = {"noise": noise, "samples": samples, "seed": seed, "limit": limit}
    given = isinstance(matrix, Operator)
    op = as_operator(matrix)
    if not op.shape[0]:
        raise OptionError("The matrix is empty.")
    options: dict[str, Any] = {"noise": noise, "samples": samples, "seed": seed, "limit": limit}
    if op.blocks:
        blocks = {name: concentration(block, **options) for name, block in op.blocks.items()}
        return _joint(op, blocks, settings, start)
    factors: dict[str, Concentration] = {}
    if isinstance(op, KroneckerOperator) and op.view.groups == 1:
        for name, factor in op.factors.items():
            part = concentration(factor, **options)
            factors[name] = _renamed(part, f"factor {name} of the {op.info.what}")
    if given and op.shape[0] > limit:
        return _unformed(op, factors, settings, start)
    dense = as_cpu(in_float64(op).dense())
    return _formed(dense, op.info.what, factors, settings, start)


def _formed(
    matrix: Tensor,
    of: str,
    factors: Mapping[str, Concentration],
    settings: dict[str, Any],
    start: float,
) -> Concentration:
    noise, seed = settings["noise"], settings["seed"]
    diagonal = matrix.diagonal()
    magnitudes = matrix.abs()
    radii = magnitudes.sum(1) - magnitudes.diagonal()
    values = torch.linalg.eigvalsh(matrix)
    warnings: list[str] = []
    scale = float(diagonal.mean())
    found: dict[str, Any] = {"scale": scale}
    if scale > 1e-12 * float(magnitudes.max()):
        noisy = off_diagonal_noise(matrix / scale, noise, seed)
        found["eigenvalues"] = values.flip(0) / scale
        found["noisy_eigenvalues"] = torch.linalg.eigvalsh(noisy).flip(0)
        found["kaiser"] = count_above_one(found["eigenvalues"])
        found["kaiser_noisy"] = count_above_one(found["noisy_eigenvalues"])
        found["noisy_snr"] = signal_to_noise(noisy)
    else:
        warnings.append(
            f"The mean diagonal of the {of} is {number(scale)}: the Kaiser rule needs a positive "
            "one, so it is left empty."
        )
    return Concentration(
        of=of,
        size=matrix.shape[0],
        diagonal_share=diagonal_share(matrix),
        null=null_model(values, samples=settings["samples"], seed=seed),
        band_shares=band_shares(matrix),
        centres=diagonal.clone(),
        radii=radii,
        disjoint=disjoint_discs(diagonal, radii),
        dominant=dominant_share(diagonal, radii),
        snr=signal_to_noise(matrix),
        fourier=fourier_magnitude(matrix),
        noise=noise,
        factors=factors,
        cost=Cost(seconds=time.perf_counter() - start),
        settings=settings,
        warnings=tuple(warnings),
        **found,
    )


def _unformed(
    op: Operator, factors: Mapping[str, Concentration], settings: dict[str, Any], start: float
) -> Concentration:
    """What diagonal, trace and norm say of a matrix that is not formed."""
    op = in_float64(op)
    energy = op.frobenius_norm() ** 2
    on_diagonal = float(torch.linalg.vector_norm(op.diagonal().to(torch.float64))) ** 2
    return Concentration(
        of=op.info.what,
        size=op.shape[0],
        diagonal_share=on_diagonal / energy if energy else math.nan,
        null=NullModel.expected(op.trace(), energy, op.shape[0]),
        noise=settings["noise"],
        factors=factors,
        cost=Cost(seconds=time.perf_counter() - start),
        settings=settings,
        warnings=(
            f"The {op.info.what} has {op.shape[0]:,} rows, more than limit={settings['limit']}: "
            "it was not formed, and only its diagonal share is given.",
        ),
    )


def _joint(
    op: Operator, blocks: Mapping[str, Concentration], settings: dict[str, Any], start: float
) -> Concentration:
    """The block-diagonal part, from its blocks; eigenvectors of the null model stay within them."""
    parts = [in_float64(block) for block in op.blocks.values()]
    energies = [part.frobenius_norm() ** 2 for part in parts]
    energy, size = math.fsum(energies), sum(part.shape[0] for part in parts)
    weights = [e / energy if energy else 0.0 for e in energies]

    def total(numbers: list[float]) -> float:
        return math.fsum(w * x for w, x in zip(weights, numbers) if w) if energy else math.nan

    nulls = [block.null for block in blocks.values()]
    spread = total([w * null.diagonal_share_std**2 for w, null in zip(weights, nulls)])
    null = NullModel(
        total([null.diagonal_share for null in nulls]),
        math.sqrt(spread),
        samples=min(null.samples for null in nulls),
    )
    warnings = [text for block in blocks.values() for text in block.warnings]
    if op.uncovered:
        warnings.append(f"The {op.info.what} does not define {listing(op.uncovered)}.")
    return Concentration(
        of=f"block diagonal of the {op.info.what}",
        size=size,
        diagonal_share=total([block.diagonal_share for block in blocks.values()]),
        null=null,
        noise=settings["noise"],
        blocks=blocks,
        cost=Cost(seconds=time.perf_counter() - start),
        settings=settings,
        warnings=tuple(warnings),
    )


def _renamed(part: Concentration, of: str) -> Concentration:
    from dataclasses import replace

    return replace(part, of=of)
