"""The registry of metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .pairs import Pair
from .quantity import Value

Function = Callable[[Pair], "float | Value"]


@dataclass(frozen=True)
class Metric:
    """A metric: its name (a column), a title for people, and which values are good.

    ``better`` is ``"low"`` (best at 0), ``"high"`` (at most 1), ``"one"`` (best at 1) or ``None``
    (a fact, not a score). Scores do not change when everything is multiplied by one number.
    """

    name: str
    title: str
    better: str | None
    function: Function
    doc: str

    def badness(self, value: float) -> float:
        """A number that grows the worse ``value`` is."""
        if self.better == "high":
            return -value
        if self.better == "one":
            return abs(value - 1)
        return value


METRICS: dict[str, Metric] = {}
"""All metrics by name, in the order of the frame's columns."""


def metric(title: str, better: str | None = None) -> Callable[[Function], Function]:
    """Register a function as a metric under its own name; its docstring is the definition."""

    def register(function: Function) -> Function:
        name, doc = function.__name__, function.__doc__ or ""
        METRICS[name] = Metric(name, title, better, function, doc)
        return function

    return register
