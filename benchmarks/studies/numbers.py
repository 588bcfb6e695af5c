"""Means and standard errors over seeds, and how they are written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Study = Mapping[str, Any]


def records(study: Study, question: str, case: str) -> list[Record]:
    """The results of one case, a record per seed."""
    start = f"{question}/{case}/seed"
    parts = study[question]["parts"]
    return [part for name, part in parts.items() if name.startswith(start)]


def each(parts: Iterable[Record], value: Callable[[Record], float]) -> list[float]:
    """One number per seed."""
    return [value(part) for part in parts]


def mean(values: Iterable[float | None]) -> float:
    """The mean; NaN of nothing, or where a number is missing."""
    found = list(values)
    if not found or any(v is None for v in found):
        return math.nan
    return statistics.fmean(v for v in found if v is not None)


def stderr(values: Sequence[float]) -> float:
    """Standard error of the mean over seeds."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def short(value: float) -> str:
    """Three digits, without exponents where that is readable."""
    if math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def spread(values: Sequence[float]) -> str:
    """``mean ± standard error``, the error to one digit and the mean to the same place."""
    if any(v is None or math.isnan(v) for v in values):
        return "–"
    centre, error = statistics.fmean(values), stderr(values)
    if math.isnan(error) or error == 0 or abs(centre) >= 1e4:
        return short(centre)
    place = max(-math.floor(math.log10(error)), 0)
    if centre:  # two or three digits of the mean
        first = math.floor(math.log10(abs(centre)))
        place = max(min(place, 2 - first), min(3, 1 - first), 0)
    bars = f"{error:.{place}f}"
    if not float(bars):
        bars = f"{error:.0e}"
    return f"{centre:.{place}f}\u00a0±\u00a0{bars}"
