"""The cap on the monitor's time, with a clock that only moves when told."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import curvscope as cs
from curvscope.errors import OptionError
from curvscope.training import At, Every, PowersOfTwo, Share, taking
from curvscope.training.schedules import Timing, schedule
from tests.training.loops import OPTIMIZERS, Clock, plain_net, problem_of
from tests.training.loops import train as loops_train

pytestmark = pytest.mark.filterwarnings("ignore::curvscope.training.MonitorWarning")


class Slow(cs.training.Measure):
    """Takes some seconds of a clock and returns one row."""

    default = Every(1)
    disturbs = False

    def __init__(self, name: str, clock: Clock, seconds: float, price: float | None = None) -> None:
        self.name = name  # type: ignore[misc]
        self._clock, self.seconds = clock, seconds
        self._price = price

    def take(self, moment: Any) -> Any:
        self._clock.sleep(self.seconds)
        return [{"x": 1.0}]


def train(clock: Clock, monitor: cs.Monitor, steps: int, seconds: float = 1.0) -> list[float]:
    """Steps of that many seconds; the monitor's overhead after each."""
    overheads = []
    for _ in range(steps):
        clock.sleep(seconds)
        monitor.step(0.5)
        overheads.append(monitor.overhead)
    return overheads


def make(clock: Clock, measures: Any, path: Path | None = None, **options: Any) -> cs.Monitor:
    model = plain_net()
    return cs.Monitor(
        problem_of(model), OPTIMIZERS["SGD"](model), path, measures=measures, clock=clock, **options
    )


def test_the_cap_holds_once_a_measure_has_been_timed(tmp_path: Path) -> None:
    clock = Clock()
    with make(clock, [Slow("slow", clock, 0.3)], tmp_path / "r", budget=0.05) as monitor:
        overheads = train(clock, monitor, 400)
    taken = cs.Run(tmp_path / "r").frame("slow")["step"].tolist()
    # its price was not known at first: it pays for that before it is taken again
    assert taken[0] == 1 and taken[1] >= 1 + 0.3 / 0.05
    assert max(overheads[20:]) <= 0.05
    # and what it may take it takes: 400 * 0.05 / 0.3 = 66, less what is kept back
    assert 55 <= len(taken) <= 66
    gaps = [b - a for a, b in itertools.pairwise(taken[1:])]
    assert max(gaps) - min(gaps) <= 2


def test_what_was_left_out_is_recorded(tmp_path: Path) -> None:
    clock = Clock()
    with make(clock, [Slow("slow", clock, 0.3)], tmp_path / "r", budget=0.05) as monitor:
        train(clock, monitor, 50)
    frame = cs.Run(tmp_path / "r").frame("monitor")
    summary = frame.query("event == 'measure'").iloc[0]
    assert summary["taken"] + summary["thinned"] == 50 and summary["taken"] == 7
    assert summary["used"] == pytest.approx(7 * 0.3)
    assert frame.query("event == 'thinned'")["times"].tolist() == [1, 2, 4, 8, 16, 32]
    end = frame.query("event == 'finished'").iloc[0]
    assert end["share"] == pytest.approx(2.1 / 50) and end["seconds"] == pytest.approx(50)


def test_without_a_cap_everything_is_taken() -> None:
    clock = Clock()
    with make(clock, [Slow("slow", clock, 3.0)], budget=None) as monitor:
        train(clock, monitor, 20)
    assert len(monitor.frame("slow")) == 20 and monitor.overhead == pytest.approx(3.0)


def test_cheap_measures_do_not_starve_a_dear_one() -> None:
    clock = Clock()
    cheap = [Slow(f"cheap{k}", clock, 0.02) for k in range(4)]
    with make(clock, [*cheap, Slow("dear", clock, 1.0)], budget=0.05) as monitor:
        train(clock, monitor, 600)
    counts = {name: a.taken for name, a in monitor.budget.accounts.items()}
    # alone the cheap ones would take 4 * 0.02 > 0.05 of every second
    assert counts["dear"] >= 4
    assert min(counts[c.name] for c in cheap) >= 200
    assert monitor.overhead <= 0.05


