"""Comparing optimizers: train a problem with each of them, watched, and able to go on later."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CurvscopeError, NonFiniteError, OptionError, OutputError, StopTraining
from ..problem import Problem
from ..problem.data import sample_count
from ..problem.state import random_state
from ..progress import stage, track
from ..zoo.recipes import threads
from .checkpoints import load_checkpoint, load_json, save_checkpoint, save_json
from .monitor import Monitor
from .optimizers_by_name import NamedOptimizer, OptimizerSpec, build_optimizer
from .plans import CHECKPOINT, RESULT, Job, begin, make_jobs
from .snapshots import Snapshots
from .subjects import Source, Subject, epoch_seed

_FULL = 1_000_000  # parameters up to which snapshots are kept in full
_TIMES = 10  # that curvature is measured per training, about
_SNAPSHOTS = 25  # per training, about


@dataclass(frozen=True)
class Trained:
    """How one training ended: ``state`` is finished, diverged, stopped (by an alarm) or failed."""

    optimizer: str
    lr: float | None
    seed: int
    path: Path
    state: str
    reason: str = ""
    epochs: int = 0
    train_loss: float = math.nan


@dataclass(frozen=True)
class Trainings:
    """What :func:`train` did: the ``folder`` and one :class:`Trained` per training."""

    folder: Path
    runs: tuple[Trained, ...]

    @property
    def failed(self) -> tuple[Trained, ...]:
        """Trainings that ended with an error other than divergence."""
        return tuple(run for run in self.runs if run.state == "failed")

    def __str__(self) -> str:
        count = len(self.runs)
        lines = [f"{count} training{'' if count == 1 else 's'} in {self.folder}"]
        for run in self.runs:
            rate = "" if run.lr is None else f", lr {run.lr:g}"
            end = f"loss {run.train_loss:.4g}" if run.state == "finished" else run.reason
            lines.append(f"{run.optimizer}{rate}, seed {run.seed}: {run.state}, {end}")
        return "\n".join(lines)


def train(
    problem: str | Problem,
    optimizers: str | OptimizerSpec | Iterable[str | OptimizerSpec],
    *,
    epochs: int,
    out: str | os.PathLike[str],
    batch_size: int | None = None,
    lrs: Sequence[float] | None = None,
    seeds: int | Sequence[int] = 1,
    schedule: str = "constant",
    budget: float | None = None,
    monitor: Mapping[str, Any] | None = None,
    data: str | os.PathLike[str] | None = None,
    device: str | None = None,
    command: str = "",
) -> Trainings:
    """Train a problem with several optimizers, each under a monitor, and keep all of it in ``out``.

    Every optimizer is trained with every learning rate and seed, into
    ``out/OPTIMIZER/lr=RATE/seed=SEED``: a :class:`~curvscope.training.Run` with a record per epoch
    (``run.frame("epoch")``: ``train_loss``, ``test_loss``, ``test_accuracy``), the latest
    checkpoint, and how it ended. The same call again goes on where it was interrupted, by Ctrl-C or
    ``kill -9``: an unfinished training continues from its last epoch and ends, on the CPU bit for
    bit, where it would have; finished ones are left alone; more optimizers, learning rates,
    seeds or epochs are added. A training that diverges is recorded as such, and the others go on.

    Parameters
    ----------
    problem
        A name of the zoo, ``package.module:function``, or a Problem, whose data are then the
        training data. Networks of the zoo start from initial weights of the seed and are tested on
        the test split; a Problem is copied, and every training starts from its weights.
    optimizers
        Names as for :func:`~curvscope.training.build_optimizer`: ``["kbfgs", "adam:lr=0.01"]``.
    epochs
        How many times all samples are seen.
    out
        The folder; new, or one of the same comparison.
    batch_size
        Default: the zoo's recipe; all samples of a Problem; a loader has its own.
    lrs
        Learning rates of optimizers that have none in their name: a grid.
    seeds
        How many (from 0 on), or a list: of initial weights and the order of samples.
    schedule
        ``"constant"``, or ``"cosine"`` for learning rates that fall to 0 over all steps.
    budget
        The monitor's most, as a share of training time, kept by leaving out measurements; ``None``
        for no cap: every training is then measured at the same steps. The first and the last
        measurements are taken in any case, and their time is told apart.
    monitor
        Other options of :class:`~curvscope.Monitor`: ``every``, ``measures``, ``snapshots``, ...
        By default its default measures and fresh approximations beside them about 10 times per
        training, and snapshots (in full up to a million parameters) about 25 times, whatever the
        budget: without them there are no paths.
    data
        Folder with the data, for problems that need one.
    device
        Where to train.
    command
        How this was asked for, repeated in the report.

    Returns the :class:`Trainings`. Raises, before anything trains, ``OptionError``,
    ``MissingPackageError``, ``OutputError``, ``RunError`` and what loading the problem raises.
    Cost: that of the trainings and of the monitors; the random state is as before afterwards.
    """
    source = Source(
        problem, batch_size=batch_size, data=None if data is None else Path(data), device=device
    )
    options = {"budget": budget, **(monitor or {})}
    with random_state():
        jobs = make_jobs(source, optimizers, lrs, seeds)
        folder = begin(
            out,
            source,
            jobs,
            epochs=epochs,
            schedule=schedule,
            monitor=options,
            command=command,
        )
        runs = []
        for number, job in enumerate(jobs, 1):
            stage(f"Training {number} of {len(jobs)}: {job}")
            runs.append(_Training(source, job, folder, epochs, schedule, options).run())
    return Trainings(folder, tuple(runs))


class _Training:
    """One training, from its beginning or its last checkpoint to its end."""

    def __init__(
        self,
        source: Source,
        job: Job,
        folder: Path,
        epochs: int,
        schedule: str,
        options: Mapping[str, Any],
    ) -> None:
        self.source, self.job, self.epochs, self.schedule = source, job, epochs, schedule
        self.folder = folder / job.folder
        self.options = dict(options)
        self.epoch = self.steps = 0
        self.losses: list[float] = []

    def run(self) -> Trained:
        """Train unless that is done; what happened is written and returned."""
        before = load_json(self.folder / RESULT)
        if before is not None and self._ended(before):
            stage(f"{self.job}: {before['state']} before")
            return self._trained(before)
        state, reason = "finished", ""
        try:
            self._train()
        except StopTraining as error:
            state, reason = "stopped", str(error)
        except NonFiniteError as error:
            state, reason = "diverged", str(error)
        except OutputError:
            raise
        except (CurvscopeError, RuntimeError) as error:
            state, reason = "failed", f"{type(error).__name__}: {error}"
        found = {
            "state": state,
            "reason": reason,
            "epochs": self.epoch,
            "steps": self.steps,
            "train_loss": self.losses[-1] if self.losses else None,
        }
        save_json(self.folder / RESULT, found)
        if state != "finished":
            stage(f"{self.job}: {state} ({reason})")
        return self._trained(found)

    def _ended(self, before: Mapping[str, Any]) -> bool:
        if before["state"] in ("diverged", "stopped"):
            return True
        return bool(before["state"] == "finished" and before["epochs"] >= self.epochs)

    def _trained(self, found: Mapping[str, Any]) -> Trained:
        loss = found.get("train_loss")
        return Trained(
            self.job.label,
            self.job.lr,
            self.job.seed,
            self.folder,
            str(found["state"]),
            str(found["reason"]),
            int(found["epochs"]),
            math.nan if loss is None else float(loss),
        )

    # -- the loop --------------------------------------------------------------------------------

    def _train(self) -> None:
        with ExitStack() as stack:
            subject = self.source.subject(self.job.seed)
            stack.enter_context(threads(subject.threads))
            subject.problem.data.seed(epoch_seed(self.job.seed, 0))
            built = build_optimizer(self.job.spec, subject.model)
            monitor = self._monitor(subject, built)
            rates = [group.get("lr") for group in built.optimizer.param_groups]
            with monitor:
                self._restore(subject, built, monitor)
                if self.epoch == 0:
                    subject.model.train()
                    built.warm_start(subject.epoch(0), subject.loss, subject.outputs)
                rest = range(self.epoch + 1, self.epochs + 1)
                for number in track(rest, str(self.job), total=len(rest)):
                    self._one_epoch(number, subject, built, monitor, rates)
                    self._finish_epoch(number, subject, built, monitor)
            if monitor.stopped is not None:
                raise StopTraining(monitor.stopped.message)

    def _monitor(self, subject: Subject, built: NamedOptimizer) -> Monitor:
        steps = (subject.steps or _SNAPSHOTS) * self.epochs
        options = {
            "measures": ("default", "fresh"),
            "every": max(1, steps // _TIMES),
            **self.options,
        }
        if "snapshots" not in options:
            kind = "full" if subject.problem.layout.numel <= _FULL else "projection"
            options["snapshots"] = Snapshots(kind, max(1, steps // _SNAPSHOTS), budgeted=False)
        if options.get("budget") is not None and isinstance(every := options["every"], int):
            # however short a training is, its beginning and its end can be seen
            options = {"assured": sorted({every, max(1, steps // every) * every}), **options}
        return Monitor(subject.problem, built.optimizer, self.folder, **options)

    def _one_epoch(
        self,
        number: int,
        subject: Subject,
        built: NamedOptimizer,
        monitor: Monitor,
        rates: Sequence[Any],
    ) -> None:
        subject.model.train()
        built.training(True)
        subject.problem.data.seed(epoch_seed(self.job.seed, number))
        total, samples = 0.0, 0
        for batch in subject.epoch(number):
            self._set_rates(subject, built, rates)
            value = float(built.step(partial(subject.value, *batch)))
            self.steps += 1
            monitor.step(value, batch=batch)
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"The loss is {value} at step {self.steps} (epoch {number}); take a smaller "
                    "learning rate."
                )
            size = sample_count(*batch)
            total, samples = total + value * size, samples + size
        if not samples:
            raise OptionError(f"{self.source.name} gave no minibatch in epoch {number}.")
        self.losses.append(total / samples)

    def _set_rates(self, subject: Subject, built: NamedOptimizer, rates: Sequence[Any]) -> None:
        if self.schedule == "constant":
            return
        if subject.steps is None:
            raise OptionError("A cosine schedule needs to know the number of minibatches.")
        share = self.steps / (subject.steps * self.epochs)
        for group, rate in zip(built.optimizer.param_groups, rates, strict=True):
            if rate is not None:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * share))

    def _finish_epoch(
        self, number: int, subject: Subject, built: NamedOptimizer, monitor: Monitor
    ) -> None:
        """Test, record, keep: the record first, so that a checkpoint always has its own."""
        with monitor.budget.apart():
            built.training(False)
            tested = subject.tested()
            built.training(True)
            row = {"epoch": number, "train_loss": self.losses[-1], **tested}
            monitor.record("epoch", [row])
            self.epoch = number
            save_checkpoint(
                self.folder / CHECKPOINT,
                {
                    "epoch": self.epoch,
                    "steps": self.steps,
                    "losses": list(self.losses),
                    "model": subject.model.state_dict(),
                    "optimizer": built.optimizer.state_dict(),
                    "monitor": monitor.state_dict(),
                    "random": torch.get_rng_state(),
                },
            )
        accuracy = tested.get("test_accuracy")
        end = "" if accuracy is None else f", test accuracy {100 * accuracy:.1f} %"
        stage(f"{self.job}: epoch {number} of {self.epochs}, loss {self.losses[-1]:.4g}{end}")

    def _restore(self, subject: Subject, built: NamedOptimizer, monitor: Monitor) -> None:
        found = load_checkpoint(self.folder / CHECKPOINT)
        if found is None:
            return
        subject.model.load_state_dict(found["model"])
        built.optimizer.load_state_dict(found["optimizer"])
        monitor.load_state_dict(found["monitor"])
        torch.set_rng_state(found["random"])
        self.epoch, self.steps = int(found["epoch"]), int(found["steps"])
        self.losses = [float(value) for value in found["losses"]]
        stage(f"{self.job}: going on after epoch {self.epoch}")
