"""What all optimizers that watch layers have in common, on K-BFGS and K-FAC."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope import errors
from curvscope.optim import KBFGS, KFAC

from .kronecker_cases import (
    closure_of,
    every_method,
    flat,
    hooks_of,
    labels,
    mixed,
    normal,
    relative,
    run,
    seeded,
    small,
)

# -- saving ----------------------------------------------------------------------------------------


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_method
@pytest.mark.parametrize("done", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_state_continues_bit_for_bit(make: Any, done: int, dtype: torch.dtype) -> None:
    def steps(optimizer: Any, model: nn.Module, start: int, stop: int) -> None:
        for k in range(start, stop):
            torch.manual_seed(k)
            x, y = normal(8, 5, seed=k, dtype=dtype), labels(8, seed=k)
            optimizer.step(closure_of(optimizer, model, x, y))

    model = mixed(dtype=dtype)
    optimizer = make(model, 0.1, 0.3)
    steps(optimizer, model, 0, done)
    saved, weights = reloaded(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    steps(optimizer, model, done, done + 3)

    other = mixed(seed=1, dtype=dtype)
    continued = make(other, 0.5, 0.1)
    other.load_state_dict(weights)
    continued.load_state_dict(saved)
    assert continued.steps == done and continued.param_groups[0]["lr"] == 0.1
    steps(continued, other, done, done + 3)
    assert torch.equal(flat(other), flat(model))
    for block in optimizer.layers:
        mine, theirs = optimizer.block_state(block), continued.block_state(block)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if isinstance(value, Tensor):
                assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key


def test_a_warm_start_is_saved() -> None:
    model = small()
    optimizer = KBFGS(model, 0.1, 0.3)
    optimizer.warm_start([normal(4, 5)])
    twin, other = small(), small()
    warm, cold = KBFGS(twin, 0.1, 0.3), KBFGS(other, 0.1, 0.3)
    warm.load_state_dict(reloaded(optimizer.state_dict()))
    for o, m in ((optimizer, model), (warm, twin), (cold, other)):
        run(o, m, 2)
    assert torch.equal(flat(twin), flat(model))
    assert not torch.equal(flat(other), flat(model))


def test_states_that_do_not_fit_are_refused() -> None:
    optimizer = KBFGS(small(), 0.1, 0.3)
    wider = KBFGS(seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))), 0.1, 0.3)
    with pytest.raises(errors.ParameterMismatchError, match="another model"):
        optimizer.load_state_dict(wider.state_dict())
    fewer = KBFGS(small(), 0.1, 0.3, params="0")
    with pytest.raises(errors.ParameterMismatchError):
        optimizer.load_state_dict(fewer.state_dict())
    model = small()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    with pytest.raises(errors.ParameterMismatchError, match="groups"):
        optimizer.load_state_dict(KBFGS(model, 0.1, 0.3, params=groups).state_dict())
    with pytest.raises(errors.OptionError, match="K-FAC"):
        optimizer.load_state_dict(KFAC(small(), 0.1, 0.3).state_dict())
    with pytest.raises(errors.OptionError, match="lacks the entry"):
        optimizer.load_state_dict(torch.optim.SGD(small().parameters(), 0.1).state_dict())


@every_method
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_independent_and_go_on_alike(make: Any, how: Any) -> None:
    model = mixed()
    optimizer = make(model, 0.1, 0.3)
    run(optimizer, model, 2)
    twin = how(optimizer)
    assert twin.model is not model
    assert all(a is b for a, b in zip(twin.model.parameters(), twin.params.values(), strict=True))
    assert hooks_of(twin.model) == hooks_of(model)  # no dead hooks are left
    for o, m in ((optimizer, model), (twin, twin.model)):
        torch.manual_seed(3)
        run(o, m, 3)
    assert torch.equal(flat(twin.model), flat(model))


@every_method
def test_a_copy_of_the_model_alone_is_not_watched(make: Any) -> None:
    model = small()
    optimizer = make(model, 0.1, 0.3)
    run(optimizer, model, 2)
    average, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    x, y = normal(7, 5), labels(7)
    for other in (average, pickled):
        F.cross_entropy(other(x), y).backward()
    expected = flat(model)
    assert torch.equal(flat(average), expected) and torch.equal(flat(pickled), expected)
    torch.manual_seed(0)
    twin = copy.deepcopy(optimizer)
    run(optimizer, model, 1)
    run(twin, twin.model, 1)
    assert torch.equal(flat(twin.model), flat(model))


# -- hooks and memory ------------------------------------------------------------------------------


@every_method
def test_hooks_go_with_close_and_with_the_object(make: Any) -> None:
    model = small()
    optimizer = make(model, 0.1, 0.3)
    run(optimizer, model, 2)
    optimizer.close()
    assert hooks_of(model) == 0
    with pytest.raises(errors.OptionError, match="closed"):
        run(optimizer, model, 1)
    optimizer = make(model, 0.1, 0.3)
    run(optimizer, model, 1)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None and hooks_of(model) == 0


@every_method
def test_memory_does_not_grow_over_200_steps(make: Any) -> None:
    """With the garbage collector off: reference cycles would show."""
    model = small()
    optimizer = make(model, 0.05, 0.3)
    sizes = []
    gc.collect()
    gc.disable()
    try:
        for k in range(221):
            run(optimizer, model, 1)
            F.cross_entropy(model(normal(7, 5)), labels(7))  # an evaluation with a graph
            if k in (20, 220):
                alive = (o for o in gc.get_objects() if issubclass(type(o), Tensor))
                sizes.append(sum(t.numel() * t.element_size() for t in alive))
    finally:
        gc.enable()
    assert sizes[1] <= sizes[0]


@every_method
def test_several_optimizers_on_one_model(make: Any) -> None:
    """Two of them that share the parameters do what one alone does for each part."""
    model = small()
    first, second = make(model, 0.1, 0.3, params="0"), make(model, 0.1, 0.3, params=["2.*"])
    assert list(first.params) == ["0.weight", "0.bias"]
    assert list(second.params) == ["2.weight", "2.bias"]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(first, model, 1)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == set(first.params)
    run(second, model, 2)
    run(first, model, 2)
    assert first.curvature().shape == (36, 36) and second.curvature().shape == (21, 21)
    first.close()
    run(second, model, 1)


# -- torch's habits --------------------------------------------------------------------------------


@every_method
def test_parameter_groups_and_schedulers(make: Any) -> None:
    model, plain = small(), small()
    groups = [
        {"params": [model[0].weight, model[2].weight], "lr": 0.2, "weight_decay": 0.1},
        {"params": [model[0].bias, model[2].bias]},
    ]
    optimizer = make(model, 0.1, 0.3, params=groups)
    other = make(plain, 0.1, 0.3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    start = flat(model)
    run(optimizer, model, 1)
    schedule.step()
    run(other, plain, 1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.05]
    # the first momentum of the biases has no weight decay, but shares the layer's preconditioner
    weight = model[0].weight.detach().reshape(-1) - start[:30]
    assert (
        1.5
        < float(weight.norm() / (plain[0].weight.detach().reshape(-1) - start[:30]).norm())
        < 2.5
    )


def test_zero_learning_rate_of_one_parameter_keeps_it() -> None:
    model = small()
    groups = [
        {"params": [model[0].weight, *model[2].parameters()]},
        {"params": model[0].bias, "lr": 0.0},
    ]
    optimizer = KBFGS(model, 0.1, 0.3, params=groups)
    bias = model[0].bias.detach().clone()
    run(optimizer, model, 2)
    assert torch.equal(model[0].bias, bias)


def test_layers_that_thaw_are_added() -> None:
    model = small()
    model[0].requires_grad_(False)
    optimizer = KBFGS(model, 0.1, 0.3)
    run(optimizer, model, 1)
    model[0].requires_grad_(True)
    with pytest.raises(errors.ModelError, match="add_param_group"):
        run(optimizer, model, 1)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})
    start = flat(model)
    run(optimizer, model, 2)
    assert list(optimizer.blocks) == ["0", "2"] and not optimizer.curvature().uncovered
    assert not torch.equal(flat(model)[:30], start[:30])


@every_method
def test_a_bias_that_thaws_begins_its_layer_anew(make: Any) -> None:
    """From then on the layer moves as with an optimizer that begins there."""
    model = small()
    model[0].bias.requires_grad_(False)
    optimizer = make(model, 0.1, 0.3)
    run(optimizer, model, 2)
    model[0].bias.requires_grad_(True)
    optimizer.add_param_group({"params": [model[0].bias]})
    twin = copy.deepcopy(model)
    fresh = make(twin, 0.1, 0.3)
    if isinstance(fresh, KFAC):  # the same labels
        fresh._load_extra_state(optimizer._extra_state())
    for net, chosen in ((model, optimizer), (twin, fresh)):
        run(chosen, net, 1)
    for name in ("0.weight", "0.bias"):
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name))
    assert optimizer.curvature().blocks["0"].shape == fresh.curvature().blocks["0"].shape
    run(optimizer, model, 2)


@every_method
def test_bf16_autocast_keeps_factors_in_float32(make: Any) -> None:
    model = small(dtype=torch.float32)
    optimizer = make(model, 0.1, 0.3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(normal(7, 5, dtype=torch.float32)), labels(7))
            loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    state = optimizer.block_state("0")
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            assert value.dtype in (torch.float32, torch.float64), key
    x = normal(7, 5, dtype=torch.float32)
    rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    # the model's own input is not rounded to bfloat16
    expected = rows.T @ rows / 7
    assert relative(optimizer.factors("0")["A"], expected) < 1e-6


@every_method
def test_grad_scaler_changes_nothing_but_the_rounding(make: Any) -> None:
    models = [small(dtype=torch.float32) for _ in range(2)]
    optimizers = [make(m, 0.1, 0.3) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(4):
        x, y = normal(7, 5, seed=k, dtype=torch.float32), labels(7, seed=k)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizers[1].zero_grad()
            loss = F.cross_entropy(models[1](x), y)
            scaler.scale(loss).backward()
            return loss

        optimizers[0].step(closure_of(optimizers[0], models[0], x, y))
        optimizers[1].step(closure, scaler=scaler)
        scaler.update()
    assert relative(flat(models[1]), flat(models[0])) < 1e-5
    for block in optimizers[0].layers:
        for name, factor in optimizers[0].factors(block).items():
            assert relative(optimizers[1].factors(block)[name], factor) < 1e-4


@pytest.mark.parametrize("way", ["scaled", "unscaled before", "overflow"])
@pytest.mark.parametrize("own", [{"fisher": "empirical"}, {"loss": nn.CrossEntropyLoss()}],
                         ids=["empirical", "named"])  # fmt: skip
def test_the_step_of_a_grad_scaler(own: dict[str, Any], way: str) -> None:
    """Without a closure: the factors are those of the loss before it was scaled."""
    model, plain = small(), small()
    optimizers = [KFAC(m, 0.1, 0.3, **own) for m in (plain, model)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(3):
        x, y = normal(7, 5, seed=k), labels(7, seed=k)
        for optimizer, net, scale in zip(optimizers, (plain, model), (False, True), strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            (scaler.scale(loss) if scale else loss).backward()
            if not scale:
                optimizer.step()
                continue
            if way == "unscaled before":
                scaler.unscale_(optimizer)
            if way == "overflow":
                net[0].weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
    assert optimizers[1].steps == (0 if way == "overflow" else 3)
    if way == "overflow":
        assert torch.equal(flat(model), flat(small()))
    else:
        assert relative(flat(model), flat(plain)) < 1e-12
        for name, factor in optimizers[0].factors("0").items():
            assert relative(optimizers[1].factors("0")[name], factor) < 1e-12


@every_method
def test_grad_scaler_leaves_out_a_step_that_overflows(make: Any) -> None:
    model = small(dtype=torch.float32)
    optimizer = make(model, 0.1, 0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    start = flat(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(normal(7, 5, dtype=torch.float32)), labels(7))
        scaler.scale(loss).backward()
        model[0].weight.grad[0, 0] = math.inf
        return loss

    optimizer.step(closure, scaler=scaler)
    scaler.update()
    assert torch.equal(flat(model), start) and optimizer.steps == 0
    assert scaler.get_scale() == 512.0


def test_clipped_gradients_are_used() -> None:
    model = small()
    optimizer = KBFGS(model, 0.1, 0.3, momentum=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(normal(7, 5)), labels(7))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return loss

    optimizer.step(closure)
    M = [optimizer.block_state(b)["M"] for b in optimizer.blocks]
    assert math.hypot(*(float(m.norm()) for m in M)) == pytest.approx(1e-3, rel=1e-4)
