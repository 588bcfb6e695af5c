"""Numbers as a reader wants them: few digits, with their error where there is one."""

from __future__ import annotations

import math
import numbers
from typing import Any


def plain_number(value: float, digits: int = 3) -> str:
    """``0.0423``, ``12,345``, ``1.2e-08``; NaN is empty, infinity ``∞``."""
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, numbers.Integral):
        text = f"{value:,}"
    elif 1e3 <= abs(value) < 1e7:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def with_error(value: float, error: float) -> str:
    """``0.123 ± 0.004``: the error to one digit (two if it begins with 1), the value to match.

    An error that is 0, NaN or infinite is left out.
    """
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return plain_number(value)
    largest = max(abs(value), error)
    power = math.floor(math.log10(largest))
    unit = 10.0**power if not -4 <= power < 6 else 1.0
    value, error = value / unit, error / unit
    exponent = math.floor(math.log10(error))
    if f"{error:.0e}".startswith("1"):
        exponent -= 1
    places = max(0, -exponent)
    text = f"{value:,.{places}f} ± {error:,.{places}f}".replace("-", "−", 1)
    return text if unit == 1.0 else f"({text})·10{_raised(power)}"


def cell(value: Any) -> str:
    """The text of a table's cell, not yet escaped."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Real):
        return plain_number(value)  # type: ignore[arg-type]
    if isinstance(value, tuple | list):
        return " × ".join(map(str, value)) if value else ""
    return str(value)


def is_number(value: Any) -> bool:
    """Whether a cell counts as a number: right-aligned, sorted by size."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
