"""The runs below a folder, grouped by optimizer and learning rate, and which rate is the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RunError
from ...training.checkpoints import load_json
from ...training.plans import PLAN, RESULT
from ...training.run import Run
from ...training.store import HEADER

if TYPE_CHECKING:
    import pandas as pd

PROGRESS = ("epoch", "step", "seconds", "train_loss", "test_loss", "test_accuracy")
"""Columns of a run's progress, as ``curvscope train`` writes them."""
_BINS = 100  # points of a loss curve of a run that has no epochs


@dataclass
class Member:
    """One run: what was trained, how it ended, and what its monitor wrote."""

    run: Run
    path: str
    optimizer: str
    lr: float
    seed: int
    state: str = "unknown"
    reason: str = ""

    @cached_property
    def progress(self) -> pd.DataFrame:
        """Columns ``epoch`` or ``step``, ``seconds``, ``train_loss`` and those of tests."""
        import pandas as pd

        if self.has_epochs:
            frame = self.run.frame("epoch")
            return frame[[name for name in PROGRESS if name in frame.columns]]
        if "loss" not in self.run.measures:
            return pd.DataFrame({"step": [], "seconds": [], "train_loss": []})
        frame = self.run.frame("loss")[["step", "seconds", "loss"]]
        size = self.steps_per_point
        means = frame.groupby([place // size for place in range(len(frame))]).mean()
        return means.rename(columns={"loss": "train_loss"})

    @cached_property
    def has_epochs(self) -> bool:
        """Whether there is a record per epoch with its number and loss, and not just of steps."""
        rows = self.run.rows("epoch") if "epoch" in self.run.measures else []
        return any({"epoch", "train_loss"} <= set(row) for row in rows)

    @property
    def steps_per_point(self) -> int:
        """How many steps' losses a point of the progress is the mean of; 0 with epochs."""
        if self.has_epochs:
            return 0
        return max(1, math.ceil(len(self.run.rows("loss")) / _BINS))

    def rows(self, measure: str) -> list[dict[str, Any]]:
        """The rows of one measure."""
        return self.run.rows(measure)

    @property
    def final_loss(self) -> float:
        """The last training loss; infinite for a training that diverged, NaN without any."""
        if self.state == "diverged":
            return math.inf
        losses = self.progress["train_loss"]
        value = float(losses.iloc[-1]) if len(losses) else math.nan
        return value if math.isfinite(value) else math.inf

    @property
    def monitored(self) -> tuple[float, float]:
        """Seconds of training and of the monitor, NaN where the run has not ended."""
        for row in reversed(self.rows("monitor")):
            if "spent" in row:
                return float(row["seconds"]), float(row["spent"])
        return (float(self.progress["seconds"].iloc[-1]) if len(self.progress) else 0.0), math.nan

    @property
    def outside(self) -> float:
        """Seconds of measurements at assured steps, which the budget does not count."""
        return sum(
            float(row.get("outside", 0) or 0) for row in self.rows("monitor") if "spent" in row
        )

    @property
    def name(self) -> str:
        """For tables and messages."""
        rate = "" if math.isnan(self.lr) else f", lr {self.lr:g}"
        return f"{self.optimizer}{rate}, seed {self.seed}"


@dataclass
class Group:
    """The runs of one optimizer: those of its best learning rate are what most pictures show."""

    optimizer: str
    members: list[Member]

    @cached_property
    def rates(self) -> dict[float, list[Member]]:
        """Runs by learning rate, ascending."""
        found: dict[float, list[Member]] = {}
        for member in sorted(self.members, key=lambda m: (m.lr, m.seed)):
            key = next((k for k in found if _same(k, member.lr)), member.lr)
            found.setdefault(key, []).append(member)
        return found

    def score(self, rate: float) -> float:
        """Mean over seeds of the last training loss; infinite where one diverged."""
        losses = [m.final_loss for m in self.rates[rate]]
        known = [loss for loss in losses if not math.isnan(loss)]
        return sum(known) / len(known) if known else math.inf

    @cached_property
    def best_rate(self) -> float:
        """The learning rate with the lowest score."""
        return min(self.rates, key=self.score)

    @property
    def best(self) -> list[Member]:
        """The runs of the best learning rate."""
        return self.rates[self.best_rate]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest of a grid."""
        rates = list(self.rates)
        return len(rates) > 1 and self.best_rate in (rates[0], rates[-1])


@dataclass
class Runs:
    """Everything that a report of runs is made of."""

    folder: Path
    groups: dict[str, Group]
    plan: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def members(self) -> list[Member]:
        """All runs."""
        return [member for group in self.groups.values() for member in group.members]

    @property
    def alone(self) -> bool:
        """Whether there is one run only: nothing is chosen or compared then."""
        return len(self.members) == 1

    @property
    def problem(self) -> str:
        """What was trained."""
        if self.plan:
            return str(self.plan["problem"])
        return ", ".join(dict.fromkeys(str(m.run.header.get("problem", "?")) for m in self.members))

    @property
    def axis(self) -> str:
        """``"epoch"`` if every run has epochs, else ``"step"``."""
        return "epoch" if all("epoch" in m.progress.columns for m in self.members) else "step"

    @cached_property
    def blocks(self) -> list[str]:
        """Blocks that any run has errors of, in the order in which they come."""
        found: dict[str, None] = {}
        for member in self.members:
            for measure in ("error", "fresh", "preconditioner"):
                found |= dict.fromkeys(str(r["block"]) for r in member.rows(measure))
        return list(found)

    def best(self) -> Iterable[tuple[str, list[Member]]]:
        """Optimizers with the runs of their best learning rates."""
        return [(name, group.best) for name, group in self.groups.items()]


def gather(folder: Path) -> Runs:
    """Read every run in or below ``folder``. Raises ``RunError`` if there is none."""
    plan = load_json(folder / PLAN) or {}
    planned = {row["path"]: row for row in plan.get("runs", ())}
    groups: dict[str, list[Member]] = {}
    notes = []
    for place in sorted(p.parent for p in folder.rglob(HEADER)):
        path = place.relative_to(folder).as_posix()
        try:
            run = Run(place)
            result = load_json(place / RESULT) or {}
        except RunError as error:
            notes.append(f"{path} is left out: {error}")
            continue
        member = _member(run, path, planned.get(path), result)
        notes += [f"{path}: {text}" for text in run.problems]
        groups.setdefault(member.optimizer, []).append(member)
    if not groups:
        reason = f" {notes[0]}" if notes else ""
        raise RunError(
            f"{folder} holds no run.{reason} A run is the folder that cs.Monitor(..., path=...) or "
            "curvscope train writes."
        )
    missing = [path for path in planned if not (folder / path / HEADER).exists()]
    if missing:
        notes.append(
            f"{len(missing)} of {len(planned)} trainings have not begun: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}."
        )
    order = [str(row["optimizer"]) for row in plan.get("runs", ())]
    names = sorted(groups, key=lambda n: order.index(n) if n in order else len(order))
    return Runs(folder, {n: Group(n, groups[n]) for n in names}, plan, notes)


def _member(run: Run, path: str, row: dict[str, Any] | None, result: dict[str, Any]) -> Member:
    state, reason = str(result.get("state", "")), str(result.get("reason", ""))
    if not state:
        events = [r.get("event") for r in run.rows("monitor") if "spent" in r]
        state = str(events[-1]) if events else "unfinished"
        if row is not None and state.startswith("ended"):
            state = "unfinished"
    if row is not None:
        lr = math.nan if row["lr"] is None else float(row["lr"])
        return Member(run, path, str(row["optimizer"]), lr, int(row["seed"]), state, reason)
    options = run.fingerprint.get("options", {})
    lr = options.get("lr", math.nan)
    name = str(run.header.get("optimizer", "?"))
    if path != ".":
        name = f"{name} ({path})"
    return Member(run, path, name, float(lr), int(run.settings.get("seed", 0)), state, reason)


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


Curve = tuple[list[float], list[float], list[float], list[float]]
Values = Callable[[Member], Iterable[tuple[float, float]]]


def band(members: Iterable[Member], value: Values) -> Curve:
    """``x``, mean, least and largest value over the members that have a finite one at ``x``."""
    found: dict[float, list[float]] = {}
    for member in members:
        for x, y in value(member):
            if math.isfinite(y):
                found.setdefault(x, []).append(y)
    xs = sorted(found)
    return (
        xs,
        [sum(found[x]) / len(found[x]) for x in xs],
        [min(found[x]) for x in xs],
        [max(found[x]) for x in xs],
    )
