"""Trainings to draw: paths, surfaces, curvature on planes, spectra over steps."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from curvscope import plot as cplot
from curvscope import training as tr
from curvscope.operators import DenseOperator

STEPS = torch.arange(0, 120, 10)


def plane() -> tr.Plane:
    return tr.plane_along(torch.zeros(3), torch.eye(3)[:, :2], names=("first", "second"))


@functools.cache
def trajectories() -> tr.Trajectories:
    """A spiral that leaves the plane, a straight line, and one that ends in NaN."""
    t = torch.linspace(0, 4, len(STEPS), dtype=torch.float64)
    spiral = torch.stack([torch.cos(t) * (2 - t / 3), torch.sin(t) * (2 - t / 3), t / 8], 1)
    line = torch.stack([2 - t / 2, t / 8, 0 * t], 1)
    broken = torch.stack([2 - t / 4, -t / 4, 0 * t], 1)
    broken[-2:] = torch.nan
    runs = {"spiral": spiral, "line": line, "diverging": broken}
    return tr.trajectories(
        {name: list(zip(STEPS.tolist(), path, strict=True)) for name, path in runs.items()},
        plane=plane(),
    )


def surface(*, holes: bool = True, level: float = 1.0) -> tr.LossSurface:
    """A bowl with a corner that is not finite."""
    x, y = torch.linspace(-3, 3, 21).double(), torch.linspace(-2, 2, 17).double()
    X, Y = torch.meshgrid(x, y, indexing="xy")
    loss = 0.5 * X**2 + 2 * Y**2 + level
    if holes:
        loss[-3:, -3:] = torch.nan
        loss[0, 0] = torch.inf
    return tr.LossSurface(
        of="a bowl",
        names=("first", "second"),
        origin_loss=level,
        x=x,
        y=y,
        loss=loss,
        plane=plane(),
    )


def ellipses() -> dict[str, list[tr.Ellipse]]:
    """Definite, indefinite, singular and zero."""
    matrices = {
        "Hessian": [[1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 1.0]],
        "spiral": [[3.0, 1.0, 0.0], [1.0, -2.0, 0.0], [0.0, 0.0, 1.0]],
        "singular": [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
        "zero": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
    }
    places = torch.tensor([[-1.5, 0.0, 0.0], [1.5, 0.5, 0.0]]).double()
    found = {}
    for name, matrix in matrices.items():
        op = DenseOperator(torch.tensor(matrix, dtype=torch.float64))
        found[name] = [tr.ellipse(op, plane(), at=place) for place in places]
    return found


def sharpness() -> Tensor:
    return 40 * (1 - torch.exp(-STEPS.double() / 30)) + torch.sin(STEPS.double()) + 1


def density() -> tuple[Tensor, Tensor]:
    """Grid and densities: a peak at zero, and one that moves out."""
    grid = torch.linspace(-5, 50, 80, dtype=torch.float64)
    away = (grid - sharpness().unsqueeze(1)).square()
    return grid, torch.exp(-grid.square()) + 0.01 * torch.exp(-away)


def training_pictures() -> dict[str, object]:
    """A call per picture, each returning axes."""
    signed = [[v, v / 3, 0.2, -v / 10][: 4 - k % 2] for k, v in enumerate(sharpness().tolist())]
    curves = {"SGD": (STEPS, sharpness()), "Adam": (STEPS[:6], sharpness()[:6] * 20)}
    return {
        "paths": lambda **k: trajectories().plot(**k),
        "paths on the surface": lambda **k: trajectories().plot(
            surface=surface(), ellipses=ellipses(), title="overlay", **k
        ),
        "distances": lambda **k: trajectories().plot(kind="distances", **k),
        "surface": lambda **k: surface().plot(**k),
        "surface, linear": lambda **k: surface(holes=False).plot(scale="linear", points=True, **k),
        "surface, logarithmic": lambda **k: surface().plot(scale="log", lines=6, **k),
        "surface with ellipses": lambda **k: surface().plot(ellipses=ellipses(), level=0.1, **k),
        "ellipses": lambda **k: cplot.plot_ellipses(ellipses(), **k),
        "edge of stability": lambda **k: cplot.plot_edge_of_stability(
            (STEPS, sharpness()), lr=0.05, **k
        ),
        "edges of stability": lambda **k: cplot.plot_edge_of_stability(
            curves, lr=0.1 / (1 + STEPS / 50), threshold=math.pi * 10, title="two runs", **k
        ),
        "eigenvalues over steps": lambda **k: cplot.plot_eigenvalues_over_steps(STEPS, signed, **k),
        "density over steps": lambda **k: cplot.plot_density_over_steps(STEPS, *density(), **k),
    }
