"""Optimizers in the training code of others: schedules, settings that change, compiled models."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from curvscope import errors
from curvscope.optim import KBFGS, AdaHessian

from .every_method import METHODS, ROWS, Method, each_method, mlp, snapshot
from .kronecker_cases import labels, normal, seeded


def normalised() -> nn.Sequential:
    """A LayerNorm, which most methods leave to their fallback."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    )


@each_method
def test_a_learning_rate_of_zero_keeps_what_the_fallback_moves(method: Method) -> None:
    model = normalised()
    before = copy.deepcopy(model[1])
    rest = [p for k in (0, 3) for p in model[k].parameters()]
    groups = [{"params": rest}, {"params": model[1].parameters(), "lr": 0.0}]
    optimizer = method.build(model, params=groups)
    method.run(optimizer, model, ROWS, 2)
    assert all(torch.equal(p, q) for p, q in zip(model[1].parameters(), before.parameters()))
    optimizer.param_groups[1]["lr"] = 0.01  # as a schedule that warms up from 0
    method.run(optimizer, model, ROWS, 2)
    assert not any(torch.equal(p, q) for p, q in zip(model[1].parameters(), before.parameters()))


@each_method
def test_one_cycle_replaces_the_learning_rate_of_the_fallback_too(method: Method) -> None:
    """What ``lr`` was before has no effect: the scheduler sets it from its ``max_lr``."""
    models = []
    for lr in (1e-5, 0.1):
        model = normalised()
        optimizer = method.build(model, lr=lr)
        scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=5, cycle_momentum=False)
        for k in range(4):
            method.run(optimizer, model, ROWS, 1, start=k)
            scheduler.step()
        models.append(model)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@each_method
@pytest.mark.parametrize(
    "name, value",
    [("lr", math.nan), ("lr", -0.1), ("lr", None), ("weight_decay", math.inf)],
    ids=["nan", "negative", "none", "infinite decay"],
)
def test_settings_that_have_become_invalid_are_refused(
    method: Method, name: str, value: float | None
) -> None:
    """A schedule that divides by zero would otherwise turn parameters and state to NaN."""
    model = mlp()
    optimizer = method.build(model)
    method.run(optimizer, model, ROWS, 1)
    good = optimizer.param_groups[0][name]
    before = snapshot(optimizer, model)
    optimizer.param_groups[0][name] = value
    with pytest.raises(errors.OptionError, match=f"{name}="):
        method.run(optimizer, model, ROWS, 1)
    optimizer.param_groups[0][name] = good
    assert snapshot(optimizer, model) == before


def test_own_settings_that_have_become_invalid_are_refused() -> None:
    model = mlp()
    method = METHODS[0]
    optimizer = method.build(model)
    for name, value in (("momentum", 1.0), ("damping", 0.0)):
        good, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], value
        with pytest.raises(errors.OptionError, match=f"{name}={value}"):
            method.run(optimizer, model, ROWS, 1)
        optimizer.param_groups[0][name] = good


@each_method
def test_settings_may_be_arrays_of_one_number(method: Method) -> None:
    """As ``np.where`` and ``np.asarray`` return them."""
    model = mlp()
    optimizer = method.build(model, lr=np.asarray(0.01))
    optimizer.param_groups[0]["lr"] = np.asarray(0.02)
    method.run(optimizer, model, ROWS, 2)
    assert type(optimizer.state_dict()["param_groups"][0]["lr"]) is float


def test_what_a_frozen_layer_needs_is_told() -> None:
    model = mlp()
    optimizer = KBFGS(model, 0.1, 0.3)
    model[3].requires_grad_(False)
    with pytest.raises(errors.ModelError, match=r"'3.weight' was frozen. Thaw it; .* lr=0") as told:
        METHODS[0].run(optimizer, model, ROWS, 1)
    assert "load_state_dict" not in str(told.value)  # a state with more parameters does not load


@pytest.mark.parametrize("method", METHODS[::2], ids=[m.name for m in METHODS[::2]])
def test_compiled_models_are_trained_as_they_are(method: Method) -> None:
    """The compiler leaves hooks alone; once it compiled them anew for every layer."""
    torch._dynamo.reset()
    plain, inner = mlp(), mlp()
    model = torch.compile(inner, backend="eager")
    optimizers = [method.build(plain), method.build(model)]
    x, y = normal(8, 5), labels(8)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(3):
            optimizers[0].step(method.closure(optimizers[0], plain, x, y))
            optimizers[1].step(method.closure(optimizers[1], model, x, y))
            with torch.no_grad():  # validation between steps
                model(x)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), inner.parameters()))
    assert optimizers[0].coverage() == optimizers[1].coverage()


@each_method
def test_a_compiled_training_step_leaves_that_of_the_optimizer_alone(method: Method) -> None:
    torch._dynamo.reset()
    plain, model = mlp(), mlp()
    optimizer, other = method.build(plain), method.build(model)

    @torch.compile(backend="eager")
    def train(x: Tensor, y: Tensor) -> Tensor:
        return other.step(method.closure(other, model, x, y))

    for k in range(2):
        x, y = normal(8, 5, seed=k), labels(8, seed=k)
        optimizer.step(method.closure(optimizer, plain, x, y))
        train(x, y)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters()))


def test_products_with_the_hessian_of_a_compiled_model() -> None:
    """Compiled code has no second derivative, so that the closure runs without it."""
    torch._dynamo.reset()
    plain, inner = mlp(), mlp()
    model = torch.compile(inner, backend="aot_eager")
    x, y = normal(8, 5), labels(8)
    for net, under in ((plain, plain), (model, inner)):
        optimizer = AdaHessian(under, lr=0.02)
        for _ in range(2):
            optimizer.step(lambda net=net: F.cross_entropy(net(x), y))  # type: ignore[misc]
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), inner.parameters()))
    with pytest.raises(errors.UnsupportedLayerError, match="compiled model under"):
        optimizer.backward(F.cross_entropy(model(x), y))


@each_method
def test_the_default_device_is_no_concern_of_the_optimizer(method: Method) -> None:
    """Training, reading and copying go by the device of the parameters."""
    plain, model = mlp(), mlp()
    optimizer, other = method.build(plain), method.build(model)
    x, y = normal(8, 5), labels(8)
    for each, net in ((optimizer, plain), (other, model)):
        if each is other:
            torch.set_default_device("meta")
        try:
            for _ in range(2):
                each.step(method.closure(each, net, x, y))
            each.diagnostics()
            each.load_state_dict(each.state_dict())
            assert each.curvature().device == torch.device("cpu")
        finally:
            torch.set_default_device(None)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters()))
