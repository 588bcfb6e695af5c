"""The page of a difference: tables of both reports' numbers, and their figures side by side."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..cells import WHOLE_TITLE, Cell, Column, Table, block_title, finite
from ..error_tables import METRIC_COLUMNS
from ..headings import heading, setting_title
from ..numbers import NOTHING, shown
from ..skeleton import Choice, Link, day, render_page
from .model import CHANGED, NOISE, ONLY_A, SAME, Difference, Number, Words
from .pictures import Pair, pairs

_LARGEST = 40  # rows of the table of the largest changes
_COUNTS = {
    *("parameters", "negative_eigenvalues", "positive", "negative", "disjoint", "kaiser"),
    "alarms raised",
}
_SECTIONS = {
    "summary": "Summary",
    "settings": "Settings and versions",
    "findings": "Findings",
    "tables": "Tables",
    "figures": "Figures side by side",
}
_TITLES = {
    "problem": "The problem",
    "layers": "Layers",
    "spectra": "Spectra",
    "concentration": "Concentration",
    "coverage": "Coverage",
    "optimizers": "Optimizers",
    "trainings": "Trainings",
}


def render(
    found: Difference,
    documents: tuple[Mapping[str, Any], Mapping[str, Any]],
    folders: tuple[Path | None, Path | None],
) -> str:
    """The whole page as HTML. Everything that comes from outside is escaped."""
    pictures, notes, rules = pairs(documents, folders)
    groups: dict[str, list[Pair]] = {}
    for pair in pictures:
        groups.setdefault(block_title(pair.block) or "The whole network", []).append(pair)
    sections = tables(found)
    below = {
        "tables": [Link(title, f"#table-{k}") for k, (title, _) in enumerate(sections)],
        "figures": [Link(block, f"#figures-{k}") for k, block in enumerate(groups)],
    }
    same_name = found.names[0] == found.names[1]
    return render_page(
        "diff.html.j2",
        kicker="curvscope diff",
        title=found.names[0] if same_name else f"{found.names[0]} and {found.names[1]}",
        subtitle="Two reports side by side: A, and what is different in B.",
        links=[Link(title, f"#{name}", below.get(name, [])) for name, title in _SECTIONS.items()],
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        choices=[Choice(name) for name in _series(found)],
        rules=rules,
        styles=("diff.css",),
        sentences=found.sentences(),
        same=found.same,
        facts=_facts(found, documents),
        largest=_largest(found),
        settings=[
            _words_table(found, "settings", "Settings that differ."),
            _words_table(found, "versions and machines", "Versions, machines and commands."),
        ],
        findings=[
            _words_table(found, "verdicts", "Verdicts that differ."),
            _words_table(found, "summary", "Sentences of the summary that differ."),
            _words_table(found, "warnings", "Warnings that differ."),
        ],
        sections=sections,
        groups=list(groups.items()),
        notes=notes,
        tolerance=f"{found.tolerance:g}",
    )


def tables(found: Difference) -> list[tuple[str, list[tuple[str, Table]]]]:
    """The sections of tables: a title, and tables with what they are folded under (or nothing)."""
    sections: list[tuple[str, list[tuple[str, Table]]]] = []
    for name in dict.fromkeys(number.table for number in found.numbers):
        numbers = found.of(name)
        if name.startswith("errors"):
            made = [("", _errors(numbers, name))]
            for place in dict.fromkeys(n.place for n in numbers):
                title = f"All metrics, {block_title(place)}"
                made.append((title, _metrics(numbers, place, name)))
            sections.append((name[0].upper() + name[1:], made))
        else:
            title = _TITLES.get(name, name)
            sections.append((title, [("", _pivot(numbers, title))]))
    return sections


def _errors(numbers: list[Number], title: str) -> Table:
    """A row per approximation, a column per block."""
    chosen = [n for n in numbers if n.metric == "error"]
    places = list(dict.fromkeys(n.place for n in chosen))
    if WHOLE_TITLE in places:
        places = [WHOLE_TITLE, *(p for p in places if p != WHOLE_TITLE)]
    known = {(n.name, n.place): n for n in chosen}
    return Table(
        f"Relative {title}, from A to B; below, the change.",
        (Column("approximation", numeric=False), *(Column(block_title(place)) for place in places)),
        [
            [Cell(name), *(_cell(known.get((name, place))) for place in places)]
            for name in dict.fromkeys(n.name for n in chosen)
        ],
        series=True,
    )


def _metrics(numbers: list[Number], place: str, title: str) -> Table:
    """A row per approximation of one block, a column per metric of the report's page."""
    chosen = [n for n in numbers if n.place == place]
    there = {n.metric for n in chosen}
    columns = [key for key in METRIC_COLUMNS if key in there]
    known = {(n.name, n.metric): n for n in chosen}
    return Table(
        f"{block_title(place)}: {title}.",
        (Column("approximation", numeric=False), *(heading(key).column() for key in columns)),
        [
            [Cell(name), *(_cell(known.get((name, key))) for key in columns)]
            for name in dict.fromkeys(n.name for n in chosen)
        ],
        series=True,
    )


