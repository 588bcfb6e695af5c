"""What every optimizer does at the edges: refusals, layers without rows, settings as tensors."""

from __future__ import annotations

import copy
import inspect
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvscope import errors
from curvscope.optim import KBFGS, KFAC, AdaFisher, AdaHessian, base

from .every_method import METHODS, ROWS, Method, each_method, mlp, snapshot
from .kronecker_cases import flat, labels, normal, relative, seeded

X, Y = normal(8, 5), labels(8)


@each_method
@pytest.mark.parametrize("what", ["input", "loss"])
def test_a_refused_step_leaves_buffers_as_they_are_too(method: Method, what: str) -> None:
    """Running statistics of NaN would spoil the model for every evaluation to come."""
    model = mlp()
    optimizer = method.build(model)
    method.run(optimizer, model, ROWS, 2)
    before = snapshot(optimizer, model)
    x = X.clone()
    x[0, 0] = math.nan if what == "input" else 0.0
    scale = math.nan if what == "loss" else 1.0
    closure = method.closure(optimizer, model, x, Y, lambda z, t: scale * F.cross_entropy(z, t))
    with pytest.raises(errors.NonFiniteError, match="layer '0'" if what == "input" else "loss"):
        optimizer.step(closure)
    assert snapshot(optimizer, model) == before


@each_method
def test_a_refused_group_leaves_the_optimizer_as_it_is(method: Method) -> None:
    model = mlp()
    model[3].requires_grad_(False)
    optimizer = method.build(model)
    if method.name != "M-FAC":  # whose window cannot grow
        method.run(optimizer, model, ROWS, 2)
    model[3].requires_grad_(True)
    before = snapshot(optimizer, model)
    for group in (
        {"params": list(model[3].parameters()), "lr": -1.0},
        {"params": [nn.Parameter(torch.zeros(3).double())]},
        {"params": [nn.Parameter(torch.zeros(3))]},
    ):
        with pytest.raises(errors.CurvscopeError):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1 and snapshot(optimizer, model) == before
        assert list(optimizer.params) == list(optimizer.layout.names)
    optimizer.add_param_group({"params": list(model[3].parameters())})
    start = flat(model)
    method.run(optimizer, model, ROWS, 2)
    assert not torch.equal(flat(model)[-21:], start[-21:])


@each_method
@pytest.mark.parametrize("other", [torch.float32, torch.float64], ids=["single", "double"])
def test_states_of_another_precision_are_cast(method: Method, other: torch.dtype) -> None:
    """A training goes on in another precision: nearly as before, with all state in the new one."""
    here = torch.float64 if other == torch.float32 else torch.float32
    saved, model = mlp().to(other), mlp().to(here)
    first, optimizer = method.build(saved), method.build(model)
    method.run(first, saved, ROWS, 3)
    optimizer.load_state_dict(first.state_dict())
    model.load_state_dict(saved.state_dict())
    for chosen, net, dtype in ((first, saved, other), (optimizer, model, here)):
        chosen.step(method.closure(chosen, net, X.to(dtype), Y))
    torch.testing.assert_close(flat(model).double(), flat(saved).double(), rtol=0, atol=1e-3)
    always = ("SY", "YY", "gram", "coefficients")
    states = [*optimizer.state.values(), getattr(optimizer, "_window", {})]
    found = {
        v.dtype for s in states for k, v in s.items() if torch.is_tensor(v) and k not in always
    }
    assert {d for d in found if d.is_floating_point} == {here}


@pytest.mark.parametrize("name", ["K-BFGS(L)", "M-FAC"])
def test_states_of_another_memory_are_refused_before_anything_changes(name: str) -> None:
    method = next(m for m in METHODS if m.name == name)
    model = mlp()
    saved, optimizer = method.build(mlp(), memory=2), method.build(model, memory=3)
    method.run(saved, saved.model, ROWS, 3)
    method.run(optimizer, model, ROWS, 4)
    before = snapshot(optimizer, model)
    with pytest.raises(errors.OptionError, match="saved with memory=2"):
        optimizer.load_state_dict(saved.state_dict())
    part = {**optimizer.state_dict(), "curvscope": {"method": method.name}}
    with pytest.raises(errors.OptionError, match="whole state"):
        optimizer.load_state_dict(part)
    assert snapshot(optimizer, model) == before


