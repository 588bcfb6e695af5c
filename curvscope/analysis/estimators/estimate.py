"""A number with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...display import spark
from ..result import Result, number


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Estimated(Result):
    """What results of the matrix-free estimators share.

    ``of`` is the matrix, ``size`` its rows, ``method`` what computed it, ``reason`` a sentence why
    it stopped. ``cost.products`` counts products with single vectors; ``products`` is the same.
    """

    of: str
    size: int
    method: str
    reason: str = ""

    @property
    def products(self) -> int:
        """Products with single vectors."""
        return self.cost.products


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Estimate(Estimated):
    """One number of a matrix; returned by ``trace``, ``norm``, ``logdet`` and others.

    ``value`` with its standard error ``stderr`` (0 where it is exact), and ``low`` to ``high``, the
    interval that holds the truth with probability ``confidence``. ``samples`` ``[n]`` are the
    values of single probes, for a picture.
    """

    quantity: str
    value: float
    stderr: float = 0.0
    low: float
    high: float
    confidence: float = 0.95
    samples: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)

    @property
    def interval(self) -> tuple[float, float]:
        """``(low, high)``."""
        return self.low, self.high

    @property
    def exact(self) -> bool:
        """Whether it is known to rounding."""
        return self.method == "exact"

    def __float__(self) -> float:
        return self.value

    def summary(self) -> str:
        """The number, its error and what it took."""
        text = f"The {self.quantity} of the {self.of} ({self.size:,} rows) is {number(self.value)}"
        if self.exact:
            return f"{text}, exactly ({self.cost})."
        if math.isfinite(self.stderr) and self.stderr:
            text += f" ± {number(self.stderr, 2)}"
        return (
            f"{text}, between {number(self.low)} and {number(self.high)} at "
            f"{100 * self.confidence:g} % confidence (method {self.method!r}, {self.cost}). "
            f"{self.reason}"
        ).rstrip()

    def _pictures(self) -> list[tuple[str, str]]:
        caption = f"{self.samples.numel()} probes"
        return [(caption, spark(self.samples.flatten().tolist(), caption))]

    def records(self) -> list[dict[str, Any]]:
        """One row."""
        return [
            {
                "quantity": self.quantity,
                "of": self.of,
                "size": self.size,
                "value": self.value,
                "stderr": self.stderr,
                "low": self.low,
                "high": self.high,
                "confidence": self.confidence,
                "converged": self.converged,
                "products": self.products,
                "method": self.method,
                "reason": self.reason,
            }
        ]
