"""Numbers from random probes and from iterations, with their errors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..analysis.estimators import Density, DiagonalEstimate, Eigenpairs, Estimate, Solution
from ..analysis.estimators.common import quantile
from ..errors import counted
from .style import INK, MUTED, NEGATIVE, PALETTE, axes_for, log_axis, styled, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 2000  # entries of a diagonal that are drawn


@styled
def plot_estimate(estimate: Estimate, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """The value against the number of probes, with the interval at the result's confidence.

    An exact value is a line; where single probes are not kept, only the final interval is drawn.
    """
    ax = axes_for(ax)
    samples = estimate.samples.numpy()
    if len(samples) > 2 and math.isclose(
        float(samples.mean()), estimate.value, rel_tol=1e-6, abs_tol=1e-12
    ):
        counts = np.arange(1, len(samples) + 1)
        means = np.cumsum(samples) / counts
        squares = np.cumsum((samples - estimate.value) ** 2) / counts
        spread = squares - (means - estimate.value) ** 2
        first = 2
        error = np.sqrt(np.maximum(spread[first:], 0) / (counts[first:] - 1))
        half = error * [quantile(estimate.confidence, n - 1) for n in counts[first:].tolist()]
        band = (means[first:] - half, means[first:] + half)
        ax.fill_between(counts[first:], *band, color=PALETTE[0], alpha=0.2, lw=0)
        ax.plot(counts, means, color=PALETTE[0])
        ax.set_xlim(1, len(samples))
    ax.axhline(estimate.value, color=INK, lw=1.0)
    if not estimate.exact:
        for edge in estimate.interval:
            if math.isfinite(edge):
                ax.axhline(edge, color=MUTED, lw=0.8, ls="--")
    ax.set_xlabel("probes")
    ax.set_ylabel(estimate.quantity)
    if title is not None:
        ax.set_title(title)
    return ax


@styled
def plot_eigenpairs(pairs: Eigenpairs, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Eigenvalues by rank, a bar of the residual on each; open circles have not converged."""
    ax = axes_for(ax)
    ranks = np.arange(1, len(pairs.values) + 1)
    values, residuals = pairs.values.numpy(), pairs.residuals.numpy()
    good = np.array(pairs.pair_converged)
    ax.axhline(0, color=MUTED, lw=0.7)
    for positive, colour in ((True, PALETTE[0]), (False, NEGATIVE)):
        for converged in (True, False):
            chosen = ((values >= 0) == positive) & (good == converged)
            if chosen.any():
                ax.errorbar(
                    ranks[chosen],
                    values[chosen],
                    yerr=residuals[chosen],
                    fmt="o",
                    color=colour,
                    mfc=colour if converged else "none",
                    elinewidth=1.0,
                )
    ax.set_xlim(0.5, len(ranks) + 0.5)
    whole_numbers(ax.xaxis)
    ax.set_xlabel("rank of the eigenvalue, the most wanted first")
    ax.set_ylabel("eigenvalue")
    if title is not None:
        ax.set_title(title)
    return ax


@styled
def plot_diagonal(
    diagonal: DiagonalEstimate, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """The entries in descending order with one standard error on either side."""
    ax = axes_for(ax)
    order = diagonal.value.argsort(descending=True)
    if len(order) > _POINTS:
        order = order[torch.linspace(0, len(order) - 1, _POINTS).round().long()]
    values, errors = diagonal.value[order].numpy(), diagonal.stderr[order].numpy()
    ranks = np.linspace(1, diagonal.size, len(values))
    ax.axhline(0, color=MUTED, lw=0.7)
    ax.fill_between(ranks, values - errors, values + errors, color=PALETTE[0], alpha=0.25, lw=0)
    ax.plot(ranks, values, color=PALETTE[0])
    ax.set_xlabel("entry, the largest first")
    ax.set_ylabel("diagonal entry")
    if title is not None:
        ax.set_title(title)
    return ax


@styled
def plot_density(
    density: Density, *, ax: Axes | None = None, log: bool = True, title: str | None = None
) -> Axes:
    """The density with its band, on a logarithmic axis of six decades unless ``log=False``."""
    ax = axes_for(ax)
    grid, low, high = density.grid.numpy(), density.low.numpy(), density.high.numpy()
    values = density.density.numpy()
    floor = float(values.max()) * 1e-6
    if log:
        ax.set_yscale("log")
        ax.set_ylim(floor, float(max(values.max(), np.nan_to_num(high).max())) * 3)
        log_axis(ax.yaxis, minor=False)
        low, high = np.maximum(low, floor), np.maximum(high, floor)
        values = np.maximum(values, floor)
    if density.probes > 1:
        band = f"{100 * density.confidence:g} % band"
        ax.fill_between(grid, low, high, color=PALETTE[0], alpha=0.25, lw=0, label=band)
    drawn = ax.plot(grid, values, color=PALETTE[0] if density.probes else INK)
    estimated = f"estimate, {counted(density.probes, 'probe')}"
    drawn[0].set_label(estimated if density.probes else "exact")
    if density.probes > 1:
        ax.legend(loc="best")
    ax.axvline(0, color=MUTED, lw=0.7)
    ax.set_xlim(grid[0], grid[-1])
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density")
    if title is not None:
        ax.set_title(title)
    return ax


@styled
def plot_solution(solution: Solution, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Relative residuals over the steps, a line per right-hand side; dots are the true ones."""
    ax = axes_for(ax)
    steps, columns = solution.history.shape
    ends = solution.residuals.numpy()
    for column in range(columns if steps else len(ends)):
        colour = PALETTE[column % len(PALETTE)]
        if steps:
            known = np.concatenate([[1.0], solution.history[:, column].numpy()])
            ax.plot(np.arange(steps + 1), known, color=colour)
        if ends[column] > 0:
            ax.plot([steps], [ends[column]], "o", color=colour, ms=4)
    ax.set_yscale("log")
    log_axis(ax.yaxis, minor=False)
    tol = float(solution.settings["tol"])
    if tol > 0:
        ax.axhline(tol, color=MUTED, lw=0.8, ls="--")
    whole_numbers(ax.xaxis)
    ax.set_xlabel("products per right-hand side")
    ax.set_ylabel("relative residual")
    if title is not None:
        ax.set_title(title)
    return ax