def _pivot(numbers: list[Number], title: str) -> Table:
    """A row per place and name, a column per metric."""
    metrics = list(dict.fromkeys(n.metric for n in numbers))
    known = {(n.place, n.name, n.metric): n for n in numbers}
    return Table(
        f"{title}: from A to B; below, the change.",
        (Column("of", numeric=False), *(heading(metric).column() for metric in metrics)),
        [
            [
                Cell(", ".join(filter(None, (block_title(place), name))) or "the problem"),
                *(_cell(known.get((place, name, metric))) for metric in metrics),
            ]
            for place, name in dict.fromkeys((n.place, n.name) for n in numbers)
        ],
    )


def _largest(found: Difference) -> Table | None:
    numbers = [n for n in found.changed if n.state == CHANGED][:_LARGEST]
    if not numbers:
        return None
    columns = (
        Column("number", numeric=False),
        Column("of", numeric=False),
        *(Column(title) for title in ("A", "B", "B − A", "change")),
    )
    rows = [
        [
            Cell(heading(n.metric).title, small=n.table),
            Cell(n.where or n.table),
            *(Cell(_text(n, v), sort=finite(v)) for v in (n.a, n.b, n.difference)),
            Cell(_change(n), sort=finite(abs(n.relative)), shade=_shade(n)),
        ]
        for n in numbers
    ]
    count = len([n for n in found.changed if n.state == CHANGED])
    which = f"The {len(rows)} largest of {count:,} changes" if count > len(rows) else "All changes"
    return Table(f"{which}: the main numbers first, by size.", columns, rows)


def _cell(number: Number | None) -> Cell:
    """From A to B in one cell."""
    if number is None:
        return Cell(NOTHING)
    if number.state == SAME:
        return Cell(_text(number, number.b), sort=0.0, title="the same in both")
    if number.state in (NOISE, CHANGED):
        return Cell(
            f"{_text(number, number.a)} → {_text(number, number.b)}",
            small="within error" if number.state == NOISE else _change(number),
            sort=finite(_size(number)) if number.state == CHANGED else 0.0,
            shade=_shade(number) if number.state == CHANGED else None,
        )
    only = number.a if number.state == ONLY_A else number.b
    return Cell(
        _text(number, only), small=number.state, title="The other report has no number here."
    )


def _text(number: Number, value: float) -> str:
    whole = number.metric in _COUNTS and math.isfinite(value)
    return shown(int(value) if whole else value)


def _size(number: Number) -> float:
    whole = max(abs(number.a), abs(number.b))
    return abs(number.difference) / whole if whole else 0.0


def _shade(number: Number) -> float | None:
    size = _size(number)
    return min(1.0, 0.15 + 0.85 * size) if math.isfinite(size) else None


def _change(number: Number) -> str:
    """In percent, or as a factor where it is large."""
    if not math.isfinite(number.relative):
        text = shown(number.difference, 2)
        return text if text.startswith("−") else f"+{text}"
    ratio = number.b / number.a
    if ratio < 0:
        return "other sign"
    if not 0.5 <= ratio <= 2:
        return f"{shown(ratio, 2)} times"
    percent = 100 * (ratio - 1)
    text = f"{percent:+.1f} %" if abs(percent) >= 0.05 else f"{shown(percent, 2)} %"
    return text.replace("-", "−")


def _words_table(found: Difference, table: str, caption: str) -> Table | None:
    words = [word for word in found.words if word.table == table]
    if not words:
        return None
    sentences = table in ("summary", "warnings")
    columns = tuple(Column(t, numeric=False) for t in ("what" if sentences else "name", "A", "B"))
    return Table(caption, columns, [_words_row(word, sentences) for word in words])


def _words_row(word: Words, sentence: bool) -> list[Cell]:
    sides = [Cell(NOTHING if text is None else text) for text in (word.a, word.b)]
    name = setting_title(word.name) if word.table == "settings" else word.name
    if sentence:
        name = "only in A" if word.b is None else "only in B" if word.a is None else "other numbers"
    return [Cell(name), *sides]


def _series(found: Difference) -> Iterable[str]:
    """Names that the check boxes switch."""
    if any(n.table.startswith("errors") for n in found.numbers):
        return dict.fromkeys(n.name for n in found.numbers if n.table.startswith("errors"))
    return ()


def _facts(
    found: Difference, documents: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> list[tuple[str, str]]:
    pairs = []
    for side, name, source, document in zip(
        "AB", found.names, found.sources, documents, strict=True
    ):
        version = document["environment"].get("versions", {}).get("curvscope", "?")
        pairs += [
            (f"report {side}", f"{name} ({source})"),
            (f"report {side} was made", f"{day(str(document['created']))} by curvscope {version}"),
        ]
    return pairs
