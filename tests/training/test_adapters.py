"""The curvature read from an optimizer's state is the inverse of what it steps by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.training import curvature_of
from curvscope.training.adapters import adapter_of, preconditioner_of
from tests.training.loops import OPTIMIZERS, problem_of, train

Make = Callable[[Any], torch.optim.Optimizer]

# without momentum the step is -lr P g, so that P^-1 (step) / -lr is the gradient
DIAGONAL: dict[str, Make] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.9), eps=1e-3),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.9), amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.0, 0.99), weight_decay=0.0),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, betas=(0.0, 0.9)),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01, betas=(0.0, 0.9)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-4),
    "RMSprop, centred": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-2, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.1),
}


def net() -> nn.Module:
    torch.default_generator.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def last_step(make: Make, steps: int = 9) -> tuple[cs.Problem, Any, Tensor, Tensor]:
    """Problem, optimizer, the last step and the gradient that it was taken by, both flat."""
    model = net()
    problem, optimizer = problem_of(model, dtype=torch.float64), make(model.parameters())
    train(model, optimizer, steps - 1)
    before = cs.training.flat_parameters(problem).clone()
    from tests.training.loops import batches, data, one_step

    x, y = data()
    index = batches(steps)[-1]
    one_step(model, optimizer, x[index].double(), y[index])
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    return problem, optimizer, cs.training.flat_parameters(problem) - before, gradient


@pytest.mark.parametrize("name", DIAGONAL)
def test_the_step_is_the_gradient_by_the_inverse(name: str) -> None:
    problem, optimizer, step, gradient = last_step(DIAGONAL[name])
    op = curvature_of(optimizer, problem)
    assert op is not None and list(op.blocks) == ["0", "2"] and not op.uncovered
    scale = 0.01
    if name == "NAdam":  # with beta1 = 0 its look-ahead has the factor of momentum 0
        scale = float(
            (step @ (op.inverse() @ gradient)) / -(op.inverse() @ gradient).square().sum()
        )
        assert scale == pytest.approx(0.01, rel=1e-6)
    assert torch.allclose(op @ step / -scale, gradient, rtol=1e-9, atol=1e-12)
    P = preconditioner_of(optimizer, problem)
    assert P is not None and torch.allclose(-scale * (P @ gradient), step, rtol=1e-9, atol=1e-12)


def test_radam_has_no_curvature_while_it_does_not_adapt() -> None:
    problem, optimizer, step, gradient = last_step(
        lambda p: torch.optim.RAdam(p, lr=0.01, betas=(0.0, 0.999)), steps=2
    )
    assert curvature_of(optimizer, problem) is None
    assert torch.allclose(step, -0.01 * gradient)


def test_before_the_first_step_and_without_an_adapter() -> None:
    model = net()
    problem = problem_of(model, dtype=torch.float64)
    assert curvature_of(torch.optim.Adam(model.parameters()), problem) is None
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, sgd, 2)
    assert adapter_of(sgd) is None and curvature_of(sgd, problem) is None
    assert preconditioner_of(sgd, problem) is None
    assert curvature_of(OPTIMIZERS["K-BFGS"](net()), problem) is None


def test_parameters_are_found_by_identity_in_any_order() -> None:
    model = net()
    problem = problem_of(model, dtype=torch.float64)
    p = list(model.parameters())
    optimizer = torch.optim.Adam(
        [{"params": [p[3], p[0]]}, {"params": [p[2]], "betas": (0.9, 0.5), "eps": 0.1}]
    )
    train(model, optimizer, 3)
    op = curvature_of(optimizer, problem)
    assert op is not None and op.uncovered == ("0",)  # its bias has no optimizer
    assert "no state for 0.bias" in op.info.settings["uncovered"]["0"]
    v = optimizer.state[p[2]]["exp_avg_sq"] / (1 - 0.5**3)
    expected = torch.cat(
        [
            (v.sqrt() + 0.1).reshape(-1),
            *[(optimizer.state[p[3]]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8],
        ]
    )
    assert torch.allclose(op.blocks["2"].diagonal(), expected)


def test_subclasses_have_the_adapter_of_their_base() -> None:
    class Mine(torch.optim.AdamW):
        pass

    problem, optimizer, step, gradient = last_step(
        lambda p: Mine(p, lr=0.01, betas=(0.0, 0.9), weight_decay=0.0)
    )
    op = curvature_of(optimizer, problem)
    assert op is not None and torch.allclose(op @ step / -0.01, gradient, rtol=1e-9)
    assert op.info.what == "Mine curvature" and op.info.settings["damped"]


class Shampoo(torch.optim.Optimizer):
    """Algorithm 1 of Gupta, Koren and Singer 2018, without momentum."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for p in self.param_groups[0]["params"]:
            G, state = p.grad, self.state[p]
            if not state:
                for axis, size in enumerate(G.shape):
                    state[f"pre_cond_{axis}"] = 0.1 * torch.eye(size, dtype=p.dtype)
            update = G
            for axis in range(G.ndim):
                rows = G.movedim(axis, 0).reshape(G.shape[axis], -1)
                state[f"pre_cond_{axis}"] += rows @ rows.mT
                values, vectors = torch.linalg.eigh(state[f"pre_cond_{axis}"])
                root = (vectors * values ** (-1 / (2 * G.ndim))) @ vectors.mT
                update = torch.tensordot(update, root, ([0], [0]))  # the axis goes last
            p.sub_(self.param_groups[0]["lr"] * update)
        return loss


