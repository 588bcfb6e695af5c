"""The monitor's numbers are those that are computed by hand at the same step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import curvscope as cs
from curvscope.training.sharpness import preconditioned_sharpness
from tests.training.loops import OPTIMIZERS, plain_net, problem_of, train

pytestmark = pytest.mark.filterwarnings("ignore::curvscope.training.MonitorWarning")
STEPS = 6


def watch(
    name: str, path: Path, by_hand: Any, measures: Any, every: Any = 2, **options: Any
) -> cs.Run:
    """Train with a monitor; ``by_hand(monitor, step)`` is called after each step."""
    model = plain_net().double()
    optimizer = OPTIMIZERS[name](model)
    problem = problem_of(model, dtype=torch.float64)
    options = {"budget": None, "strict": True, "probe": 20, "seed": 3, **options}
    with cs.Monitor(problem, optimizer, path, measures=measures, every=every, **options) as monitor:

        def after(step: int, loss: Tensor) -> None:
            monitor.step(loss)
            by_hand(monitor, step)

        train(model, optimizer, STEPS, after)
    return cs.Run(path)


@pytest.mark.parametrize("reference", ["ggn", "hessian"])
@pytest.mark.parametrize("name", ["K-BFGS", "AdaFisher", "Adam"])
def test_error_is_that_of_compare(name: str, reference: str, tmp_path: Path) -> None:
    expected: dict[tuple[int, str], tuple[float, float]] = {}

    def by_hand(monitor: cs.Monitor, step: int) -> None:
        exact = getattr(cs, reference)(monitor.problem.subset(20, seed=3))
        op = (
            monitor.optimizer.curvature()
            if name != "Adam"
            else cs.training.curvature_of(monitor.optimizer, monitor.problem)
        )
        found = cs.compare(exact, {"it": op}, metrics=["error", "cosine"], best_in_class=False)
        for row in found.rows:
            expected[step, row.block] = (row["error"], row["cosine"])

    frame = watch(name, tmp_path / "r", by_hand, ["error"], reference=reference).frame("error")
    assert list(frame["step"].unique()) == [2, 4, 6]
    assert set(frame["block"]) == {"0", "2"}
    for row in frame.itertuples():
        assert (row.error, row.cosine) == pytest.approx(expected[row.step, row.block], rel=1e-12)
        assert row.approximation == name and math.isfinite(row.error)


def test_fresh_and_best_are_those_of_compare(tmp_path: Path) -> None:
    expected: dict[int, pd.DataFrame] = {}

    def by_hand(monitor: cs.Monitor, step: int) -> None:
        probe = monitor.probe
        others = {
            "K-FAC": cs.kfac(probe),
            "diagonal K-FAC": cs.diagonal_kf(probe),
            "Hutchinson diagonal": cs.hutchinson_diagonal(probe, probes=4, seed=3),
            "K-FAC optimizer": monitor.optimizer.curvature(),
        }
        expected[step] = cs.compare(cs.ggn(probe), others, metrics=["error", "cosine"]).to_frame()

    run = watch("K-FAC", tmp_path / "r", by_hand, ["fresh", "best"])
    for row in run.frame("fresh").itertuples():
        hand = expected[row.step].query(
            "block == @row.block and approximation == @row.approximation"
        )
        assert row.error == pytest.approx(hand["error"].item(), rel=1e-12)
    for row in run.frame("best").itertuples():
        hand = expected[row.step].query(
            "block == @row.block and approximation == 'K-FAC optimizer'"
        )
        for column in ("error", "best_in_class", "excess"):
            assert getattr(row, column) == pytest.approx(hand[column].item(), rel=1e-9)
        assert row.best_class == hand["best_class"].item()
        assert row.best_in_class <= row.error


def test_fresh_leaves_out_what_the_loss_does_not_have(tmp_path: Path) -> None:
    x, y = torch.randn(12, 3), torch.randn(12, 2)
    model = torch.nn.Linear(3, 2)
    loss = lambda z, t: torch.nn.functional.huber_loss(z, t)  # noqa: E731
    problem = cs.Problem(model, loss, (x, y), reduction="mean")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"measures": ["fresh"], "every": 1, "budget": None, "strict": True}
    with cs.Monitor(problem, optimizer, tmp_path / "r", **options) as monitor:
        monitor.step(problem.objective())
    found = set(cs.Run(tmp_path / "r").frame("fresh")["approximation"])
    assert found == {"diagonal K-FAC", "Hutchinson diagonal"}
    only = {**options, "measures": [cs.training.Fresh(names="K-FAC")]}
    with (
        pytest.raises(cs.errors.UnsupportedLossError, match="negative log-likelihood"),
        cs.Monitor(problem, optimizer, tmp_path / "k", **only) as monitor,
    ):
        monitor.step(problem.objective())


def test_gradient_update_and_decrease(tmp_path: Path) -> None:
    seen: dict[int, tuple[Tensor, float, Tensor, Tensor]] = {}

    def by_hand(monitor: cs.Monitor, step: int) -> None:
        probe = monitor.probe
        theta = cs.training.flat_parameters(probe).clone()
        seen[step] = (theta, probe.objective(), probe.gradient(), cs.ggn(probe).dense())

    run = watch("SGD", tmp_path / "r", by_hand, ["gradient", "update", "decrease"], every=[3, 5])
    assert run.steps == (3, 5)
    for row in run.frame("gradient").itertuples():
        assert row.objective == pytest.approx(seen[row.step][1], rel=1e-12)
        assert row.norm == pytest.approx(float(seen[row.step][2].norm()), rel=1e-12)
    for row in run.frame("update").itertuples():
        before, after = seen[row.step - 1], seen[row.step]
        s = after[0] - before[0]
        cosine = float(-s @ before[2] / (s.norm() * before[2].norm()))
        assert row.angle == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-9)
        assert row.length == pytest.approx(float(s.norm()), rel=1e-10)
        assert row.relative == pytest.approx(float(s.norm() / before[0].norm()), rel=1e-10)
    for row in run.frame("decrease").itertuples():
        before, after = seen[row.step - 1], seen[row.step]
        s = after[0] - before[0]
        predicted = float(-s @ before[2] - s @ before[3] @ s / 2)
        assert row.actual == pytest.approx(before[1] - after[1], rel=1e-9)
        assert row.predicted == pytest.approx(predicted, rel=1e-9)
        assert row.ratio == pytest.approx(row.actual / row.predicted)


def test_sharpness_trace_spectrum_and_concentration(tmp_path: Path) -> None:
    seen: dict[int, dict[str, Any]] = {}

    def by_hand(monitor: cs.Monitor, step: int) -> None:
        probe = monitor.probe
        H, G = cs.hessian(probe).dense(), cs.ggn(probe)
        P = monitor.optimizer.preconditioner().dense()
        seen[step] = {
            "top": torch.linalg.eigvalsh(H).max(),
            "inner": torch.linalg.eigvals(P @ H).real.max(),
            "trace": G.trace(),
            "values": torch.linalg.eigvalsh(G.dense()).flip(0)[:4],
            "matrix": G.blocks["0"].dense(),
            "P": monitor.optimizer.preconditioner().blocks["2"].dense(),
        }

    measures = {
        cs.training.Sharpness(steps=40, tol=0): None,
        "trace": None,
        cs.training.Spectrum(count=4, steps=53): None,
        "concentration": None,
        "preconditioner": None,
    }
    run = watch("K-BFGS", tmp_path / "r", by_hand, measures, every=3)
    for row in run.frame("sharpness").itertuples():
        hand = seen[row.step]
        assert row.lambda_max == pytest.approx(float(hand["top"]), rel=1e-2)
        assert abs(row.lambda_max - float(hand["top"])) <= row.residual + 1e-9
        assert row.preconditioned == pytest.approx(float(hand["inner"]), rel=1e-6)
        assert row.product == pytest.approx(row.lambda_max * 0.05)
    traces = run.frame("trace").query("block == '(all)'")
    for step, trace in zip(traces["step"], traces["trace"]):
        assert trace == pytest.approx(seen[step]["trace"], rel=1e-10)
    for step, tensors in run.spectra().items():
        values, residuals = tensors["eigenvalues"], tensors["residuals"]
        assert bool(((values - seen[step]["values"]).abs() <= residuals + 1e-9).all())
    assert set(run.spectra()) == {3, 6}
    shares = run.frame("concentration").query("block == '0' and approximation == 'GGN'")
    for step, share, null in zip(shares["step"], shares["share"], shares["null_share"]):
        M = seen[step]["matrix"]
        energy, d = float(M.square().sum()), len(M)
        assert share == pytest.approx(float(M.diagonal().square().sum()) / energy, rel=1e-9)
        trace = float(M.trace())
        assert null == pytest.approx((trace**2 + 2 * energy) / (d + 2) / energy, rel=1e-9)
    facts = run.frame("preconditioner").query("block == '2'")
    for step, far in zip(facts["step"], facts["from_identity"]):
        P = seen[step]["P"]
        nearest = torch.eye(len(P)) * P.trace() / len(P)
        assert far == pytest.approx(float((P - nearest).norm() / P.norm()), rel=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_sharpness_with_several_learning_rates(kind: Any) -> None:
    """A large rate of flat directions is no reason to fear for the steep ones."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    model = model.double()
    data = 10 * torch.randn(12, 3).double(), torch.randn(12, 2).double()
    problem = cs.Problem(model, torch.nn.MSELoss(), data)
    rates = {"0.weight": 1e-4, "0.bias": 1e-3, "2.weight": 0.05, "2.bias": 0.2}
    groups = [{"params": [model.get_parameter(n)], "lr": lr} for n, lr in rates.items()]
    optimizer = kind(groups, lr=0.1)
    measure = cs.training.Sharpness(steps=40, tol=0)
    with cs.Monitor(
        problem, optimizer, every=1, budget=None, measures=[measure], probe="all"
    ) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(data[0]), data[1])
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    row = monitor.frame("sharpness").iloc[-1]
    H = cs.hessian(problem).dense()
    lr = torch.cat([torch.full_like(model.get_parameter(n), r).flatten() for n, r in rates.items()])
    truth = torch.linalg.eigvals(lr.detach().diag() @ H).real.max()
    assert row["product"] == pytest.approx(float(truth), rel=1e-6)
    assert row["lr"] == 0.2 and row["lambda_max"] * row["lr"] > 1.1 * row["product"]
    if kind is torch.optim.RMSprop:
        moments = [optimizer.state[model.get_parameter(n)]["square_avg"].flatten() for n in rates]
        steps = lr.detach() / (torch.cat(moments).sqrt() + 1e-8)
        truth = torch.linalg.eigvals(steps.diag() @ H).real.max()
        assert row["preconditioned_product"] == pytest.approx(float(truth), rel=1e-6)


