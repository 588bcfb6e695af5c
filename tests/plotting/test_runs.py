"""A run draws itself: panels for what it recorded, and refusals in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import curvscope as cs
from curvscope import plot as cplot
from curvscope.errors import NotDefinedError, OptionError
from curvscope.training.store import Writer

HEAD: dict[str, Any] = {
    "format": 1,
    "id": "a",
    "name": "net, SGD",
    "initial": "x",
    "fingerprint": {},
}
ALARMS = {
    10: ("too sharp", "", "raised"),
    15: ("too sharp", "", "over"),
    20: ("above", "b1", "raised"),
}


def watched(path: Path, *, blocks: int = 2) -> cs.Run:
    """Twenty steps; one alarm that is over, one that is not; a loss that is not finite."""
    writer = Writer(path, HEAD)
    for step in range(1, 21):
        writer.append(step, "loss", [{"loss": math.nan if step == 7 else 20.0 / step, "lr": 0.1}])
        if step % 5 == 0:
            rows = [{"block": f"b{k}", "size": 10 + k, "error": 1.0 + k} for k in range(blocks)]
            writer.append(step, "error", [*rows, {"block": "none", "size": 3}])
            sharp = {"lambda_max": 10.0, "product": step / 4, "preconditioned_product": 0.5}
            writer.append(step, "sharpness", [sharp])
        if step in ALARMS:
            name, block, state = ALARMS[step]
            row = {"alarm": name, "block": block, "state": state, "message": "much"}
            writer.append(step, "alarm", [row])
    writer.close()
    return cs.Run(path)


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def test_a_run_draws_what_it_recorded(tmp_path: Path) -> None:
    loss, error, sharpness, alarms = axes = watched(tmp_path / "r").plot()
    assert [ax.get_ylabel() for ax in axes[:3]] == ["loss", "relative error", "λ_max · lr"]
    (curve,) = loss.get_lines()
    assert list(curve.get_xdata()) == list(range(1, 21))
    assert math.isnan(curve.get_ydata()[6]) and curve.get_ydata()[9] == 2.0
    assert loss.get_yscale() == "log" and loss.get_title(loc="left") == "net, SGD"
    named = {line.get_label(): list(line.get_ydata()) for line in error.get_lines()}
    assert named == {"b0": [1.0] * 4, "b1": [2.0] * 4}  # a block that was never compared has none
    limit = [line for line in sharpness.get_lines() if line.get_label() == "limit of stability"]
    assert list(limit[0].get_ydata()) == [2.0, 2.0]
    spans = [tuple(line.get_xdata()) for line in alarms.get_lines()]
    assert spans == [(10, 15), (20, 20)]
    assert [t.get_text() for t in alarms.get_yticklabels()] == ["too sharp", "above · b1"]
    assert axes[-1].get_xlabel() == "step"


def test_labels_and_legends_lie_inside_and_apart(tmp_path: Path) -> None:
    axes = watched(tmp_path / "r", blocks=9).plot()
    figure = axes[0].figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    boxes = [legend.get_window_extent(renderer) for ax in axes if (legend := ax.get_legend())]
    boxes += [label.get_window_extent(renderer) for ax in axes[:3] for label in [ax.yaxis.label]]
    boxes.append(axes[-1].xaxis.label.get_window_extent(renderer))
    for k, box in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert not any(box.overlaps(other) for other in boxes[k + 1 :])


def test_of_many_blocks_the_largest_are_drawn_and_the_picture_says_so(tmp_path: Path) -> None:
    (ax,) = watched(tmp_path / "r", blocks=9).plot(panels=["error"])
    assert [line.get_label() for line in ax.get_lines()] == [f"b{k}" for k in range(3, 9)]
    assert ax.get_legend().get_title().get_text() == "6 largest of 9 blocks"


def test_axes_are_taken_and_returned_and_can_be_saved(tmp_path: Path) -> None:
    run = watched(tmp_path / "r")
    _, given = plt.subplots(2, 1)
    drawn = cplot.plot(run, panels=["loss", "alarms"], axes=given)
    assert drawn == list(given) and all(ax.has_data() for ax in given)
    assert cplot.save(run.plot(), tmp_path / "run.pdf").stat().st_size > 1000
    assert "run.plot()" in run._repr_html_()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    run = watched(tmp_path / "r")
    with pytest.raises(OptionError, match="Did you mean 'loss'"):
        run.plot(panels=["los"])
    with pytest.raises(OptionError, match="axes= holds 1 axes"):
        run.plot(axes=[plt.figure().subplots()])
    writer = Writer(tmp_path / "empty", HEAD)
    with pytest.raises(NotDefinedError, match="has no records of loss, error"):
        cs.Run(tmp_path / "empty").plot()
    writer.append(1, "loss", [{"loss": 1.0}])
    writer.close()
    (ax,) = cs.Run(tmp_path / "empty").plot()  # a single step is drawn as a point
    assert ax.get_lines()[0].get_marker() == "."
    with pytest.raises(NotDefinedError, match="has no records of sharpness"):
        cs.Run(tmp_path / "empty").plot(panels=["loss", "sharpness"])
