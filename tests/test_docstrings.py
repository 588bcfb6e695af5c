"""Docstrings of the public names: what a reader needs is there, and what they name exists."""

from __future__ import annotations

import inspect
import re

import pytest

import curvscope as cs

PUBLIC = {
    name: value
    for name in cs.__all__
    if inspect.isfunction(value := getattr(cs, name)) or inspect.isclass(value)
}
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
# what they do is no computation that somebody has published
WITHOUT_SOURCE = {"make_report", "explore", "show_progress"}


def words(name: str) -> str:
    """The docstring, one space between words."""
    return " ".join((inspect.getdoc(PUBLIC[name]) or "").split())


@pytest.mark.parametrize("name", list(PUBLIC))
def test_begins_with_a_sentence_and_names_errors_that_exist(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name])
    assert text, f"cs.{name} has no docstring"
    first = text.partition("\n\n")[0]
    assert first.endswith((".", ":", "?")) and len(first) < 250, first
    for error in re.findall(r"``(\w+Error)``", text):
        assert hasattr(cs.errors, error), error


@pytest.mark.parametrize("name", FUNCTIONS)
def test_says_what_it_costs_raises_and_comes_from(name: str) -> None:
    if name == "show_progress":  # computes nothing
        return
    text = words(name)
    assert re.search(r"\bCost: ", text), f"cs.{name} does not say what it costs"
    assert re.search(r"\bRaises\b", text), f"cs.{name} does not say what it raises"
    if name not in WITHOUT_SOURCE:
        named = re.search(r"\bSource: ", text) or re.search(r"\barXiv \d{4}\.\d{5}", text)
        assert named, f"cs.{name} does not say where it comes from"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_explains_every_argument_or_says_where(name: str) -> None:
    text = words(name)
    elsewhere = re.search(r"(are|is) (those|that) of :func:", text) or "as is ``" in text
    for argument in inspect.signature(PUBLIC[name]).parameters.values():
        if argument.kind is argument.KEYWORD_ONLY:
            named = re.search(rf"(?<!\w){argument.name}(?!\w)", text)
            assert named or elsewhere, f"cs.{name} does not explain {argument.name}="
