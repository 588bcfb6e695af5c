"""Heat maps of matrices and of Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import memory
from ..errors import NotDefinedError, check_option
from ..operators import Operator
from .marks import mark
from .style import SIGNED_MAP, SIZE_MAP, axes_for, axes_row, power_of_ten, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Matrix = Operator | Tensor | np.ndarray
_SCALES = ("symlog", "linear", "log")
_MOST = 384  # pixels a side; larger matrices are pooled
_DECADES = 3


@styled
def plot_matrix(
    matrix: Matrix,
    *,
    ax: Axes | None = None,
    scale: str = "symlog",
    limit: float | None = None,
    most: int = _MOST,
    colorbar: bool = True,
    title: str | None = None,
) -> Axes:
    """Heat map of a matrix.

    ``scale="symlog"`` shows signs (blue negative, red positive, white zero) on a scale that is
    linear within a thousandth of ``limit`` and logarithmic beyond; ``"linear"`` the same without
    logarithm; ``"log"`` the magnitude alone. ``limit`` is the magnitude of the end colours
    (default: the largest entry). A matrix of more than ``most`` rows is pooled: a pixel shows the
    entry of largest magnitude among those under it, so that nothing disappears.
    """
    check_option("scale", scale, _SCALES)
    ax = axes_for(ax, width=4.2, height=3.6)
    pixels, pooled = _pooled(_array(matrix), most)
    image = _show(ax, pixels, _norm(scale, limit or _largest([pixels])), scale, pooled)
    if colorbar:
        _bar(image, [ax], scale)
    if title is not None:
        ax.set_title(title)
    return ax


@styled
def plot_blocks(
    matrices: Mapping[str, Matrix],
    *,
    axes: Sequence[Axes] | None = None,
    scale: str = "symlog",
    most: int = _MOST,
) -> list[Axes]:
    """Heat maps beside each other on one common scale; see :func:`plot_matrix`."""
    check_option("scale", scale, _SCALES)
    if not matrices:
        raise NotDefinedError("There is no matrix to draw.")
    row = axes_row(axes, len(matrices))
    shown = [_pooled(_array(matrix), most) for matrix in matrices.values()]
    norm = _norm(scale, _largest([pixels for pixels, _ in shown]))
    image = None
    for ax, name, (pixels, pooled) in zip(row, matrices, shown, strict=True):
        image = _show(ax, pixels, norm, scale, pooled)
        ax.set_title(name)
        mark(ax, series=name)
    for ax in row[1:]:
        ax.set_ylabel("")
    _bar(image, row, scale)
    return row


@styled
def plot_factors(
    op: Operator, *, axes: Sequence[Axes] | None = None, scale: str = "symlog", most: int = _MOST
) -> list[Axes]:
    """Heat maps of the Kronecker factors ``G`` (outputs) and ``A`` (inputs), each on its scale.

    Grouped factors are shown as one block-diagonal matrix. Raises ``NotDefinedError`` for an
    operator without factors.
    """
    factors = getattr(op, "factors", None)
    if not factors:
        raise NotDefinedError(f"The {op.info.what} has no Kronecker factors; use plot_matrix.")
    row = axes_row(axes, len(factors))
    titles = {"G": "output factor G", "A": "input factor A"}
    for ax, (name, factor) in zip(row, factors.items(), strict=True):
        pixels, pooled = _pooled(_factor_matrix(factor), most)
        image = _show(ax, pixels, _norm(scale, _largest([pixels])), scale, pooled)
        _bar(image, [ax], scale)
        ax.set_title(titles.get(name, name))
    return row


def _factor_matrix(factor: Tensor) -> np.ndarray:
    factor = factor.detach().to("cpu", torch.float64)
    if factor.ndim == 1:
        factor = torch.diag(factor)
    elif factor.ndim == 3:
        factor = torch.block_diag(*factor)
    return factor.numpy()


def _array(matrix: Any) -> np.ndarray:
    if isinstance(matrix, Operator):
        block = "one of its blocks, op.blocks[...].plot(), or " if len(matrix.blocks) else ""
        with memory.advising(
            f"Draw {block}what products alone tell: cs.density(op).plot() for its spectrum, "
            "cs.eigsh(op).plot() for the ends of it, cs.diagonal(op).plot() for its diagonal."
        ):
            matrix = matrix.dense()
    if isinstance(matrix, Tensor):
        matrix = matrix.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise NotDefinedError(f"A heat map needs a matrix, not an array of shape {array.shape}.")
    return array


def _pooled(array: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """At most ``most`` pixels a side: of each tile the entry of largest magnitude."""
    tile = -(-max(array.shape) // most)
    if tile <= 1:
        return array, 1
    rows, columns = (-(-n // tile) for n in array.shape)
    padded = np.zeros((rows * tile, columns * tile))
    padded[: array.shape[0], : array.shape[1]] = array
    tiles = padded.reshape(rows, tile, columns, tile).swapaxes(1, 2).reshape(rows, columns, -1)
    chosen = np.abs(tiles).argmax(-1)
    return np.take_along_axis(tiles, chosen[..., None], -1)[..., 0], tile


def _largest(arrays: list[np.ndarray]) -> float:
    return max(float(np.abs(a[np.isfinite(a)]).max(initial=0.0)) for a in arrays) or 1.0


def _norm(scale: str, limit: float) -> Any:
    from matplotlib.colors import LogNorm, Normalize, SymLogNorm

    if scale == "linear":
        return Normalize(-limit, limit)
    if scale == "symlog":
        return SymLogNorm(limit * 10.0**-_DECADES, linscale=0.3, vmin=-limit, vmax=limit)
    return LogNorm(limit * 10.0 ** -(2 * _DECADES), limit)


def _show(ax: Axes, pixels: np.ndarray, norm: Any, scale: str, pooled: int) -> Any:
    if scale == "log":
        pixels = np.maximum(np.abs(pixels), norm.vmin)
    # The axes count matrix entries, whatever a pixel stands for.
    extent = (0, pixels.shape[1] * pooled, pixels.shape[0] * pooled, 0)
    cmap = SIZE_MAP if scale == "log" else SIGNED_MAP
    # "none" leaves the pixels of vector formats as they are, without resampling
    image = ax.imshow(
        pixels, norm=norm, cmap=cmap, extent=extent, aspect="equal", interpolation="none"
    )
    ax.set_xlabel("column")
    ax.set_ylabel("row")
    ax.locator_params(nbins=4, integer=True)
    for spine in ax.spines.values():
        spine.set_visible(True)
    return image


def _bar(image: Any, row: Sequence[Axes], scale: str) -> None:
    from matplotlib.ticker import FuncFormatter

    figure = row[0].figure
    label = "magnitude of the entry" if scale == "log" else "entry"
    bar = figure.colorbar(image, ax=list(row), shrink=0.85, pad=0.02, label=label)
    limit = image.norm.vmax
    if scale == "symlog":
        small = limit * 10.0**-_DECADES
        middle = 10.0 ** round(math.log10(limit * small) / 2)  # a power of ten is easy to read
        bar.set_ticks([-limit, -middle, 0.0, middle, limit])
        bar.ax.minorticks_off()
    elif scale == "linear":
        bar.set_ticks([-limit, -limit / 2, 0.0, limit / 2, limit])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: power_of_ten(_two_digits(v))))
    bar.outline.set_linewidth(0.5)


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