def test_a_measure_that_can_never_be_afforded_starves_nobody() -> None:
    clock = Clock()
    dear, cheap = Slow("dear", clock, 1e4), Slow("cheap", clock, 0.04)
    with make(clock, [cheap, dear], budget=0.05) as monitor:
        monitor.budget.accounts["dear"].estimate = 1e4
        train(clock, monitor, 200)
    assert monitor.budget.accounts["dear"].taken == 0
    assert monitor.budget.accounts["cheap"].taken >= 198


def test_a_measure_that_becomes_slower_is_taken_less() -> None:
    clock = Clock()
    slow = Slow("slow", clock, 0.05)
    with make(clock, [slow], budget=0.05) as monitor:
        train(clock, monitor, 100)
        before = monitor.budget.accounts["slow"].taken
        slow.seconds = 1.0
        overheads = train(clock, monitor, 200)
    assert before >= 80
    assert monitor.budget.accounts["slow"].taken - before <= 11
    assert max(overheads[30:]) <= 0.055 and overheads[-1] <= 0.05


def test_short_trainings_do_not_pay_for_a_first_measurement(tmp_path: Path) -> None:
    """By the price of a measure in gradients it is known beforehand that it does not fit."""
    model = plain_net()
    problem = problem_of(model)
    with (
        pytest.warns(cs.training.MonitorWarning, match="Never fitted.*'error', due 20 times"),
        cs.Monitor(problem, OPTIMIZERS["Adam"](model), tmp_path / "r", every=1) as monitor,
    ):
        for _ in range(20):
            monitor.step(0.5)
    assert monitor.budget.accounts["error"].taken == 0


def _slept(clock: Clock, seconds: float, result: float) -> float:
    clock.sleep(seconds)
    return result


class Priced(Slow):
    """Knows its price in gradients."""

    disturbs = True

    def price(self, moment: Any) -> float:
        return float(self._price or 0.0)


