"""The tables of a page: cells, columns, and what turns numbers into them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..analysis.comparison import WHOLE, place
from .numbers import shown

WHOLE_TITLE = "whole matrix"


def block_title(block: str) -> str:
    """A block as a heading: its name, ``"block 0"`` for a number, or the whole matrix."""
    return WHOLE_TITLE if block == WHOLE else place(block)


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, a small second line, a sort key, and a shade in [0, 1]."""

    text: str
    small: str = ""
    sort: float | str | None = None
    title: str = ""
    shade: float | None = None
    strong: bool = False
    link: str = ""


@dataclass(frozen=True)
class Column:
    """A table head: its title, what it means, and whether its cells are numbers."""

    title: str
    doc: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table of the page; the first cell of every row is its header.

    ``series`` says that the headers are names which the page's check boxes switch.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: list[list[Cell]] = field(default_factory=list)
    sortable: bool = True
    series: bool = False


def number(value: float | None, digits: int = 3) -> Cell:
    """A cell with a number, which sorts by its exact value."""
    known = value is not None and not math.isnan(value)
    return Cell(shown(value, digits), sort=value if known else None)


def finite(value: float) -> float | None:
    """``value`` as a sort key: ``None`` for NaN and infinity, which sort last."""
    return value if math.isfinite(value) else None


def shade(error: float) -> float | None:
    """How strongly the cell of a relative error is coloured: fully from 1.5 on."""
    return min(error, 1.5) / 1.5 if math.isfinite(error) else None
