"""Numbers of diagnostics() against what they stand for, where groups, gates and copies meddle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope.optim import KBFGS, KFAC

from .every_method import METHODS, Method, each_method
from .kronecker_cases import closure_of, flat, labels, normal, run, seeded, small

ROWS = (7, 5)
kronecker = pytest.mark.parametrize(
    "build",
    [
        lambda model: KBFGS(model, 0.05, 0.3),
        lambda model: KBFGS(model, 0.05, 0.3, memory=2),
        lambda model: KFAC(model, 0.05, 0.1, fisher="exact", split="trace"),
    ],
    ids=["K-BFGS", "K-BFGS(L)", "K-FAC"],
)


def grouped() -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3, groups=2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
        )
    )


@kronecker
def test_condition_of_a_convolution_with_groups(build: Any) -> None:
    """An eigenvalue of a group is a product of two of the same group's factors."""
    model = grouped()
    optimizer = build(model)
    for k in range(3):
        x = normal(6, 4, 7, seed=k) * torch.tensor([3.0, 3.0, 0.2, 0.2]).double()[:, None]
        optimizer.step(closure_of(optimizer, model, x, labels(6, seed=k)))
    row = optimizer.diagnostics()[0]
    values = optimizer.preconditioner().blocks["0"].dense().double()
    values = torch.linalg.eigvalsh(values)
    assert row["condition"] == pytest.approx(float(values[-1] / values[0]), rel=1e-9)
    extremes = row["H_g_max"] * row["H_a_max"] / (row["H_g_min"] * row["H_a_min"])
    assert extremes > 1.01 * row["condition"]  # those of all groups together say more


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.side(h)) if self.on else h)


@pytest.mark.parametrize("method", METHODS[:-1], ids=[m.name for m in METHODS[:-1]])
def test_a_layer_that_did_not_run_gets_older_and_has_no_last_step(method: Method) -> None:
    """All but M-FAC, whose one matrix holds zero gradients of such a layer."""
    model = seeded(Gated)
    options = {"update_every": 1} if method.name.startswith("Ada") else {}
    optimizer = method.build(model, **options)
    method.run(optimizer, model, ROWS, 2)
    model.on = False
    method.run(optimizer, model, ROWS, 3, start=2)
    rows = {row["block"]: row for row in optimizer.diagnostics()}
    assert rows["side"]["age"] == 3 and rows["first"]["age"] == 0
    if method.name.startswith("K-"):
        assert "angle" in rows["first"] and "angle" not in rows["side"]
        assert "secant_residual" not in rows["side"]


@each_method
def test_diagnostics_after_loading_are_not_those_of_the_steps_before(method: Method) -> None:
    def trained(start: int) -> Any:
        model = small()
        optimizer = method.build(model)
        method.run(optimizer, model, ROWS, 3, start=start)
        return optimizer

    saved, other = trained(0), trained(9)
    other.load_state_dict(saved.state_dict())
    for ours, theirs in zip(other.diagnostics(), saved.diagnostics(), strict=True):
        assert all(theirs[key] == value for key, value in ours.items())


@pytest.mark.parametrize("lrs", [(1e-6, 1.0), (1.0, 1e-6)], ids=str)
def test_max_update_norm_heeds_every_learning_rate(lrs: tuple[float, float]) -> None:
    model = small()
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "lr": lrs[0]}, {"params": biases, "lr": lrs[1]}]
    optimizer = KBFGS(model, 0.1, 0.1, max_update_norm=1e-3, params=groups)
    start = flat(model)
    run(optimizer, model, 1)
    assert float((flat(model) - start).norm()) == pytest.approx(1e-3)


def test_max_update_norm_takes_no_step_that_is_infinite() -> None:
    model = seeded(lambda: nn.Linear(5, 3, bias=False), dtype=torch.float32)
    optimizer = KBFGS(model, 0.05, 1e-16, max_update_norm=1.0)
    x, start = normal(*ROWS, dtype=torch.float32) * 1e-4, flat(model)
    loss = optimizer.step(
        closure_of(optimizer, model, x, labels(7), lambda z, y: F.cross_entropy(z, y) * 1e38)
    )
    assert loss is not None and math.isfinite(float(loss))
    assert torch.equal(flat(model), start)
    assert optimizer.diagnostics()[0]["update_norm"] == 0
