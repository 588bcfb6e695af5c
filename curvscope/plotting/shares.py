"""How much of a matrix's energy lies on and near the diagonal, beside the null model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..analysis.concentration import Concentration
from ..errors import NotDefinedError
from .marks import mark, readout
from .style import GRID, INK, MUTED, PALETTE, axes_for, colours, short, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 120  # of a curve
_SIGMAS = 2.0  # standard errors that a band shows


def null_band_shares(size: int, diagonal_share: float) -> np.ndarray:
    """Expected share of energy with ``|i - j| <= k`` under the null model, for ``k = 0 .. d-1``.

    Random orthogonal eigenvectors make all off-diagonal places alike, so what is not on the
    diagonal is spread evenly over them: ``s + (1 - s) k (2d - k - 1) / (d (d - 1))``.
    """
    if size == 1:
        return np.ones(1)
    k = np.arange(size)
    inside = k * (2 * size - k - 1) / (size * (size - 1))
    return np.asarray(diagonal_share + (1 - diagonal_share) * inside)


@styled
def plot_bands(
    concentration: Concentration | Mapping[str, Concentration],
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Cumulative share of squared entries within a distance of the diagonal.

    Solid: the matrix. Dotted, in the same colour: what the null model (the same spectrum with
    random orthogonal eigenvectors) is expected to have. Solid above dotted means that energy
    concentrates near the diagonal beyond what any matrix of that spectrum does. A pale band is two
    standard errors wide on either side where the shares are estimates.
    """
    named = _named(concentration)
    named = {name: c for name, c in named.items() if len(c.band_shares)}
    if not named:
        raise NotDefinedError("No band shares were computed; the matrix was too large to form.")
    ax = axes_for(ax, width=5.6, height=3.2)
    tint = colours(list(named), exact=0)
    for name, one in named.items():
        shares = one.band_shares.numpy()
        null = null_band_shares(one.size, one.null.diagonal_share)
        # Fraction of the largest distance, so that matrices of different sizes share an axis.
        distance = np.arange(one.size) / max(one.size - 1, 1)
        few = np.unique(np.linspace(0, one.size - 1, min(one.size, _POINTS)).astype(int))
        steps = "steps-post" if len(few) == one.size else "default"
        (line,) = ax.plot(
            distance[few], shares[few], color=tint[name], label=short(name), drawstyle=steps
        )
        mark(line, name, points=zip(distance[few].tolist(), shares[few].tolist(), strict=True))
        error = one.band_stderr.numpy()
        if len(error):
            low, high = (shares + c * error for c in (-_SIGMAS, _SIGMAS))
            ax.fill_between(
                distance[few], low[few], high[few], color=tint[name], alpha=0.15, lw=0, step=None
            )
        (line,) = ax.plot(
            distance[few], null[few], color=tint[name], ls=":", lw=1.1, drawstyle=steps
        )
        points = zip(distance[few].tolist(), null[few].tolist(), strict=True)
        mark(line, f"{name}, null model", points=points)
        (dot,) = ax.plot([0], shares[:1], marker="o", color=tint[name], clip_on=False, zorder=4)
        mark(dot)
    ax.plot([], [], color=MUTED, ls=":", label="null model")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("distance from the diagonal / largest distance")
    ax.set_ylabel("cumulative share of energy")
    readout(ax, "distance", "share")
    ax.grid(True)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    if title is not None:
        ax.set_title(title)
    return ax


@styled
def plot_diagonal_shares(
    concentration: Concentration | Mapping[str, Concentration],
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Share of squared entries on the diagonal, and the null model's with two standard deviations.

    Of an operator with blocks, a bar per block and per Kronecker factor.
    """
    named = _flat(_named(concentration))
    if not named:
        raise NotDefinedError("There is no matrix of which to draw the diagonal's share.")
    ax = axes_for(ax, width=6.2, height=0.95 + 0.24 * len(named))
    places = np.arange(len(named))
    shares = [one.diagonal_share for one in named.values()]
    bars = ax.barh(places, shares, height=0.7, color=PALETTE[0], label="the matrix")
    for bar, (name, one) in zip(bars, named.items(), strict=True):
        chance = f"null model {100 * one.null.diagonal_share:.3g} %"
        mark(bar, f"{name}: {100 * one.diagonal_share:.3g} % on the diagonal, {chance}")
    null = [one.null.diagonal_share for one in named.values()]
    spread = [2 * _or_zero(one.null.diagonal_share_std) for one in named.values()]
    ax.errorbar(
        null,
        places,
        xerr=spread,
        ls="none",
        marker="D",
        ms=4,
        color=INK,
        ecolor=INK,
        capsize=2.5,
        label="null model, ± 2 standard deviations",
    )
    ax.set_yticks(places, [short(name, 34) for name in named])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(named) - 0.4, -0.6)
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of energy on the diagonal")
    ax.grid(True, axis="x", color=GRID)
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    if title is not None:
        ax.set_title(title)
    return ax


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _named(concentration: Concentration | Mapping[str, Concentration]) -> dict[str, Concentration]:
    if isinstance(concentration, Mapping):
        return dict(concentration)
    return dict(concentration.blocks) or {concentration.of: concentration}


def _flat(named: Mapping[str, Concentration]) -> dict[str, Concentration]:
    """Blocks and their factors in one list; a Kronecker product stands for its factors."""
    found: dict[str, Concentration] = {}
    for name, one in named.items():
        if one.factors:
            for factor, part in one.factors.items():
                found[f"{name}, factor {factor}"] = part
        else:
            found[name] = one
    return found
