"""Comparing optimizers: grids, seeds, resuming after an interruption, and what is refused."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import curvscope as cs
from curvscope.errors import DataError, OptionError, OutputError, RunError
from curvscope.training import Trainings, lines, train, trainings
from tests.training.killing import EPOCHS, compare, served
from tests.training.loops import plain_net, problem_of

pytestmark = pytest.mark.filterwarnings("ignore::curvscope.training.MonitorWarning")
QUICK: dict[str, Any] = {"measures": ["loss", "gradient"], "every": 4}


def go(out: Path, optimizers: Any = "adam", **options: Any) -> Trainings:
    options = {"epochs": 2, "batch_size": 8, "monitor": QUICK, **options}
    return train(problem_of(plain_net()), optimizers, out=out, **options)


def ends(folder: Path) -> dict[str, dict[str, Any]]:
    """By training: its checkpoint."""
    return {
        path.parent.relative_to(folder).as_posix(): torch.load(path, weights_only=True)
        for path in sorted(folder.rglob("checkpoint.pt"))
    }


def assert_same_ends(one: Path, other: Path) -> None:
    """Parameters, optimizers' states and records are those of the other folder."""
    first, second = ends(one), ends(other)
    assert first.keys() == second.keys() and first
    for path, state in first.items():
        for name, value in state["model"].items():
            assert torch.equal(value, second[path]["model"][name]), (path, name)
        assert state["losses"] == second[path]["losses"]
        assert torch.equal(state["random"], second[path]["random"])
        a, b = cs.Run(one / path), cs.Run(other / path)
        assert not a.problems
        for measure in ("loss", "epoch"):
            kept = [
                [{k: v for k, v in row.items() if k != "seconds"} for row in run.rows(measure)]
                for run in (a, b)
            ]
            assert kept[0] == kept[1]
        assert a.snapshots().steps == b.snapshots().steps


def test_every_optimizer_rate_and_seed(tmp_path: Path) -> None:
    found = go(tmp_path / "out", ["adam", "kbfgs:lr=0.1"], lrs=[0.01, 0.1], seeds=2)
    assert [(r.optimizer, r.lr, r.seed) for r in found.runs] == [
        (name, lr, seed)
        for seed in (0, 1)
        for name, lr in (("adam", 0.01), ("adam", 0.1), ("kbfgs", 0.1))
    ]
    assert all(run.state == "finished" and run.epochs == 2 for run in found.runs)
    assert not found.failed and "6 trainings" in str(found)
    run = cs.Run(found.runs[0].path)
    assert run.frame("epoch")["epoch"].tolist() == [1, 2]
    assert run.frame("loss")["step"].tolist() == list(range(1, 9))
    # the loss of an epoch is the mean of what its steps saw
    first = run.frame("loss")["loss"][:4].mean()
    assert run.frame("epoch")["train_loss"][0] == pytest.approx(first)
    orders = [cs.Run(r.path).frame("loss")["loss"][1] for r in found.runs if r.lr == 0.01]
    assert orders[0] != orders[1]  # seeds differ in the order of samples
    plan = json.loads((tmp_path / "out" / "train.json").read_text())
    assert len(plan["runs"]) == 6 and plan["epochs"] == 2


def test_the_trajectory_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    found = go(tmp_path / "out", "adam:lr=0.02", monitor={"budget": None, "every": 1})
    state = torch.load(found.runs[0].path / "checkpoint.pt", weights_only=True)
    bare = go(tmp_path / "bare", "adam:lr=0.02", monitor={"measures": ["loss"], "snapshots": None})
    other = torch.load(bare.runs[0].path / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(v, other["model"][k]) for k, v in state["model"].items())


