"""The monitor: put into any training loop, it measures at chosen steps and writes a run."""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from ..errors import OptionError, RunError, StopTraining, check_option
from ..problem import Problem, require_problem
from . import identity, spectral_measures, summary  # noqa: F401  (registers measures)
from .adapters import adapter_of
from .alarms import Alarm, AlarmEvent, MonitorWarning, NotFinite, Watch, default_alarms
from .budget import Budget
from .curvature_measures import OF_CURVATURE, defaults
from .losses import Losses
from .measures import Loss, choose
from .moment import REFERENCES, Moment
from .probe import make_probe
from .recorder import Recorder
from .run import EVENTS
from .schedules import At
from .snapshots import SnapshotMeasure, Snapshots
from .taking import ENOUGH, Taker

_OWN = __name__.partition(".")[0] + "."


class Monitor:
    """Watch a training: measure curvature at chosen steps, within a share of the time.

    Put it around any loop and call :meth:`step` after every step of the optimizer. The training's
    trajectory is that of the loop without it, bit for bit: random states, gradients, buffers and
    flags are as they were when :meth:`step` returns. Errors of the monitor become records and a
    warning; they end the training only with ``strict=True``.

    Parameters
    ----------
    problem
        A :class:`~curvscope.Problem` of the model that is trained: its loss, its data, its blocks.
    optimizer
        Any ``torch.optim.Optimizer``. Curvature is read from ``optimizer.curvature()``, or from the
        state of Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, AdaBelief, EXAdam and
        Shampoo (``cs.training.register_adapter`` adds others); of the rest only exact quantities.
    path
        Folder of the run, which :class:`~curvscope.training.Run` reads. A folder of the same
        training is continued, another one refused (``RunError``). ``None`` keeps the latest 10,000
        rows in memory (:meth:`frame`).
    every
        Schedule of all measures without one of their own, except the loss: ``n`` for every n-th
        step, a list of steps, or ``Every``, ``PowersOfTwo``, ``At``, ``Share`` of ``cs.training``.
    measures
        Names (``"default"`` stands for the default ones, of which a name beside it replaces its
        own), objects of ``cs.training.Measure``, or a mapping from either to schedules. Default:
        loss, gradient, update, error, preconditioner, diagnostics, sharpness, as far as the
        optimizer has them.
    budget
        Most that the monitor may take, as a share of training time, or ``None`` for no cap. It is
        kept by leaving out measurements, which is recorded.
    assured
        Steps at which everything that is due is measured whatever the budget. What that takes is
        not the budget's; the run has it as ``outside``.
    probe
        Where curvature is measured: a number of samples (default 64) drawn once from the problem,
        ``"all"``, ``"current"`` (the batch given to :meth:`step`), or a Problem.
    reference
        The exact matrix: ``"ggn"`` or ``"hessian"``.
    alarms
        Objects of ``cs.training.Alarm``; default: not finite, damping fires, near the identity,
        too sharp. ``()`` for none.
    on_alarm
        Called with an ``AlarmEvent`` when one is raised. ``cs.training.stop`` ends the training.
    snapshots
        ``"projection"``, ``"strided"``, ``"full"`` or a ``cs.training.Snapshots``; default none.
    seed
        Of the probe and of whatever measures draw.
    strict
        Whether errors of the monitor are raised.
    clock
        What tells the seconds.

    Raises ``OptionError``, ``RunError``, ``OutputError`` when it is made. Cost: see ``budget``;
    what was spent stands in :attr:`overhead` and in the run. Memory does not grow with the steps.

    Source: Cohen et al. 2021 (arXiv 2103.00065) for ``lambda_max * lr`` against 2.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> measures = {"loss": 1, "sharpness": 2}  # every step, every second step
    >>> with cs.Monitor(problem, optimizer, measures=measures, budget=None) as monitor:
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         loss = torch.nn.functional.cross_entropy(model(data[0]), data[1])
    ...         loss.backward()
    ...         optimizer.step()
    ...         monitor.step(loss)
    >>> list(monitor.frame("loss")["step"]), list(monitor.frame("sharpness")["step"])
    ([1, 2, 3], [2])
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: Any,
        path: str | os.PathLike[str] | None = None,
        *,
        every: Any = None,
        measures: str | Iterable[Any] | Mapping[Any, Any] | None = None,
        budget: float | None = 0.05,
        assured: Iterable[int] = (),
        probe: Any = None,
        reference: str = "ggn",
        alarms: Sequence[Alarm] | None = None,
        on_alarm: Callable[[AlarmEvent], Any] | None = None,
        snapshots: str | Snapshots | None = None,
        seed: int = 0,
        strict: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.budget = Budget(budget, clock)
        self.budget.enter()
        require_problem(problem)
        identity.require_its_optimizer(problem, optimizer)
        check_option("reference", reference, REFERENCES)
        self.problem, self.optimizer, self.reference = problem, optimizer, reference
        self.seed, self.strict, self.on_alarm = seed, strict, on_alarm
        known = callable(getattr(optimizer, "curvature", None)) or adapter_of(optimizer)
        self.measures = choose(measures, every, defaults(optimizer, bool(known)))
        if isinstance(snapshots, str):
            snapshots = Snapshots(snapshots)
        if snapshots is not None:
            keeper = SnapshotMeasure(snapshots, every)
            keeper.start(problem)
            self.measures.append((keeper, keeper.when))
        self.budget.open((m.name, m.weight, m.steady) for m, _ in self.measures)
        method = str(getattr(optimizer, "method", type(optimizer).__name__))
        self.watch = Watch(default_alarms() if alarms is None else alarms, method)
        self._losses = Losses()
        hearing = (a for a in self.watch.alarms if a.hears(Loss.name))
        self._attentive = any(type(a) is not NotFinite for a in hearing)
        if snapshots is not None:
            self.budget.accounts[SnapshotMeasure.name].exempt = not snapshots.budgeted
        self._steady = {m.name for m, _ in self.measures if m.steady}
        self.probe = make_probe(problem, probe, seed)
        self.steps = 0
        self.stopped: AlarmEvent | None = None
        sure = At(assured).steps if (assured := list(assured)) else frozenset()
        make = functools.partial(Moment, optimizer=optimizer, reference=reference, seed=seed)
        self._taker = Taker(self.measures, self.budget, make, problem, self.probe, self, sure)
        self._loaded: dict[str, Any] | None = None
        self._begun = self._closed = False
        self._warned: set[str] = set()
        self._idle = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._idle = self._idle and torch.distributed.get_rank() != 0
        settings = {
            "measures": {m.name: {"schedule": repr(s), **m.settings()} for m, s in self.measures},
            "budget": budget,
            "assured": sorted(sure),
            "probe": "current" if self.probe is None else probe if probe == "all" else "fixed",
            "reference": reference,
            "seed": seed,
            "alarms": [repr(alarm) for alarm in self.watch.alarms],
            "snapshots": None if snapshots is None else snapshots.describe(),
        }
        head = identity.header(problem, optimizer, self.probe, settings)
        self.recorder = Recorder(None if self._idle else path, head, self._warn)
        if not known:
            asked = [m.name for m, _ in self.measures if m.name in OF_CURVATURE]
            if asked:
                self._warn(
                    f"{method} has no curvature that can be read: {', '.join(asked)} will have no "
                    "records. Give it a curvature() method, or add an adapter with "
                    "cs.training.register_adapter."
                )
        self.budget.leave()

    # -- the loop --------------------------------------------------------------------------------

    def step(self, loss: Any = None, *, batch: Any = None) -> None:
        """To be called after every step of the optimizer, with its loss (a number or a tensor).

        ``batch`` is the ``(inputs, targets)`` of this step, for ``probe="current"``. Raises
        ``StopTraining`` if an alarm's callback did, and with ``strict=True`` what a measure raises.
        """
        if self._idle or self._closed:
            return
        self.budget.enter()
        try:
            if not self._begun:
                self._begin()
            self.steps += 1
            self._taker.visit(self.steps, loss, batch)
        except StopTraining:
            raise
        except Exception as error:
            self._trouble("monitor", error)
        finally:
            self.budget.leave()

    def log(self, name: str, **numbers: Any) -> None:
        """Put numbers of your own (a validation loss, an accuracy) into the run, at this step.

        Raises ``OptionError`` for the name of a measure.
        """
        if name in EVENTS or name in self.budget.accounts:
            raise OptionError(f"{name!r} is the monitor's own; log under another name.")
        if self._idle or self._closed or not self._begun:
            return
        self.budget.enter(step=False)
        self._settle()
        self.recorder.write(self.steps, name, [numbers], self.budget.training)
        self.budget.leave()

    def _begin(self) -> None:
        """At the first step: where the run stands, and what a restart supersedes."""
        self._begun = True
        if self._loaded is not None:
            start = int(self._loaded["step"])
        else:
            start = max(0, (identity.steps_of(self.optimizer) or 1) - 1)
        self.steps = start
        try:
            self.recorder.begin(start)
        except RunError as error:
            if self.strict:
                raise
            self._warn(str(error))
            self.recorder.give_up()
        if start == 0:
            for measure, _ in self.measures:
                again = measure.name in self.recorder.at_start
                if isinstance(measure, SnapshotMeasure) and not again:
                    self._write(0, measure.name, measure.initial(), 0.0)

    @property
    def overhead(self) -> float:
        """Seconds of the monitor over seconds of training so far."""
        return self.budget.overhead

    # -- records ---------------------------------------------------------------------------------

    def _write(self, step: int, name: str, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        tensors = next((r["tensors"] for r in rows if "tensors" in r), None)
        plain = [{k: v for k, v in row.items() if k != "tensors"} for row in rows]
        self.recorder.write(step, name, plain, seconds, tensors, later=name in self._steady)

    def note(self, step: int, loss: Any) -> None:
        """For the taker: a loss, which alarms see at once if they hear it or it is not finite."""
        due = self._losses.add(step, loss, self.optimizer, self.budget.training)
        if due or self._attentive:
            self._settle()

    def _settle(self) -> None:
        """Losses that were kept, into the run and before the alarms."""
        kept = self._losses.drain()
        for step, row, seconds in kept:
            self._record(step, Loss.name, [row], seconds)
        if len(kept) > 1:
            self.recorder.flush()

    def record(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """For the taker: rows of a measure, into the run and before the alarms."""
        self._settle()
        self._record(self.steps, name, rows, self.budget.training)

    def _record(self, step: int, name: str, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        self._write(step, name, rows, seconds)
        for state, event in self.watch.show(step, name, rows):
            row = {"alarm": event.alarm, "block": event.block, "state": state}
            row["message"] = event.message
            self.recorder.write(step, "alarm", [row], seconds)
            if state == "raised":
                self._warn(f"Step {event.step}: {event.message}.")
                if self.on_alarm is not None:
                    self._call(event)

    def _call(self, event: AlarmEvent) -> None:
        assert self.on_alarm is not None
        try:
            self.on_alarm(event)
        except StopTraining:
            self.stopped = event
            row = {"event": "stopped", "of": event.alarm, "message": event.message}
            self.recorder.write(self.steps, "monitor", [row], self.budget.training)
            raise

    def thinned(self, name: str, times: int, estimate: float) -> None:
        """For the taker: there was no time for a measure."""
        self._settle()
        row = {"event": "thinned", "of": name, "times": times, "estimate": estimate}
        self.recorder.write(self.steps, "monitor", [row], self.budget.training)

    def failed(self, name: str, error: Exception, given_up: bool) -> None:
        """For the taker: a measure raised an error."""
        self._trouble(name, error, f"given up after {ENOUGH} failures" if given_up else "")

    def _trouble(self, name: str, error: Exception, note: str = "") -> None:
        """An error of the monitor's own: raised if strict, else recorded and warned of once."""
        if self.strict:
            raise error
        self._settle()
        kind = f"{type(error).__name__}: {error}"
        row = {"event": "failed", "of": name, "error": kind, "note": note}
        self.recorder.write(self.steps, "monitor", [row], self.budget.training)
        if (key := f"{name} {type(error).__name__} {note}") not in self._warned:
            self._warned.add(key)
            end = f" It is {note}." if note else " Training goes on; this is recorded."
            self._warn(f"Step {self.steps}: measuring {name!r} failed ({kind}).{end}")

    def _warn(self, message: str) -> None:
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OWN):
            level, frame = level + 1, frame.f_back
        warnings.warn(MonitorWarning(message), stacklevel=level)

    def frame(self, measure: str | None = None) -> Any:
        """What was measured, as a pandas frame: of the run, or the latest rows without a path."""
        self._settle()
        return self.recorder.frame(measure)

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain values that ``torch.load(weights_only=True)`` reads."""
        self._settle()
        self.recorder.flush()
        return {
            "run": self.recorder.id,
            "step": self.steps,
            "budget": self.budget.state(),
            "alarms": self.watch.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run from a checkpoint, before the first :meth:`step`.

        Records after the checkpoint's step are superseded by what is measured now. Raises
        ``OptionError`` after the first step, ``RunError`` for the checkpoint of another run.
        """
        if self._begun:
            raise OptionError("load_state_dict comes before the first monitor.step().")
        if self.recorder.path is not None and state["run"] != self.recorder.id:
            raise RunError(
                f"This is the checkpoint of another run than that in {self.recorder.path}: give "
                "path= the folder that it was saved with. To begin a new run from these "
                "parameters, leave monitor.load_state_dict out."
            )
        self._loaded = dict(state)
        self.steps = int(state["step"])
        left = self.budget.training, self.budget.spent
        self.budget.load(dict(state["budget"]))
        self.budget.training += left[0]
        self.budget.spent += left[1]
        self.watch.load(dict(state["alarms"]))

    # -- end -------------------------------------------------------------------------------------

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.close(failed=None if isinstance(error, StopTraining) else error)
        return isinstance(error, StopTraining) and self.stopped is not None

    def close(self, *, failed: BaseException | None = None) -> None:
        """Write what the monitor took and left out, and warn of what never happened."""
        if self._closed or self._idle:
            return
        self._closed = True
        self.budget.enter()
        budget = self.budget
        if self._begun:
            self._settle()
            state = "finished" if failed is None else f"ended by {type(failed).__name__}"
            rows = summary.rows(budget, state)
            self.recorder.write(self.steps, "monitor", rows, budget.training)
        self.recorder.close()
        budget.leave()
        if failed is None:
            begun = self.steps if self._begun else None
            for message in summary.complaints(self.measures, budget, begun):
                self._warn(message)
