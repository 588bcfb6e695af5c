"""The options of a report as a TOML file: read for ``--config``, written beside every report."""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError, nearest

__all__ = ["OPTIONS", "Option", "check_keys", "read_config", "toml"]


@dataclass(frozen=True)
class Option:
    """A key of the file: its type, its least value, and what it means."""

    kind: type
    about: str
    least: float | None = None


OPTIONS: dict[str, Option] = {
    "problem": Option(str, "a name of the zoo, or package.module:function"),
    "out": Option(str, "the folder that is written"),
    "data": Option(str, "folder with the data, for problems that need one"),
    "samples": Option(int, "how many samples to take; all that the problem has, if not given", 1),
    "seed": Option(int, "of everything random", 0),
    "dtype": Option(str, "float32 or float64"),
    "device": Option(str, "cpu, cuda, ..."),
    "threads": Option(int, "threads to compute with", 1),
    "hessian": Option(bool, "whether to compute the Hessian beside the GGN"),
    "verify": Option(bool, "whether to check the problem as well"),
    "probes": Option(int, "random probes of the Hutchinson diagonals", 2),
    "damping": Option(float, "in metrics of steps; the GGN's mean eigenvalue, if not given", 0),
    "quick": Option(bool, "at most 256 samples; what is not given here is left out"),
}
"""Every key that the file may have; the same names as the options of ``curvscope report``."""

QUICK = {"hessian": False, "verify": False, "probes": 8}
"""What ``quick`` stands for, unless asked for otherwise."""
QUICK_SAMPLES = 256
"""Samples that ``quick`` takes at most."""

_NAMES = {
    str: "a string in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options in a TOML file, checked.

    Raises ``OptionError`` for a file that cannot be read or is no TOML, for unknown keys (with the
    nearest known ones), and for values of another type or out of range.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"The configuration {os.fspath(path)} cannot be read: {reason}."
        ) from error
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{os.fspath(path)} is no TOML file: {error}.") from error
    check_keys(found, os.fspath(path))
    return {key: _checked(key, value, os.fspath(path)) for key, value in found.items()}


def check_keys(values: Mapping[str, Any], where: str) -> None:
    """Raise ``OptionError``, with the nearest known keys, for keys that are no options."""
    for key in values:
        if key not in OPTIONS:
            raise OptionError(
                f"{where} has the unknown key {key!r}.{nearest(key, OPTIONS)} The keys are "
                f"{', '.join(OPTIONS)}."
            )


def _checked(key: str, value: Any, where: str) -> Any:
    option = OPTIONS[key]
    fits = isinstance(value, option.kind) and (option.kind is bool or not isinstance(value, bool))
    if option.kind is float and type(value) is int:
        value, fits = float(value), True
    if not fits:
        raise OptionError(f"{where}: {key} = {value!r} must be {_NAMES[option.kind]}.")
    if option.least is not None and not (option.least <= value < math.inf):
        raise OptionError(f"{where}: {key} = {value!r} must be at least {option.least:g}.")
    return value


def toml(values: Mapping[str, Any]) -> str:
    """The file for ``values``: every key with its meaning; those without value as comments."""
    named = "problem" in values
    lines = [
        "# Everything that this report was made with. To make it again:",
        "#   curvscope report --config report.toml"
        if named
        else "#   curvscope report PROBLEM --out FOLDER --config report.toml",
        "",
    ]
    for key, option in OPTIONS.items():
        value = values.get(key)
        start = f"# {key} =" if value is None else f"{key} = {_literal(value)}"
        lines.append(f"{start}  # {option.about}")
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    # JSON's strings are TOML's, but for one control character
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
