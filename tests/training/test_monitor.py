"""Bad input, errors, restarts: training goes on, and what happened is said once."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.errors import OptionError, OutputError, RunError, StopTraining
from curvscope.training import MonitorWarning, store
from tests.training.loops import OPTIMIZERS, one_step, plain_net, problem_of, train


def make(path: Path | None, name: str = "SGD", seed: int = 0, **options: Any) -> cs.Monitor:
    model = plain_net(seed)
    options = {"budget": None, "measures": ["loss", "gradient"], "every": 2, **options}
    return cs.Monitor(problem_of(model), OPTIMIZERS[name](model), path, **options)


def go(monitor: cs.Monitor, steps: int) -> None:
    train(monitor.problem.user_model, monitor.optimizer, steps, lambda _, loss: monitor.step(loss))


# -- what is refused at once -------------------------------------------------------------------


def test_options() -> None:
    model = plain_net()
    problem, optimizer = problem_of(model), OPTIMIZERS["SGD"](model)
    with pytest.raises(OptionError, match="A Problem is needed, not Sequential"):
        cs.Monitor(model, optimizer)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="watches a torch optimizer, not Problem"):
        cs.Monitor(problem, problem)
    with pytest.raises(OptionError, match=r"no measure 'eror'. Did you mean 'error'"):
        cs.Monitor(problem, optimizer, measures=["eror"])
    with pytest.raises(OptionError, match="'loss' twice"):
        cs.Monitor(problem, optimizer, measures=["loss", cs.training.Loss()])
    with pytest.raises(OptionError, match=r"measures= is empty"):
        cs.Monitor(problem, optimizer, measures=[])
    with pytest.raises(OptionError, match="is no schedule"):
        cs.Monitor(problem, optimizer, measures={"loss": "always"})
    with pytest.raises(OptionError, match="reference='fisher'"):
        cs.Monitor(problem, optimizer, reference="fisher")
    with pytest.raises(OptionError, match="alarms= takes alarms"):
        cs.Monitor(problem, optimizer, alarms=["too sharp"])  # type: ignore[list-item]


def test_an_optimizer_without_curvature_is_told_so() -> None:
    with pytest.warns(MonitorWarning, match="SGD has no curvature that can be read: error, best"):
        make(None, measures=["error", "best"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = make(None, measures=None)
    names = [m.name for m, _ in monitor.measures]
    assert names == ["loss", "gradient", "update", "sharpness"]


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        make(tmp_path / "file" / "run")


def test_the_path_of_another_run_is_refused(tmp_path: Path) -> None:
    with make(tmp_path / "r") as monitor:
        go(monitor, 2)
    with pytest.raises(RunError, match=r'another run.*"SGD" there, "Adam" here'):
        make(tmp_path / "r", "Adam")
    model = plain_net()
    with pytest.raises(RunError, match=r"options: .*0\.05.* there, .*0\.5.* here"):
        cs.Monitor(
            problem_of(model),
            torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
            tmp_path / "r",
        )
    wide = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    with pytest.raises(RunError, match="parameters"):
        cs.Monitor(problem_of(wide), OPTIMIZERS["SGD"](wide), tmp_path / "r")
    assert cs.Run(tmp_path / "r").last_step == 2


def test_other_initial_parameters_are_another_run(tmp_path: Path) -> None:
    """It cannot be refused before the first step, which may follow a checkpoint."""
    with make(tmp_path / "r") as monitor:
        go(monitor, 3)
    before = (tmp_path / "r" / "records.jsonl").read_bytes()
    with make(tmp_path / "r", seed=1) as monitor, pytest.warns(MonitorWarning, match="nothing is"):
        go(monitor, 3)
    assert (tmp_path / "r" / "records.jsonl").read_bytes() == before
    with pytest.raises(RunError, match="other parameters"):
        go(make(tmp_path / "r", seed=1, strict=True), 1)


# -- what goes wrong on the way ----------------------------------------------------------------


def test_a_full_disk_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = make(tmp_path / "r")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with monitor:
            go(monitor, 3)
            monitor.frame()  # nothing waits to be written

            def full(handle: int, content: bytes) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(store, "_write", full)
            go(monitor, 5)
    said = [str(w.message) for w in caught if issubclass(w.category, MonitorWarning)]
    assert len(said) == 1 and "No space left" in said[0] and "Training goes on" in said[0]
    monkeypatch.undo()
    run = cs.Run(tmp_path / "r")
    assert run.last_step == 3 and not run.problems and monitor.steps == 8


def test_parameters_that_change_shape(tmp_path: Path) -> None:
    monitor = make(tmp_path / "r")
    go(monitor, 2)
    layer = monitor.problem.user_model[2]
    layer.weight = nn.Parameter(torch.zeros(4, 5))
    with pytest.warns(MonitorWarning, match=r"'2.weight' has shape \[4, 5\].* shape \[3, 5\]"):
        monitor.step(0.3)
        monitor.step(0.3)
    monitor.close()
    run = cs.Run(tmp_path / "r")
    assert run.frame("loss")["step"].tolist() == [1, 2, 3, 4]
    assert run.frame("gradient")["step"].tolist() == [2]
    assert "shape" in run.frame("monitor").query("event == 'failed'")["error"].item()


def test_a_loop_that_never_calls_step(tmp_path: Path) -> None:
    with pytest.warns(MonitorWarning, match="never called"), make(tmp_path / "r"):
        pass


def test_a_schedule_that_never_fires() -> None:
    with (
        pytest.warns(MonitorWarning, match=r"schedule Every\(n=50\) of 'gradient' never came up"),
        make(None, measures={"loss": None, "gradient": 50}) as monitor,
    ):
        go(monitor, 4)


def test_errors_of_a_measure_are_recorded_and_raised_only_if_strict(tmp_path: Path) -> None:
    class Broken(cs.training.Measure):
        name = "broken"

        def take(self, moment: Any) -> Any:
            raise ZeroDivisionError("on purpose")

    with (
        pytest.warns(MonitorWarning, match="measuring 'broken' failed .*on purpose") as caught,
        make(tmp_path / "r", measures=["loss", Broken()]) as monitor,
    ):
        go(monitor, 16)
    assert len(caught) == 2  # the first time, and when it was given up
    frame = cs.Run(tmp_path / "r").frame("monitor").query("event == 'failed'")
    assert frame["step"].tolist() == [2, 4, 6, 8, 10]
    with pytest.raises(ZeroDivisionError):
        go(make(None, measures=[Broken()], strict=True), 2)


def test_a_training_that_fails_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(KeyError), make(tmp_path / "r") as monitor:
        go(monitor, 2)
        raise KeyError("mine")
    assert cs.Run(tmp_path / "r").frame("monitor")["event"].iloc[1] == "ended by KeyError"


def test_memory_does_not_grow_with_the_steps() -> None:
    import gc
    import pickle

    def size(steps: int) -> tuple[int, int]:
        monitor = make(
            None, "K-BFGS", measures=["loss", "update", "diagnostics", "preconditioner"], every=1
        )
        monitor.recorder._store.kept = []  # type: ignore[union-attr]
        monitor.recorder.writing = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            go(monitor, steps)
        gc.collect()
        tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        return len(pickle.dumps(monitor.state_dict())), tensors

    size(3)
    (early, before), (late, after) = size(55), size(75)
    assert abs(late - early) < 200 and abs(after - before) <= 5


# -- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["K-BFGS", "Adam", "SGD"])
def test_a_restart_from_a_checkpoint_continues_without_duplicates(
    name: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"measures": ["loss", "gradient", "update"], "every": 2}

    def part(monitor: cs.Monitor, first: int, last: int, save: int | None = None) -> Any:
        from tests.training.loops import batches, data

        x, y = data()
        saved = None
        for number, index in enumerate(batches(last), 1):
            if number >= first:
                loss = one_step(monitor.problem.user_model, monitor.optimizer, x[index], y[index])
                monitor.step(loss)
            if number == save:
                file = tmp_path / "checkpoint"
                torch.save(
                    {
                        "model": monitor.problem.user_model.state_dict(),
                        "optimizer": monitor.optimizer.state_dict(),
                        "monitor": monitor.state_dict(),
                    },
                    file,
                )
                saved = file
        monitor.close()
        return saved

    whole = make(tmp_path / "whole", name, **options)
    part(whole, 1, 12)
    cut = make(tmp_path / "cut", name, **options)
    file = part(cut, 1, 9, save=5)
    again = make(tmp_path / "cut", name, **options)
    state = torch.load(file, weights_only=True)
    again.problem.user_model.load_state_dict(state["model"])
    again.optimizer.load_state_dict(state["optimizer"])
    again.load_state_dict(state["monitor"])
    part(again, 6, 12)
    for left, right in zip(
        whole.problem.user_model.parameters(), again.problem.user_model.parameters()
    ):
        assert torch.equal(left, right)
    one, two = cs.Run(tmp_path / "whole"), cs.Run(tmp_path / "cut")
    for measure in one.measures:
        expected, found = (
            r.frame(measure).drop(columns="seconds").set_index("step") for r in (one, two)
        )
        # nothing was kept of step 5 for the update of step 6
        missing = {6} if measure == "update" else set()
        assert set(found.index) == set(expected.index) - missing
        assert found.equals(expected.loc[found.index])
    assert two.frame("continued")["superseded_up_to"].tolist() == [9]


def test_a_restart_from_the_beginning(tmp_path: Path) -> None:
    """Killed before the first checkpoint: the same script runs again."""
    for steps in (7, 4):
        with make(tmp_path / "r") as monitor:
            go(monitor, steps)
    run = cs.Run(tmp_path / "r")
    assert run.frame("loss")["step"].tolist() == [1, 2, 3, 4]
    assert cs.Run(tmp_path / "r", superseded=True).frame("loss")["step"].tolist() == [
        *range(1, 8),
        *range(1, 5),
    ]


def test_a_resumed_optimizer_tells_the_step(tmp_path: Path) -> None:
    """Where the checkpoint has no state of the monitor."""
    with make(tmp_path / "r", "Adam") as monitor:
        go(monitor, 6)
    with make(tmp_path / "r", "Adam", seed=3) as again:
        state = monitor.optimizer.state_dict()
        for entry in state["state"].values():
            entry["step"] = torch.tensor(4.0)
        again.optimizer.load_state_dict(state)
        go(again, 2)
    assert cs.Run(tmp_path / "r").frame("loss")["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert cs.Run(tmp_path / "r").frame("continued")["step"].tolist() == [4]


def test_states_that_come_too_late_or_from_elsewhere(tmp_path: Path) -> None:
    monitor = make(None)
    state = monitor.state_dict()
    go(monitor, 1)
    with pytest.raises(OptionError, match="before the first"):
        monitor.load_state_dict(state)
    with pytest.raises(RunError, match="checkpoint of another run"):
        make(tmp_path / "r").load_state_dict({**state, "run": "another"})


def test_numbers_of_ones_own(tmp_path: Path) -> None:
    with make(tmp_path / "r") as monitor:
        go(monitor, 2)
        monitor.log("validation", loss=0.5, accuracy=0.75)
        with pytest.raises(OptionError, match="the monitor's own"):
            monitor.log("loss", loss=1.0)
        go(monitor, 1)
    row = cs.Run(tmp_path / "r").rows("validation")[0]
    assert (row["step"], row["loss"], row["accuracy"]) == (2, 0.5, 0.75)


def test_stopping(tmp_path: Path) -> None:
    class Always(cs.training.Alarm):
        name = "always"
        measures = ("gradient",)

        def look(self, step: int, measure: str, rows: Any, method: str) -> Any:
            yield cs.training.Finding("", step >= 4, "it is enough")

    options: dict[str, Any] = {"alarms": [Always()], "on_alarm": cs.training.stop}
    with pytest.warns(MonitorWarning, match="Step 4: SGD: it is enough"):
        with make(tmp_path / "r", **options) as monitor:
            go(monitor, 10)
            raise AssertionError("not reached")
        assert monitor.steps == 4 and monitor.stopped is not None
        assert monitor.stopped.message == "SGD: it is enough"
        with pytest.raises(StopTraining):
            go(make(None, alarms=[Always()], on_alarm=cs.training.stop), 10)
    frame = cs.Run(tmp_path / "r").frame("monitor")
    assert frame["event"].tolist()[:3] == ["began", "stopped", "finished"]
    assert len(cs.Run(tmp_path / "r").frame("gradient")) == 2


def test_an_optimizer_of_another_model(tmp_path: Path) -> None:
    model = seeded_model()
    problem = cs.Problem(model, nn.CrossEntropyLoss(), (torch.randn(6, 4), torch.arange(6) % 3))
    twin = copy.deepcopy(model)
    with pytest.raises(OptionError, match="trains none of the parameters"):
        cs.Monitor(problem, torch.optim.SGD(twin.parameters(), lr=0.1), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def seeded_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
