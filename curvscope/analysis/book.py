"""Writing down values, how they were got, and why others are missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import CurvscopeError
from .quantity import Moments, Quantity, Value


class Book:
    """Values of one row, and why others are missing."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.stderr: dict[str, float] = {}
        self.method: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def enter(self, name: str, function: Callable[[Any], float | Value], pair: Any) -> None:
        """Compute a value; what the library refuses, it refuses with a reason."""
        try:
            found = function(pair)
        except (CurvscopeError, torch.linalg.LinAlgError) as error:
            self.refuse(name, str(error))
            return
        self.put(name, found if isinstance(found, Value) else Value(found))

    def put(self, name: str, found: Value) -> None:
        """Note a value that is known."""
        self.values[name] = found.value
        self.method[name] = found.method
        if found.stderr:
            self.stderr[name] = found.stderr
        if math.isnan(found.value):
            self.reasons[name] = "The reference or the approximation is zero here."
        elif math.isinf(found.value):
            self.reasons[name] = "Infinite: the matrix is singular. Pass damping=."

    def refuse(self, name: str, reason: str) -> None:
        """Note that there is no value."""
        self.values[name] = math.nan
        self.reasons[name] = reason


def relative(gap: Quantity, energy: Quantity, method: str) -> Value:
    """``sqrt(gap / energy)``."""
    moments = Moments(energy, 0.0, 0.0, gap, method)
    return moments.apply(lambda rr, rb, bb, gap: math.sqrt(max(gap, 0.0) / rr) if rr else math.nan)


def share(part: Quantity, energy: Quantity, method: str) -> Value:
    """``part / energy``."""
    moments = Moments(energy, 0.0, 0.0, part, method)
    return moments.apply(lambda rr, rb, bb, gap: gap / rr if rr else math.nan)


def root(energy: Quantity) -> Value:
    """``sqrt(energy)``."""
    return Moments(energy, 0.0, 0.0, 0.0, "").apply(lambda rr, *_: math.sqrt(rr))
