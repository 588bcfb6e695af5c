"""Writing the page of a difference: one file, over nothing that is not such a page."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import OutputError
from .model import Difference

_OURS = '<meta name="generator" content="curvscope">'


def check_page(out: str | os.PathLike[str]) -> Path:
    """The file to write. Raises ``OutputError`` if that cannot be, or something else is there."""
    target = Path(out).expanduser()
    if target.is_dir():
        raise OutputError(f"{target} is a folder; give the name of an HTML file, as in diff.html.")
    if target.exists():
        try:
            head = target.read_bytes()[:2000].decode("utf-8", "replace")
        except OSError as error:
            raise OutputError(f"{target} cannot be read ({error.strerror or error}).") from error
        if _OURS not in head:
            raise OutputError(
                f"{target} exists and is no page of curvscope, so it is not replaced. Choose "
                "another name, or remove it yourself."
            )
    if not target.parent.is_dir():
        raise OutputError(f"There is no folder {target.parent}; make it, or choose another name.")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"{target.parent} cannot be written; choose another place.")
    return target


def write_page(
    found: Difference,
    documents: tuple[Mapping[str, Any], Mapping[str, Any]],
    folders: tuple[Path | None, Path | None],
    out: str | os.PathLike[str],
) -> Path:
    """Write the page; it takes its name when it is complete."""
    from .page import render

    target = check_page(out)
    text = render(found, documents, folders)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OutputError(f"Writing {target} failed: {error}. Nothing was left there.") from error
    return target
