"""Fragments in a real browser: tables sort by mouse and keys, in every scheme, without errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from curvscope.display import Card, Table, render

from ..report import browser as browsers

PROGRAM = browsers.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium or Chrome")

ROWS = [
    {"name": "b", "value": 10.0, "count": 3},
    {"name": "a", "value": 9.5e-7, "count": None},
    {"name": "c", "value": 200.0, "count": 1},
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Tab]:
    page = tmp_path_factory.mktemp("page") / "page.html"
    first = render(Card(title="first", tables=[Table(ROWS)]))
    second = render(Card(title="second", tables=[Table(ROWS[:2])]))
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{first}{second}</body>")
    with browsers.browser(str(PROGRAM)) as program:
        opened = program.tab()
        opened.open(Path(page))
        yield opened


def names(tab: browsers.Tab, place: int = 0) -> list[str]:
    return list(
        tab.evaluate(
            f"[...document.querySelectorAll('.curvscope')[{place}].querySelectorAll('tbody tr')]"
            ".map(row => row.cells[0].textContent)"
        )
    )


def test_a_click_sorts_by_value_and_a_second_one_turns_it_round(tab: browsers.Tab) -> None:
    assert names(tab) == ["b", "a", "c"]
    tab.click("th:nth-child(2) button")
    assert names(tab) == ["a", "b", "c"]  # by size, not by letters
    assert tab.evaluate("document.querySelector('th:nth-child(2)').ariaSort") == "ascending"
    tab.click("th:nth-child(2) button")
    assert names(tab) == ["c", "b", "a"]
    assert names(tab, 1) == ["b", "a"]  # the other table stays
    tab.click("th:nth-child(3) button")
    assert names(tab) == ["c", "b", "a"]  # what is empty comes last
    tab.click("th:nth-child(3) button")
    assert names(tab) == ["b", "c", "a"]


def test_the_keyboard_sorts_too(tab: browsers.Tab) -> None:
    tab.evaluate("document.querySelector('th:nth-child(1) button').focus()")
    tab.key("Enter")
    assert names(tab) == ["a", "b", "c"]


def test_a_heading_has_one_button_though_every_fragment_brings_the_script(
    tab: browsers.Tab,
) -> None:
    buttons = "[...document.querySelectorAll('th')].map(h => h.querySelectorAll('button').length)"
    assert tab.evaluate(buttons) == [1] * 6
    assert not tab.errors
