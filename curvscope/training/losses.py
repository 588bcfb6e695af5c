"""Losses of single steps, looked at in groups.

Python that runs once between two steps of a training finds its caches cold, and takes several times
as long as the same done for many steps in a row.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

_MOST = 64
_SECONDS = 0.5


def value_of(loss: Any) -> float:
    """The loss as the loop gives it: a number, a tensor, or NaN for nothing."""
    if loss is None:
        return math.nan
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def learning_rate(optimizer: Any) -> float:
    """The learning rate; the largest where parameter groups differ, NaN without one."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        return float(groups[0].get("lr", math.nan))
    return max((float(g["lr"]) for g in groups if "lr" in g), default=math.nan)


class Losses:
    """Rows of the measure ``"loss"`` that wait for others, half a second at most."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, dict[str, Any], float]] = []

    def add(self, step: int, loss: Any, optimizer: Any, seconds: float) -> bool:
        """Keep one, at ``seconds`` of training; whether it is time to look at them."""
        value = value_of(loss)
        row: dict[str, Any] = {"loss": value, "lr": learning_rate(optimizer)}
        if loss is None:
            row["given"] = False
        kept = self._kept
        kept.append((step, row, seconds))
        late = seconds - kept[0][2] >= _SECONDS or len(kept) >= _MOST
        return late or not (math.isfinite(value) and math.isfinite(row["lr"]))

    def drain(self) -> list[tuple[int, dict[str, Any], float]]:
        """Step, row and seconds of each that is kept, which are forgotten."""
        kept, self._kept = self._kept, []
        return kept
