"""Gershgorin discs, and eigenvalues against the Kaiser rule with and without noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..analysis.concentration import Concentration
from ..errors import NotDefinedError, check_option
from .marks import mark, value
from .style import GRID, INK, NEGATIVE, PALETTE, SIZE_MAP, axes_for, log_axis, power_of_ten, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_DISCS = 60  # more circles than this are drawn as intervals


@styled
def plot_gershgorin(
    concentration: Concentration,
    *,
    ax: Axes | None = None,
    kind: str = "auto",
    title: str | None = None,
) -> Axes:
    """Gershgorin discs: every eigenvalue lies in one of them.

    Row i has its centre at the diagonal entry and as radius the sum of the magnitudes beside it.
    ``kind="discs"`` draws circles in the complex plane, ``"intervals"`` the real parts of them one
    above the other, sorted by centre (``"auto"`` takes circles for up to 60 rows). Discs that touch
    no other are filled in green. Crosses are the eigenvalues, circles those after noise was added
    off the diagonal. Everything is divided by the mean of the diagonal. Of a matrix that was not
    formed there are the discs of some rows, drawn at random.
    """
    check_option("kind", kind, ("auto", "discs", "intervals"))
    centres, radii = _discs(concentration)
    ax = axes_for(ax, width=5.4, height=3.4)
    whole = len(centres) == concentration.size
    alone = _alone(centres, radii) if whole else np.zeros(len(centres), dtype=bool)
    circles = kind == "discs" or (kind == "auto" and len(centres) <= _MOST_DISCS)
    if circles:
        _circles(ax, centres, radii, alone)
    else:
        _intervals(ax, centres, radii, alone)
    _eigenvalues(ax, concentration, circles)
    ax.set_xlabel("eigenvalue / mean diagonal entry")
    ax.grid(True, axis="x")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1.2)
    apart = f"{int(alone.sum())} of {len(centres)} discs touch no other"
    if not whole:
        apart = f"{len(centres)} of {concentration.size:,} discs, drawn at random"
    ax.set_title(apart if title is None else f"{title}: {apart}")
    return ax


def _discs(concentration: Concentration) -> tuple[np.ndarray, np.ndarray]:
    centres = concentration.centres.numpy()
    if not len(centres):
        raise NotDefinedError(
            f"The discs of the {concentration.of} were not computed (too large, or a whole "
            "operator of which only the blocks have them: take concentration.blocks[...])."
        )
    scale = concentration.scale or 1.0
    return centres / scale, concentration.radii.numpy() / abs(scale)


def _alone(centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Which discs touch no other one."""
    gap = np.abs(centres[:, None] - centres[None, :]) - (radii[:, None] + radii[None, :])
    np.fill_diagonal(gap, np.inf)
    return np.asarray((gap > 0).all(1)) if len(centres) > 1 else np.ones(1, dtype=bool)


def _circles(ax: Axes, centres: np.ndarray, radii: np.ndarray, alone: np.ndarray) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Circle

    for k in np.argsort(-radii):
        colour = PALETTE[2] if alone[k] else PALETTE[0]
        disc = Circle(
            (centres[k], 0), radii[k], fc=to_rgba(colour, 0.1), ec=to_rgba(colour, 0.7), lw=0.6
        )
        touches = "touches no other" if alone[k] else "touches others"
        text = f"row {k + 1}: centre {value(centres[k])}, radius {value(radii[k])}, {touches}"
        mark(ax.add_patch(disc), text)
    tall = float(radii.max()) or 0.1
    corners = [(float((centres - radii).min()), -tall), (float((centres + radii).max()), tall)]
    ax.update_datalim(corners)
    ax.margins(0.04)
    ax.set_aspect("equal", adjustable="datalim")
    ax.autoscale_view()
    ax.axhline(0, color=GRID, lw=0.6, zorder=0)
    ax.set_ylabel("imaginary part")