def test_densities_are_those_of_cs_density(tmp_path: Path) -> None:
    seen: dict[int, Any] = {}

    def by_hand(monitor: cs.Monitor, step: int) -> None:
        seen[step] = cs.density(cs.ggn(monitor.probe), probes=3, steps=12, points=60, seed=3)

    measure = cs.training.Density(probes=3, steps=12, points=60)
    run = watch("Adam", tmp_path / "r", by_hand, {measure: None}, every=3)
    rows = {row["step"]: row for row in run.rows("density")}
    assert list(rows) == [3, 6]
    for step, row in rows.items():
        tensors, hand = run.tensors(row), seen[step]
        assert torch.allclose(tensors["grid"], hand.grid.float(), rtol=1e-5, atol=1e-6)
        assert torch.allclose(tensors["density"], hand.density.float(), rtol=1e-4, atol=1e-4)
        assert row["mean"] == pytest.approx(float(hand.moments[0]), rel=1e-8)
        assert row["largest"] == pytest.approx(float(hand.nodes[hand.weights > 0].max()))
    steps, grid, densities = run.densities(points=300)
    assert steps == [3, 6] and densities.shape == (2, 300)
    whole = torch.trapezoid(densities, grid)  # every density has the integral one
    assert torch.allclose(whole, torch.ones(2, dtype=torch.float64), atol=0.05)
    cs.plot.plot_density_over_steps(steps, grid, densities)
    with pytest.raises(cs.errors.OptionError, match="no densities"):
        watch("Adam", tmp_path / "none", lambda *_: None, ["loss"]).densities()


