"""Examples of docstrings run as a reader would type them, each on its own."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import time

import pytest
import torch

import curvscope as cs

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SECONDS = 20.0  # of one example at most, with room for a machine that does other things too
# what somebody asks about with `?`
ASKED = {f"cs.{name}": getattr(cs, name) for name in cs._PUBLIC}
ASKED |= {f"cs.optim.{name}": getattr(cs.optim, name) for name in cs.optim.__all__}
ASKED["cs.zoo.load"] = cs.zoo.load
WITHOUT = {"cs.optim.CurvatureOptimizer"}  # the base class of the others


def _examples() -> dict[str, doctest.DocTest]:
    """All docstrings of the package with examples, by name."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for part in pkgutil.walk_packages(cs.__path__, "curvscope."):
        if part.name.endswith("__main__"):
            continue  # runs the command line
        for test in finder.find(importlib.import_module(part.name)):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = _examples()


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.chdir(str(tmp_path))
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    lines: list[str] = []
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        runner.run(EXAMPLES[name], out=lines.append, clear_globs=False)
    assert not runner.failures, "".join(lines)
    assert time.perf_counter() - start < SECONDS
    skipped = [e for e in EXAMPLES[name].examples if doctest.SKIP in e.options]
    assert not skipped or name == "curvscope.report.make_report"  # it takes a minute


@pytest.mark.parametrize("name", sorted(ASKED))
def test_a_question_mark_answers_with_an_example(name: str) -> None:
    text = inspect.getdoc(ASKED[name]) or ""
    assert ">>> " in text or name in WITHOUT, f"{name} has no example"


def test_examples_stand_alone() -> None:
    """What is typed first imports what it uses, so that a reader can paste it."""
    for name, value in ASKED.items():
        if name in WITHOUT:
            continue
        first = doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")[0]
        assert "import" in first.source, name
