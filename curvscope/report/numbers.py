"""Numbers as people read them: sensible digits, real minus signs, powers of ten, errors."""

from __future__ import annotations

import math
import re
from typing import Any

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NOTHING = "–"


def shown(value: Any, digits: int = 3) -> str:
    """``0.4217`` -> ``"0.422"``, ``1.2e-7`` -> ``"1.2·10⁻⁷"``, NaN and ``None`` -> ``"–"``."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, str):
        return value
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")  # 0.9996 has as many places as 1.00
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -3 or exponent >= 6:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}·10{str(int(power)).translate(_SUPERSCRIPT)}".replace("-", "−")
    places = max(0, digits - 1 - exponent)
    return f"{value:,.{places}f}".replace("-", "−")


def with_error(value: float, stderr: float, digits: int = 3) -> str:
    """``"0.424 ± 0.012"``: two digits of the standard error, and as many places of the value.

    An error far below the last digit that is worth showing stands in powers of ten; one that is
    rounding is left out.
    """
    if not (math.isfinite(value) and math.isfinite(stderr) and stderr > 1e-9 * abs(value)):
        return shown(value, digits)
    place = math.floor(math.log10(float(f"{stderr:.1e}"))) - 1
    fine = value != 0 and stderr < 10.0 ** (1 - digits) * abs(value) / 3
    if fine or place < -6 or stderr > 1e5 or abs(value) < 1e-4:
        return f"{shown(value, digits + 1)} ± {shown(stderr, 2)}"
    places = max(0, -place)
    return f"{value:,.{places}f} ± {stderr:,.{places}f}".replace("-", "−")


def powers(text: str) -> str:
    """A sentence with ``9.6e-07`` written as ``9.6·10⁻⁷``, which does not break at its hyphen."""

    def power(found: re.Match[str]) -> str:
        return f"{found[1]}·10{str(int(found[2])).translate(_SUPERSCRIPT)}"

    return re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)e([+-]\d+)\b", power, text)


def percent(share: float) -> str:
    """``0.0423`` -> ``"4.2 %"``; shares below a thousandth as ``"< 0.1 %"``."""
    if share is None or math.isnan(share):
        return NOTHING
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.9995 else "100 %"


def seconds(value: float) -> str:
    """``"0.031 s"``, ``"12 s"``, ``"3 min 20 s"``."""
    if math.isnan(value):
        return NOTHING
    if value < 60:
        return f"{float(f'{value:.2g}'):g} s"
    return f"{int(value) // 60} min {int(value) % 60} s"
