"""Taking measures: which are due, which there is time for, and what happens when one fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

from ..errors import OptionError, StopTraining
from ..problem import Problem
from .budget import Account, Budget
from .measures import Loss, Measure
from .moment import Moment, check_shapes, gradient_seconds, undisturbed
from .schedules import Schedule, Share, Timing

ENOUGH = 5  # failures in succession after which a measure is given up
_CHECK = 3.0  # gradients that the first look at the probe takes
_PRICING = 3.0  # gradients that finding out a price takes
_NO_TIME = Timing()

Rows = Sequence[dict[str, Any]]
_Entry = tuple[Measure, Schedule, Account, bool]  # the last: whether it has a price


class Reports(Protocol):
    """To whom a :class:`Taker` tells what happened."""

    def note(self, step: int, loss: Any) -> None:
        """The loss of a step."""

    def record(self, name: str, rows: Rows) -> None:
        """A measure was taken."""

    def thinned(self, name: str, times: int, estimate: float) -> None:
        """There was no time for a measure, the 1st, 2nd, 4th, ... time."""

    def failed(self, name: str, error: Exception, given_up: bool) -> None:
        """A measure raised an error."""


class Taker:
    """Takes the measures of one training, one :meth:`visit` per step.

    At the ``assured`` steps what is due is taken whatever the budget says.
    """

    def __init__(
        self,
        measures: Sequence[tuple[Measure, Schedule]],
        budget: Budget,
        make_moment: Callable[..., Moment],
        problem: Problem,
        probe: Problem | None,
        reports: Reports,
        assured: Container[int] = (),
    ) -> None:
        self.budget, self.problem, self.probe = budget, problem, probe
        self._make, self._reports, self._assured = make_moment, reports, assured
        self._free = False  # whether the step is an assured one
        self._measures = [
            (m, s, budget.accounts[m.name], type(m).price is not Measure.price) for m, s in measures
        ]
        blocks = (problem if probe is None else probe).blocks
        for measure, _ in measures:
            if measure.by_block:
                budget.accounts[measure.name].count = len(blocks)
        self._steady = [entry for entry in self._measures if entry[2].steady]
        self._others = [entry for entry in self._measures if not entry[2].steady]
        self._quiet_until: float = 0  # before this step none of the others is due
        self._shapes = {n: tuple(p.shape) for n, p in problem.user_model.named_parameters()}
        self._planned: dict[str, float] = {}  # measures of the next step: seconds spent already
        self._previous: Moment | None = None
        self._first: dict[tuple[str, str], float] = {}  # estimates of what was never taken
        self._preparing = 0.0  # seconds from the beginning of the last visit to its first measure
        self._at_hand = 0.0  # seconds there were for prices when a visit began, less what they took
        self.memo: dict[str, Any] = {}

    def visit(self, step: int, loss: Any, batch: Any) -> None:
        """Everything that is due after a step."""
        probe = self.problem if self.probe is None else self.probe
        for measure, when, account, _ in self._steady:
            timing = self._timing(account) if isinstance(when, Share) else _NO_TIME
            if not when.due(step, timing) or account.in_succession >= ENOUGH:
                continue
            if type(measure) is Loss:
                self._note(measure, account, step, loss)
            else:
                moment = self._make(step, loss, probe, memo=self.memo)
                if self._affordable(measure, account, moment):
                    self._take(measure, account, moment, 0.0)
        if step >= self._quiet_until:
            self._free = step in self._assured
            with self.budget.assured() if self._free else nullcontext():
                self._visit(step, loss, batch, probe)
            self._free = False
            self._quiet_until = min(
                (when.after(step) - m.needs_before for m, when, _, _ in self._others),
                default=math.inf,
            )
            if self._planned:
                self._quiet_until = 0

    def _visit(self, step: int, loss: Any, batch: Any, probe: Problem) -> None:
        self._at_hand, began = self.budget.allowance, self.budget.clock()
        planned, self._planned = self._planned, {}
        previous, self._previous = self._previous, None
        cheap: list[_Entry] = []
        dear: list[_Entry] = []
        ahead: list[_Entry] = []
        for entry in self._others:
            measure, when, account, _ = entry
            timing = self._timing(account) if isinstance(when, Share) else _NO_TIME
            if measure.needs_before:
                if measure.name in planned:
                    dear.append(entry)
                if when.due(step + 1, timing) and (
                    step + 1 in self._assured or self._conceivable(*entry)
                ):
                    ahead.append(entry)
            elif when.due(step, timing) and self._conceivable(*entry):
                (dear if measure.disturbs else cheap).append(entry)
        if not (cheap or dear or ahead):
            return
        moment = self._make(step, loss, probe, memo=self.memo, previous=previous)
        own = self.budget.clock()
        for measure, _, account, _ in cheap:
            if self._affordable(measure, account, moment):
                self._take(measure, account, moment, 0.0)
        began += self.budget.clock() - own
        if not (dear or ahead):
            return
        with undisturbed(moment.optimizer, self.problem.device):
            check_shapes(self.problem, self._shapes)
            if self.probe is None:
                moment.problem = self._current(batch)
            self._preparing = self.budget.clock() - began
            for measure, _, account, _ in sorted(dear, key=lambda e: e[2].used / e[0].weight):
                if measure.by_block and not self._unlimited(account):
                    self._take_blocks(measure, account, moment)
                elif measure.needs_before or self._affordable(measure, account, moment):
                    self._take(measure, account, moment, planned.get(measure.name, 0.0))
            for measure, _, account, _ in ahead:
                self._prepare(measure, account, moment, step + 1 in self._assured)
            if self._planned:
                _ = moment.at  # before the parameters change
                moment.previous = None
                self._previous = moment

    def _current(self, batch: Any) -> Problem:
        if batch is None:
            raise OptionError(
                'probe="current" needs the batch: monitor.step(loss, batch=(inputs, targets)).'
            )
        return self.problem.with_data([batch], check=False)

    def _note(self, measure: Measure, account: Account, step: int, loss: Any) -> None:
        start = self.budget.clock()
        estimate = account.estimate if account.taken else 0.0
        if not self.budget.allows(measure.name, estimate):
            self._thin(measure, account, estimate)
            return
        try:
            self._reports.note(step, loss)
            account.in_succession = 0
            account.taken += 1
        except StopTraining:
            account.taken += 1
            raise
        except Exception as error:
            self._fail(measure, account, error)
        finally:
            account.spend(self.budget.clock() - start)

    def _take(self, measure: Measure, account: Account, moment: Moment, spent: float) -> None:
        start = self.budget.clock()
        try:
            rows = measure.take(moment)
            account.in_succession = 0
            account.taken += 1
            account.whole += 1
            self._reports.record(measure.name, rows)
        except StopTraining:
            raise
        except Exception as error:
            self._fail(measure, account, error)
        finally:
            seconds = self.budget.clock() - start
            account.spend(spent + seconds, outside=self._free)
            if account.exempt:
                self.budget.forgive(seconds)

    def _take_blocks(self, measure: Measure, account: Account, moment: Moment) -> None:
        """As many blocks as there is time for, each of them once, in one record."""
        rows: list[dict[str, Any]] = []
        taken, failed, estimate = 0, False, math.nan
        for block in self._pieces(measure, account):
            moment.only = [block]
            estimate = self._estimate(measure, account, moment, block)
            if not self._allowed(measure, account, estimate, block):
                if account.waiting:
                    break
                continue  # too dear for a training as long as this one is yet
            start = self.budget.clock()
            try:
                rows += measure.take(moment)
                taken += 1
            except StopTraining:
                raise
            except Exception as error:
                failed = True
                self._fail(measure, account, error)
                break
            finally:
                account.spend_on(block, self.budget.clock() - start)
        moment.only = None
        if not failed and not taken:
            self._thin(measure, account, estimate)
            return
        if not failed:
            account.in_succession = 0
        if taken:
            account.taken += 1
            self._reports.record(measure.name, rows)

    def _prepare(
        self, measure: Measure, account: Account, moment: Moment, assured: bool = False
    ) -> None:
        """What a measure of the next step needs of this one."""
        if not (assured or self._affordable(measure, account, moment)):
            return
        start = self.budget.clock()
        try:
            with self.budget.assured() if assured and not self._free else nullcontext():
                measure.before(moment)
        except Exception as error:
            self._fail(measure, account, error)
            return
        self._planned[measure.name] = self.budget.clock() - start

    def _fail(self, measure: Measure, account: Account, error: Exception) -> None:
        account.failed += 1
        account.in_succession += 1
        self._reports.failed(measure.name, error, account.in_succession >= ENOUGH)

    # -- time ------------------------------------------------------------------------------------

    def _timing(self, account: Account) -> Timing:
        estimate = account.estimate if account.estimate == account.estimate else 0.0
        return Timing(account.used, self.budget.training, estimate)

    def _unlimited(self, account: Account) -> bool:
        return self._free or self.budget.share is None or account.exempt

    def _pieces(self, measure: Measure, account: Account) -> list[str]:
        """What a measure is taken in: its blocks, or ``""`` for the whole.

        Those first that were taken least, and of them the cheapest.
        """
        if not measure.by_block:
            return [""]
        probe = self.problem if self.probe is None else self.probe

        def seconds(block: str) -> float:
            known = account.expected(block)
            known = known if known == known else self._first.get((measure.name, block), 0.0)
            return known if known == known else 0.0

        return sorted(probe.blocks, key=lambda block: (account.times(block), seconds(block)))

    def _conceivable(self, measure: Measure, _: Schedule, account: Account, priced: bool) -> bool:
        """Whether there may be time for a measure, before anything is done for it."""
        budget = self.budget
        if account.in_succession >= ENOUGH:
            return False
        if self._unlimited(account):
            return True
        least = math.nan
        for piece in self._pieces(measure, account):
            least = account.expected(piece)
            if least != least:
                least = self._first.get((measure.name, piece), math.nan)
            if least == least:
                # without what preparing takes, every visit would spend what the next waits for
                ahead = self._preparing if measure.disturbs else 0.0
                may = self._allowed(measure, account, least, piece, ahead)
            else:  # what finding out takes, before anything is spent on it
                unit = self.memo.get("unit")
                wait = budget.mean_step if unit is None else _PRICING * float(unit)
                may = budget.allowance >= (wait if priced else 0.0)
                account.waiting = priced and not may  # for its price
            if may:
                return True
            if account.waiting:
                break
        return self._thin(measure, account, least)

    def _allowed(
        self,
        measure: Measure,
        account: Account,
        estimate: float,
        piece: str,
        preparing: float = 0.0,
    ) -> bool:
        first = account.times(piece) == 0
        return self.budget.allows(measure.name, estimate, first=first, preparing=preparing)

    def _affordable(self, measure: Measure, account: Account, moment: Moment) -> bool:
        if self._unlimited(account):
            return True
        estimate = self._estimate(measure, account, moment)
        allowed = self._allowed(measure, account, estimate, "")
        return allowed or self._thin(measure, account, estimate)

    def _estimate(
        self, measure: Measure, account: Account, moment: Moment, piece: str = ""
    ) -> float:
        known = account.expected(piece)
        return known if known == known else self._first_estimate(measure, moment, piece)

    def _first_estimate(self, measure: Measure, moment: Moment, piece: str) -> float:
        """Seconds of a measure that was never taken, by its price in gradients over the probe.

        NaN while that cannot be known: a gradient is timed once there is time for it. What counts
        is what there was when the visit began: a visit that asks again after its own preparations
        spends what the next one waits for, for ever.
        """
        if type(measure).price is Measure.price:
            return 0.0
        key = measure.name, piece
        if key in self._first:
            return self._first[key]
        budget = self.budget
        start = budget.clock()
        if "unit" not in self.memo:
            if self._at_hand < budget.mean_step:
                return math.nan
            self.memo["unit"] = gradient_seconds(moment.problem, budget.clock)
            self._at_hand -= budget.clock() - start
            start = budget.clock()
        unit = float(self.memo["unit"])
        if self._at_hand < _PRICING * unit:
            return math.nan
        checked = 0.0 if moment.problem._facts else _CHECK
        self._first[key] = (measure.price(moment) + checked) * unit
        self._at_hand -= budget.clock() - start
        return self._first[key]

    def _thin(self, measure: Measure, account: Account, estimate: float) -> bool:
        """Book, and now and then report, that there was no time; ``False``."""
        account.thinned += 1
        if account.thinned & (account.thinned - 1) == 0:
            self._reports.thinned(measure.name, account.thinned, estimate)
        return False