@pytest.mark.parametrize("name", ["K-BFGS", "AdaFisher"])
def test_states_of_another_fallback_are_refused(name: str) -> None:
    """What Adam kept is nothing that SGD can go on with, and the other way round."""
    method = next(m for m in METHODS if m.name == name)
    saved = method.build(mlp(), fallback="sgd")
    method.run(saved, saved.model, ROWS, 1)
    with pytest.raises(errors.OptionError, match="fallback='sgd'"):
        method.build(mlp()).load_state_dict(saved.state_dict())
    if name == "AdaFisher":
        with pytest.raises(errors.OptionError, match="averaging='paper'"):
            method.build(mlp(), averaging="release").load_state_dict(
                method.build(mlp()).state_dict()
            )


@each_method
def test_a_batch_without_samples(method: Method) -> None:
    model = mlp()
    optimizer = method.build(model)
    method.run(optimizer, model, ROWS, 1)
    before = snapshot(optimizer, model)
    with pytest.raises(errors.NonFiniteError, match="did not take step 2"):
        optimizer.step(method.closure(optimizer, model, X[:0], Y[:0]))
    assert snapshot(optimizer, model) == before


@each_method
def test_sparse_gradients(method: Method) -> None:
    found = []
    for sparse in (False, True):
        model = seeded(
            lambda s=sparse: nn.Sequential(nn.Embedding(7, 4, sparse=s), nn.Linear(4, 3))
        )
        optimizer = method.build(model)
        for k in range(2):
            optimizer.step(method.closure(optimizer, model, labels(8, 7, seed=k), Y))
        found.append(flat(model))
    assert relative(found[1], found[0]) < 1e-12


@each_method
def test_a_layer_replaced_by_one_with_the_same_parameters(method: Method) -> None:
    """The new layer is not watched; without a word it would follow the fallback from now on."""
    model = mlp()
    optimizer = method.build(model)
    method.run(optimizer, model, ROWS, 1)
    new = nn.Linear(6, 3)
    new.weight, new.bias = model[3].weight, model[3].bias
    model[3] = new
    if not optimizer.layers:  # a method that sees parameters only
        return method.run(optimizer, model, ROWS, 1)
    with pytest.raises(errors.ModelError, match="the layer '3' was replaced"):
        method.run(optimizer, model, ROWS, 1)


@each_method
def test_a_learning_rate_may_be_a_tensor(method: Method) -> None:
    """Schedules then change it in place; the fallback follows them all the same."""
    nets = [seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 3)))] * 2
    nets = [copy.deepcopy(net) for net in nets]
    rates: list[Any] = [torch.tensor(0.015625), 0.015625]
    for net, lr in zip(nets, rates, strict=True):
        optimizer = method.build(net, lr=lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.25)
        for k in range(4):
            method.run(optimizer, net, ROWS, 1, start=k)
            schedule.step()
    assert relative(flat(nets[0]), flat(nets[1])) < 1e-12


@each_method
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_settings_may_be_numbers_of_numpy(method: Method, kind: Any) -> None:
    """As of ``np.logspace``; a state that held them would not load with ``weights_only``."""
    whole = {"update_every": 2, "inverse_every": 2, "n_probes": 2, "memory": 3, "seed": 1}
    accepted = set(inspect.signature(method.make).parameters)
    whole = {k: v for k, v in whole.items() if k in accepted}
    nets = [seeded(mlp), seeded(mlp)]
    states = []
    for net, real, integer in zip(nets, (float, kind), (int, np.int64), strict=True):
        options = {k: real(kind(v)) for k, v in method.options.items() if isinstance(v, float)}
        options |= {k: integer(v) for k, v in whole.items()}
        optimizer = method.build(net, **{**options, "lr": real(kind(0.01))})
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: kind(0.5) ** k)
        for k in range(3):
            method.run(optimizer, net, ROWS, 1, start=k)
            schedule.step()
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        states.append(torch.load(buffer, weights_only=True))
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert torch.equal(flat(nets[0]), flat(nets[1]))


