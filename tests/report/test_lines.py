"""Legends below the pictures of trainings: complete, and inside the figure."""

from __future__ import annotations

import pytest

from curvscope.report.runs.lines import legend_below

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(("length", "columns"), [(2, 4), (16, 2), (40, 1)])
def test_a_legend_has_every_line_and_stays_inside(length: int, columns: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [f"{k}" * length for k in range(4)]
    for name in names[:3]:
        left.plot([0, 1], [0, 1], label=name)
    right.plot([0, 1], [0, 1], label=names[0])
    right.plot([0, 1], [1, 0], label=names[3])  # a line that the first panel does not have
    legend_below(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert legend._ncols == columns  # type: ignore[attr-defined]
    assert legend.get_window_extent().width <= figure.bbox.width
    rows = 4 // columns
    assert figure.get_figheight() == pytest.approx(3.0 + 0.18 * (rows - 1))


def test_one_line_needs_no_legend() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([0, 1], [0, 1], label="alone")
    legend_below(figure, least=2)
    assert not figure.legends
    legend_below(figure)
    assert len(figure.legends) == 1
