"""Snapshots of the parameters: in full, thinned out, projected with a known error."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import curvscope as cs
from curvscope.training.snapshots import Snapshots, sketch
from tests.training.loops import OPTIMIZERS, plain_net, problem_of, train


def run(path: Path, snapshots: str | Snapshots) -> tuple[cs.Run, dict[int, Tensor]]:
    model = plain_net()
    problem, seen = problem_of(model), {}
    seen[0] = cs.training.flat_parameters(problem).double()
    with cs.Monitor(
        problem, OPTIMIZERS["SGD"](model), path, measures="loss", budget=None, snapshots=snapshots
    ) as monitor:

        def after(step: int, loss: Tensor) -> None:
            monitor.step(loss)
            seen[step] = cs.training.flat_parameters(problem).double()

        train(model, monitor.optimizer, 9, after)
    return cs.Run(path), seen


def test_full_snapshots_are_the_parameters(tmp_path: Path) -> None:
    found, seen = run(tmp_path / "r", Snapshots("full", schedule=3))
    snapshots = found.snapshots()
    assert snapshots.kind == "full" and snapshots.steps == (0, 3, 6, 9) and snapshots.error == 0
    for step in snapshots:
        assert torch.equal(snapshots.vector(step), seen[step])
    model = plain_net(1)
    model.load_state_dict(snapshots.load(6))
    assert torch.equal(cs.training.flat_parameters(problem_of(model)).double(), seen[6])
    distances = snapshots.distances()
    assert distances["distance"].iloc[2] == pytest.approx(float((seen[6] - seen[0]).norm()))
    assert (distances["stderr"] == 0).all()


def test_strided_snapshots_are_some_entries(tmp_path: Path) -> None:
    found, seen = run(tmp_path / "r", Snapshots("strided", schedule=[4], stride=7))
    assert torch.equal(found.snapshots().vector(4), seen[4][::7])
    assert math.isnan(found.snapshots().error)
    with pytest.raises(cs.errors.OptionError, match="no snapshot of step 5"):
        found.snapshots().load(5)


def test_projected_snapshots(tmp_path: Path) -> None:
    config = Snapshots("projection", schedule=3, size=64, seed=2)
    found, seen = run(tmp_path / "r", config)
    snapshots = found.snapshots()
    assert snapshots.error == pytest.approx(math.sqrt(2 / 64))
    for step in snapshots:
        assert torch.allclose(snapshots.vector(step), sketch(seen[step], 64, 2), atol=1e-12)


def test_sketches_are_linear_and_as_exact_as_they_say(randn64) -> None:  # type: ignore[no-untyped-def]
    x, y = randn64(500), randn64(500, seed=1)
    assert torch.allclose(sketch(x - 2 * y, 32, 5), sketch(x, 32, 5) - 2 * sketch(y, 32, 5))
    size, draws = 64, 400
    found = torch.tensor([float(sketch(x, size, seed).square().sum()) for seed in range(draws)])
    relative = found.double() / float(x.square().sum())
    error = math.sqrt(2 / size)
    assert abs(float(relative.mean()) - 1) < 4 * error / math.sqrt(draws)  # unbiased
    assert float(relative.std()) < 1.15 * error  # the bound, and 3 sigma of a standard deviation
    assert float(relative.std()) > 0.6 * error


def test_options() -> None:
    with pytest.raises(cs.errors.OptionError, match="Did you mean 'projection'"):
        Snapshots("projections")
    with pytest.raises(cs.errors.OptionError, match="stride=0"):
        Snapshots("strided", stride=0)


def test_trajectories_take_a_run(tmp_path: Path) -> None:
    found, _ = run(tmp_path / "r", Snapshots("full", schedule=3))
    paths = cs.training.trajectories({"SGD": found})
    assert paths is not None
