"""The monitor as a callback of Lightning's Trainer and of the Trainer of ``transformers``.

Both are thin: they make a :class:`~curvscope.training.Monitor` when training begins and call its
``step`` after every step of the optimizer. Neither package is needed until its callback is made.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingPackageError, OptionError, StopTraining
from ..problem import Problem
from .monitor import Monitor

_STATE = "curvscope_monitor.json"


class _Watching:
    """What both callbacks share: the monitor, made late, and its state."""

    def __init__(
        self,
        problem: Problem | Callable[[Any], Problem],
        path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self.problem, self.path, self.options = problem, path, options
        self.monitor: Monitor | None = None
        self._state: dict[str, Any] | None = None

    def _begin(self, model: Any, optimizer: Any) -> None:
        if not isinstance(self.problem, Problem) and not callable(self.problem):
            raise OptionError(
                "The callback takes a cs.Problem, or a function from the model to one, not "
                f"{type(self.problem).__name__}."
            )
        problem = self.problem if isinstance(self.problem, Problem) else self.problem(model)
        self.monitor = Monitor(problem, _inner(optimizer), self.path, **self.options)
        if self._state is not None:
            self.monitor.load_state_dict(self._state)

    def _step(self, loss: Any = None, batch: Any = None) -> bool:
        """Whether the training is to end."""
        assert self.monitor is not None
        try:
            self.monitor.step(loss, batch=batch)
        except StopTraining:
            return True
        return False

    def _end(self, failed: BaseException | None = None) -> None:
        if self.monitor is not None:
            self.monitor.close(failed=failed)

    def _saved(self) -> dict[str, Any]:
        return {} if self.monitor is None else self.monitor.state_dict()


def _inner(optimizer: Any) -> Any:
    """The optimizer itself, out of the wrappers of Accelerate and Lightning."""
    for name in ("optimizer", "_optimizer"):
        inner = getattr(optimizer, name, None)
        if hasattr(inner, "param_groups"):
            return _inner(inner)
    return optimizer


def _pair(batch: Any) -> Any:
    return batch if isinstance(batch, tuple | list) and len(batch) == 2 else None


class LightningHooks(_Watching):
    """The hooks of :func:`lightning_callback`, without the base class of Lightning."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the monitor for the first optimizer of the trainer."""
        self._begin(pl_module, trainer.optimizers[0])
        self._seen = int(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step, unless gradients are still being accumulated."""
        if int(trainer.global_step) == self._seen:
            return
        self._seen = int(trainer.global_step)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._step(loss, _pair(batch)):
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the run."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the run of a training that failed."""
        self._end(exception)

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoint."""
        return self._saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the trainer's checkpoint; used when training begins."""
        self._state = dict(state_dict) or None


def lightning_callback(
    problem: Problem | Callable[[Any], Problem],
    path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """A Lightning ``Callback`` that watches a training: ``Trainer(callbacks=[...])``.

    ``problem`` is a Problem of the module that is trained, or a function from the module to one;
    ``path`` and ``options`` are those of :class:`~curvscope.training.Monitor`. Its state is part of
    the trainer's checkpoints. Raises ``MissingPackageError`` without ``lightning`` (or
    ``pytorch_lightning``).
    """
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError:
        try:
            from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]
        except ImportError as error:
            raise MissingPackageError(
                "lightning_callback needs the package lightning: pip install lightning."
            ) from error
    kind = type("CurvscopeMonitor", (LightningHooks, Callback), {})
    return kind(problem, path, **options)


class TransformersHooks(_Watching):
    """The hooks of :func:`transformers_callback`, without the base class of transformers."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Make the monitor, continuing that of the checkpoint that the trainer resumes from."""
        file = self._folder(args, state) / _STATE
        if state.global_step > 0 and file.exists():
            self._state = json.loads(file.read_text(encoding="utf-8"))
        self._begin(given["model"], given["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A step."""
        if self._step():
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """What the trainer logs (loss, gradient norm, epoch), as records ``"trainer"``."""
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if self.monitor is not None and numbers:
            self.monitor.log("trainer", **numbers)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The monitor's state beside the trainer's checkpoint."""
        folder = self._folder(args, state)
        if folder.is_dir():
            text = json.dumps(_json(self._saved()), allow_nan=False)
            (folder / _STATE).write_text(text, encoding="utf-8")

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """End the run."""
        self._end()

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _json(value: Any) -> Any:
    """NaN is kept as ``null``: it stands for an estimate that is not known."""
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def transformers_callback(
    problem: Problem | Callable[[Any], Problem],
    path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """A ``TrainerCallback`` for the Trainer of transformers: ``Trainer(callbacks=[...])``.

    ``problem`` is a Problem of the model that is trained, or a function from the model to one;
    ``path`` and ``options`` are those of :class:`~curvscope.training.Monitor`. The Trainer hands no
    loss to callbacks: what it logs becomes the records ``"trainer"``. The monitor's state is saved
    in the trainer's checkpoint folders. Raises ``MissingPackageError`` without ``transformers``.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingPackageError(
            "transformers_callback needs the package transformers: pip install transformers."
        ) from error
    kind = type("CurvscopeMonitor", (TransformersHooks, TrainerCallback), {})
    return kind(problem, path, **options)
