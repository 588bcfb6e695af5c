"""What each kind of picture draws, and what it refuses."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import curvscope as cs
from curvscope import plot as cplot
from curvscope.analysis import compare, concentration, spectrum
from curvscope.errors import NotDefinedError, OptionError, UnknownBlockError
from curvscope.operators import DenseOperator, DiagonalOperator
from curvscope.plotting.matrices import _pooled
from curvscope.plotting.shares import null_band_shares

from .pictures import comparison, kronecker, positive, symmetric, verification

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


def test_operators_draw_themselves_and_factors_with_a_row_per_sample_are_no_picture() -> None:
    model = torch.nn.Linear(3, 2)
    data = torch.randn(5, 3), torch.randint(2, (5,))
    problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    block = cs.ggn(problem).blocks["(root)"]
    assert block.factors["a"].shape[0] == 5  # type: ignore[attr-defined]
    assert block.plot().images[0].get_array().shape == (8, 8)
    assert len(cs.kfac(problem).blocks["(root)"].plot()) == 2


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
    for kind in ("scree", "fourier"):
        with pytest.raises(NotDefinedError):
            large.plot(kind=kind)
    title = large.plot(kind="discs").get_title(loc="left")
    assert "of 12 discs" in title  # what products give is estimated


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


# -- verification --------------------------------------------------------------------------------


def test_checks_have_their_value_tolerance_status_and_group() -> None:
    ax = verification().plot()
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == [check.name for check in verification().checks]
    marks = {}  # row -> place and colour of the mark
    ticks = {}
    for line in ax.get_lines():
        if line.get_marker() == "|" and len(line.get_xdata()):
            ticks[int(line.get_ydata()[0])] = float(line.get_xdata()[0])
        elif line.get_marker() not in ("None", None, "") and len(line.get_xdata()):
            marks[int(line.get_ydata()[0])] = (float(line.get_xdata()[0]), line.get_color())
    row = dict(zip(names, (int(y) for y in ax.get_yticks()), strict=True))
    low, high = ax.get_xlim()
    assert ax.get_xscale() == "log"
    assert marks[row["gradient"]][0] == 1e-11 and ticks[row["gradient"]] == 1e-6
    assert marks[row["determinism"]][0] == low  # zero has no place on a logarithmic axis
    assert marks[row["torch.func"]][0] == high
    assert row["symmetry"] not in marks and ticks[row["symmetry"]] == 1e-8
    passed, failed = marks[row["gradient"]][1], marks[row["precision"]][1]
    assert passed != failed == marks[row["torch.func"]][1]
    words = [text.get_text() for text in ax.texts]
    groups = ["your problem", "curvscope", "other tools"]
    assert words == [
        "your problem",
        "not applicable",
        "curvscope",
        "undecided",
        "other tools",
        "passed",
    ]
    assert [word for word in words if word in groups] == groups
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == [
        "passed (3)",
        "failed (2)",
        "undecided (1)",
        "not applicable (1)",
        "tolerance",
    ]
