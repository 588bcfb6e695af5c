"""Curvature at the ends of the paths: the restriction of the very matrices to the very plane."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import curvscope as cs
from curvscope import training
from curvscope.report import read_report
from curvscope.report.runs import make_runs_report
from curvscope.training import curvature_of

from .test_runs import problem

pytestmark = pytest.mark.filterwarnings("ignore::curvscope.training.MonitorWarning")
OPTIMIZERS = ["adam:lr=0.05", "kbfgs:lr=0.1", "sgd:lr=0.1"]


def test_ellipses_are_of_the_exact_matrix_and_of_the_optimizers_own(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    source = "tests.report.test_runs:problem"
    found = training.train(source, OPTIMIZERS, epochs=3, batch_size=12, out=out)
    make_runs_report(out)
    document = read_report(out / "report")
    drawn = [(row["of"], row["matrix"], row["centre"]) for row in document["ellipses"]]
    # SGD has no curvature of its own
    assert [of for of, *_ in drawn] == ["exact GGN"] * 3 + ["adam", "kbfgs"]

    mine = problem()
    runs = {run.optimizer: cs.Run(run.path) for run in found.runs}
    snapshots = {name: run.snapshots() for name, run in runs.items()}
    plane = training.plane_of_paths(snapshots, layout=mine.layout)
    D = plane.directions
    for place, (name, run) in enumerate(runs.items()):
        state = torch.load(run.path / "checkpoint.pt", weights_only=True)
        mine.user_model.load_state_dict(state["model"])
        of_exact = dict(enumerate(drawn))[place]
        exact = D.mT @ cs.ggn(mine).dense().double() @ D
        assert torch.allclose(torch.tensor(of_exact[1], dtype=torch.float64), exact, rtol=1e-5)
        theta = training.flat_parameters(mine)
        assert torch.allclose(torch.tensor(of_exact[2], dtype=torch.float64), plane.project(theta))
        spec = next(s for s in OPTIMIZERS if s.startswith(name))
        optimizer = training.build_optimizer(spec, mine.user_model).optimizer
        optimizer.load_state_dict(state["optimizer"])
        op = curvature_of(optimizer, mine)
        if op is not None:
            own = torch.tensor(next(row[1] for row in drawn if row[0] == name), dtype=torch.float64)
            assert torch.allclose(own, D.mT @ op.dense().double() @ D, rtol=1e-5)
    figure = (out / "report" / "figures" / "trajectories.svg").read_text(encoding="utf-8")
    page = (out / "report" / "report.html").read_text(encoding="utf-8")
    assert "curvature: exact GGN" in page and "curvature: kbfgs" in page
    assert "Curves around the ends are level lines of curvature" in page and figure


def test_without_a_checkpoint_there_is_a_picture_without_curvature(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    training.train("tests.report.test_runs:problem", "adam:lr=0.05", epochs=2, out=out)
    (next(out.glob("*/*/*/checkpoint.pt"))).write_bytes(b"damaged")
    make_runs_report(out)
    document = read_report(out / "report")
    assert document["ellipses"] == [] and document["trajectories"] is not None
    page = (out / "report" / "report.html").read_text(encoding="utf-8")
    assert "cannot be read" in page and "Curves around the ends" not in page
