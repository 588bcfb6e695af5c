"""The record file of a run: one JSON object per line, each with a checksum of itself.

A *record* is one measure at one step. It has one row or several (a row per block, say), each on a
line of its own so that ``pandas.read_json(path, lines=True)`` gives a table; its rows are written
by one call and follow each other, numbered ``row`` of ``rows`` where there are several. Numbers
that JSON does not have are ``null`` (NaN) and the strings ``"inf"`` and ``"-inf"``.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..analysis.result import plain

Row = dict[str, Any]

CONTINUED = "continued"
"""Measure of the marker after which earlier records beyond its ``step`` no longer count."""

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_INFINITE = {"inf": math.inf, "-inf": -math.inf}


def encode(step: int, measure: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The lines of one record."""
    lines = []
    for number, row in enumerate(rows):
        whole: Row = {"step": step, "measure": measure}
        if len(rows) > 1:
            whole |= {"row": number, "rows": len(rows)}
        whole |= {key: _value(value) for key, value in row.items()}
        text = _encode(whole)
        lines.append(f'{text[:-1]},"crc":"{_checksum(text[:-1])}"}}\n')
    return "".join(lines).encode()


def _value(value: Any) -> Any:
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, float | int | str | bool) or value is None:
        return None if isinstance(value, float) and math.isnan(value) else value
    if getattr(value, "ndim", None) == 0:
        return _value(value.item())
    if isinstance(value, Mapping):
        return {str(key): _value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_value(item) for item in value]
    return plain(value)


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def decode(line: bytes) -> Row:
    """One row. Raises ``ValueError`` (with what is wrong) for a damaged line."""
    try:
        text = line.decode()
        row = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(row, dict) or not {"step", "measure", "crc"} <= row.keys():
        raise ValueError("is no record")
    body, _, _ = text.rpartition(',"crc":')
    if _checksum(body) != row.pop("crc"):
        raise ValueError("does not fit its checksum")
    return {key: _number(value) for key, value in row.items()}


def _number(value: Any) -> Any:
    if value is None:
        return math.nan
    return _INFINITE.get(value, value) if isinstance(value, str) else value


@dataclass
class Scan:
    """What a record file holds.

    ``rows`` in the order of the file, those superseded left out unless asked for; ``problems`` as
    sentences; ``end`` the position behind the last complete record: what follows was being written
    when the process died.
    """

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    end: int = 0


def scan(content: bytes, name: str, *, superseded: bool = False) -> Scan:
    """Read a record file; damaged lines become ``problems``, a torn end is left out."""
    found = Scan()
    start = number = 0
    group: list[Row] = []
    while (stop := content.find(b"\n", start)) >= 0:
        number += 1
        line, start = content[start:stop], stop + 1
        try:
            row = decode(line)
        except ValueError as error:
            found.problems.append(f"{name}, line {number} {error}; its row is left out.")
            found.rows += group
            group, found.end = [], start
            continue
        if row.get("rows", 1) > 1:
            group.append(row)
            if row["row"] < row["rows"] - 1:
                continue
            found.rows += group
            group = []
        else:
            found.rows += [*group, row]
            group = []
        found.end = start
    found.rows = found.rows if superseded else valid(found.rows)
    return found


def valid(rows: Iterable[Row]) -> list[Row]:
    """Rows that still count after restarts: a marker at step s takes earlier ones beyond s away."""
    kept: list[Row] = []
    for row in rows:
        step = row["step"]
        if row["measure"] == CONTINUED:
            kept = [earlier for earlier in kept if earlier["step"] <= step]
        elif kept and step < kept[-1]["step"]:  # after a restart whose marker is damaged
            kept = [earlier for earlier in kept if earlier["step"] < step]
        kept.append(row)
    return kept
