"""All figures: arguments, labels, matplotlib left as it was; style and the page's SVG."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

import curvscope as cs
from curvscope import analysis
from curvscope import plot as cplot
from curvscope.analysis import concentration
from curvscope.analysis.result import Result
from curvscope.errors import NotDefinedError, OptionError
from curvscope.plotting.style import PALETTE, power_of_ten, short
from curvscope.report.svg import for_page

from .pictures import coverage, kronecker, pictures, symmetric


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.mark.parametrize("name", list(pictures()))
def test_axes_are_taken_and_returned_and_labelled(name: str) -> None:
    figure, ax = plt.subplots()
    returned = pictures()[name](ax=ax)  # type: ignore[operator]
    assert returned is ax
    assert ax.has_data() or ax.patches or ax.images
    if name != "coverage":  # names on its axes speak for themselves
        assert ax.get_xlabel()
    figure.canvas.draw()
    new = pictures()[name]()  # type: ignore[operator]
    assert isinstance(new, Axes) and new is not ax


def subclasses(base: type) -> set[type]:
    return {base}.union(*map(subclasses, base.__subclasses__())) - {Result}


def test_every_result_of_a_single_analysis_has_a_picture() -> None:
    results = {
        name
        for name in dir(analysis)
        if isinstance(one := getattr(analysis, name), type)
        and issubclass(one, Result)
        and one is not Result
    }
    for part in pkgutil.walk_packages(cs.__path__, "curvscope."):
        if part.name.startswith(("curvscope.analysis", "curvscope.training")):
            importlib.import_module(part.name)
    found = subclasses(Result)
    results |= {c.__name__ for c in found if c.__module__.startswith("curvscope.")} - {"Estimated"}
    drawn = set(cplot._KINDS)
    assert results <= drawn, results - drawn
    assert {"Comparison", "Spectrum", "Concentration", "Coverage", "Verification"} <= results


def test_pyplot_does_not_keep_figures_of_scripts() -> None:
    before = plt.get_fignums()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            pictures()["spectrum"]()  # type: ignore[operator]
        cplot.plot_factors(kronecker())
    assert plt.get_fignums() == before


def test_at_a_prompt_figures_are_those_of_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    ax = pictures()["spectrum"]()  # type: ignore[operator]
    assert plt.get_fignums() == [ax.figure.number]


def test_settings_of_matplotlib_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    for draw in pictures().values():
        draw()  # type: ignore[operator]
    cplot.plot_factors(kronecker())
    cplot.plot_blocks({"a": symmetric(5), "b": symmetric(5, 1)})
    with pytest.raises(NotDefinedError):
        cplot.plot_cost({})
    assert dict(matplotlib.rcParams) == before


def test_interactive_mode_that_a_backend_turns_on_stays_on() -> None:
    """As the first figure of a notebook does; else no later one would be shown."""
    before = matplotlib.is_interactive()
    try:
        with cplot.style():
            matplotlib.interactive(not before)
        assert matplotlib.is_interactive() is not before
    finally:
        matplotlib.interactive(before)


def test_nothing_but_the_call_imports_matplotlib() -> None:
    code = (
        "import sys, curvscope, curvscope.plot, curvscope.report, curvscope.cli\n"
        "heavy = {'matplotlib', 'pandas', 'jinja2', 'typer', 'sklearn', 'backpack'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_label_lies_outside_the_figure_or_on_another(tmp_path: Path) -> None:
    """Tick labels, axis labels and legends of the main figures stay inside and apart."""
    for name, draw in pictures().items():
        ax = draw()  # type: ignore[operator]
        figure = ax.figure
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        width, height = figure.canvas.get_width_height()
        boxes = {
            text.get_text(): text.get_window_extent(renderer)
            for text in (ax.xaxis.label, ax.yaxis.label, ax._left_title)
            if text.get_text()
        }
        if ax.get_legend():
            boxes["legend"] = ax.get_legend().get_window_extent(renderer)
        for label, box in boxes.items():
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert inside, (name, label, box)
        items = list(boxes.items())
        for k, (label, box) in enumerate(items):
            for other, second in items[k + 1 :]:
                assert not box.overlaps(second), (name, label, other)


def test_unknown_results_and_kinds_are_refused() -> None:
    with pytest.raises(OptionError, match="no picture for Result"):
        Result().plot()
    with pytest.raises(OptionError, match="Did you mean 'discs'"):
        concentration(torch.eye(3), samples=0).plot(kind="disks")


def test_coverage_has_a_square_per_cell_and_a_cross_where_uncovered() -> None:
    ax = coverage().plot()
    assert len(ax.patches) == 6
    crosses = [line for line in ax.get_lines() if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [(1, 0)]


def test_powers_of_ten_and_short_names() -> None:
    assert [power_of_ten(v) for v in (1e-3, 2e-3, 0.01, 1.0, 1000.0, 1e4, 0.0, -1e-5)] == [
        "10⁻³",
        "2·10⁻³",
        "0.01",
        "1",
        "1000",
        "10⁴",
        "0",
        "−10⁻⁵",
    ]
    assert short("blocks.0.attention.out_proj", 12) == "block…t_proj"
    assert len(short("a" * 50)) == 28


def test_svg_for_the_page_follows_its_colours_and_keeps_its_numbers_apart() -> None:
    markup = (
        '<?xml version="1.0"?><!-- c --><svg viewBox="0 0 10 10"><metadata>x</metadata>'
        '<defs><clipPath id="a"><path d="M 1.23456 2.00001"/></clipPath></defs>'
        '<g clip-path="url(#a)" transform="scale(0.01234)"><path style="stroke: #1c2126"/></g>'
        "<text>0.01234</text></svg>"
    )
    found = for_page(markup, "fig-1", 'a "b" <c>')
    assert 'id="fig-1--a"' in found and "url(#fig-1--a)" in found
    assert "M1.23 2" in found and "scale(0.01234)" in found and ">0.01234<" in found
    assert "currentColor" in found and "metadata" not in found and "<!--" not in found
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in found and found.startswith("<svg")


def test_lines_of_ones_own_have_the_colours_of_the_package() -> None:
    with cplot.style():
        axes = plt.figure().add_subplot()
        lines = [axes.plot([0, 1])[0] for _ in range(2)]
    assert [line.get_color() for line in lines] == list(PALETTE[:2])
    plt.close("all")