def test_staleness_compares_old_with_fresh_factors(tmp_path: Path) -> None:
    expected: dict[int, float] = {}

    def by_hand(monitor: cs.Monitor, step: int) -> None:
        fresh = cs.kfac(monitor.probe)
        raw = monitor.optimizer.curvature(damped=False)
        found = cs.compare(fresh, {"it": raw}, metrics=["error"], blocks=["0"])
        expected[step] = found.row("0", "it").error

    frame = watch("K-FAC", tmp_path / "r", by_hand, ["staleness"]).frame("staleness")
    rows = frame.query("block == '0'")
    assert rows["error"].tolist() == pytest.approx([expected[s] for s in rows["step"]], rel=1e-10)
    assert set(rows["fresh"]) == {"K-FAC"} and rows["age"].notna().all()


def test_noise_and_diagnostics(tmp_path: Path) -> None:
    expected: dict[int, Any] = {}

    def by_hand(monitor: cs.Monitor, step: int) -> None:
        rows = monitor.optimizer.diagnostics(eigenvalues=False)
        expected[step] = cs.gradient_noise(monitor.probe), rows

    run = watch("K-BFGS", tmp_path / "r", by_hand, ["noise", "diagnostics"])
    for row in run.frame("noise").itertuples():
        assert row.noise_scale == pytest.approx(expected[row.step][0].noise_scale, rel=1e-10)
    for row in run.frame("diagnostics").itertuples():
        hand = next(r for r in expected[row.step][1] if r["block"] == row.block)
        assert row.damped_on_identity == hand["damped_on_identity"]
        assert row.update_norm == pytest.approx(hand["update_norm"])