@pytest.mark.parametrize("visit", [0.001, 0.02])
def test_visits_do_not_use_up_what_a_first_measurement_waits_for(
    visit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(taking, "gradient_seconds", lambda *_: _slept(clock, 0.03, 0.014))
    monkeypatch.setattr(taking, "check_shapes", lambda *_: clock.sleep(visit))
    measures = [Priced("dear", clock, 0.5, 35.0), Priced("less", clock, 0.014, 1.0)]
    with make(clock, measures, budget=0.05, every=10) as monitor:
        overheads = train(clock, monitor, 10_000, seconds=0.006)
    dear, less = monitor.budget.accounts["dear"], monitor.budget.accounts["less"]
    assert dear.taken >= 1 and less.taken >= 5
    assert max(overheads[2000:]) <= 0.05


def test_assured_steps_are_outside_the_budget(tmp_path: Path) -> None:
    clock = Clock()
    measures = [Slow("slow", clock, 20.0), Slow("quick", clock, 0.01)]
    options: dict[str, Any] = {"budget": 0.05, "assured": [3, 40], "every": 1}
    with make(clock, measures, tmp_path / "r", **options) as monitor:
        overheads = train(clock, monitor, 50)
    run = cs.Run(tmp_path / "r")
    assert run.frame("slow")["step"].tolist() == [1, 3, 40]  # the first to learn its price
    assert run.settings["assured"] == [3, 40]
    frame = run.frame("monitor")
    end = frame.query("event == 'finished'").iloc[0]
    assert end["outside"] == pytest.approx(2 * 20.01)
    rows = frame.query("event == 'measure'").set_index("of")
    assert rows["outside"].to_dict() == pytest.approx({"slow": 40.0, "quick": 0.02})
    assert rows["used"]["slow"] == pytest.approx(20.0)
    # nothing of it counts: the share is that of a monitor that was not asked for them
    assert overheads[2] == pytest.approx(overheads[1] * 2 / 3, rel=0.05)
    with pytest.raises(OptionError, match="whole numbers from 1"):
        make(clock, measures, assured=[0])


def test_what_was_outside_survives_a_checkpoint() -> None:
    clock = Clock()
    monitor = make(clock, [Slow("slow", clock, 2.0)], budget=0.05, assured=[2])
    train(clock, monitor, 3)
    again = make(clock, [Slow("slow", clock, 2.0)], budget=0.05, assured=[2])
    again.load_state_dict(monitor.state_dict())
    assert again.budget.outside == monitor.budget.outside == pytest.approx(2.0)
    assert again.budget.accounts["slow"].outside == pytest.approx(2.0)


def test_a_measure_of_two_steps_can_be_assured() -> None:
    model = plain_net()
    monitor = cs.Monitor(
        problem_of(model),
        OPTIMIZERS["SGD"](model),
        measures=["update", "gradient"],
        budget=1e-9,
        assured=[6],
        every=3,
    )
    loops_train(model, monitor.optimizer, 9, lambda _, loss: monitor.step(loss))
    assert monitor.frame("update")["step"].tolist() == [6]
    assert monitor.frame("gradient")["step"].tolist() == [6]
    assert 0 < monitor.budget.accounts["update"].outside <= monitor.budget.outside


def test_schedules() -> None:
    none = Timing()

    def steps(when: Any) -> list[int]:
        return [s for s in range(1, 20) if schedule(when).due(s, none)]

    assert steps(5) == [5, 10, 15] == steps(Every(5))
    assert steps(PowersOfTwo()) == [1, 2, 4, 8, 16]
    assert steps([3, 7]) == [3, 7] == steps(At({3, 7}))
    share = Share(0.02)
    assert share.due(1, Timing(used=1.0, training=100.0, estimate=0.9))
    assert not share.due(1, Timing(used=1.5, training=100.0, estimate=0.9))
    for wrong in (0, -1, True, "often", 2.5, [], [0]):
        with pytest.raises(OptionError):
            schedule(wrong)
    with pytest.raises(OptionError, match=r"Share\(2\)"):
        Share(2)


def test_a_share_of_the_time() -> None:
    clock = Clock()
    slow = Slow("slow", clock, 0.2)
    with make(clock, {slow: Share(0.02)}, budget=0.5) as monitor:
        train(clock, monitor, 200)
    assert 17 <= monitor.budget.accounts["slow"].taken <= 21
    assert monitor.overhead <= 0.021


def test_every_is_for_measures_without_a_schedule() -> None:
    model = plain_net()
    monitor = cs.Monitor(
        problem_of(model),
        OPTIMIZERS["SGD"](model),
        measures={"loss": None, "gradient": None, "update": PowersOfTwo()},
        every=7,
    )
    found = {m.name: repr(s) for m, s in monitor.measures}
    assert found == {"loss": "Every(n=1)", "gradient": "Every(n=7)", "update": "PowersOfTwo()"}


def test_what_is_named_replaces_the_default_of_that_name() -> None:
    model = plain_net()
    for measures in ({"default": None, "error": 50}, {"error": 50, "default": None}):
        monitor = cs.Monitor(problem_of(model), OPTIMIZERS["Adam"](model), measures=measures)
        chosen = {m.name: when for m, when in monitor.measures}
        assert chosen["error"] == Every(50) and chosen["gradient"] == Every(10)
    plain = cs.Monitor(problem_of(model), OPTIMIZERS["Adam"](model))
    assert chosen.keys() == {m.name for m, _ in plain.measures}


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, True])
def test_budgets_that_are_none(budget: Any) -> None:
    with pytest.raises(OptionError, match="share of training time"):
        make(Clock(), "loss", budget=budget)
