"""Largest eigenvalues and densities of minibatch curvature against batch size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import NotDefinedError
from .style import INK, MUTED, PALETTE, axes_for, log_axis, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..analysis.batch_spectra import BatchSpectra


@styled
def plot_batch_spectra(
    spectra: BatchSpectra, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """The largest eigenvalue against batch size, both logarithmic.

    Marks are single batches and the line their mean; the dashed line is the random-matrix
    prediction, the dotted one that with the noise along the eigenvector, and the horizontal line
    the largest eigenvalue of all samples.
    """
    top = spectra.values[:, :, 0]
    if not bool((top > 0).any()):
        raise NotDefinedError("No eigenvalue is positive: there is nothing to draw.")
    ax = axes_for(ax)
    sizes = list(spectra.sizes)
    for draw in range(top.shape[1]):
        ax.plot(sizes, top[:, draw].numpy(), "o", color=PALETTE[0], alpha=0.35, ms=4)
    ax.plot(sizes, spectra.largest.numpy(), "-", color=PALETTE[0], label="mean of batches")
    ax.plot(sizes, spectra.predicted[:, 0].numpy(), "--", color=PALETTE[1], label="random matrix")
    ax.plot(
        sizes,
        spectra.predicted_along[:, 0].numpy(),
        ":",
        color=PALETTE[2],
        lw=2.0,
        label="noise along the eigenvector",
    )
    ax.axhline(float(spectra.full[0]), color=INK, lw=0.9, label=f"all {spectra.samples:,} samples")
    ax.set_xscale("log")
    ax.set_yscale("log")
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    ax.set_xlabel("batch size")
    ax.set_ylabel("largest eigenvalue")
    ax.legend(loc="upper right")
    ax.set_title(title if title is not None else f"{spectra.of} of a minibatch")
    return ax


@styled
def plot_batch_densities(
    spectra: BatchSpectra, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Spectral densities of one batch per size, one above the other on a logarithmic axis."""
    if not spectra.densities:
        raise NotDefinedError(
            "There are no densities here: ask for them with batch_spectra(densities=True)."
        )
    ax = axes_for(ax)
    for k, (size, found) in enumerate(zip(spectra.sizes, spectra.densities, strict=True)):
        shade = 0.25 + 0.75 * (k + 1) / len(spectra.sizes)
        ax.semilogy(
            found.grid.numpy(),
            found.density.clamp_min(1e-12).numpy(),
            color=PALETTE[0],
            alpha=shade,
            label=f"batch of {size:,}",
        )
    peak = max(float(d.density.max()) for d in spectra.densities)
    ax.set_ylim(peak * 1e-6, peak * 2)
    log_axis(ax.yaxis, minor=False)
    ax.axvline(0.0, color=MUTED, lw=0.6)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density")
    ax.legend(loc="upper right")
    ax.set_title(title if title is not None else f"{spectra.of} of a minibatch")
    return ax
