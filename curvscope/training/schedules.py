"""When a measure is taken."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError, check_count


@dataclass(frozen=True)
class Timing:
    """What a schedule may know: seconds spent on this measure, of training, of the next one."""

    used: float = 0.0
    training: float = 0.0
    estimate: float = 0.0


class Schedule:
    """Base class: :meth:`due` says whether a measure is to be taken after a step (from 1)."""

    def due(self, step: int, timing: Timing) -> bool:
        """Whether to measure after ``step`` steps."""
        raise NotImplementedError

    def after(self, step: int) -> float:
        """No step between ``step`` and this one is due; the next one, where that is not known."""
        return step + 1


@dataclass(frozen=True)
class Every(Schedule):
    """Every ``n``-th step."""

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", check_count("n", self.n))

    def due(self, step: int, timing: Timing) -> bool:
        """At multiples of ``n``."""
        return step % self.n == 0

    def after(self, step: int) -> float:
        """The next multiple."""
        return step + self.n - step % self.n


@dataclass(frozen=True)
class PowersOfTwo(Schedule):
    """Steps 1, 2, 4, 8, ...: as many in the first hundred steps as in the last half."""

    def due(self, step: int, timing: Timing) -> bool:
        """At powers of two."""
        return step & (step - 1) == 0

    def after(self, step: int) -> float:
        """The next power of two."""
        return 1 << step.bit_length()


@dataclass(frozen=True, init=False)
class At(Schedule):
    """Given steps."""

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        chosen = list(steps)
        if not chosen or any(
            isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in chosen
        ):
            raise OptionError(f"At({chosen!r}): take whole numbers from 1, at least one of them.")
        object.__setattr__(self, "steps", frozenset(chosen))

    def due(self, step: int, timing: Timing) -> bool:
        """At these steps."""
        return step in self.steps

    def after(self, step: int) -> float:
        """The next one of them."""
        return min((s for s in self.steps if s > step), default=math.inf)

    def __repr__(self) -> str:
        return f"At({sorted(self.steps)})"


@dataclass(frozen=True)
class Share(Schedule):
    """As often as a share of the training time allows: ``Share(0.02)`` is two per cent."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise OptionError(f"Share({self.share!r}): take a part of the time in (0, 1].")

    def due(self, step: int, timing: Timing) -> bool:
        """As soon as the time used and that of one more measurement are within the share."""
        return timing.used + timing.estimate <= self.share * timing.training


def schedule(value: Any) -> Schedule:
    """A schedule from what users write: a number ``n``, steps, or a schedule.

    Raises ``OptionError`` for anything else.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Every(value)
    if isinstance(value, list | tuple | set | frozenset | range):
        return At(value)
    raise OptionError(
        f"{value!r} is no schedule: give n for every n-th step, a list of steps, Every(n), "
        "PowersOfTwo(), At(steps) or Share(0.02)."
    )
