"""Alarms: each raised by its condition and by nothing less."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.errors import OptionError
from curvscope.training import (
    Above,
    Alarm,
    DampingFires,
    MonitorWarning,
    NearIdentity,
    NotFinite,
    TooSharp,
)
from curvscope.training.alarms import Watch
from tests.training.loops import OPTIMIZERS, plain_net, problem_of, train


def shown(alarm: Alarm, records: list[tuple[int, str, list[dict[str, Any]]]]) -> list[str]:
    """``"step state block: message"`` of every change."""
    watch = Watch([alarm], "K-BFGS")
    found = []
    for step, measure, rows in records:
        for state, event in watch.show(step, measure, rows):
            assert event.alarm == alarm.name and event.step == step
            found.append(f"{step} {state} {event.message}")
    return found


def damping(fires: Any, steps: int, every: int = 5) -> list[Any]:
    """Diagnostics every few steps of a block whose damping fires at the steps that are said."""
    count, records = 0, []
    for step in range(1, steps + 1):
        count += bool(fires(step))
        if step % every == 0:
            row = {"block": "3", "damped_on_inverse": 0, "damped_on_identity": count}
            records.append((step, "diagnostics", [row, {"block": "norm", "rule": "adam"}]))
    return records


def test_damping_fires() -> None:
    sentence = "K-BFGS, 3: the damping against the identity fired in"
    found = shown(DampingFires(), damping(lambda step: step % 25 != 0, 60))
    assert found == [f"55 raised {sentence} 96 % of the last 50 steps"]
    assert shown(DampingFires(), damping(lambda step: step % 5 != 0, 300)) == []
    assert shown(DampingFires(share=0.8), damping(lambda step: step % 5 != 0, 300))
    found = shown(DampingFires(), damping(lambda step: step <= 100, 300))
    assert [text.split()[:2] for text in found] == [["55", "raised"], ["115", "over"]]


def test_damping_that_fires_says_what_to_try() -> None:
    records = damping(lambda step: True, 60)
    for _, _, rows in records:
        rows[0].update(sy_ss_before=0.02, sy_ss_after=0.1)
    (found,) = shown(DampingFires(), records)
    assert "s'y/s's of 0.02 was raised to 0.1," in found
    assert found.endswith("try a third of the damping, or larger batches")


def test_damping_is_not_judged_by_a_few_steps() -> None:
    assert shown(DampingFires(), damping(lambda step: True, 50)) == []  # no count of step 0
    assert shown(DampingFires(window=10), damping(lambda step: True, 15))
    with pytest.raises(OptionError, match="a share in"):
        DampingFires(share=2)


def test_near_identity() -> None:
    def rows(far: float) -> list[dict[str, Any]]:
        return [{"block": "0", "from_identity": far}, {"block": "2", "from_identity": 0.5}]

    records = [(s, "preconditioner", rows(f)) for s, f in ((1, 0.02), (2, 0.009), (3, 0.5))]
    found = shown(NearIdentity(), records)
    assert len(found) == 2 and found[0].startswith(
        "2 raised K-BFGS, 0: the preconditioner is within 0.9 % of a multiple of the identity"
    )
    assert found[1] == "3 over K-BFGS, 0: over"
    assert shown(NearIdentity(), [(1, "preconditioner", rows(math.nan))]) == []
    (exact,) = shown(NearIdentity(), [(1, "preconditioner", rows(0.0))])
    assert ": the preconditioner is a multiple of the identity, so" in exact


@pytest.mark.parametrize(
    ("measure", "good", "bad", "words"),
    [
        ("loss", {"loss": 1.0}, {"loss": math.inf}, "the loss is inf"),
        ("gradient", {"norm": 1.0}, {"norm": math.nan}, "the gradient on the probe is nan"),
        (
            "preconditioner",
            {"block": "0", "finite": True},
            {"block": "0", "finite": False},
            "K-BFGS, 0: the curvature is not finite",
        ),
    ],
)
def test_not_finite(measure: str, good: Any, bad: Any, words: str) -> None:
    found = shown(NotFinite(), [(s, measure, [r]) for s, r in ((1, good), (2, bad), (3, bad))])
    assert len(found) == 1 and found[0].startswith("2 raised") and words in found[0]


def sharp(values: dict[int, float], **more: Any) -> list[Any]:
    return [(s, "sharpness", [{"product": v, "covered": True, **more}]) for s, v in values.items()]


def test_too_sharp() -> None:
    above = dict.fromkeys(range(5, 30, 5), 2.5)
    found = shown(TooSharp(), sharp({1: 1.0, **above}))
    what = "largest eigenvalue times learning rate"
    assert found == [f"25 raised K-BFGS: {what} is 2.5, above 2 for 20 steps"]
    assert shown(TooSharp(), sharp({**above, 15: 1.9})) == []
    assert len(shown(TooSharp(), sharp({**above, 30: 1.9}))) == 2  # and over
    assert shown(TooSharp(steps=5), sharp(above))[0].startswith("10 raised")
    # the preconditioned Hessian decides where there is one, and nothing if it is not known
    assert shown(TooSharp(), sharp(above, preconditioned_product=0.5)) == []
    assert "preconditioned" in shown(TooSharp(), sharp(above, preconditioned_product=3.0))[0]
    assert shown(TooSharp(), sharp(above, covered=False)) == []


def test_above_anything() -> None:
    def rows(value: float) -> list[dict[str, Any]]:
        return [
            {"block": b, "approximation": "it", "error": v} for b, v in (("0", value), ("2", 0))
        ]

    records = [(s, "error", rows(v)) for s, v in ((10, 0.5), (20, 1.5), (30, 1.6), (40, 0.2))]
    found = shown(Above("error", "error", 1.0), records)
    assert found == ["20 raised K-BFGS, 0: error: error is 1.5, above 1", "40 over K-BFGS, 0: over"]
    later = shown(Above("error", "error", 1.0, steps=10), records)
    assert later[0] == "30 raised K-BFGS, 0: error: error is 1.6, above 1 for 10 steps"
    assert len(shown(Above("error", "error", 0.1, below=True), records)) == 1  # block 2, from 10 on
    assert shown(Above("trace", "error", 1.0), records) == []


def test_the_state_survives_a_checkpoint() -> None:
    first = Watch([TooSharp(), DampingFires(window=10)], "K-BFGS")
    records = sharp(dict.fromkeys(range(5, 30, 5), 2.5)) + damping(lambda _: True, 15)
    for record in records[:3] + records[5:7]:
        list(first.show(*record))
    second = Watch([TooSharp(), DampingFires(window=10)], "K-BFGS")
    second.load(first.state())
    changes = [e for r in records[3:5] + records[7:] for e in second.show(*r)]
    assert [(state, event.alarm) for state, event in changes] == [
        ("raised", "too sharp"),
        ("raised", "damping fires"),
    ]


# -- in a training -----------------------------------------------------------------------------


def watch_training(name: str, model: nn.Module, steps: int, path: Path, **options: Any) -> cs.Run:
    optimizer = options.pop("optimizer", None) or OPTIMIZERS[name](model)
    options = {"budget": None, "every": 1, **options}
    with cs.Monitor(problem_of(model), optimizer, path, **options) as monitor:
        train(model, optimizer, steps, lambda _, loss: monitor.step(loss))
    return cs.Run(path)


def test_adafisher_with_a_large_damping_is_scaled_descent(tmp_path: Path) -> None:
    model = plain_net()
    optimizer = cs.optim.AdaFisher(model, lr=1e-3, damping=1e3, update_every=1)
    with pytest.warns(MonitorWarning, match="AdaFisher, 0: the preconditioner is within"):
        run = watch_training(
            "", model, 3, tmp_path / "a", optimizer=optimizer, measures="preconditioner"
        )
    assert set(run.alarms["alarm"]) == {"near the identity"}
    assert set(run.alarms["block"]) == {"0", "2"} and set(run.alarms["state"]) == {"raised"}
    model = plain_net()
    run = watch_training("AdaFisher", model, 3, tmp_path / "b", measures="preconditioner")
    assert run.alarms.empty


def test_a_learning_rate_beyond_the_limit_of_stability(tmp_path: Path) -> None:
    model = plain_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
    calls: list[cs.training.AlarmEvent] = []
    with pytest.warns(
        MonitorWarning, match=r"largest eigenvalue times learning rate is .*above 2 for"
    ):
        run = watch_training(
            "",
            model,
            12,
            tmp_path / "r",
            optimizer=optimizer,
            measures="sharpness",
            alarms=[TooSharp(steps=3)],
            on_alarm=calls.append,
        )
    frame = run.frame("sharpness")
    step = int(run.alarms["step"].iloc[0])
    window = frame[(frame["step"] <= step) & (frame["step"] >= step - 3)]
    assert (window["product"] > 2).all()
    assert calls[0].step == step and "above 2" in calls[0].message
    model = plain_net()
    run = watch_training("SGD", model, 8, tmp_path / "s", measures="sharpness")
    assert run.alarms.empty and (run.frame("sharpness")["product"] < 2).all()


def test_a_loss_that_overflows(tmp_path: Path) -> None:
    model = plain_net()
    monitor = cs.Monitor(problem_of(model), OPTIMIZERS["SGD"](model), measures="loss")
    monitor.budget.share = None
    with pytest.warns(MonitorWarning, match="SGD, loss: the loss is inf"):
        monitor.step(math.inf)
    # a loop that hands over no loss is none that diverges
    monitor = cs.Monitor(problem_of(model), OPTIMIZERS["SGD"](model), measures="loss")
    monitor.budget.share = None
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.step()


def test_no_alarms(tmp_path: Path) -> None:
    model = plain_net()
    optimizer = cs.optim.AdaFisher(model, lr=1e-3, damping=1e3, update_every=1)
    run = watch_training("", model, 2, tmp_path / "r", optimizer=optimizer, alarms=())
    assert run.alarms.empty and not run.problems


def test_a_single_number_is_no_multiple_of_the_identity(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    x = torch.randn(8, 1)
    problem = cs.Problem(model, nn.MSELoss(), (x, 2 * x))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    options = {"measures": "preconditioner", "budget": None, "every": 1}
    with cs.Monitor(problem, optimizer, tmp_path / "a", **options) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), 2 * x)
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    run = cs.Run(tmp_path / "a")
    assert len(run.rows("preconditioner")) == 3 and not len(run.alarms)
