"""Alarms: conditions on what is measured, said in words when they begin and when they end."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..analysis.result import number
from ..errors import OptionError, StopTraining

Rows = Sequence[dict[str, Any]]


class MonitorWarning(UserWarning):
    """What a monitor warns of: alarms, measures that fail or never fire, a full disk."""


@dataclass(frozen=True)
class AlarmEvent:
    """An alarm that was raised: which, when, on which block (``""``: none), and in words."""

    alarm: str
    step: int
    block: str
    message: str


@dataclass(frozen=True)
class Finding:
    """What an alarm says about one block: whether its condition holds, and the sentence if so."""

    block: str
    holds: bool
    message: str = ""


class Alarm:
    """Base class: :meth:`look` is shown every record of :attr:`measures`.

    Subclasses give ``name`` and ``measures``, and keep what must outlive a checkpoint in
    ``memory``, a dictionary of plain values that stays small.
    """

    name: ClassVar[str] = ""
    measures: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}

    def look(self, step: int, measure: str, rows: Rows, method: str) -> Iterable[Finding]:
        """Findings about the rows of one record; ``method`` names the optimizer."""
        raise NotImplementedError

    def hears(self, measure: str) -> bool:
        """Whether records of this measure are shown."""
        return measure in self.measures

    def __repr__(self) -> str:
        own = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if k != "memory")
        return f"{type(self).__name__}({own})"


class DampingFires(Alarm):
    """K-BFGS: one of its two dampings fired in at least ``share`` of the last ``window`` steps."""

    name = "damping fires"
    measures = ("diagnostics",)
    counters: ClassVar[dict[str, str]] = {
        "damped_on_inverse": "against the inverse",
        "damped_on_identity": "against the identity",
    }

    def __init__(self, share: float = 0.9, window: int = 50) -> None:
        super().__init__()
        if not 0 < share <= 1 or window < 1:
            raise OptionError(f"DampingFires({share}, {window}): a share in (0, 1] and steps >= 1.")
        self.share, self.window = share, window

    def look(self, step: int, measure: str, rows: Rows, method: str) -> Iterator[Finding]:
        """Counts now against those at the beginning of the window."""
        for row in rows:
            now = [row.get(key) for key in self.counters]
            if not any(isinstance(value, int | float) for value in now):
                continue
            counts = [float(v) if isinstance(v, int | float) else 0.0 for v in now]
            past = self.memory.setdefault("counts", {}).setdefault(row["block"], [])
            while len(past) > 1 and past[1][0] <= step - self.window:
                past.pop(0)
            if past and step - past[0][0] >= self.window:
                steps = step - past[0][0]
                shares = [(c - p) / steps for c, p in zip(counts, past[0][1:], strict=True)]
                k = max(range(len(shares)), key=shares.__getitem__)
                on = self.memory.setdefault("on", [])
                # over only when well below, or it would come and go
                fires = shares[k] >= self.share * (0.8 if row["block"] in on else 1.0)
                if fires != (row["block"] in on):
                    (on.append if fires else on.remove)(row["block"])
                yield Finding(
                    row["block"],
                    fires,
                    f"the damping {list(self.counters.values())[k]} fired in "
                    f"{100 * shares[k]:.0f} % of the last {steps} steps{_advice(k, row)}",
                )
            past.append([step, *counts])


def _advice(counter: int, row: Mapping[str, Any]) -> str:
    """What the last pair measured, and what to try, where it was raised to the damping."""
    before, after = row.get("sy_ss_before"), row.get("sy_ss_after")
    if counter != 1 or before is None or after is None or not before < after:
        return ""
    return (
        f"; the last pair's s'y/s's of {before:.2g} was raised to {after:.2g}, as all are that "
        "lie below sqrt(damping): try a third of the damping, or larger batches"
    )


class NearIdentity(Alarm):
    """The preconditioner is within ``tolerance`` of a multiple of the identity: plain descent."""

    name = "near the identity"
    measures = ("preconditioner",)

    def __init__(self, tolerance: float = 0.01) -> None:
        super().__init__()
        self.tolerance = tolerance

    def look(self, step: int, measure: str, rows: Rows, method: str) -> Iterator[Finding]:
        """A finding per block."""
        for row in rows:
            far = row.get("from_identity", math.nan)
            if far == far:
                near = f"within {_percent(far)} of " if far >= 1e-6 else ""
                yield Finding(
                    row["block"],
                    far <= self.tolerance,
                    f"the preconditioner is {near}a multiple of the identity, "
                    "so the block is trained by scaled gradient descent",
                )


class NotFinite(Alarm):
    """Loss, gradient or preconditioner is NaN or infinite."""

    name = "not finite"
    measures = ("loss", "gradient", "preconditioner")

    def look(self, step: int, measure: str, rows: Rows, method: str) -> Iterator[Finding]:
        """A finding per row that has such a number."""
        for row in rows:
            if measure == "preconditioner":
                ok = bool(row.get("finite", True))
                yield Finding(row["block"], not ok, "the curvature is not finite")
            else:
                key = "loss" if measure == "loss" else "norm"
                value = row.get(key, 0.0)
                what = {"loss": "the loss", "gradient": "the gradient on the probe"}[measure]
                if measure == "loss" and value != value and row.get("given") is False:
                    continue
                yield Finding(measure, not math.isfinite(value), f"{what} is {value}")


class TooSharp(Alarm):
    """``lambda_max * lr`` (of the preconditioned Hessian, if there is one) above ``limit``.

    Raised once it was above at every measurement over ``steps`` steps.
    """

    name = "too sharp"
    measures = ("sharpness",)

    def __init__(self, limit: float = 2.0, steps: int = 20) -> None:
        super().__init__()
        self.limit, self.steps = limit, steps

    def look(self, step: int, measure: str, rows: Rows, method: str) -> Iterator[Finding]:
        """One finding."""
        for row in rows:
            if not row.get("covered", True):
                continue  # which matrix limits the learning rate is not known
            inner = row.get("preconditioned_product", math.nan)
            value = row["product"] if inner != inner else inner
            since = self.memory.get("since")
            if not value > self.limit:
                self.memory["since"] = since = None
            elif since is None:
                self.memory["since"] = since = step
            steps = 0 if since is None else step - since
            of = "" if inner != inner else " of the preconditioned Hessian"
            yield Finding(
                "",
                since is not None and steps >= self.steps,
                f"largest eigenvalue{of} times learning rate is {number(value)}, above "
                f"{number(self.limit)} for {steps} steps",
            )


class Above(Alarm):
    """Any number of any measure above ``limit`` at every measurement over ``steps`` steps.

    ``Above("error", "error", 1.0)``: worse than a zero matrix. ``below=True`` turns it round.
    """

    name = "above"

    def __init__(
        self, measure: str, column: str, limit: float, *, steps: int = 0, below: bool = False
    ) -> None:
        super().__init__()
        self.measure, self.column, self.limit = measure, column, limit
        self.steps, self.below = steps, below

    def hears(self, measure: str) -> bool:
        """Its own measure only."""
        return measure == self.measure

    def look(self, step: int, measure: str, rows: Rows, method: str) -> Iterator[Finding]:
        """A finding per row that has the column."""
        for row in rows:
            value = row.get(self.column)
            if not isinstance(value, int | float) or value != value:
                continue
            block = str(row.get("block", ""))
            key = f"{block} {row.get('approximation', '')}"
            out = value < self.limit if self.below else value > self.limit
            since = self.memory.get(key) if out else None
            if out and since is None:
                since = step
            self.memory[key] = since
            steps = 0 if since is None else step - since
            during = f" for {steps} steps" if self.steps else ""
            yield Finding(
                block,
                out and steps >= self.steps,
                f"{self.measure}: {self.column} is {number(float(value))}, "
                f"{'below' if self.below else 'above'} {number(self.limit)}{during}",
            )


def default_alarms() -> list[Alarm]:
    """The alarms of a monitor that was told nothing else."""
    return [NotFinite(), DampingFires(), NearIdentity(), TooSharp()]


def stop(event: AlarmEvent) -> None:
    """For ``on_alarm=``: end the training, by ``StopTraining`` out of ``monitor.step``.

    A ``with cs.Monitor(...)`` statement ends quietly at this error.
    """
    raise StopTraining(event.message)


class Watch:
    """Shows records to alarms and tells what began and what ended."""

    def __init__(self, alarms: Iterable[Alarm], method: str) -> None:
        self.alarms = list(alarms)
        self.method = method
        self.on: dict[tuple[int, str], str] = {}
        self.latest: deque[AlarmEvent] = deque(maxlen=100)
        self._hearing: dict[str, list[tuple[int, Alarm]]] = {}
        for alarm in self.alarms:
            if not isinstance(alarm, Alarm):
                raise OptionError(
                    f"alarms= takes alarms such as cs.training.TooSharp(), not {alarm!r}."
                )

    def show(self, step: int, measure: str, rows: Rows) -> Iterator[tuple[str, AlarmEvent]]:
        """``("raised" or "over", event)`` for what has changed by a record."""
        if measure not in self._hearing:
            self._hearing[measure] = [(k, a) for k, a in enumerate(self.alarms) if a.hears(measure)]
        for k, alarm in self._hearing[measure]:
            for found in alarm.look(step, measure, rows, self.method):
                key = (k, found.block)
                if found.holds == (key in self.on):
                    continue
                place = f"{self.method}, {found.block}" if found.block else self.method
                event = AlarmEvent(alarm.name, step, found.block, f"{place}: {found.message}")
                if found.holds:
                    self.on[key] = event.message
                    self.latest.append(event)
                    yield "raised", event
                else:
                    del self.on[key]
                    yield "over", AlarmEvent(alarm.name, step, found.block, f"{place}: over")

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "on": [[k, block, text] for (k, block), text in self.on.items()],
            "memory": [alarm.memory for alarm in self.alarms],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.on = {(int(k), str(block)): str(text) for k, block, text in state["on"]}
        for alarm, memory in zip(self.alarms, state["memory"]):
            alarm.memory = dict(memory)


def _percent(share: float) -> str:
    return f"{number(100 * share, 2)} %"


Callback = Callable[[AlarmEvent], Any]
