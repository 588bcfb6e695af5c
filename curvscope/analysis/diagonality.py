"""Measures of how diagonal one matrix ``[d, d]`` is, each a function of the matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TILES = 128  # rows of a Fourier picture
_ROUNDING = 1e-12


def diagonal_share(matrix: Tensor) -> float:
    """``sum_i M_ii^2 / ||M||_F^2``; NaN for the zero matrix."""
    energy = float(matrix.square().sum())
    return float(matrix.diagonal().square().sum()) / energy if energy else math.nan


def band_shares(matrix: Tensor) -> Tensor:
    """``[d]``: entry ``k`` is the share of energy with ``|i - j| <= k``; the last one is 1."""
    rows = matrix.shape[0]
    energies = torch.zeros(rows, dtype=matrix.dtype)
    place = torch.arange(rows)
    for i in range(rows):  # row by row: no index matrix as large as the matrix itself
        energies.index_add_(0, (place - i).abs(), matrix[i].square())
    total = energies.sum()
    if not float(total):
        return torch.full_like(energies, math.nan)
    return energies.cumsum(0) / total


def disjoint_discs(centres: Tensor, radii: Tensor) -> int:
    """How many of the intervals ``centre +- radius`` have no point in common with any other."""
    low, order = (centres - radii).sort()
    high = (centres + radii)[order]
    reach = torch.cummax(high, 0).values
    free = torch.ones(len(low), dtype=torch.bool)
    free[1:] &= reach[:-1] < low[1:]
    free[:-1] &= high[:-1] < low[1:]
    return int(free.sum())


def dominant_share(centres: Tensor, radii: Tensor) -> float:
    """Share of rows with ``|M_ii| > sum_{j != i} |M_ij|``."""
    return float((centres.abs() > radii).to(torch.float64).mean())


def signal_to_noise(matrix: Tensor) -> float:
    """``10 log10(sum_i M_ii^2 / sum_{i < j} M_ij^2)`` in decibel; infinite for a diagonal matrix.

    Each pair off the diagonal counts once, as in arXiv 2405.16397: all entries together would give
    3.01 dB less. NaN for the zero matrix.
    """
    on_diagonal = float(matrix.diagonal().square().sum())
    beside = float(matrix.triu(1).square().sum())
    if not beside:
        return math.inf if on_diagonal else math.nan
    return 10 * math.log10(on_diagonal / beside) if on_diagonal else -math.inf


def off_diagonal_noise(matrix: Tensor, deviation: float, seed: int) -> Tensor:
    """``matrix`` plus symmetric normal noise of that standard deviation off the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype).triu(1)
    return matrix + deviation * (noise + noise.mT)


def count_above_one(values: Tensor) -> int:
    """Kaiser's rule: eigenvalues above one, where rounding does not lift them there."""
    return int((values > 1 + _ROUNDING * max(1.0, float(values.abs().max()))).sum())


def fourier_magnitude(matrix: Tensor) -> Tensor:
    """``|FFT2(M)|`` ``[m, m]``, zero frequency first; averaged over tiles where ``d > 128``."""
    magnitude = torch.fft.fft2(matrix).abs()
    rows = magnitude.shape[0]
    if rows <= _TILES:
        return magnitude
    # the edges of adaptive pooling are those of equal tiles, up to one row
    return torch.nn.functional.adaptive_avg_pool2d(magnitude[None], _TILES)[0]
