"""Quadratic models along a direction, and batch sizes from gradient noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..errors import NotDefinedError
from .style import INK, MUTED, PALETTE, axes_for, log_axis, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..analysis.local import LocalModel
    from ..analysis.noise import GradientNoise


@styled
def plot_local_model(
    model: LocalModel, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Actual over predicted decrease against the length of the step, logarithmic.

    A model that fits stays on the line at 1. The dashed line marks the radius within which the
    model of the gradient holds. Ratios outside of [-1, 3] are drawn as triangles at the edge.
    """
    ax = axes_for(ax)
    t, ratio = model.lengths, model.ratios
    known = torch.isfinite(ratio)
    if not bool(known.any()):
        raise NotDefinedError("The model predicts no decrease at any length: nothing to draw.")
    low, high = -1.0, 3.0
    inside = known & (ratio >= low) & (ratio <= high)
    ax.axhline(1.0, color=INK, lw=0.9)
    ax.plot(t[inside].numpy(), ratio[inside].numpy(), "o-", color=PALETTE[0], label="ratio")
    for mask, edge, marker in ((ratio > high, high, "^"), (ratio < low, low, "v")):
        out = known & mask
        if bool(out.any()):
            ax.plot(
                t[out].numpy(),
                [edge] * int(out.sum()),
                marker,
                color=PALETTE[1],
                ms=6,
                clip_on=False,
            )
    if math.isfinite(model.radius) and model.radius > 0:
        ax.axvline(model.radius, color=MUTED, ls="--", lw=1.0, label="radius of the gradient model")
    ax.set_xscale("log")
    log_axis(ax.xaxis)
    ax.set_ylim(low, high)
    ax.set_xlabel("length of the step")
    ax.set_ylabel("actual / predicted decrease")
    ax.grid(True, axis="y")
    ax.legend(loc="lower left")
    ax.set_title(title if title is not None else f"Quadratic model with the {model.of}")
    return ax


@styled
def plot_gradient_noise(
    noise: GradientNoise, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """The noise scale and the batch sizes that the tests ask for, logarithmic.

    The dashed line is the number of samples of the problem; a bar beyond it asks for more than
    there are.
    """
    ax = axes_for(ax, height=2.4)
    sizes = {
        "noise scale": noise.noise_scale,
        "noise scale with curvature": noise.curvature_noise_scale,
        "norm test": noise.norm_test,
        "inner-product test": noise.inner_product_test,
        "orthogonality test": noise.orthogonality_test,
    }
    shown = {name: size for name, size in sizes.items() if math.isfinite(size) and size > 0}
    if not shown:
        raise NotDefinedError(
            "No batch size is positive and finite: the gradient vanishes, or has no noise."
        )
    names = list(shown)
    colours = [PALETTE[0] if "scale" in name else PALETTE[2] for name in names]
    left = min(*shown.values(), noise.samples) / 3
    widths = [size - left for size in shown.values()]
    ax.barh(names, widths, left=left, color=colours, height=0.6)
    if noise.curvature_noise_scale_stderr > 0 and "noise scale with curvature" in shown:
        ax.errorbar(
            noise.curvature_noise_scale,
            names.index("noise scale with curvature"),
            xerr=noise.curvature_noise_scale_stderr,
            color=INK,
            capsize=3,
        )
    ax.axvline(noise.samples, color=INK, ls="--", lw=1.0)
    ax.annotate(
        f"{noise.samples:,} samples",
        (noise.samples, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 2),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
    ax.set_xscale("log")
    ax.set_xlim(left, 2 * max(*shown.values(), noise.samples))
    log_axis(ax.xaxis)
    ax.invert_yaxis()
    ax.set_xlabel("batch size")
    ax.grid(True, axis="x")
    if title is not None:
        ax.set_title(title)
    return ax
