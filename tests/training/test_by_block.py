"""Measures that are taken block by block, so that a budget has room for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.errors import OptionError
from curvscope.training import Every
from curvscope.training.curvature_measures import Error
from curvscope.training.moment import Moment
from curvscope.training.probe import AtMost, make_probe
from tests.training.loops import OPTIMIZERS, Clock, batches, data, one_step, plain_net, problem_of

pytestmark = pytest.mark.filterwarnings("ignore::curvscope.training.MonitorWarning")
SECONDS = {"0": 0.2, "2": 0.5}


class ByBlock(cs.training.Measure):
    """Takes some seconds of a clock for each block."""

    name = "blocks"
    default = Every(1)
    by_block = True

    def __init__(self, clock: Clock, seconds: dict[str, float]) -> None:
        self._clock, self._seconds = clock, seconds

    def take(self, moment: Any) -> Any:
        for block in moment.blocks:
            self._clock.sleep(self._seconds[block])
        return [{"block": block, "x": 1.0} for block in moment.blocks]


def make(clock: Clock, path: Path | None = None, **options: Any) -> cs.Monitor:
    model = plain_net()
    options = {"measures": [ByBlock(clock, SECONDS)], "budget": 0.05, "strict": True, **options}
    return cs.Monitor(problem_of(model), OPTIMIZERS["SGD"](model), path, clock=clock, **options)


def go(clock: Clock, monitor: cs.Monitor, steps: int) -> list[float]:
    overheads = []
    for _ in range(steps):
        clock.sleep(1.0)
        monitor.step(0.5)
        overheads.append(monitor.overhead)
    return overheads


def test_blocks_take_turns_within_the_budget(tmp_path: Path) -> None:
    clock = Clock()
    with make(clock, tmp_path / "r") as monitor:
        overheads = go(clock, monitor, 200)
    frame = cs.Run(tmp_path / "r").frame("blocks")
    counts = frame["block"].value_counts()
    assert counts.max() - counts.min() <= 1  # dear or cheap, each as often as the other
    # 200 * 0.05 / 0.7 rounds, less what is kept back
    assert counts.min() >= 10 and max(overheads[60:]) <= 0.05
    # a visit is one block where there is no time for two
    assert frame.groupby("step").size().max() == 1
    summary = cs.Run(tmp_path / "r").frame("monitor").query("of == 'blocks'").iloc[-1]
    assert summary["rounds"] == counts.min() and summary["taken"] == len(frame)


def test_everything_at_once_where_there_is_no_cap_or_a_step_is_assured(tmp_path: Path) -> None:
    clock = Clock()
    with make(clock, budget=None) as monitor:
        go(clock, monitor, 3)
    assert monitor.frame("blocks").groupby("step").size().tolist() == [2, 2, 2]
    assert monitor.budget.accounts["blocks"].rounds == 3
    with make(clock, budget=1e-6, assured=[2]) as monitor:
        go(clock, monitor, 5)
    frame = monitor.frame("blocks")
    assert frame[frame["step"] == 2]["block"].tolist() == ["0", "2"]


def test_a_block_that_never_fits_does_not_hold_up_the_others() -> None:
    clock = Clock()
    monitor = make(clock, measures=[ByBlock(clock, {"0": 0.2, "2": 1e4})])
    monitor.budget.accounts["blocks"].blocks["2"] = [0, 1e4]
    go(clock, monitor, 100)
    taken = monitor.budget.accounts["blocks"].blocks
    assert taken["2"][0] == 0 and taken["0"][0] >= 15


def test_the_turn_survives_a_checkpoint(tmp_path: Path) -> None:
    clock = Clock()
    with make(clock, tmp_path / "whole") as whole:
        go(clock, whole, 120)
    clock = Clock()  # the same seconds again, to the last bit
    cut = make(clock, tmp_path / "cut")
    go(clock, cut, 70)
    torch.save(cut.state_dict(), tmp_path / "state")
    cut.close()
    with make(clock, tmp_path / "cut") as again:
        again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        go(clock, again, 50)
    for a, b in zip(
        cs.Run(tmp_path / "whole").rows("blocks"),
        cs.Run(tmp_path / "cut").rows("blocks"),
        strict=True,
    ):
        assert (a["step"], a["block"]) == (b["step"], b["block"])


def test_a_block_that_fails_does_not_stop_the_turn(tmp_path: Path) -> None:
    clock = Clock()

    class Half(ByBlock):
        def take(self, moment: Any) -> Any:
            if "0" in moment.blocks:
                raise ZeroDivisionError("on purpose")
            return super().take(moment)

    with make(clock, measures=[Half(clock, SECONDS)], strict=False) as monitor:
        go(clock, monitor, 60)
    assert set(monitor.frame("blocks")["block"]) == {"2"}


@pytest.mark.parametrize("name", ["Adam", "K-BFGS"])
def test_errors_of_single_blocks_are_those_of_compare(name: str, tmp_path: Path) -> None:
    """With a cap that the clock keeps: one block at a step, by turns."""
    model, clock = plain_net().double(), Clock()
    optimizer, problem = OPTIMIZERS[name](model), problem_of(model, dtype=torch.float64)

    class Slow(cs.training.Error):
        def take(self, moment: Any) -> Any:
            clock.sleep(0.1)
            return super().take(moment)

    seen: dict[tuple[int, str], tuple[float, float]] = {}
    x, y = data()
    with cs.Monitor(
        problem, optimizer, tmp_path / "r", measures={Slow(): 1}, probe=20, clock=clock, strict=True
    ) as monitor:
        for step, index in enumerate(batches(40), 1):
            loss = one_step(model, optimizer, x.double()[index], y[index])
            clock.sleep(1.0)
            monitor.step(loss)
            op = cs.training.curvature_of(optimizer, problem)
            exact = cs.ggn(problem.subset(20, seed=0))
            found = cs.compare(exact, {"it": op}, metrics=["error", "cosine"], best_in_class=False)
            seen |= {(step, row.block): (row["error"], row["cosine"]) for row in found.rows}
    frame = cs.Run(tmp_path / "r").frame("error")
    assert set(frame["block"]) == {"0", "2"} and frame.groupby("step").size().min() == 1
    for row in frame.itertuples():
        assert (row.error, row.cosine) == pytest.approx(seen[row.step, row.block], rel=1e-10)


def test_errors_are_estimated_where_a_sample_has_many_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 101)).double()
    x = torch.randn(12, 6, dtype=torch.float64)
    problem = cs.Problem(model, nn.MSELoss(), (x, torch.randn(12, 101).double()))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    nn.functional.mse_loss(model(x), torch.zeros(12, 101).double()).backward()
    optimizer.step()

    def monitored(error: cs.training.Measure) -> Any:
        with cs.Monitor(
            problem, optimizer, measures={error: [1]}, budget=None, seed=5, strict=True
        ) as monitor:
            monitor.step(0.5)
        return monitor.frame("error").set_index("block")

    rows, exact = monitored(cs.training.Error()), monitored(cs.training.Error(method="exact"))
    op = cs.training.curvature_of(optimizer, problem)
    by_hand = cs.compare(
        cs.ggn(problem, route="autograd"),
        {"it": op},
        metrics=["error", "cosine"],
        best_in_class=False,
        blocks=["0", "2"],
        method="estimated",
        budget=8,
        seed=5,
    )
    for block in ("0", "2"):
        assert rows["error"][block] == pytest.approx(by_hand.row(block, "it")["error"], rel=1e-10)
        spread = rows["error_stderr"][block]
        assert spread > 0 and abs(rows["error"][block] - exact["error"][block]) <= 5 * spread
    assert "error_stderr" not in exact


def test_a_reference_may_be_of_some_blocks_only() -> None:
    problem = problem_of(plain_net().double(), dtype=torch.float64)
    whole = cs.ggn(problem)
    part = whole.focused(["2"])
    assert list(part.blocks) == ["2"]
    assert torch.equal(part.blocks["2"].dense(), whole.blocks["2"].dense())
    assert list(whole._blocks) == ["2"]  # the other one was not computed with it
    assert torch.allclose(cs.ggn(problem).blocks["2"].dense(), part.blocks["2"].dense(), rtol=1e-12)


def test_a_probe_is_one_batch_unless_that_is_too_large() -> None:
    x, y = torch.randn(90, 6), torch.arange(90) % 3
    parts = [(x[k : k + 30], y[k : k + 30]) for k in (0, 30, 60)]
    problem = cs.Problem(plain_net(), nn.CrossEntropyLoss(), parts)
    probe = make_probe(problem, None, 0)
    assert probe is not None and probe.n_samples == 64 and len(probe.data.items) == 1
    hand = problem.subset(64, seed=0)
    assert torch.allclose(probe.gradient(), hand.gradient(), rtol=1e-5, atol=1e-7)
    large = make_probe(problem, 80, 0)
    assert large is not None and len(large.data.items) == 3
    assert make_probe(problem, AtMost(256), 0) is problem
    with pytest.raises(OptionError, match="probe=91: the problem has 90 samples"):
        make_probe(problem, 91, 0)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=20, shuffle=True
    )
    loaded = make_probe(cs.Problem(plain_net(), nn.CrossEntropyLoss(), loader), None, 0)
    assert loaded is not None and [len(b[0]) for b in loaded.data.items] == [64]
    normed = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    apart = cs.Problem(normed, nn.CrossEntropyLoss(), parts, batchnorm="batch")
    kept = make_probe(apart, None, 0)
    assert kept is not None and len(kept.data.items) == 3  # batches are part of its definition


def test_sharpness_stops_when_it_knows_the_largest_eigenvalue() -> None:
    model = plain_net().double()
    problem, optimizer = problem_of(model, dtype=torch.float64), OPTIMIZERS["K-BFGS"](model)
    x, y = data()
    one_step(model, optimizer, x.double(), y)
    values = torch.linalg.eigvalsh(cs.hessian(problem).dense())
    P = optimizer.preconditioner().dense()
    inner = float(torch.linalg.eigvals(P @ cs.hessian(problem).dense()).real.max())
    with cs.Monitor(
        problem,
        optimizer,
        measures={cs.training.Sharpness(steps=53): [1]},
        budget=None,
        strict=True,
    ) as monitor:
        monitor.step(0.5)
    row = monitor.frame("sharpness").iloc[0]
    assert row["residual"] <= 0.01 * row["lambda_max"]
    assert float((values - row["lambda_max"]).abs().min()) <= row["residual"] + 1e-12
    assert row["lambda_max"] == pytest.approx(float(values[-1]), rel=0.01)
    assert row["preconditioned"] == pytest.approx(inner, rel=0.01)


def test_losses_wait_half_a_second_but_not_those_that_are_not_finite(tmp_path: Path) -> None:
    clock = Clock()
    monitor = make(clock, tmp_path / "r", measures=["loss"], strict=False)

    def written() -> list[int]:
        return [row["step"] for row in cs.Run(tmp_path / "r").rows("loss")]

    for _ in range(4):
        clock.sleep(0.1)
        monitor.step(1.0)
    assert written() == []
    clock.sleep(0.3)
    monitor.step(1.0)
    assert written() == [1, 2, 3, 4, 5]
    clock.sleep(0.1)
    with pytest.warns(cs.training.MonitorWarning, match="Step 6"):
        monitor.step(math.nan)
    assert written() == [1, 2, 3, 4, 5, 6]
    clock.sleep(0.1)
    monitor.step(1.0)
    monitor.log("mine", x=1.0)
    assert written() == [1, 2, 3, 4, 5, 6, 7]
    steps = [r["step"] for r in cs.Run(tmp_path / "r").rows("loss")]
    assert steps == sorted(steps)
    monitor.close()


def test_blocks_that_the_optimizer_makes_alone_are_those_of_the_whole() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    model = model.double()
    data = torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))
    problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    optimizer = cs.optim.KBFGS(model, lr=0.01, damping=0.3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(data[0]), data[1])
        loss.backward()
        return loss

    moment = Moment(0, 1.0, problem, optimizer)
    moment.only = ["2"]
    assert moment.believed() is None  # before the first step
    optimizer.step(closure)
    for damped in (True, False):
        whole = optimizer.curvature(damped=damped)
        alone = Moment(1, 1.0, problem, optimizer)
        alone.only = ["2"]
        found = alone.believed(damped=damped)
        assert found is not None and list(found.blocks) == ["2"]
        assert torch.equal(found.blocks["2"].dense(), whole.blocks["2"].dense())
        assert found.info.settings["damping"] == whole.info.settings["damping"]
    with pytest.raises(cs.errors.UnknownBlockError, match="no block 'x'"):
        optimizer.curvature(blocks=["x"])
    # each factor of 5 (4 + bias) and 5 rows is inverted for it
    assert optimizer.curvature_work("0") == 4 * (5**3 + 5**3)
    one, two = Moment(1, 1.0, problem, optimizer), Moment(1, 1.0, problem, optimizer)
    two.only = ["2"]
    assert Error().price(two) < Error().price(one)
