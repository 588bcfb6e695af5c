"""What the pictures of trainings draw, and what they refuse."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")

from curvscope import plot as cplot
from curvscope import training as tr
from curvscope.errors import NotDefinedError, OptionError, ShapeError
from curvscope.plotting.style import INK

from .trainings import STEPS, density, ellipses, plane, sharpness, surface, trajectories


def test_paths_are_drawn_where_they_were_projected_and_say_how_much_they_show() -> None:
    found = trajectories()
    ax = found.plot(marks=0)
    lines = {line.get_label(): line for line in ax.get_lines()}
    for name, path in found.paths.items():
        (label,) = (text for text in lines if text.startswith(f"{name} ("))
        assert f"{100 * path.share_inside:.0f} % along" in label
        drawn = np.stack(lines[label].get_data(), 1)
        assert np.array_equal(drawn, path.points.numpy(), equal_nan=True)
    assert not ax.texts and ax.get_xlabel() == "first"
    written = [text.get_text() for text in found.plot(marks=2).texts]
    assert written == ["60", "110", "60", "110", "40", "90"]  # the last run ends in NaN


def test_steps_beside_a_path_do_not_lie_over_each_other() -> None:
    """Where a training comes to rest, its last steps are at one place."""
    steps = [(k, torch.tensor([1 - 0.3**k, 0.5**k, 0.0])) for k in range(0, 120, 10)]
    found = tr.trajectories({"one": steps, "two": steps[:-2]}, plane=plane())
    ax = found.plot(surface=surface(), marks=8)
    ax.figure.canvas.draw()
    heights = [t for t in ax.texts if "·" in t.get_text() or "." in t.get_text()]
    written = [t for t in ax.texts if t not in heights]
    assert {"110", "90"} <= {t.get_text() for t in written}  # the ends always
    boxes = [t.get_window_extent() for t in written]
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    marks = ax.transData.transform(found.paths["one"].points.numpy())
    seen = [t.get_window_extent() for t in heights if t.get_visible()]
    assert seen and not any(box.contains(*point) for box in seen for point in marks)


def test_explained_variance_stands_on_the_axes() -> None:
    steps = [(k, torch.tensor([3.0 * k, (-1.0) ** k, 0.0])) for k in range(6)]
    ax = tr.trajectories(steps).plot()
    shares = tr.plane_of_paths(steps).explained
    assert ax.get_xlabel() == f"principal component 1 ({100 * shares[0]:.0f} %)"


def test_a_surface_of_another_plane_is_refused() -> None:
    other = tr.plane_along(torch.ones(3), torch.eye(3)[:, 1:])
    with pytest.raises(NotDefinedError, match="another plane"):
        tr.trajectories([(0, torch.zeros(3)), (1, torch.ones(3))], plane=other).plot(
            surface=surface()
        )
    copied = tr.trajectories([(0, torch.zeros(3)), (1, torch.ones(3))], plane=plane())
    assert copied.plane is not surface().plane
    copied.plot(surface=surface())


def test_ellipses_lie_on_their_level_and_take_the_colour_of_their_run() -> None:
    every = ellipses()
    ax = trajectories().plot(surface=surface(), ellipses={"Hessian": every["Hessian"]}, level=0.5)
    curves = [line for line in ax.get_lines() if len(line.get_xdata()) > 100]
    assert len(curves) == 2 and {line.get_color() for line in curves} == {INK}
    for line, one in zip(curves, every["Hessian"], strict=True):
        s = np.stack(line.get_data(), 1) - one.centre.numpy()
        assert np.allclose(np.einsum("ni,ij,nj->n", s, one.matrix.numpy(), s) / 2, 0.5)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "curvature: Hessian" in texts and "±0.5 by curvature" in texts
    ax = trajectories().plot(ellipses={"spiral": every["spiral"]}, level=0.05)
    spiral = next(line for line in ax.get_lines() if line.get_label().startswith("spiral"))
    dashed = [line for line in ax.get_lines() if len(line.get_xdata()) > 100]
    assert {line.get_color() for line in dashed} == {spiral.get_color()}
    assert {line.get_linestyle() for line in dashed} == {"-", "--"}  # up and down


def test_no_curvature_is_said() -> None:
    ax = cplot.plot_ellipses({"zero": ellipses()["zero"][0]})
    assert "no curvature" in [text.get_text() for text in ax.get_legend().get_texts()]
    with pytest.raises(NotDefinedError, match="no ellipse"):
        cplot.plot_ellipses({})


def test_crosses_where_the_objective_is_not_finite() -> None:
    ax = surface().plot()
    (crosses,) = (line for line in ax.get_lines() if line.get_marker() == "x")
    assert len(crosses.get_xdata()) == 10
    assert not list(surface(holes=False).plot().get_lines())
    dots = surface(holes=False).plot(points=True).get_lines()[0]
    assert len(dots.get_xdata()) == 17 * 21


def test_surfaces_that_cannot_be_drawn() -> None:
    values = vars(surface())
    nothing = tr.LossSurface(**{**values, "loss": torch.full_like(values["loss"], math.nan)})
    with pytest.raises(NotDefinedError, match="not finite at any"):
        nothing.plot()
    constant = tr.LossSurface(**{**values, "loss": torch.ones_like(values["loss"])})
    constant.plot().figure.canvas.draw()
    with pytest.raises(NotDefinedError, match="no logarithm"):
        surface(level=-1.0).plot(scale="log")
    with pytest.raises(OptionError, match="Did you mean 'quantiles'"):
        surface().plot(scale="quantile")


def test_distances_of_one_run_and_of_none_in_common() -> None:
    path = list(zip(STEPS.tolist(), torch.eye(12)[:, :5].cumsum(0), strict=True))
    ax = tr.trajectories(path).plot(kind="distances")
    (line,) = ax.get_lines()
    assert ax.get_ylabel() == "distance from the start"
    colours = {a.get_color() for a in tr.trajectories(path).plot(kind="paths").get_lines()}
    assert line.get_color() in colours  # a run has one colour
    expected = [float((v - path[0][1]).norm()) for _, v in path]
    assert line.get_ydata() == pytest.approx(expected)
    apart = {"a": path, "b": [(step + 1, v) for step, v in path]}
    with pytest.raises(NotDefinedError, match="no step in common"):
        tr.trajectories(apart).plot(kind="distances")


def test_edge_of_stability_lies_at_two_over_the_rate() -> None:
    ax = cplot.plot_edge_of_stability((STEPS, sharpness()), lr=0.05)
    assert ax.get_yscale() == "log"
    limit = {line.get_label(): line for line in ax.get_lines()}["2 / lr"]
    assert list(limit.get_ydata()) == [40.0, 40.0]
    rates = torch.linspace(0.1, 0.2, len(STEPS))
    rates[0] = 0  # warming up
    ax = cplot.plot_edge_of_stability((STEPS, -sharpness()), lr=rates)
    assert ax.get_yscale() == "linear"
    limit = {line.get_label(): line for line in ax.get_lines()}["2 / lr"]
    assert math.isnan(limit.get_ydata()[0])
    assert limit.get_ydata()[1:] == pytest.approx((2 / rates[1:]).tolist())
    with pytest.raises(ShapeError, match="3 values for 12 steps"):
        cplot.plot_edge_of_stability((STEPS, sharpness()), lr=[0.1, 0.2, 0.3])
    with pytest.raises(ShapeError, match="SGD: 12 steps and 5"):
        cplot.plot_edge_of_stability({"SGD": (STEPS, sharpness()[:5])})
    with pytest.raises(NotDefinedError, match="no finite"):
        cplot.plot_edge_of_stability((STEPS, torch.full((12,), math.inf)))


def test_eigenvalues_are_sorted_at_every_step() -> None:
    ax = cplot.plot_eigenvalues_over_steps([0, 1, 2], [[1.0, 3.0], [5.0, 2.0], [4.0]])
    lines = [line.get_ydata() for line in ax.get_lines()]
    assert lines[0].tolist() == [3, 5, 4] and lines[1][:2].tolist() == [1, 2]
    assert math.isnan(lines[1][2])
    with pytest.raises(ShapeError, match="2 steps and 1"):
        cplot.plot_eigenvalues_over_steps([0, 1], [[1.0]])
    with pytest.raises(NotDefinedError, match="other than zero"):
        cplot.plot_eigenvalues_over_steps([0], [[0.0]])


def test_densities_fill_the_plane_of_steps_and_eigenvalues() -> None:
    grid, table = density()
    ax = cplot.plot_density_over_steps(STEPS, grid, table, colorbar=False)
    (mesh,) = ax.collections
    shown = np.asarray(mesh.get_array()).reshape(len(grid), len(STEPS))
    top = float(table.max())
    assert np.allclose(shown, table.numpy().T.clip(min=top * 1e-5))
    assert mesh.norm.vmax == top
    one = cplot.plot_density_over_steps([7], grid, table[:1])
    assert one.get_xlim() == (6.5, 7.5)
    for steps, values, densities in (
        (STEPS[:3], grid, table),
        (STEPS.flip(0), grid, table),
        (STEPS, grid.flip(0), table),
    ):
        with pytest.raises(ShapeError):
            cplot.plot_density_over_steps(steps, values, densities)
    with pytest.raises(NotDefinedError, match="nowhere positive"):
        cplot.plot_density_over_steps(STEPS, grid, 0 * table)
