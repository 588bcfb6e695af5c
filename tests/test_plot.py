"""Figures: what they draw, what they refuse, and that they leave matplotlib as it was."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from curvscope import plot as cplot
from curvscope.analysis import compare, concentration, spectrum
from curvscope.analysis.comparison import Comparison, ReferenceBlock, Row
from curvscope.analysis.coverage import Cell, Coverage, ParameterRow
from curvscope.analysis.result import Result
from curvscope.errors import NotDefinedError, OptionError, UnknownBlockError
from curvscope.operators import DenseOperator, DiagonalOperator, KroneckerOperator
from curvscope.plotting.matrices import _pooled
from curvscope.plotting.shares import null_band_shares
from curvscope.plotting.style import power_of_ten, short
from curvscope.report.svg import for_page


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (matrix + matrix.mT) / 2


def positive(size: int, seed: int = 0) -> torch.Tensor:
    matrix = symmetric(size, seed)
    return matrix @ matrix


def kronecker(seed: int = 0) -> KroneckerOperator:
    return KroneckerOperator(positive(3, seed), positive(4, seed + 1))


def comparison() -> Comparison:
    """Two blocks and the whole; one estimated row, one uncovered."""
    rows = []
    for block in ("first", "second", "(all)"):
        rows.append(
            Row(
                block,
                "K-FAC",
                size=4,
                family="Kronecker",
                best_class="Kronecker",
                values={"error": 0.5, "best_in_class": 0.25, "cosine": 0.75},
                stderr={"error": 0.05} if block == "(all)" else {},
            )
        )
        rows.append(
            Row(block, "diagonal", "uncovered", 4, note="not here")
            if block == "second"
            else Row(
                block,
                "diagonal",
                size=4,
                family="diagonal",
                best_class="diagonal",
                values={"error": 0.9, "best_in_class": 0.9, "cosine": 0.1},
            )
        )
    return Comparison(
        reference="GGN",
        approximations=("K-FAC", "diagonal"),
        blocks=("first", "second"),
        rows=tuple(rows),
        references=(ReferenceBlock("first", 4, "GGN", "gram", 1.0, 1.0),),
        metrics=("error", "cosine"),
    )


def coverage() -> Coverage:
    names = ("weight", "bias", "frozen")
    rows = tuple(
        ParameterRow(
            name=name,
            names=(name,),
            shape=(2,),
            size=2,
            block="0",
            layer="Linear",
            state="frozen" if name == "frozen" else "included",
        )
        for name in names
    )
    cells = tuple(
        Cell(parameter=name, method=method, status=status, route=route)
        for name, states in zip(
            names,
            (
                [("covered", "gram"), ("uncovered", "")],
                [("covered", "autograd"), ("covered", "Kronecker")],
                [("ignored", ""), ("ignored", "")],
            ),
            strict=True,
        )
        for method, (status, route) in zip(("Hessian", "K-FAC"), states, strict=True)
    )
    return Coverage(
        problem="p",
        methods=("Hessian", "K-FAC"),
        parameters=rows,
        cells=cells,
        shares={},
        not_available={},
        buffers={},
    )


# -- everything at once --------------------------------------------------------------------------


@functools.cache
def pictures() -> dict[str, object]:
    """A call per picture, each returning axes."""
    block = concentration(positive(12), samples=4)
    factors = concentration(kronecker(), samples=4)
    curve = spectrum(symmetric(40))
    return {
        "bars": lambda **k: comparison().plot(**k),
        "bars of one block": lambda **k: comparison().plot(blocks=["first"], **k),
        "bars of another metric": lambda **k: comparison().plot(metric="cosine", **k),
        "spectrum": lambda **k: curve.plot(**k),
        "histogram": lambda **k: curve.plot(kind="histogram", **k),
        "discs": lambda **k: block.plot(**k),
        "intervals": lambda **k: cplot.plot_gershgorin(block, kind="intervals", **k),
        "diagonal": lambda **k: factors.plot(kind="diagonal", **k),
        "bands": lambda **k: block.plot(kind="bands", **k),
        "scree": lambda **k: block.plot(kind="scree", **k),
        "fourier": lambda **k: block.plot(kind="fourier", **k),
        "matrix": lambda **k: cplot.plot(DenseOperator(symmetric(6)), **k),
        "coverage": lambda **k: coverage().plot(**k),
        "cost": lambda **k: cplot.plot_cost({"a": 0.004, "b": 12.0}, **k),
    }


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


def test_settings_of_matplotlib_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    for draw in pictures().values():
        draw()  # type: ignore[operator]
    cplot.plot_factors(kronecker())
    cplot.plot_blocks({"a": symmetric(5), "b": symmetric(5, 1)})
    with pytest.raises(NotDefinedError):
        cplot.plot_cost({})
    assert dict(matplotlib.rcParams) == before


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


# -- spectra -------------------------------------------------------------------------------------


def test_negative_eigenvalues_are_drawn_with_their_size_and_number() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, -0.5, -3.0], dtype=torch.float64)
    ax = spectrum(torch.diag(values)).plot()
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    (positive_line,) = (y for label, y in lines.items() if "negative" not in label)
    (negative_line,) = (y for label, y in lines.items() if "2 negative" in label)
    assert list(positive_line) == [4.0, 2.0, 1.0]
    assert list(negative_line) == [3.0, 0.5]
    assert ax.get_yscale() == "log"


def test_what_vanishes_is_not_drawn_as_an_eigenvalue() -> None:
    values = torch.tensor([1.0, 1e-20, -1e-20, 0.0], dtype=torch.float64)
    ax = spectrum(torch.diag(values)).plot()
    assert sum(len(line.get_ydata()) for line in ax.get_lines()) == 1


def test_several_spectra_keep_their_order_in_the_legend_and_the_exact_one_is_ink() -> None:
    named = {"GGN": spectrum(positive(6)), "K-FAC": spectrum(symmetric(6))}
    ax = cplot.plot_spectra(named)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[0] == "GGN" and texts[1] == "K-FAC" and texts[2].startswith("K-FAC, ")
    inks = {line.get_label(): line.get_color() for line in ax.get_lines()}
    assert inks["GGN"] != inks["K-FAC"]


def test_zero_and_constant_spectra_can_be_drawn() -> None:
    for matrix in (torch.zeros(4, 4), torch.eye(4), torch.diag(torch.full((40,), 10.0))):
        for kind in ("rank", "histogram"):
            ax = spectrum(matrix.double()).plot(kind=kind)
            ax.figure.canvas.draw()


def test_histogram_counts_every_eigenvalue_once() -> None:
    matrix = symmetric(60)
    matrix[:10] = 0
    matrix[:, :10] = 0
    found = spectrum(matrix)
    ax = found.plot(kind="histogram")
    assert sum(patch.get_height() for patch in ax.patches) == 60
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert f"negative ({found.negative})" in labels
    assert f"about zero ({found.zero})" in labels


# -- matrices ------------------------------------------------------------------------------------


def test_pooling_keeps_the_largest_entry_of_every_tile_with_its_sign() -> None:
    array = np.zeros((10, 10))
    array[3, 4], array[9, 9], array[0, 0] = -5.0, 2.0, 1.0
    pixels, tile = _pooled(array, 5)
    assert tile == 2 and pixels.shape == (5, 5)
    assert pixels[1, 2] == -5.0 and pixels[4, 4] == 2.0 and pixels[0, 0] == 1.0
    assert np.count_nonzero(pixels) == 3
    odd, tile = _pooled(np.ones((7, 7)), 3)  # the last tile is padded, not cut
    assert tile == 3 and odd.shape == (3, 3) and odd.all()


def test_heat_maps_are_symmetric_about_zero_and_share_a_scale() -> None:
    left, right = cplot.plot_blocks({"a": 3 * torch.eye(4), "b": -torch.eye(4)})
    limits = [ax.images[0].get_clim() for ax in (left, right)]
    assert limits == [(-3.0, 3.0), (-3.0, 3.0)]
    assert left.get_title(loc="left") == "a"
    ax = cplot.plot_matrix(torch.eye(4), scale="log")
    assert ax.images[0].norm.vmax == 1.0 and ax.images[0].norm.vmin > 0
    assert tuple(cplot.plot_matrix(torch.eye(4), limit=7.0).images[0].get_clim()) == (-7.0, 7.0)


def test_factors_are_drawn_each_on_its_own_scale() -> None:
    op = kronecker()
    axes = cplot.plot(op)
    assert [ax.get_title(loc="left") for ax in axes] == ["output factor G", "input factor A"]
    for ax, factor in zip(axes, op.factors.values(), strict=True):
        assert ax.images[0].get_array().shape == tuple(factor.shape)
        assert ax.images[0].get_clim()[1] == pytest.approx(float(factor.abs().max()))


def test_matrix_without_factors_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(NotDefinedError, match="no Kronecker factors"):
        cplot.plot_factors(DiagonalOperator(torch.ones(3)))
    with pytest.raises(NotDefinedError, match="needs a matrix"):
        cplot.plot_matrix(torch.ones(3))
    with pytest.raises(OptionError, match="scale="):
        cplot.plot_matrix(torch.eye(3), scale="logarithmic")
    with pytest.raises(OptionError, match="axes= holds 1"):
        cplot.plot_factors(kronecker(), axes=[plt.subplots()[1]])


# -- bars ----------------------------------------------------------------------------------------


def test_bars_have_the_errors_and_ticks_the_best_of_the_class() -> None:
    ax = comparison().plot()
    widths = sorted(round(patch.get_width() + patch.get_x(), 9) for patch in ax.patches)
    assert widths == [0.5, 0.5, 0.5, 0.9, 0.9]
    ticks = sorted(float(line.get_xdata()[0]) for line in ax.get_lines() if len(line.get_xdata()))
    assert [t for t in ticks if t in (0.25, 0.9)] == [0.25, 0.25, 0.25, 0.9, 0.9]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "first",
        "second",
        "whole matrix",
    ]
    assert "uncovered" in [text.get_text() for text in ax.texts]


def test_bars_refuse_unknown_names_and_nothing_to_draw() -> None:
    with pytest.raises(UnknownBlockError, match="Did you mean 'first'"):
        comparison().plot(blocks=["frist"])
    with pytest.raises(UnknownBlockError, match="Did you mean 'K-FAC'"):
        comparison().plot(approximations=["KFAC"])
    with pytest.raises(NotDefinedError, match="'spectral_error'"):
        comparison().plot(metric="spectral_error")


def test_real_comparison_can_be_drawn() -> None:
    reference = DenseOperator(positive(6))
    result = compare(reference, {"diagonal": DiagonalOperator(reference.diagonal())})
    assert result.plot().patches


# -- concentration -------------------------------------------------------------------------------


def test_band_shares_of_the_null_model_are_those_of_random_eigenvectors() -> None:
    """Against 400 random orthogonal bases: every band within four standard errors."""
    size, draws = 7, 400
    values = torch.arange(1.0, size + 1, dtype=torch.float64) ** 2
    generator = torch.Generator().manual_seed(3)
    shares = []
    for _ in range(draws):
        gauss = torch.randn(size, size, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gauss)
        q = q * r.diagonal().sign()
        squares = ((q * values) @ q.mT).square()
        distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
        bands = [float(squares[distance <= k].sum() / squares.sum()) for k in range(size)]
        shares.append(bands)
    found = np.array(shares)
    tr, norm = float(values.sum()), float(values.square().sum())
    expected = null_band_shares(size, (tr**2 + 2 * norm) / (size + 2) / norm)
    z = (found.mean(0) - expected)[:-1] / (found.std(0, ddof=1)[:-1] / math.sqrt(draws))
    assert np.abs(z).max() < 4
    assert expected[-1] == pytest.approx(1.0) and (np.diff(expected) > 0).all()
    assert null_band_shares(1, 1.0).tolist() == [1.0]


def test_disjoint_discs_are_counted_as_in_the_result() -> None:
    matrix = torch.diag(torch.tensor([1.0, 5.0, 9.0, 9.5])).double()
    matrix[2, 3] = matrix[3, 2] = 1.0
    result = concentration(matrix, samples=0)
    assert result.disjoint == 2
    for kind in ("discs", "intervals"):
        ax = cplot.plot_gershgorin(result, kind=kind)
        assert ax.get_title(loc="left") == "2 of 4 discs touch no other"


def test_what_was_not_computed_is_refused_with_a_reason() -> None:
    large = concentration(DenseOperator(positive(12)), limit=4, samples=0)
    for kind in ("discs", "bands", "scree", "fourier"):
        with pytest.raises(NotDefinedError):
            large.plot(kind=kind)


def test_fourier_of_a_diagonal_matrix_lies_where_the_frequencies_cancel() -> None:
    result = concentration(torch.diag(torch.arange(1.0, 17.0)).double(), samples=0)
    ax = result.plot(kind="fourier")
    image = np.asarray(ax.images[0].get_array())
    assert ax.images[0].origin == "lower"
    rows, columns = np.nonzero(image > 0.5 * image.max())
    frequencies = np.fft.fftshift(np.fft.fftfreq(16))
    total = frequencies[rows] + frequencies[columns]
    assert np.allclose(np.round(total), total)  # zero up to a whole turn
    assert len(rows) == 16


# -- dispatch, style, svg ------------------------------------------------------------------------


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
