"""Files that are either complete under their name or not there: checkpoints and small JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import OutputError, RunError


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replace ``path`` by ``state``, which ``torch.load(weights_only=True)`` reads.

    After ``kill -9`` there is the new one or the one before. Raises ``OutputError``.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    _place(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """What :func:`save_checkpoint` wrote, on the CPU; ``None`` without one. Raises ``RunError``."""
    if not path.exists():
        return None
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise RunError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: {error}). Remove the "
            "folder it lies in, and that training begins anew."
        ) from error


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path`` by ``content``; numbers that JSON does not have are ``null``."""
    from ..analysis.result import plain

    text = json.dumps(plain(dict(content)), indent=1, ensure_ascii=False, allow_nan=False)
    _place(path, (text + "\n").encode())


def load_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; ``None`` where it is missing. Raises ``RunError`` if damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}).") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object.")
    return found


def _place(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}); make room or choose another "
            "folder, and run the same command again."
        ) from error
