"""The kernel polynomial method: a density by Chebyshev polynomials of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import NotDefinedError
from ...progress import track
from .checkpoint import Keeper
from .common import Meter, column_dots, signs, title
from .slq import MOMENTS, Quadrature, quadrature

BOUNDS = 20
"""Products for the bounds of the spectrum."""
_MARGIN = 0.05


def chebyshev(
    meter: Meter, seed: int, probes: int, steps: int, keeper: Keeper
) -> tuple[Quadrature, float]:
    """The Jackson-damped density at the Chebyshev points, and the width that it resolves.

    The spectrum is mapped to [-1, 1] by bounds from 20 Lanczos steps. Two moments come of every
    product: ``T_2k = 2 T_k^2 - 1``. The damped expansion is positive; its values at the Chebyshev
    points are the weights.
    """
    state = keeper.load()
    moments = torch.zeros(0, 2 * steps + 1, dtype=torch.float64)
    if state is None:
        centre, half = _bounds(meter, seed)
    else:
        centre, half = state["centre"], state["half"]
        moments, meter.used = state["moments"], state["used"]
    block = meter.columns(8)
    for start in range(len(moments), probes, block):

        def hold(moments: Tensor = moments, **inner: Any) -> None:
            keeper.hold(moments=moments, centre=centre, half=half, used=meter.used, **inner)

        count = min(block, probes - start)
        vectors = signs(meter.op, seed, start, count, stream=7) / math.sqrt(meter.size)
        new = _moments(meter, vectors, steps, centre, half, hold, state)
        state = None
        moments = torch.cat([moments, new])
        keeper.hold(moments=moments, centre=centre, half=half, used=meter.used)
    return _damped(moments, centre, half), math.pi * half / moments.shape[1]


def _bounds(meter: Meter, seed: int) -> tuple[float, float]:
    found = quadrature(meter, seed + 1, 0, 1, min(BOUNDS, meter.size), label="Bounds")
    low, high = float(found.nodes.min()), float(found.nodes.max())
    size = max(abs(low), abs(high))
    apart = high - low > 1e3 * torch.finfo(meter.op.dtype).eps * size
    half = (high - low) / 2 if apart else (size or 1.0) / 100
    return (high + low) / 2, (1 + _MARGIN) * half


def _moments(
    meter: Meter,
    vectors: Tensor,
    steps: int,
    centre: float,
    half: float,
    hold: Callable[..., None],
    state: Mapping[str, Any] | None,
) -> Tensor:
    """``z^T T_k z`` for ``k`` up to ``2 steps``: ``[n, 2 steps + 1]``."""

    def mapped(x: Tensor) -> Tensor:
        return (meter(x) - centre * x) / half

    if state is not None and "now" in state:
        k, result = state["k"], state["result"].clone()
        before, now = state["before"].to(vectors), state["now"].to(vectors)
    else:
        result = torch.zeros(vectors.shape[1], 2 * steps + 1, dtype=torch.float64)
        result[:, 0] = 1.0
        k, before, now = 1, vectors, mapped(vectors)
        result[:, 1] = column_dots(before, now)
    for place in track(range(k, steps + 1), f"Density of the {title(meter.op)}"):
        result[:, 2 * place] = 2 * column_dots(now, now) - 1
        if float(result[:, 2 * place].abs().max()) > 1.01:
            raise NotDefinedError(
                f"The spectrum of the {title(meter.op)} reaches beyond the bounds that "
                f"{BOUNDS} Lanczos steps gave; use method='slq'."
            )
        if place < steps:
            before, now = now, 2 * mapped(now) - before
            result[:, 2 * place + 1] = 2 * column_dots(before, now) - result[:, 1]
            hold(k=place + 1, before=before, now=now, result=result.clone())
    return result


def _damped(moments: Tensor, centre: float, half: float) -> Quadrature:
    count = moments.shape[1]
    k = torch.arange(count, dtype=torch.float64)
    angle = math.pi / (count + 1)
    jackson = ((count - k + 1) * torch.cos(k * angle) + torch.sin(k * angle) / math.tan(angle)) / (
        count + 1
    )
    places = 2 * count
    phi = (torch.arange(places, dtype=torch.float64) + 0.5) * math.pi / places
    terms = torch.cos(k[:, None] * phi)
    terms[1:] *= 2
    nodes = centre + half * torch.cos(phi)
    # without the kernel the weights integrate polynomials exactly, but are not positive
    powers = torch.stack([nodes**p for p in range(1, MOMENTS + 1)], 1)
    weights = (moments @ (terms * jackson[:, None]) / places).clamp_min(0.0)
    return Quadrature(
        nodes.expand(len(moments), -1).clone(),
        weights / weights.sum(1, True),
        moments=moments @ terms @ powers / places,
    )
