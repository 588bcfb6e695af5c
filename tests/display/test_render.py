"""Fragments for notebooks: numbers with errors, escaped names, cut and sorted tables."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest
import torch

from curvscope.display import Card, Table, cell, render, spark, strip, thumbnail, with_error
from curvscope.display.render import MOST_ROWS

VOID = {"img", "br"}


class Checked(HTMLParser):
    """Every element is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def well_formed(text: str) -> Checked:
    found = Checked()
    found.feed(text)
    assert not found.open, found.open
    return found


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.1234, 0.0042, "0.123 ± 0.004"),
        (0.1234, 0.0142, "0.123 ± 0.014"),
        (0.1234, 0.0, "0.123"),
        (0.1234, math.nan, "0.123"),
        (12345.6, 230.0, "12,346 ± 230"),
        (-2.5, 0.5, "−2.5 ± 0.5"),
        (1.234e-8, 2e-10, "(1.23 ± 0.02)·10⁻⁸"),
        (3.21e9, 1e7, "(3.210 ± 0.010)·10⁹"),
        (0.001, 3.0, "0 ± 3"),
        (math.nan, 1.0, ""),
    ],
)
def test_a_value_has_the_digits_that_its_error_allows(
    value: float, error: float, text: str
) -> None:
    assert with_error(value, error) == text


def test_cells_of_every_type() -> None:
    values = [None, True, 1234, 12345.678, 1.23456e-9, math.nan, -math.inf, "a", (2, 3)]
    assert [cell(v) for v in values] == [
        *("", "yes", "1,234", "12,346", "1.23e-09", "", "−∞", "a", "2 × 3")
    ]


def test_a_card_is_well_formed_and_everything_in_it_escaped() -> None:
    evil = "<script>alert(1)</script>&\"'"
    card = Card(
        title=evil,
        kind=evil,
        marks=[evil],
        facts={evil: evil},
        text=[evil],
        warnings=[evil],
        pictures=[(evil, strip({evil: 3, "b": 1}, [evil])), (evil, spark([1.0, 2.0], evil))],
        tables=[Table([{evil: evil, "value": 1.5, "stderr": 0.1}], title=evil, folded=True)],
        hints=[evil],
    )
    text = render(card)
    assert "alert(1)" in text and "<script>alert" not in text
    seen = well_formed(text).seen
    assert seen.count("script") == 1 and seen.count("style") == 1 and "svg" in seen
    assert "1.50 ± 0.10" in text and ">stderr<" not in text


def test_a_long_table_is_cut_and_says_so() -> None:
    rows = [{"k": k} for k in range(1000)]
    text = render(Card(title="t", tables=[Table(rows, where="all_of_it()")]))
    assert text.count("<tr>") == MOST_ROWS + 1
    assert f"{MOST_ROWS} of 1,000 rows" in text and "all_of_it()" in text
    assert len(text) < 12_000
    short = render(Card(title="t", tables=[Table(rows[:MOST_ROWS])]))
    assert " rows; all of them" not in short


def test_empty_columns_and_empty_tables_are_left_out() -> None:
    rows = [{"a": 1, "b": math.nan, "c": "", "d": None}, {"a": 2, "b": math.nan, "c": "", "d": 3.5}]
    heads = re.findall(r"<th [^>]*>([^<]*)", render(Card(title="t", tables=[Table(rows)])))
    assert heads == ["a", "d"]
    assert "<table>" not in render(Card(title="t", tables=[Table([])]))


def test_numbers_sort_by_their_value_and_keep_all_digits() -> None:
    text = render(Card(title="t", tables=[Table([{"a": 1 / 3, "b": None}, {"a": 2, "b": 1}])]))
    assert f'data-v="{1 / 3!r}"' in text and f'title="{1 / 3!r}"' in text
    assert '<td class="cs-n"></td>' in text  # nothing to sort by, so last


def test_colours_are_those_of_the_notebook() -> None:
    style = render(Card(title="t")).split("</style>")[0]
    assert "color:inherit" in style
    for rule in re.findall(r"([^{}]+)\{[^}]*\}", style.partition("<style>")[2]):
        for selector in rule.split(","):
            assert selector.strip().startswith(".curvscope"), selector
    colours = set(re.findall(r"#[0-9a-f]{3,6}\b", style))
    assert colours <= {"#d66b13", "#2f7fd0"}, colours
    for colour in colours:  # contrast of graphics with white and black, WCAG 1.4.11
        light = luminance(colour)
        assert 1.05 / (light + 0.05) >= 3 and (light + 0.05) / 0.05 >= 3


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_line_breaks_where_a_value_is_missing_and_has_no_more_points_than_pixels() -> None:
    assert spark([1.0, 2.0, math.nan, 3.0, 4.0], "x").count("<polyline") == 2
    assert spark([1.0], "x") == "" and spark([math.nan, 1.0], "x") == ""
    assert "logarithmic" in spark([1.0, 1e-4], "x")
    assert "dasharray" in spark([-1.0, 1.0], "x")
    assert len(spark(list(range(100_000)), "x")) < 8000


def test_a_strip_is_as_wide_as_its_blocks() -> None:
    text = strip({"a": 30, "b": 10}, ["b"], width=400)
    assert re.findall(r'width="([\d.]+)" height="13"', text) == ["299.0", "99.0"]
    assert "a: 30 (75 %)" in text and "b: 10 (25 %), not covered" in text
    assert strip({}) == "" and strip({str(k): 1 for k in range(1000)}) == ""


def test_the_look_of_a_matrix_is_a_small_png() -> None:
    text = thumbnail(torch.eye(500), "unit")
    assert text.startswith("<img") and 'alt="unit"' in text and len(text) < 4000
    assert 'width="80" height="80"' in text
    assert thumbnail(torch.ones(3, 30, dtype=torch.float16), "x")
    assert thumbnail(torch.tensor([[math.nan]]), "x") == ""
    assert thumbnail(torch.zeros(2, 2), "x")
    assert thumbnail(torch.empty(2000, 2000), "x") == ""
