"""Numbers of diagnostics() against what they stand for, where groups, gates and copies meddle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope.optim import KBFGS, KFAC

from .every_method import METHODS, Method, each_method, mlp
from .kronecker_cases import closure_of, flat, labels, normal, relative, run, seeded, small

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


@each_method
def test_operators_hold_no_tensor_of_the_optimizer(method: Method) -> None:
    model = small()
    optimizer = method.build(model)
    method.run(optimizer, model, ROWS, 2)
    kept = {
        value.data_ptr()
        for state in (*optimizer.state.values(), getattr(optimizer, "_window", {}))
        for value in state.values()
        if isinstance(value, Tensor)
    }
    ops = (optimizer.curvature(), optimizer.curvature(damped=False), optimizer.preconditioner())
    held = [value for op in ops for block in op.blocks.values() for value in vars(block).values()]
    held += [value for block in optimizer.blocks for value in optimizer.factors(block).values()]
    tensors = [value for value in held if isinstance(value, Tensor)]
    assert tensors and not kept & {value.data_ptr() for value in tensors}


@each_method
@pytest.mark.parametrize("dims", [1, 2])
def test_a_sample_without_its_axis_is_a_batch_of_one(method: Method, dims: int) -> None:
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    found = []
    for single in (False, True):
        model = seeded(lambda: nn.Sequential(kind(4, 6, 3, groups=2, stride=2), nn.Tanh()))
        optimizer = method.build(model)
        for k in range(3):
            x = normal(1, 4, *[7] * dims, seed=k)
            optimizer.step(
                method.closure(
                    optimizer,
                    model,
                    x[0] if single else x,
                    labels(1),
                    lambda z, y: F.cross_entropy(z.reshape(6, -1).mean(1)[None], y),
                )
            )
        found.append((flat(model), optimizer.curvature().dense()))
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_curvature_of_factors_that_rounding_left_indefinite(dtype: torch.dtype) -> None:
    """It is read all the same: the inverse of what the factor is up to rounding."""
    model = small(dtype=dtype)
    optimizer = KBFGS(model, 0.05, 0.3)
    run(optimizer, model, 3)
    eps = torch.finfo(dtype).eps
    vectors = torch.linalg.qr(normal(6, 6, seed=3))[0]
    values = torch.tensor([-2 * eps, 0.5, 0.7, 1.0, 2.0, 3.0]).double()
    H = ((vectors * values) @ vectors.mT).to(dtype)
    optimizer.block_state("0")["H_g"][0] = (H + H.mT) / 2
    G = optimizer.curvature().blocks["0"].G.double()
    least = torch.linalg.eigvalsh(G)
    assert float(least[0]) > 0.3 and float(least[-1]) == pytest.approx(1 / (15 * eps), rel=0.1)
    assert math.isinf(optimizer.diagnostics()[0]["condition"])
    optimizer.block_state("0")["H_g"][0, 0, 0] = math.nan
    with pytest.raises(cs.errors.SingularError, match="layer '0'"):
        optimizer.curvature()


@each_method
def test_reading_leaves_the_saved_state_as_it_is(method: Method) -> None:
    model = small()
    optimizer = method.build(model)
    for _ in range(2):
        before = repr(optimizer.state_dict())
        optimizer.diagnostics(), optimizer.coverage(), optimizer.preconditioner()
        optimizer.curvature(), optimizer.curvature(damped=False)
        assert repr(optimizer.state_dict()) == before
        method.run(optimizer, model, ROWS, 2)


def test_damping_of_inverses_is_that_with_which_they_were_made() -> None:
    model = small()
    optimizer = KFAC(model, 0.05, 0.1, inverse_every=50)
    run(optimizer, model, 21)
    optimizer.param_groups[0]["damping"] = 5.0
    assert optimizer.curvature().info.settings["damping"] == 0.1
    run(optimizer, model, 1)
    assert optimizer.curvature().info.settings["damping"] == 0.1
    row = optimizer.diagnostics()[0]
    assert row["age"] == 2 and optimizer.preconditioner().blocks["0"].dense().max() > 1 / 5


def test_solve_takes_a_preconditioner_that_leaves_parameters_out() -> None:
    method = METHODS[0]
    model = mlp()
    optimizer = method.build(model)
    method.run(optimizer, model, ROWS, 4)
    problem = cs.Problem(model.eval(), nn.CrossEntropyLoss(), (normal(*ROWS), labels(7)))
    matrix, g = cs.ggn(problem), problem.gradient()
    truth = torch.linalg.solve(matrix.dense() + 0.1 * torch.eye(len(g)).double(), g)
    inverse = optimizer.preconditioner()
    assert inverse.uncovered == ("1",)
    for given in (inverse, inverse.with_uncovered("zero"), optimizer.curvature().inverse(0.1)):
        found = cs.solve(matrix, g, damping=0.1, preconditioner=given, tol=1e-10, method="cg")
        assert found.converged and relative(found.value, truth) < 1e-8


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
