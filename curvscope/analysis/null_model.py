"""What concentration a matrix would have if its eigenvectors were random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .diagonality import diagonal_share, disjoint_discs, dominant_share, signal_to_noise

_OPERATIONS = 4e9  # of d^3 per sample: what sampling may cost
_FEWEST = 4  # samples below which a standard deviation says nothing


@dataclass(frozen=True)
class NullModel:
    """Random orthogonal eigenvectors (Haar measure) with the spectrum of the matrix.

    ``diagonal_share`` is the exact expectation ``(tr^2 + 2 ||.||_F^2) / ((d + 2) ||.||_F^2)``;
    everything else is a mean or standard deviation over ``samples`` random bases, NaN without.
    """

    diagonal_share: float
    diagonal_share_std: float = math.nan
    disjoint: float = math.nan
    disjoint_std: float = math.nan
    dominant: float = math.nan
    dominant_std: float = math.nan
    snr: float = math.nan
    snr_std: float = math.nan
    samples: int = 0

    @classmethod
    def expected(cls, trace: float, energy: float, rows: int) -> NullModel:
        """The expectation alone, from trace and squared Frobenius norm ``energy``."""
        if not energy:
            return cls(math.nan)
        return cls((trace**2 + 2 * energy) / ((rows + 2) * energy))


def null_model(values: Tensor, *, samples: int = 16, seed: int = 0) -> NullModel:
    """The null model of a matrix with eigenvalues ``values`` ``[d]``.

    Fewer than ``samples`` bases are drawn for large matrices, none where even a few would take
    long.
    """
    rows = len(values)
    plain = NullModel.expected(float(values.sum()), float(values.square().sum()), rows)
    samples = min(samples, int(_OPERATIONS / rows**3))
    if samples < _FEWEST or math.isnan(plain.diagonal_share):
        return plain
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(samples):
        basis = haar_orthogonal(rows, generator)
        matrix = (basis * values) @ basis.mT
        centres = matrix.diagonal()
        radii = matrix.abs().sum(1) - centres.abs()
        drawn.append(
            [
                diagonal_share(matrix),
                float(disjoint_discs(centres, radii)),
                dominant_share(centres, radii),
                signal_to_noise(matrix),
            ]
        )
    means, spreads = zip(*(_moments(column) for column in zip(*drawn)))
    return NullModel(
        diagonal_share=plain.diagonal_share,
        diagonal_share_std=spreads[0],
        disjoint=means[1],
        disjoint_std=spreads[1],
        dominant=means[2],
        dominant_std=spreads[2],
        snr=means[3],
        snr_std=spreads[3],
        samples=samples,
    )


def haar_orthogonal(rows: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix from the Haar measure.

    The signs of R make the QR decomposition unique; without them Q is not Haar-distributed.
    Source: Mezzadri, "How to generate random matrices from the classical compact groups", Notices
    of the AMS 54 (2007).
    """
    normal = torch.randn(rows, rows, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(normal)
    return basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(basis.dtype)


def _moments(column: tuple[float, ...]) -> tuple[float, float]:
    values = torch.tensor(column, dtype=torch.float64)
    # a diagonal sample has an infinite signal-to-noise ratio; rounding decides which ones do
    if not bool(torch.isfinite(values).all()):
        return math.nan, math.nan
    return float(values.mean()), float(values.std())