def _intervals(ax: Axes, centres: np.ndarray, radii: np.ndarray, alone: np.ndarray) -> None:
    order = np.argsort(centres)
    places = np.arange(1, len(centres) + 1)
    c, r, apart = centres[order], radii[order], alone[order]
    for which, colour in ((~apart, PALETTE[0]), (apart, PALETTE[2])):
        ax.fill_betweenx(
            places, c - r, c + r, where=which, step="mid", color=colour, alpha=0.45, lw=0.4
        )
    ax.plot(c, places, color=INK, lw=1.0, label="centre")
    ax.set_ylim(-0.06 * len(c), len(c) * 1.02)
    ax.set_ylabel("row, sorted by diagonal entry")


def _eigenvalues(ax: Axes, concentration: Concentration, circles: bool) -> None:
    base = 0.0 if circles else -0.03 * len(concentration.centres)
    noisy = _distinct(concentration.noisy_eigenvalues.numpy(), ax)
    clean = _distinct(concentration.eigenvalues.numpy(), ax)
    if len(noisy):
        ax.plot(
            noisy,
            np.full(len(noisy), base),
            ls="none",
            marker="o",
            mfc="none",
            ms=4,
            mew=0.7,
            color=NEGATIVE,
            label="with noise",
        )
    if len(clean):
        ax.plot(
            clean,
            np.full(len(clean), base),
            ls="none",
            marker="x",
            ms=4,
            mew=0.9,
            color=INK,
            label="eigenvalue",
        )


def _distinct(values: np.ndarray, ax: Axes) -> np.ndarray:
    """One of several values whose marks would cover each other."""
    low, high = ax.get_xlim()
    places = np.round((values - low) / (high - low) * 250)
    return np.asarray(values[np.unique(places, return_index=True)[1]])


@styled
def plot_scree(
    concentration: Concentration, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Eigenvalues divided by the mean diagonal entry, with and without noise off the diagonal.

    Those above the line at 1 are the ones that the Kaiser rule keeps.
    """
    ax = axes_for(ax, width=5.0, height=3.0)
    pairs = (
        (concentration.eigenvalues, INK, "-", "without noise", concentration.kaiser),
        (concentration.noisy_eigenvalues, NEGATIVE, "--", "with noise", concentration.kaiser_noisy),
    )
    drawn = False
    for values, colour, dash, label, above in pairs:
        array = values.numpy()
        if len(array):
            drawn = True
            text = label if above is None else f"{label}: {above} above 1"
            ax.plot(np.arange(1, len(array) + 1), array, color=colour, ls=dash, label=text)
    if not drawn:
        raise NotDefinedError(f"The eigenvalues of the {concentration.of} were not computed.")
    ax.axhline(1.0, color=PALETTE[0], lw=0.8, ls=(0, (4, 2)), label="Kaiser rule")
    ax.set_yscale("symlog", linthresh=1.0)
    ax.set_xscale("log")
    log_axis(ax.xaxis)
    ax.yaxis.set_major_formatter(lambda v, _: power_of_ten(v))
    ax.set_xlabel("rank of the eigenvalue")
    ax.set_ylabel("eigenvalue / mean diagonal entry")
    ax.grid(True)
    ax.legend(loc="upper right")
    if title is not None:
        ax.set_title(title)
    return ax


@styled
def plot_fourier(
    concentration: Concentration, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Magnitude of the two-dimensional Fourier transform, zero frequency in the middle.

    A diagonal matrix has all its energy on the anti-diagonal, where the two frequencies cancel.
    """
    from matplotlib.colors import LogNorm

    fourier = concentration.fourier.numpy()
    if not fourier.size or not fourier.max() > 0:
        raise NotDefinedError(f"The Fourier spectrum of the {concentration.of} was not computed.")
    ax = axes_for(ax, width=4.2, height=3.6)
    shifted = np.fft.fftshift(fourier)
    top = float(shifted.max())
    norm = LogNorm(top * 1e-4, top)
    image = ax.imshow(
        np.maximum(shifted, top * 1e-4),
        norm=norm,
        cmap=SIZE_MAP,
        extent=(-0.5, 0.5, -0.5, 0.5),
        origin="lower",
        interpolation="none",
    )
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.85, pad=0.02, label="magnitude")
    log_axis(bar.ax.yaxis, minor=False)
    ax.set_xlabel("frequency along the columns")
    ax.set_ylabel("frequency along the rows")
    if title is not None:
        ax.set_title(title)
    return ax
