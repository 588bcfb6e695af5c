"""The figures of two reports, read from their folders, in pairs."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ReportError
from ..read import report_file
from ..svg import for_page, share_styles

_BUDGET = 4_200_000  # characters of all figures together, which keeps the page below 5 MB
_NOT_SHOWN = ("cost",)  # times differ always
# What to leave out last, where not all fit.
_ORDER = ("errors", "own", "beside", "progress", "spectra", "concentration", "checks", "coverage")
_TAGS = {
    *("svg", "g", "path", "rect", "text", "tspan", "use", "defs", "clipPath", "image", "line"),
    *("circle", "polygon", "polyline", "style", "title", "metadata", "linearGradient", "stop"),
}


@dataclass(frozen=True)
class Pair:
    """One figure of both reports; an empty string where one has none."""

    name: str
    kind: str
    block: str
    caption: str
    a: str
    b: str
    width: int
    same: bool = False


def pairs(
    documents: tuple[Mapping[str, Any], Mapping[str, Any]],
    folders: tuple[Path | None, Path | None],
) -> tuple[list[Pair], list[str], str]:
    """The figures, notes on what is missing, and the style rules that they share."""
    notes: list[str] = []
    sides = []
    for document, folder, side in zip(documents, folders, "AB", strict=True):
        listed = {str(one["name"]): one for one in document["figures"]}
        drawn = dict(_read(listed, folder, side.lower()))
        if listed and not drawn:
            notes.append(f"Report {side} has no folder of figures beside its report.json.")
        sides.append((listed, drawn))
    (listed_a, drawn_a), (listed_b, drawn_b) = sides
    found = []
    for name in dict.fromkeys([*listed_a, *listed_b]):
        facts = listed_a.get(name) or listed_b[name]
        a, width_a, plain_a = drawn_a.get(name, ("", 0, ""))
        b, width_b, plain_b = drawn_b.get(name, ("", 0, ""))
        if name in _NOT_SHOWN or not (a or b):
            continue
        same = plain_a == plain_b
        block = str(facts.get("block") or facts.get("optimizer") or "")
        kind = name.partition("-")[0]
        found.append(
            Pair(
                *(name, kind, block, str(facts.get("caption", ""))),
                *(a, "" if same else b, max(width_a, width_b), same),
            )
        )
    kept, left = _fitting(found)
    if left:
        notes.append(
            f"{left} figures are not shown, to keep the page small; they are in the folders of "
            "the two reports."
        )
    markup, rules = share_styles([text for pair in kept for text in (pair.a, pair.b)])
    parts = iter(markup)
    return [replace(pair, a=next(parts), b=next(parts)) for pair in kept], notes, rules


def _fitting(found: list[Pair]) -> tuple[list[Pair], int]:
    """As many pairs as fit, the telling kinds first; and how many do not."""

    def rank(pair: Pair) -> int:
        return _ORDER.index(pair.kind) if pair.kind in _ORDER else len(_ORDER)

    chosen, size = set(), 0
    for pair in sorted(found, key=rank):
        size += len(pair.a) + len(pair.b)
        if size <= _BUDGET:
            chosen.add(pair.name)
    kept = [pair for pair in found if pair.name in chosen]
    return kept, len(found) - len(kept)


def _read(
    listed: Mapping[str, Any], folder: Path | None, side: str
) -> Iterator[tuple[str, tuple[str, int, str]]]:
    """Name, markup for the page, width, and the markup that tells whether two are the same."""
    if folder is None:
        return
    try:
        place = report_file(folder).parent / "figures"
    except ReportError:
        return
    for name, facts in listed.items():
        path = place / f"{Path(name).name}.svg"
        try:
            text = path.read_text(encoding="utf-8")
            width = _checked(text)
        except (OSError, ValueError, ElementTree.ParseError):
            continue
        alt = f"Report {side.upper()}: {facts.get('alt', name)}"
        yield name, (for_page(text, f"{side}-{name}", alt), width, for_page(text, "x", "x"))


def _checked(text: str) -> int:
    """The width in pixels of an SVG that holds nothing but drawing. Raises ``ValueError``."""
    root = ElementTree.fromstring(text)
    for element in root.iter():
        tag = str(element.tag)
        space, _, name = tag[1:].rpartition("}") if tag.startswith("{") else ("", "", tag)
        if space and "svg" not in space:
            continue  # metadata, which do not come into the page
        if name not in _TAGS:
            raise ValueError(f"a figure may not hold <{name}>")
        for key, value in element.attrib.items():
            bare = key.rpartition("}")[2]
            if bare.startswith("on"):
                raise ValueError("a figure may not hold scripts")
            if bare == "href" and not value.startswith(("#", "data:image/png;base64,")):
                raise ValueError("a figure may not refer to anything outside")
    points = float(str(root.get("width", "0")).removesuffix("pt") or 0)
    return round(points * 96 / 72)