class Experts(nn.Module):
    """A gate sends every sample to one of two layers, of which one may get none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 4)
        for k, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0) == bool(k)
            hidden[chosen] = expert(x[chosen])
        return self.head(hidden.tanh())


@each_method
def test_a_layer_that_gets_no_rows(method: Method) -> None:
    model = seeded(Experts)
    optimizer = method.build(model)
    for k in range(6):
        x = normal(8, 5, seed=k)
        if k % 2:
            x[:, 0] = x[:, 0].abs()
        optimizer.step(method.closure(optimizer, model, x, labels(8, seed=k)))
    assert bool(torch.isfinite(flat(model)).all())
    assert not optimizer.curvature().uncovered
    before = optimizer.factors("experts.0")
    if method.make is AdaFisher:  # what it learned before stays as it is
        optimizer.step(method.closure(optimizer, model, x, labels(8)))
        assert all(torch.equal(v, before[k]) for k, v in optimizer.factors("experts.0").items())


@pytest.mark.parametrize("steps", [0, 2])
def test_squares_that_overflow_are_refused(steps: int) -> None:
    """Inputs of 1e25 have finite losses and gradients here, but no squares in float32."""
    for method in METHODS:
        if method.name in ("AdaFisherW", "M-FAC") or method.make is KFAC:
            continue
        model = nn.Linear(5, 3)
        nn.init.zeros_(model.weight)
        own = {} if method.make is KBFGS else {"update_every": 1}
        optimizer = method.build(model, **own)
        x = X.float()
        for _ in range(steps):
            optimizer.step(method.closure(optimizer, model, x, Y))
        before = snapshot(optimizer, model)
        closure = method.closure(
            optimizer, model, 1e25 * x, Y, lambda z, t: 1e25 * F.cross_entropy(1e-25 * z, t)
        )
        with pytest.raises(errors.NonFiniteError, match=r"layer '\(root\)'"):
            optimizer.step(closure)
        assert snapshot(optimizer, model) == before


def test_labels_of_a_refused_step_are_drawn_again() -> None:
    model = mlp()
    optimizer = KFAC(model, 0.05, 0.3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        model[3].bias.grad[0] = math.inf
        return loss

    before = snapshot(optimizer, model)
    with pytest.raises(errors.NonFiniteError, match="layer '3'"):
        optimizer.step(closure)
    assert snapshot(optimizer, model) == before


@each_method
def test_copies_average_no_more_than_the_original(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(base, "choose_group", lambda model, group: asked.append(group))
    for group in (False, None):
        copy.deepcopy(method.build(mlp(), process_group=group))
    assert asked == [False, False, None, None]


# -- AdaHessian's closure -------------------------------------------------------------------------


def vmapped(model: nn.Module, x: Tensor) -> Tensor:
    params = dict(model.named_parameters())

    def one(image: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (image[None],))[0]

    return torch.func.vmap(one)(x)


def forward_mode(model: nn.Module, x: Tensor) -> Tensor:
    outputs, slope = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    return outputs + slope


def reverse_mode(model: nn.Module, x: Tensor) -> Tensor:
    return model(x) + torch.func.vjp(model, x)[1](torch.ones(len(x), 3).double())[0].mean()


def recomputed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


WAYS = [vmapped, forward_mode, reverse_mode, recomputed]


@pytest.mark.parametrize("way", WAYS, ids=[w.__name__ for w in WAYS])
def test_closures_with_transforms_and_checkpoints(way: Any) -> None:
    """They keep to torch's own derivatives, and get the same step as without our faster ones."""

    def net() -> nn.Module:
        norm = nn.GroupNorm(2, 2) if way is not recomputed else nn.BatchNorm2d(2)
        layers = [nn.Conv2d(1, 2, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)]
        return nn.Sequential(*layers)

    x = normal(8, 1, 5, 5)
    model, twin = seeded(net), seeded(net)
    optimizer, other = AdaHessian(model, seed=2), AdaHessian(twin, seed=2)
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(way(model, x), Y))
        other.zero_grad()
        other.backward(F.cross_entropy(twin(x) if way is recomputed else way(twin, x), Y))
        other.step()
    assert relative(flat(model), flat(twin)) < 1e-10
