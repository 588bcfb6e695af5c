"""Values of a grid, appended to a file as they become known."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from ..errors import DataError, OutputError
from .planes import Plane

_FORMAT = "curvscope loss surface 1"


class GridFile:
    """A line with what is evaluated, then ``[index, value]`` per line; nothing without a path.

    A line that was cut off by an interruption is dropped. Raises ``DataError`` for a file of
    another plane, grid or objective, ``OutputError`` where the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        plane: Plane,
        settings: Mapping[str, Any],
        origin_loss: float,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.known: dict[int, float] = {}
        self._file: TextIO | None = None
        if self.path is None:
            return
        header = {
            "format": _FORMAT,
            **json.loads(json.dumps(settings)),
            "plane": _digest(plane),
            "origin_loss": origin_loss,
        }
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            end = content.rfind(b"\n") + 1
            lines = content[:end].decode("utf-8", "replace").splitlines()
            begin = json.dumps({"format": _FORMAT})[:-1].encode()
            if content and not lines and content[: len(begin)] != begin[: len(content)]:
                lines = ["not ours"]
            if lines:  # else not even the first line was finished
                self._read(lines, header)
            with open(self.path, "ab") as file:
                file.truncate(end)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            if not lines:
                self._write(json.dumps(header))
        except OSError as error:
            raise OutputError(
                f"checkpoint={str(self.path)!r} cannot be read or written "
                f"({error.strerror or error})."
            ) from error

    def _read(self, lines: list[str], header: dict[str, Any]) -> None:
        again = "Delete it or name another file."
        try:
            found = json.loads(lines[0])
            values = [json.loads(line) for line in lines[1:]]
            known = {int(index): float(value) for index, value in values}
            if found["format"] != _FORMAT:
                raise ValueError(found["format"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self.path} is no checkpoint of a loss surface. {again}") from error
        for key, value in header.items():
            if not _same(found.get(key), value):
                raise DataError(
                    f"The checkpoint {self.path} is of another surface: its {key} is "
                    f"{found.get(key)!r}, here it is {value!r}. {again}"
                )
        self.known = known

    def add(self, index: int, value: float) -> None:
        """Keep one value."""
        if self._file is None:
            return
        try:
            self._write(json.dumps([index, value]))
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written ({error.strerror}).") from error

    def _write(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    def __enter__(self) -> GridFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def _digest(plane: Plane) -> list[float]:
    """Numbers that two planes share in practice only if they are the same."""
    weights = torch.cos(torch.arange(plane.size, dtype=torch.float64) * 0.7071)
    parts = [plane.origin, *plane.directions.unbind(1)]
    return [
        float(f"{v:.9g}") for part in parts for v in (float(part.norm()), float(part @ weights))
    ]


def _same(left: Any, right: Any) -> bool:
    """Equal up to rounding, which differs between machines; NaN equals NaN."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float) and isinstance(right, int | float):
        near = math.isclose(left, right, rel_tol=1e-5, abs_tol=1e-7)
        return near or (math.isnan(left) and math.isnan(right))
    return bool(left == right)
