"""Sharpness against what the learning rate allows, and spectra over the steps of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import NotDefinedError, ShapeError
from .style import DASHES, INK, PALETTE, SIZE_MAP, axes_for, log_axis, power_of_ten, short, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = Mapping[str, tuple[Any, Any]] | tuple[Any, Any]


@styled
def plot_edge_of_stability(
    sharpness: Curves,
    *,
    lr: Any = None,
    threshold: Any = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """The largest eigenvalue over the steps, and the value beyond which plain descent diverges.

    ``sharpness`` is ``(steps [n], largest eigenvalues [n])``, or a mapping from names to such
    pairs. The line lies at ``2 / lr``, the limit for gradient descent on a quadratic; ``lr`` is a
    number, or one per step (of the first curve). ``threshold`` draws another limit, such as
    ``2 (1 + beta) / lr`` with momentum. The axis is logarithmic where every value is positive.

    Source: Cohen, Kaur, Li, Kolter and Talwalkar 2021 (arXiv 2103.00065).
    """
    ax = axes_for(ax)
    named = dict(sharpness) if isinstance(sharpness, Mapping) else {"": sharpness}
    curves = {name: _curve(name, *pair) for name, pair in named.items()}
    if not any(np.isfinite(values).any() for _, values in curves.values()):
        raise NotDefinedError("There is no finite eigenvalue to draw.")
    lowest = min(float(np.nanmin(v, initial=np.inf)) for _, v in curves.values())
    for k, (name, (steps, values)) in enumerate(curves.items()):
        ax.plot(
            steps,
            values,
            color=PALETTE[k % len(PALETTE)],
            marker=".",
            label=short(name) if name else "largest eigenvalue",
        )
    steps = next(iter(curves.values()))[0]
    rates = None if lr is None else _plain(lr)
    limits = {}
    if rates is not None:
        limits["2 / lr"] = 2 / np.where(rates > 0, rates, np.nan)
    if threshold is not None:
        limits["limit"] = _plain(threshold)
    for k, (name, limit) in enumerate(limits.items()):
        if limit.ndim and limit.shape != steps.shape:
            raise ShapeError(
                f"{name} has {limit.size} values for {steps.size} steps: give one number, or one "
                "per step of the first curve."
            )
        dash = DASHES[1 + k]
        if limit.ndim:
            ax.plot(steps, limit, color=INK, ls=dash, lw=1.1, label=name)
        else:
            ax.axhline(float(limit), color=INK, ls=dash, lw=1.1, label=name)
    if lowest > 0:
        ax.set_yscale("log")
        log_axis(ax.yaxis)
        _room(ax)
    ax.set_xlabel("step")
    ax.set_ylabel("largest eigenvalue")
    ax.grid(True, axis="y")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    if title is not None:
        ax.set_title(title)
    return ax


@styled
def plot_eigenvalues_over_steps(
    steps: Any,
    eigenvalues: Sequence[Any],
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Eigenvalues as lines over the steps: the largest of every step joined, and so on.

    ``eigenvalues`` holds one sequence per step, of any length, in any order. The axis is
    logarithmic for magnitudes over more than two decades, linear in between, so that signs show.
    """
    ax = axes_for(ax)
    places = _plain(steps).reshape(-1)
    rows = [np.sort(_plain(row).reshape(-1))[::-1] for row in eigenvalues]
    if len(rows) != len(places):
        raise ShapeError(f"There are {len(places)} steps and {len(rows)} lists of eigenvalues.")
    most = max((len(row) for row in rows), default=0)
    table = np.full((len(rows), most), np.nan)
    for k, row in enumerate(rows):
        table[k, : len(row)] = row
    sizes = np.abs(table[np.isfinite(table) & (table != 0)])
    if not sizes.size:
        raise NotDefinedError("There is no finite eigenvalue other than zero to draw.")
    import matplotlib

    shades = matplotlib.colormaps[SIZE_MAP](np.linspace(0.0, 0.85, most))
    for k in range(most):
        ax.plot(places, table[:, k], color=shades[k], lw=1.0, marker=".", ms=2.5)
    if sizes.max() > 100 * sizes.min():
        if np.nanmin(table) > 0:
            ax.set_yscale("log")
            log_axis(ax.yaxis)
        else:
            ax.set_yscale("symlog", linthresh=float(sizes.max()) * 1e-3, linscale=1.0)
            ax.yaxis.set_major_formatter(lambda value, _: power_of_ten(value))
    ax.axhline(0.0, color=INK, lw=0.6) if np.nanmin(table) <= 0 else None
    ax.set_xlabel("step")
    ax.set_ylabel("eigenvalue")
    ax.grid(True, axis="y")
    if title is not None:
        ax.set_title(title)
    return ax


@styled
def plot_density_over_steps(
    steps: Any,
    grid: Any,
    densities: Any,
    *,
    decades: float = 5.0,
    colorbar: bool = True,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Spectral densities as a heat map: a column per step, logarithmic colours.

    ``grid`` ``[m]`` holds eigenvalues, ascending, and ``densities`` ``[n, m]`` the density at each
    step. Colours span ``decades`` below the largest density; what lies below is the lowest colour.
    A column reaches half way to the neighbouring steps.
    """
    ax = axes_for(ax, width=6.4, height=3.6)
    places, values, table = (_plain(v) for v in (steps, grid, densities))
    if table.shape != (places.size, values.size):
        raise ShapeError(
            f"densities has the shape {list(table.shape)}, not [{places.size} steps, "
            f"{values.size} eigenvalues]."
        )
    if np.any(np.diff(places) <= 0) or np.any(np.diff(values) <= 0) or values.size < 2:
        raise ShapeError("steps and grid must increase, and grid hold at least two values.")
    known = table[np.isfinite(table)]
    if not known.size or known.max() <= 0:
        raise NotDefinedError("The density is nowhere positive: nothing to draw.")
    from matplotlib.colors import LogNorm

    high = float(known.max())
    low = high * 10.0**-decades
    image = ax.pcolormesh(
        _edges(places),
        _edges(values),
        np.clip(table, low, None).T,
        norm=LogNorm(low, high),
        cmap=SIZE_MAP,
        rasterized=True,
    )
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, pad=0.02, label="density of eigenvalues")
        log_axis(bar.ax.yaxis)
        bar.outline.set_linewidth(0.5)
    ax.set_xlabel("step")
    ax.set_ylabel("eigenvalue")
    if title is not None:
        ax.set_title(title)
    return ax


def _curve(name: str, steps: Any, values: Any) -> tuple[np.ndarray, np.ndarray]:
    places, heights = _plain(steps).reshape(-1), _plain(values).reshape(-1)
    if places.shape != heights.shape:
        raise ShapeError(
            f"{name or 'The curve'}: {places.size} steps and {heights.size} eigenvalues."
        )
    return places, np.where(np.isfinite(heights), heights, np.nan)


def _plain(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=float)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Borders half way between the centres, and as far beyond the outer ones."""
    if centres.size == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    first, last = 2 * centres[0] - middle[0], 2 * centres[-1] - middle[-1]
    return np.concatenate([[first], middle, [last]])


def _room(ax: Axes) -> None:
    """At least a decade, so that a flat curve does not fill the picture with its noise."""
    low, high = ax.get_ylim()
    if high < 10 * low:
        middle = (low * high) ** 0.5
        ax.set_ylim(middle / 10**0.5, middle * 10**0.5)