def test_a_finished_comparison_is_left_alone_and_added_to(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = go(out).runs[0]
    before = (first.path / "records.jsonl").read_bytes()
    again = go(out, ["adam", "sgd"])
    assert [r.optimizer for r in again.runs] == ["adam", "sgd"]
    assert (first.path / "records.jsonl").read_bytes() == before
    go(out, ["adam"], epochs=4)  # more epochs go on from where it ended
    whole = tmp_path / "whole"
    go(whole, ["adam"], epochs=4)
    found, expected = ends(out), ends(whole)
    for name, value in expected["adam/lr=0.01/seed=0"]["model"].items():
        assert torch.equal(found["adam/lr=0.01/seed=0"]["model"][name], value)


@pytest.mark.parametrize("where", ["in an epoch", "before its checkpoint"])
def test_interrupted_by_ctrl_c(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    go(whole, ["kbfgs", "adam"], epochs=3)
    with monkeypatch.context() as patch:
        if where == "in an epoch":
            original, seen = cs.Monitor.step, []

            def step(self: Any, *args: Any, **options: Any) -> None:
                seen.append(1)
                if len(seen) == 18:  # in the second epoch of the second training
                    raise KeyboardInterrupt
                original(self, *args, **options)

            patch.setattr(cs.Monitor, "step", step)
        else:

            def save(path: Path, state: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(trainings, "save_checkpoint", save)
        with pytest.raises(KeyboardInterrupt):
            go(out, ["kbfgs", "adam"], epochs=3)
    go(out, ["kbfgs", "adam"], epochs=3)
    assert_same_ends(out, whole)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    with served("comparison") as run:
        start = time.perf_counter()
        whole = tmp_path / "whole"
        assert run(whole, -1) == "done 0"
        duration = time.perf_counter() - start
        compare(tmp_path / "here")
        assert_same_ends(tmp_path / "here", whole)
        generator, deaths = random.Random(2), 0
        for moment in range(4):
            out = tmp_path / f"killed{moment}"
            deaths += run(out, generator.uniform(0.1, 0.9) * duration) == "killed"
            for place in out.rglob("records.jsonl"):
                losses = [
                    row["step"]
                    for row in lines.scan(place.read_bytes(), "records").rows
                    if row["measure"] == "loss"
                ]
                assert losses == list(range(1, len(losses) + 1))
            assert run(out, -1) == "done 0"
            assert_same_ends(out, whole)
    assert deaths >= 2
    assert all(state["epoch"] == EPOCHS for state in ends(whole).values())


def test_divergence_is_a_result_and_the_others_go_on(tmp_path: Path) -> None:
    found = go(tmp_path / "out", ["sgd:lr=1e38", "adam"])
    assert [r.state for r in found.runs] == ["diverged", "finished"] and not found.failed
    assert "smaller learning rate" in found.runs[0].reason
    again = go(tmp_path / "out", ["sgd:lr=1e38", "adam"])
    assert again.runs[0].state == "diverged"


def test_an_optimizer_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    found = go(tmp_path / "out", ["tests.training.killing:Broken", "adam"])
    assert [r.state for r in found.runs] == ["failed", "finished"]
    assert "RuntimeError: on purpose" in found.failed[0].reason


def test_snapshots_are_kept_whatever_the_budget(tmp_path: Path) -> None:
    found = go(tmp_path / "out", ["adam", "sgd"], budget=1e-6, epochs=3)
    sets = {run.optimizer: cs.Run(run.path).snapshots() for run in found.runs}
    assert all(len(kept) == 13 for kept in sets.values())  # each of the 12 steps, and the start
    paths = cs.training.trajectories(sets)
    assert len(paths.paths) == 2


def test_first_and_last_measurements_are_taken_whatever_the_budget(tmp_path: Path) -> None:
    options = {"measures": ["loss", "gradient", "error"]}
    found = go(tmp_path / "out", "adam", budget=1e-6, epochs=6, monitor=options)  # 24 steps
    run = cs.Run(found.runs[0].path)
    assert sorted(set(run.frame("error")["step"])) == [2, 24]
    assert run.frame("gradient")["step"].tolist() == [2, 24]
    end = run.frame("monitor").query("event == 'finished'").iloc[0]
    assert end["outside"] > 0


def test_cosine_learning_rates(tmp_path: Path) -> None:
    found = go(tmp_path / "out", "sgd:lr=0.1", schedule="cosine")
    rates = cs.Run(found.runs[0].path).frame("loss")["lr"].tolist()
    assert rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True)


def test_the_zoo_is_tested(tmp_path: Path) -> None:
    found = train(
        "digits-mlp", "adam", epochs=1, batch_size=256, out=tmp_path / "out", monitor=QUICK
    )
    row = cs.Run(found.runs[0].path).frame("epoch").iloc[0]
    assert 0 < row["test_accuracy"] <= 1 and row["test_loss"] > 0


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"optimizers": []}, OptionError, "at least one optimizer"),
        ({"optimizers": ["adam", "adma"]}, OptionError, "no optimizer 'adma'"),
        ({"optimizers": "adam:lr=-1"}, OptionError, "no positive number"),
        ({"epochs": 0}, OptionError, "epochs"),
        ({"seeds": 0}, OptionError, "seeds"),
        ({"seeds": [1, 1]}, OptionError, "different"),
        ({"schedule": "linear"}, OptionError, "schedule"),
        ({"batch_size": 0}, (OptionError, DataError), "batch"),
    ],
    ids=lambda value: None if isinstance(value, type | tuple) else str(value)[:30],
)
def test_refusals(options: dict[str, Any], error: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        go(tmp_path / "out", options.pop("optimizers", "adam"), **options)


def test_folders_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        go(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        go(tmp_path / "full")
    go(tmp_path / "out", epochs=1)
    with pytest.raises(RunError, match="batch_size 8, not 16"):
        go(tmp_path / "out", batch_size=16)
