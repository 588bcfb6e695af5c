"""What the documentation says about the package is complete."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import curvscope as cs
from curvscope.analysis.metrics import METRICS

ROOT = Path(__file__).parents[1]
BESIDE = {"best_in_class", "excess", "outside"}
PACKAGES = (
    "analysis",
    "curvature",
    "curvature.backpack",
    "operators",
    "optim",
    "plot",
    "problem",
    "report",
    "training",
    "zoo",
)


def _hook(name: str) -> ModuleType:
    for package in ("mkdocs", "latex2mathml", "griffe"):
        pytest.importorskip(package, reason="the documentation is built with the docs extra")
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_metric_has_an_entry() -> None:
    text = (ROOT / "docs" / "explanations" / "metrics.md").read_text(encoding="utf-8")
    entries = re.findall(r"^### `(\w+)`$", text, re.MULTILINE)
    assert len(entries) == len(set(entries))
    assert set(entries) == set(METRICS) | BESIDE


def test_public_names_are_on_one_page_of_the_reference_each() -> None:
    hooks = _hook("hooks")
    found: list[str] = []
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        text = hooks._REST.sub(hooks._rest, page.read_text(encoding="utf-8"))
        found += hooks._NAMED.findall(text)
    twice = {name for name in found if found.count(name) > 1}
    assert not twice, f"{twice} stand on two pages"
    wanted = {f"curvscope.{package}.{name}" for name, package in cs._PUBLIC.items()}
    for package in PACKAGES:
        module = importlib.import_module(f"curvscope.{package}")
        wanted |= {f"curvscope.{package}.{name}" for name in module.__all__}
    # the page of errors has the whole module, and estimators stand with their own results
    assert wanted - set(found) == set()
    assert set(found) - wanted == {"curvscope.errors"}


def test_paths_of_the_reference_lead_somewhere() -> None:
    hooks = _hook("hooks")
    for name in cs._PUBLIC:
        *path, last = hooks.canonical(name).split(".")
        module = importlib.import_module(".".join(path))
        assert getattr(module, last).__name__ == getattr(cs, name).__name__ == last


def test_imports_point_down_the_house() -> None:
    diagrams = _hook("diagrams")
    floors = list(diagrams.HOUSE)
    for above, below in diagrams.imports():
        assert floors.index(above) < floors.index(below), f"{above} imports {below}"
    modules = {path.stem for path in (ROOT / "curvscope").iterdir()} - {"__init__", "__pycache__"}
    homeless = {name for name in modules if diagrams.floor_of(name) is None} - {"py"}
    assert not homeless, f"give {homeless} a floor in docs/diagrams.py"


def test_the_map_has_every_approximation_of_the_report() -> None:
    from curvscope.report.approximations import RECIPES

    drawn = _hook("diagrams").recipes()
    assert drawn == [(recipe.name, recipe.group, recipe.about) for recipe in RECIPES]


def test_prose_below_sections_comes_first() -> None:
    """Parsers would take it for the last error that is raised."""
    reordered = _hook("docstrings").prose_first
    raises, cost = "Raises\n------\nError\n    When.", "Cost: much\nof it."
    example = "Examples\n--------\n>>> 1"
    text = "\n\n".join(["What.", raises, cost, example])
    wanted = "\n\n".join(["What.", cost, raises, example])
    assert reordered(text) == wanted
    assert reordered("What.\n\nCost: nothing.") == "What.\n\nCost: nothing."