def test_shampoo() -> None:
    problem, optimizer, step, gradient = last_step(lambda p: Shampoo(p, lr=0.01))
    op = curvature_of(optimizer, problem)
    assert op is not None and torch.allclose(op @ step / -0.01, gradient, rtol=1e-8, atol=1e-12)


def test_shampoo_of_a_convolution(randn64: Callable[..., Tensor]) -> None:
    conv = nn.Conv2d(2, 3, 2).double()
    x, y = randn64(8, 2, 4, 4), randn64(8, 3, 3, 3, seed=1)
    problem = cs.Problem(conv, nn.MSELoss(), (x, y))
    optimizer = Shampoo(conv.parameters(), lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(conv(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    before = cs.training.flat_parameters(problem)
    optimizer.step(closure)
    step = cs.training.flat_parameters(problem) - before
    gradient = torch.cat([p.grad.reshape(-1) for p in conv.parameters() if p.grad is not None])
    op = curvature_of(optimizer, problem)
    assert op is not None and torch.allclose(op @ step / -0.01, gradient, rtol=1e-8, atol=1e-12)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdaBelief": ("AdaBelief", {"betas": (0.0, 0.9), "eps": 1e-8, "rectify": False}),
    "AdaBelief, rectified": ("AdaBelief", {"betas": (0.0, 0.9), "rectify": True}),
    "Shampoo": ("Shampoo", {"momentum": 0.0, "preconditioning_compute_steps": 1}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_those_of_pytorch_optimizer(name: str) -> None:
    other = pytest.importorskip("pytorch_optimizer")
    kind, options = OTHERS[name]
    problem, optimizer, step, gradient = last_step(
        lambda p: getattr(other, kind)(p, lr=0.01, **options), steps=9
    )
    op = curvature_of(optimizer, problem)
    assert op is not None
    found = op @ step / -0.01
    if kind == "AdaBelief":  # its belief is g - m, which is zero for beta1 = 0: m is g all the same
        assert torch.allclose(found, gradient, rtol=1e-6, atol=1e-12)
    else:
        assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("steps", [2, 9])
def test_exadam(steps: int) -> None:
    other = pytest.importorskip("pytorch_optimizer")
    problem, optimizer, step, gradient = last_step(
        lambda p: other.EXAdam(p, lr=0.01, betas=(0.8, 0.9), eps=1e-3), steps=steps
    )
    states = [optimizer.state[p] for p in problem.user_model.parameters()]
    mean = torch.cat([state["exp_avg"].reshape(-1) for state in states])
    op = curvature_of(optimizer, problem)
    assert op is not None and not op.uncovered
    moved = (mean + gradient) / (1 - 0.8**steps)
    assert torch.allclose(op @ step / -0.01, moved, rtol=1e-8, atol=1e-12)


def test_diffgrad_does_not_keep_what_its_curvature_is_made_of() -> None:
    other = pytest.importorskip("pytorch_optimizer")
    _, optimizer, _, _ = last_step(lambda p: other.DiffGrad(p, lr=0.01), steps=3)
    assert adapter_of(optimizer) is None


def test_registering_another() -> None:
    class Odd(torch.optim.SGD):
        pass

    @cs.training.register_adapter("Odd")
    def odd(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Any:
        return cs.operators.DiagonalOperator(torch.full((p.numel(),), 2.0, dtype=p.dtype))

    from curvscope.training import adapters

    try:
        model = net()
        optimizer = Odd(model.parameters(), lr=0.1, momentum=0.9)
        train(model, optimizer, 1)
        op = curvature_of(optimizer, problem_of(model, dtype=torch.float64))
        assert op is not None and torch.equal(op.diagonal(), torch.full((53,), 2.0).double())
        with cs.Monitor(problem_of(model), optimizer, measures="error", budget=None, every=1) as m:
            m.step(0.1)
        assert len(m.frame("error")) == 2
    finally:
        del adapters._ADAPTERS["Odd"]
