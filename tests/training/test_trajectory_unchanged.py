"""A monitored training is the unmonitored one, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import curvscope as cs
from curvscope.training import curvature_measures, spectral_measures
from curvscope.training.measures import REGISTRY
from tests.training.loops import OPTIMIZERS, noisy_net, problem_of, train

STEPS = 3
# importing them registers their measures
assert curvature_measures.OF_CURVATURE and spectral_measures.Sharpness.name in REGISTRY


def everything(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {n: v.clone() for n, v in model.state_dict().items()}
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters()}
    found["training"] = [m.training for m in model.modules()]
    found["random"] = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    state = optimizer.state_dict()["state"]
    for key, entries in state.items():
        for name, value in entries.items():
            found[f"state {key} {name}"] = value
    return found


def run(name: str, path: Path | None, steps: int = STEPS, **options: Any) -> dict[str, Any]:
    model = noisy_net()
    optimizer = OPTIMIZERS[name](model)
    torch.default_generator.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    if path is None:
        train(model, optimizer, steps)
    else:
        with cs.Monitor(problem_of(model), optimizer, path, strict=True, **options) as monitor:
            train(model, optimizer, steps, lambda _, loss: monitor.step(loss))
        assert monitor.steps == steps
    return everything(model, optimizer)


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        same = torch.equal(value, right[key]) if torch.is_tensor(value) else None
        if same is None:
            same = str(value) == str(right[key])
        assert same, key


@pytest.mark.filterwarnings("ignore::curvscope.training.MonitorWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_measure_at_every_step_changes_nothing(name: str, tmp_path: Path) -> None:
    alone = run(name, None)
    watched = run(
        name, tmp_path / "run", measures=list(REGISTRY), every=1, budget=None, snapshots="full"
    )
    assert_same(alone, watched)
    taken = cs.Run(tmp_path / "run").measures
    assert {"loss", "gradient", "update", "sharpness", "trace", "snapshot"} <= set(taken)
    if name != "SGD":
        assert {"error", "preconditioner", "staleness", "best"} <= set(taken)


@pytest.mark.filterwarnings("ignore::curvscope.training.MonitorWarning")
def test_the_default_monitor_changes_nothing(tmp_path: Path) -> None:
    assert_same(run("K-BFGS", None, 5), run("K-BFGS", tmp_path / "run", 5))


@pytest.mark.filterwarnings("ignore::curvscope.training.MonitorWarning")
def test_measures_that_fail_change_nothing(tmp_path: Path) -> None:
    class Broken(cs.training.Measure):
        name = "broken"
        default = cs.training.Every(1)

        def take(self, moment: Any) -> Any:
            torch.rand(3)
            moment.problem.gradient()
            raise RuntimeError("on purpose")

    model = noisy_net()
    optimizer = OPTIMIZERS["AdaFisher"](model)
    torch.default_generator.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    with cs.Monitor(
        problem_of(model), optimizer, tmp_path / "run", measures=["default", Broken()], budget=None
    ) as monitor:
        train(model, optimizer, 5, lambda _, loss: monitor.step(loss))
    assert_same(run("AdaFisher", None, 5), everything(model, optimizer))
    failed = cs.Run(tmp_path / "run").frame("monitor").query("event == 'failed'")
    assert failed["error"].str.contains("on purpose").all() and len(failed) == 5  # then given up
    assert failed["note"].iloc[-1] == "given up after 5 failures"
