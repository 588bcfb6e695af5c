"""The callbacks, driven as the trainers drive them, and by those where they are installed."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.errors import MissingPackageError, OptionError
from curvscope.training.callbacks import LightningHooks, TransformersHooks
from tests.training.loops import OPTIMIZERS, batches, data, one_step, plain_net, problem_of

OPTIONS: dict[str, Any] = {"measures": ["loss", "gradient", "update"], "every": 2, "budget": None}


class StopAt(cs.training.Alarm):
    name = "enough"
    measures = ("loss",)

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def look(self, step: int, measure: str, rows: Any, method: str) -> Any:
        yield cs.training.Finding("", step >= self.last, "it is enough")


class FakeLightning:
    """Calls the hooks in Lightning's order, accumulating ``accumulate`` batches per step."""

    def __init__(self, model: nn.Module, callback: Any, accumulate: int = 1) -> None:
        self.model, self.callback, self.accumulate = model, callback, accumulate
        self.optimizers = [OPTIMIZERS["Adam"](model)]
        self.global_step, self.should_stop = 0, False

    def fit(self, steps: int, first: int = 1) -> None:
        x, y = data()
        self.callback.on_train_start(self, self.model)
        for number, index in enumerate(batches(steps), 1):
            if number < first:
                continue
            batch = x[index], y[index]
            loss = torch.tensor(1.0)
            if number % self.accumulate == 0:
                loss = one_step(self.model, self.optimizers[0], *batch)
                self.global_step += 1
            self.callback.on_train_batch_end(self, self.model, {"loss": loss}, batch, number - 1)
            if self.should_stop:
                break
        self.callback.on_train_end(self, self.model)


def test_lightning(tmp_path: Path) -> None:
    model = plain_net()
    callback = LightningHooks(problem_of, tmp_path / "r", **OPTIONS)
    trainer = FakeLightning(model, callback)
    trainer.fit(6)
    run = cs.Run(tmp_path / "r")
    assert run.frame("loss")["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.frame("loss")["loss"].notna().all() and len(run.frame("gradient")) == 3
    state = callback.state_dict()
    assert state["step"] == 6
    again = LightningHooks(problem_of(model), tmp_path / "r", **OPTIONS)
    again.load_state_dict(state)
    FakeLightning(model, again).fit(9, first=7)
    assert cs.Run(tmp_path / "r").frame("loss")["step"].tolist() == list(range(1, 10))


def test_lightning_accumulates_stops_and_fails(tmp_path: Path) -> None:
    model = plain_net()
    callback = LightningHooks(problem_of, tmp_path / "a", **OPTIONS)
    FakeLightning(model, callback, accumulate=2).fit(8)
    assert cs.Run(tmp_path / "a").last_step == 4
    callback = LightningHooks(
        problem_of, tmp_path / "b", alarms=[StopAt(3)], on_alarm=cs.training.stop, **OPTIONS
    )
    trainer = FakeLightning(plain_net(), callback)
    with pytest.warns(cs.training.MonitorWarning, match="enough"):
        trainer.fit(8)
    assert trainer.should_stop and cs.Run(tmp_path / "b").last_step == 3
    callback = LightningHooks(problem_of, tmp_path / "c", **OPTIONS)
    trainer = FakeLightning(plain_net(), callback)
    callback.on_train_start(trainer, trainer.model)
    callback.on_train_batch_end(trainer, trainer.model, None, None, 0)
    callback.on_exception(trainer, trainer.model, KeyError("x"))
    with pytest.raises(OptionError, match="or a function from the model"):
        LightningHooks(3).on_train_start(trainer, trainer.model)  # type: ignore[arg-type]


class FakeTransformers:
    """Calls the hooks as the Trainer of transformers does, its optimizer behind a wrapper."""

    def __init__(self, model: nn.Module, callback: Any, folder: Path, save: int = 4) -> None:
        self.model, self.callback, self.save = model, callback, save
        self.args = types.SimpleNamespace(output_dir=str(folder))
        self.state = types.SimpleNamespace(global_step=0)
        self.control = types.SimpleNamespace(should_training_stop=False)
        self.optimizer = OPTIMIZERS["Adam"](model)

    def event(self, name: str) -> None:
        wrapped = types.SimpleNamespace(optimizer=self.optimizer)
        hook = getattr(self.callback, name)
        hook(self.args, self.state, self.control, model=self.model, optimizer=wrapped)

    def train(self, steps: int, first: int = 1) -> None:
        x, y = data()
        self.state.global_step = first - 1
        self.event("on_train_begin")
        for number, index in enumerate(batches(steps), 1):
            if number < first:
                continue
            loss = one_step(self.model, self.optimizer, x[index], y[index])
            self.state.global_step = number
            self.event("on_step_end")
            if number % 2:
                logs = {"loss": loss.item(), "epoch": number / 4, "note": "x"}
                self.callback.on_log(self.args, self.state, self.control, logs=logs)
            if self.control.should_training_stop:
                break
            if number % self.save == 0:
                (Path(self.args.output_dir) / f"checkpoint-{number}").mkdir(parents=True)
                self.event("on_save")
        self.event("on_train_end")


def test_transformers(tmp_path: Path) -> None:
    model = plain_net()
    callback = TransformersHooks(problem_of, tmp_path / "r", **OPTIONS)
    FakeTransformers(model, callback, tmp_path).train(6)
    assert cs.Run(tmp_path / "r").frame("loss")["step"].tolist() == [1, 2, 3, 4, 5, 6]
    logged = cs.Run(tmp_path / "r").frame("trainer")
    assert logged["step"].tolist() == [1, 3, 5] and logged["loss"].between(0, 3).all()
    assert callback.monitor is not None and isinstance(callback.monitor.optimizer, torch.optim.Adam)
    again = TransformersHooks(problem_of, tmp_path / "r", **OPTIONS)
    FakeTransformers(model, again, tmp_path, save=100).train(8, first=5)  # from checkpoint-4
    run = cs.Run(tmp_path / "r")
    assert run.frame("loss")["step"].tolist() == list(range(1, 9))
    assert run.frame("continued")["step"].tolist() == [4]
    stopping = TransformersHooks(
        problem_of, None, alarms=[StopAt(3)], on_alarm=cs.training.stop, **OPTIONS
    )
    trainer = FakeTransformers(plain_net(), stopping, tmp_path / "b")
    with pytest.warns(cs.training.MonitorWarning, match="enough"):
        trainer.train(8)
    assert trainer.state.global_step == 3


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match="pip install lightning"):
        cs.training.lightning_callback(problem_of)
    with pytest.raises(MissingPackageError, match="pip install transformers"):
        cs.training.transformers_callback(problem_of)


def imported(name: str) -> Any:
    """A package, or a skip where it is missing or does not go with the installed torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported here: {error}")


def test_with_lightning_itself(tmp_path: Path) -> None:
    lightning = imported("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain_net()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return OPTIMIZERS["Adam"](self)

    def make(module: Any) -> cs.Problem:
        return cs.Problem(
            module, nn.CrossEntropyLoss(), data(), forward=lambda m, x: m.net(x), params="net"
        )

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=8)
    trainer = lightning.Trainer(
        max_steps=6,
        callbacks=[cs.training.lightning_callback(make, tmp_path / "r", **OPTIONS)],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(Module(), loader)
    run = cs.Run(tmp_path / "r")
    assert run.last_step == 6 and len(run.frame("update")) == 3


def test_with_transformers_itself(tmp_path: Path) -> None:
    transformers = imported("transformers")
    assert issubclass(
        type(cs.training.transformers_callback(problem_of)), transformers.TrainerCallback
    )