def test_probes(tmp_path: Path) -> None:
    model = plain_net()
    problem = problem_of(model)
    optimizer = OPTIMIZERS["SGD"](model)
    same = cs.Monitor(problem, optimizer, probe=7, seed=4).probe
    assert same is not None
    hand = problem.subset(7, seed=4)
    assert torch.equal(same.gradient(), hand.gradient())
    assert cs.Monitor(problem, optimizer).probe is problem  # fewer than 64 samples
    assert cs.Monitor(problem, optimizer, probe="all").probe is problem
    assert cs.Monitor(problem, optimizer, probe=hand).probe is hand
    with pytest.raises(cs.errors.OptionError, match="32 samples"):
        cs.Monitor(problem, optimizer, probe=33)
    with pytest.raises(cs.errors.OptionError, match="'current'"):
        cs.Monitor(problem, optimizer, probe="curent")
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*problem.data.items[0]), batch_size=5, shuffle=True
    )
    state = torch.get_rng_state()
    probe = cs.Monitor(cs.Problem(model, problem.user_loss, loader), optimizer, probe=12).probe
    assert probe is not None and probe.n_samples == 12
    assert torch.equal(state, torch.get_rng_state())


def test_the_current_batch_as_probe(tmp_path: Path) -> None:
    model = plain_net()
    problem, optimizer = problem_of(model), OPTIMIZERS["SGD"](model)
    x, y = problem.data.items[0]
    with cs.Monitor(
        problem, optimizer, tmp_path / "r", probe="current", every=1, measures="gradient"
    ) as monitor:
        monitor.budget.share = None
        for part in (slice(0, 4), slice(4, 12)):
            batch = x[part], y[part]
            monitor.step(1.0, batch=batch)
            expected = problem.with_data([batch]).gradient().norm()
            norm = monitor.frame("gradient")["norm"].iloc[-1]
            assert norm == pytest.approx(float(expected), rel=1e-5)
        with pytest.warns(cs.training.MonitorWarning, match="needs the batch"):
            monitor.step(1.0)


def test_lanczos_in_the_inner_product_of_the_preconditioner(randn64: Any) -> None:
    H, root = randn64(30, 30), randn64(30, 30, seed=1)
    H = H + H.mT
    P = cs.operators.DenseOperator(root @ root.mT + 0.1 * torch.eye(30, dtype=torch.float64))
    exact = float(torch.linalg.eigvals(P.dense() @ H).real.max())
    full = preconditioned_sharpness(lambda v: H @ v, P, steps=30)
    assert full == pytest.approx(exact, rel=1e-9)
    assert preconditioned_sharpness(lambda v: H @ v, P, steps=8) <= exact * (1 + 1e-12)
