"""Eigenvalues: by rank on logarithmic axes, and as a histogram over both signs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..analysis.spectrum import Spectrum
from ..errors import OptionError
from .marks import mark, readout
from .style import DASHES, INK, NEGATIVE, PALETTE, axes_for, colours, log_axis, power_of_ten, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DECADES = 12  # below this many decades under the largest there is only rounding


def _named(spectra: Spectrum | Mapping[str, Spectrum]) -> dict[str, Spectrum]:
    if isinstance(spectra, Spectrum):
        return {spectra.of: spectra}
    if not spectra:
        raise OptionError("There is no spectrum to draw.")
    return dict(spectra)


@styled
def plot_spectra(
    spectra: Spectrum | Mapping[str, Spectrum],
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Magnitudes of the eigenvalues against their rank, one line per spectrum.

    Positive eigenvalues are a line, negative ones a line of open circles of the same colour that
    counts its own ranks, so that negative curvature is seen with its size and its number. Those
    that vanish up to the spectrum's tolerance are left out. The first spectrum is drawn in ink,
    as the exact one.
    """
    named = _named(spectra)
    ax = axes_for(ax)
    tint = colours(list(named))
    top = max((s.spectral_norm for s in named.values()), default=0.0)
    longest = max(s.size for s in named.values())
    low = top
    # The exact one last, so that an approximation that coincides with it does not hide it.
    for place, (name, spectrum) in reversed(list(enumerate(named.items()))):
        values = spectrum.eigenvalues.numpy()
        positive = values[values > spectrum.tolerance][::-1]
        negative = -values[values < -spectrum.tolerance]
        dash = DASHES[place % len(DASHES)]
        width = 2.0 if place == 0 else 1.3
        if len(positive):
            ranks = np.arange(1, len(positive) + 1)
            (line,) = ax.plot(ranks, positive, color=tint[name], ls=dash, lw=width, label=name)
            points = zip(ranks.tolist(), positive.tolist(), strict=True)
            mark(line, name, series=name, points=points)
            low = min(low, positive[-1])
        else:
            ax.plot([], [], color=tint[name], ls=dash, lw=width, label=name)
        if len(negative):
            label = f"{name}, {len(negative):,} negative"
            ranks = np.arange(1, len(negative) + 1)
            marks = np.unique(np.geomspace(1, len(negative), 24).astype(int)) - 1
            (line,) = ax.plot(
                ranks,
                negative,
                color=tint[name],
                lw=0.7,
                marker="o",
                mfc="none",
                markevery=marks.tolist(),
                label=label,
            )
            points = zip(ranks.tolist(), (-negative).tolist(), strict=True)
            mark(line, f"{name}, negative", series=name, points=points)
            low = min(low, negative[-1])
    if top > 0:
        ax.set_yscale("log")
        ax.set_ylim(max(low, top * 10.0**-_DECADES) / 1.6, top * 2)
        log_axis(ax.yaxis, minor=False)
    if longest > 30:
        ax.set_xscale("log")
        log_axis(ax.xaxis)
    ax.set_xlim(0.9 if longest > 30 else 0.5, longest * 1.1)
    ax.set_xlabel("rank of the eigenvalue, largest magnitude first")
    ax.set_ylabel("magnitude of the eigenvalue")
    readout(ax, "rank", "eigenvalue")
    ax.grid(True, which="major")
    handles, labels = ax.get_legend_handles_labels()
    order = _legend_order(labels, list(named))
    ax.legend(
        [handles[k] for k in order],
        [labels[k] for k in order],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
    )
    if title is not None:
        ax.set_title(title)
    return ax


def _legend_order(labels: list[str], names: list[str]) -> list[int]:
    wanted = [text for name in names for text in labels if _belongs(text, name)]
    return [labels.index(text) for text in dict.fromkeys(wanted)]


def _belongs(label: str, name: str) -> bool:
    return label == name or (label.startswith(f"{name}, ") and label.endswith(" negative"))


@styled
def plot_histogram(
    spectrum: Spectrum, *, ax: Axes | None = None, bins: int = 12, title: str | None = None
) -> Axes:
    """How many eigenvalues of which size: ``bins`` logarithmic bins on either side of zero.

    The bar at zero counts those that vanish up to the spectrum's tolerance.
    """
    ax = axes_for(ax)
    values = spectrum.eigenvalues.numpy()
    top = spectrum.spectral_norm
    if top == 0:
        ax.bar([0], [len(values)], color=INK)
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("number of eigenvalues")
        return ax
    sizes = np.abs(values)
    seen = sizes[sizes > max(spectrum.tolerance, top * 1e-12)]
    floor = min(float(seen.min()), top / 10)
    edges = np.geomspace(floor, top * (1 + 1e-9), bins + 1)
    for sign, colour, label in ((1, PALETTE[0], "positive"), (-1, NEGATIVE, "negative")):
        counts, _ = np.histogram(sign * values, bins=edges)
        if counts.any():
            centres = sign * np.arange(1, bins + 1)
            ax.bar(centres, counts, width=0.92, color=colour, label=f"{label} ({counts.sum():,})")
    inside = int((sizes < edges[0]).sum())
    if inside:
        ax.bar([0], [inside], width=0.92, color="#9aa3ab", label=f"about zero ({inside:,})")
    ticks = range(bins, -1, -max(1, bins // 3))
    places = [0.5 + k for k in ticks]
    texts = [power_of_ten(float(f"{edges[k]:.2g}")) for k in ticks]
    if bool((values < -edges[0]).any()):
        places = [-p for p in places[:-1]] + [0.0] + places[:-1]
        texts = [f"−{t}" for t in texts[:-1]] + ["0"] + texts[:-1]
    ax.set_xticks(places, texts)
    ax.set_yscale("symlog", linthresh=1)
    ax.yaxis.set_major_formatter(lambda v, _: power_of_ten(v))
    ax.set_ylim(0)
    ax.set_xlabel("eigenvalue (logarithmic bins)")
    ax.set_ylabel("number of eigenvalues")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    if title is not None:
        ax.set_title(title)
    return ax
