"""Drawing probes until the interval is short enough, with few looks at it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...progress import track
from ..result import number
from .checkpoint import Keeper
from .common import Meter, quantile

FIRST = 16
_GROWTH = 1.3  # a second look at hardly more probes would only be a chance to stop by luck
_MARGIN = 1.1


@dataclass(frozen=True)
class Sampled:
    """Samples ``[n, q]``, what they give, and why there are not more.

    ``freedom`` are the degrees of freedom of the standard error, ``n - 1`` if not given.
    ``bias`` widens the interval on either side.
    """

    samples: Tensor
    value: float
    stderr: float
    converged: bool
    reason: str
    freedom: int | None = None
    bias: float = 0.0


def sample_until(
    draw: Callable[[int, int], Tensor],
    estimate: Callable[[Tensor], tuple[float, float]],
    *,
    most: int,
    tol: float,
    confidence: float,
    block: int,
    keeper: Keeper,
    meter: Meter,
    label: str,
    extra: Mapping[str, Any] | None = None,
    absolute: bool = False,
) -> Sampled:
    """Samples until the half width of the interval is ``tol`` of the value, or there are ``most``.

    ``draw(start, count)`` gives ``[count, q]``. There are at least 16 samples. The number that the
    tolerance needs is predicted from the spread so far, and only when so many (at least 1.3 times
    as many as before) have been drawn is the interval looked at again: three or four looks, so
    that stopping by luck does not make the interval too short.
    """
    state = keeper.load()
    done: Tensor = torch.zeros(0)
    if state is not None:
        done, meter.used = state["samples"], state["used"]
    target = min(FIRST, most)
    while True:
        have = len(done)
        for start in track(range(have, target, block), label):
            new = draw(start, min(block, target - start)).double().cpu()
            done = torch.cat([done, new]) if len(done) else new
            keeper.hold(samples=done, used=meter.used, **(extra or {}))
        seen = done[:target]
        value, stderr = estimate(seen)
        half = quantile(confidence, target - 1) * stderr
        allowed = tol if absolute else tol * abs(value)
        if half <= allowed:
            of = "" if absolute else " of the value"
            reason = f"It stopped as the interval's half width is below {tol:g}{of}."
            return Sampled(seen, value, stderr, True, reason)
        if target >= most:
            needs = _needed(target, half, allowed)
            more = f" About {number(float(needs))} probes would." if math.isfinite(needs) else ""
            reason = (
                f"It stopped as the budget is spent; {target} probes do not reach tol={tol:g}, the "
                f"interval's half width is {number(half, 2)}.{more}"
            )
            return Sampled(seen, value, stderr, False, reason)
        wanted = max(_GROWTH * target, _MARGIN * _needed(target, half, allowed))
        target = int(min(most, math.ceil(wanted) if math.isfinite(wanted) else most))


def _needed(count: int, half: float, allowed: float) -> float:
    return count * (half / allowed) ** 2 if allowed else math.inf


def mean_of(samples: Tensor) -> tuple[float, float]:
    """Mean and its standard error of ``[n]`` or ``[n, 1]``."""
    samples = samples.flatten()
    spread = float(samples.std()) if len(samples) > 1 else math.inf
    return float(samples.mean()), spread / math.sqrt(len(samples))
