"""The monitor's time as a share of the training's: what may be measured now, and what was not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import OptionError

_MARGIN = 1.2  # measurements do not all take the same time
_INSIDE = 0.9  # of the budget; the step after a measurement finds its caches cold
_RESERVE = 0.005  # seconds, for ending the run
_STEADY = 0.4  # of the budget, for all measures that are taken at every step
_FOR_ALL = 0.25  # of what is left, for a measure's first time though another one waits
_WARM = 0.75  # of the first measurement of a block, which prepares what later ones find ready
_GUESS = 1.3  # the price of a first measurement is not known any better


@dataclass
class Account:
    """One measure: seconds used, how often it was taken, thinned out and failed.

    ``steady``: cheap and taken at every step; see :class:`Budget`. ``exempt``: not of the budget.
    ``outside``: seconds that were not the budget's, at assured steps. ``blocks``: of a measure
    taken by block, how often each was taken and the seconds that it is expected to take; ``count``
    is how many there are, ``whole`` how often all were taken at once.
    """

    weight: float = 1.0
    steady: bool = False
    exempt: bool = False
    used: float = 0.0
    outside: float = 0.0
    taken: int = 0
    thinned: int = 0
    failed: int = 0
    in_succession: int = 0  # failures since the last success
    estimate: float = math.nan
    waiting: bool = False  # was due, and could not be afforded
    blocks: dict[str, list[float]] = field(default_factory=dict)
    count: int = 0
    whole: int = 0

    def spend(self, seconds: float, *, outside: bool = False) -> None:
        """Book one measurement, ``outside`` the budget or within."""
        if outside:
            self.outside += seconds
        else:
            self.used += seconds
        if self.steady:
            self.estimate = self.used / max(1, self.taken + self.failed)
            return
        self.estimate = _expected(self.estimate, seconds)

    def spend_on(self, block: str, seconds: float) -> None:
        """Book the measurement of one block, within the budget."""
        self.spend(seconds)
        times, old = self.blocks.get(block, (0, math.nan))
        expected = _expected(old, seconds) if times else _WARM * seconds
        self.blocks[block] = [times + 1, expected]

    def times(self, block: str) -> float:
        """How often a block was measured; ``""`` is the measure as a whole."""
        return self.blocks.get(block, (0,))[0] if block else self.taken

    def expected(self, block: str) -> float:
        """Seconds of the next measurement of a block, NaN if not known; ``""`` is the whole."""
        return self.blocks.get(block, (0, math.nan))[1] if block else self.estimate

    @property
    def rounds(self) -> int:
        """How often every block was measured."""
        complete = len(self.blocks) >= self.count
        return self.whole + int(min((n for n, _ in self.blocks.values()), default=0) * complete)


def _expected(old: float, seconds: float) -> float:
    # a measurement that takes longer counts at once, one that takes less by and by
    return seconds if not old < math.inf else max(seconds, (old + seconds) / 2)


class Budget:
    """Keeps ``monitor seconds <= share * training seconds`` by saying no.

    Training is all time between leaving the monitor and entering it again; the monitor's is all
    inside, whatever it does. A measurement is allowed if what it took before, with a margin, still
    fits. While a measure waits that has used less than its part of the budget (by weight), others
    may not go beyond theirs, but for their first time: cheap measures do not starve a dear one, nor
    it them. Steady measures have a part of
    the budget to themselves and look at nothing else, so that a training's losses are there from
    its first steps on, whatever the monitor's beginning took. ``share=None`` allows all.
    """

    def __init__(self, share: float | None, clock: Callable[[], float]) -> None:
        if share is not None and (isinstance(share, bool) or not 0 < share <= 1):
            raise OptionError(
                f"budget={share!r}: give the share of training time in (0, 1], or None for no cap."
            )
        self.share = share
        self.clock = clock
        self.training = self.spent = self.outside = 0.0
        self.accounts: dict[str, Account] = {}
        self.steps = 0
        self._weights = 0.0
        self._left: float | None = None
        self._entered: float | None = None

    def enter(self, *, step: bool = True) -> None:
        """The monitor begins to work, after a step of the training or otherwise."""
        now = self.clock()
        if self._left is not None:
            self.training += now - self._left
            self.steps += step
        self._entered, self._left = now, None

    def leave(self) -> None:
        """The monitor ends; training goes on."""
        now = self.clock()
        if self._entered is not None:
            self.spent += now - self._entered
        self._left, self._entered = now, None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What happens inside is neither training nor the monitor's: testing, a checkpoint."""
        start = self.clock()
        try:
            yield
        finally:
            if self._left is not None:
                self._left += self.clock() - start

    def forgive(self, seconds: float) -> None:
        """Seconds of an exempt measure, which are not the monitor's."""
        self.spent -= seconds

    @contextmanager
    def assured(self) -> Iterator[None]:
        """What happens inside is the monitor's, but not the budget's: it counts as ``outside``."""
        start, before = self.clock(), self.spent
        try:
            yield
        finally:
            # but for what was forgiven inside, which is nobody's
            seconds = self.clock() - start + (self.spent - before)
            self.outside += seconds
            self.forgive(seconds)

    @property
    def mean_step(self) -> float:
        """Seconds of training per visit so far."""
        return self.training / max(1, self.steps)

    @property
    def total(self) -> float:
        """Seconds of the monitor so far, the current visit included."""
        running = 0.0 if self._entered is None else self.clock() - self._entered
        return self.spent + running

    @property
    def overhead(self) -> float:
        """Seconds of the monitor over those of training."""
        return self.total / self.training if self.training else 0.0

    @property
    def allowance(self) -> float:
        """Seconds that may be spent now."""
        if self.share is None:
            return math.inf
        return _INSIDE * self.share * self.training - self.total - _RESERVE

    def allows(
        self, name: str, estimate: float, *, first: bool = False, preparing: float = 0.0
    ) -> bool:
        """Whether a measurement of ``estimate`` seconds may begin; remembers those that wait.

        ``preparing`` are the seconds that pass before it begins.
        """
        account = self.accounts[name]
        if self.share is None or account.exempt:
            return True
        needed = estimate * (_GUESS if first else _MARGIN) + preparing
        account.waiting = False
        if account.steady:
            return account.used + needed <= _STEADY * self.share * self.training
        if not needed <= self.allowance:
            # worth saving for if it will fit before the training is twice as long
            soon = not needed > 2 * self.share * self.training
            account.waiting = soon and account.used < self._part(account)
            return False
        if account.taken == 0 and needed <= _FOR_ALL * self.allowance:
            return True
        others = (a for a in self.accounts.values() if a is not account)
        if any(a.waiting and a.used < self._part(a) for a in others):
            return account.used + needed <= self._part(account)
        return True

    def _part(self, account: Account) -> float:
        # what no measure is booked for (preparing a visit, writing) is shared by none of them
        booked = sum(a.used for a in self.accounts.values() if not (a.steady or a.exempt))
        left = _INSIDE * (self.share or 0.0) * self.training - max(0.0, self.total - booked)
        return left * account.weight / (self._weights or 1.0)

    def open(self, names: Iterable[tuple[str, float, bool]]) -> None:
        """Accounts of the measures: name, weight, whether they are steady."""
        self.accounts = {name: Account(weight, steady) for name, weight, steady in names}
        self._weights = sum(a.weight for a in self.accounts.values() if not a.steady)

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {
            "training": self.training,
            "spent": self.spent,
            "outside": self.outside,
            "accounts": {name: asdict(a) for name, a in self.accounts.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.training, self.spent = float(state["training"]), float(state["spent"])
        self.outside = float(state.get("outside", 0.0))
        for name, values in state["accounts"].items():
            for key, value in values.items() if name in self.accounts else ():
                # null in JSON is NaN; in place, for those who hold the account
                if key not in ("weight", "steady", "exempt", "count") and value is not None:
                    setattr(self.accounts[name], key, value)
