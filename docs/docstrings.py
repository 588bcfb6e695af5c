"""Prose that stands below a docstring's sections is put above them, where parsers look for it."""

from __future__ import annotations

import re
from typing import Any

import griffe

_UNDERLINE = re.compile(r"^-{3,}$")


class ProseFirst(griffe.Extension):
    """Cost and source come before parameters and errors; the docstring itself has them last."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = prose_first(obj.docstring.value)


def prose_first(text: str) -> str:
    """The paragraphs of a docstring, those outside its sections first."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    heads = [place for place, part in enumerate(paragraphs) if _is_head(part)]
    if not heads:
        return text
    before, after = paragraphs[: heads[0]], paragraphs[heads[0] :]
    prose = [part for part in after if _is_prose(part)]
    return "\n\n".join([*before, *prose, *(part for part in after if part not in prose)])


def _is_head(paragraph: str) -> bool:
    lines = paragraph.splitlines()
    return len(lines) > 1 and bool(_UNDERLINE.match(lines[1].strip()))


def _is_prose(paragraph: str) -> bool:
    """Sentences at the margin: no section, no item with an indented text, no example."""
    lines = paragraph.splitlines()
    margin = all(line[:1].strip() for line in lines)
    return margin and not _is_head(paragraph) and not re.match(r"(>>>|\.\.\.|[-*|`\[{(])", lines[0])
