"""Loss scales, low precision and bad input, for AdaFisher, AdaHessian and M-FAC alike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvscope.errors import (
    CurvscopeError,
    ModelError,
    NonFiniteError,
    OptionError,
)
from curvscope.optim import AdaFisher, AdaHessian
from tests.optim.adaptive_cases import (
    METHODS,
    batch,
    conv_net,
    data,
    each_method,
    flat,
    mlp,
    relative,
    run,
    seeded,
)

# -- precision ------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_changes_nothing(method, unscale):
    """Scaled by a power of two, so that only the 1e-6 of min-max could betray a forgotten scale."""
    model, twin = seeded(conv_net, dtype=torch.float32), seeded(conv_net, dtype=torch.float32)
    optimizer, other = method.build(model), method.build(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for t in range(5):
        x, y = batch(t)
        other.zero_grad()
        method.backward(other, F.cross_entropy(twin(x.float()), y))
        optimizer.zero_grad()
        method.backward(optimizer, scaler.scale(F.cross_entropy(model(x.float()), y)))
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        other.step()
        assert relative(flat(model), flat(twin)) < 1e-6
    assert scaler.get_scale() > 2.0**12  # it did grow on the way
    for row, same in zip(optimizer.diagnostics(), other.diagnostics()):
        assert row["condition"] == pytest.approx(same["condition"], rel=1e-3)


@each_method
def test_grad_scaler_skips_steps_that_overflow(method):
    model = seeded(conv_net, dtype=torch.float32)
    optimizer = method.build(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    x, y = (v.float() if v.is_floating_point() else v for v in batch(0))
    before = flat(model)
    optimizer.zero_grad()
    method.backward(optimizer, scaler.scale(F.cross_entropy(model(x), y)))
    next(model.parameters()).grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(model), before) and optimizer.steps == 0
    assert scaler.get_scale() == 2.0**3
    method.step(optimizer, model, x, y)
    assert optimizer.steps == 1


@pytest.mark.parametrize("kind", [AdaFisher, AdaHessian])
def test_other_loss_scales_are_given_by_hand(kind):
    model, twin = seeded(conv_net), seeded(conv_net)
    optimizer, other = kind(model), kind(twin)
    optimizer.loss_scale = lambda: 64.0
    x, y = batch(0)
    for net, opt, scale in ((model, optimizer, 64.0), (twin, other, 1.0)):
        loss = scale * F.cross_entropy(net(x), y)
        opt.backward(loss) if kind is AdaHessian else loss.backward()
        for p in net.parameters():
            p.grad /= scale
        opt.step()
    assert relative(flat(model), flat(twin)) < 1e-12


@each_method
def test_autocast_keeps_factors_in_single_precision(method):
    model, twin = seeded(conv_net, dtype=torch.float32), seeded(conv_net, dtype=torch.float32)
    optimizer, other = method.build(model), method.build(twin)
    for t in range(4):
        x, y = batch(t)
        x = x.float()

        def closure(x=x, y=y):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            if not isinstance(optimizer, AdaHessian):
                loss.backward()
            return loss

        optimizer.step(closure)
        method.step(other, twin, x, y)
    assert optimizer.curvature().dtype == torch.float32
    for block in optimizer.blocks:
        assert {v.dtype for v in optimizer.factors(block).values()} == {torch.float32}
    assert relative(flat(model), flat(twin)) < 0.1  # bf16 gradients, the same method


@each_method
def test_half_precision_parameters(method):
    model = seeded(lambda: mlp(6, 5, 3), dtype=torch.bfloat16)
    optimizer = method.build(model)
    before = flat(model)
    for t in range(4):
        x, y = data(t, 8, 6)
        method.step(optimizer, model, x.bfloat16(), y)
    assert bool((flat(model) != before).any()) and bool(flat(model).isfinite().all())
    assert optimizer.curvature().dtype == torch.float32
    restored = method.build(model)
    restored.load_state_dict(optimizer.state_dict())
    tensors = [v for s in restored.state.values() for v in s.values() if torch.is_tensor(v)]
    assert all(v.dtype == torch.float32 for v in tensors)


# -- bad input ------------------------------------------------------------------------------------


def state_of(optimizer):
    """Everything saved, as comparable values."""

    def plain(value):
        if torch.is_tensor(value):
            return value.flatten().tolist()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(optimizer.state_dict())


@each_method
@pytest.mark.parametrize("where", ["input", "weight", "loss"])
def test_losses_that_are_not_finite_name_the_layer_and_change_nothing(method, where):
    model = seeded(conv_net)
    optimizer = method.build(model)
    run(method, model, optimizer, 2)
    x, y = batch(2)
    if where == "weight":
        with torch.no_grad():
            model[3].weight[0, 0, 0, 0] = float("nan")
    elif where == "input":
        x[0, 0, 0, 0] = float("inf")
    before, state = flat(model), state_of(optimizer)

    def closure():
        loss = method.closure(optimizer, model, x, y)()
        return loss * float("nan") if where == "loss" else loss

    words = {"input": "layer '0'", "weight": "layer '3'", "loss": "the loss"}[where]
    with pytest.raises(NonFiniteError, match=words):
        optimizer.step(closure)
    assert torch.equal(torch.nan_to_num(flat(model)), torch.nan_to_num(before))
    assert state_of(optimizer) == state


@each_method
def test_gradients_that_are_not_finite_name_the_layer(method):
    model = seeded(conv_net)
    optimizer = method.build(model)
    run(method, model, optimizer, 2)
    before, state = flat(model), state_of(optimizer)
    optimizer.zero_grad()
    method.backward(optimizer, F.cross_entropy(model(batch(2)[0]), batch(2)[1]))
    model[6].bias.grad[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"layer '6' \(6\.bias\)"):
        optimizer.step()
    assert torch.equal(flat(model), before) and state_of(optimizer) == state
    run(method, model, optimizer, 1)  # and goes on afterwards


@each_method
def test_missing_gradients_and_changed_models(method):
    model = seeded(conv_net)
    optimizer = method.build(model)
    with pytest.raises(OptionError, match="No parameter has a gradient"):
        optimizer.step()
    run(method, model, optimizer, 1)
    model[6] = nn.Linear(54, 5).double()
    with pytest.raises(ModelError, match="has changed"):
        run(method, model, optimizer, 1)
    for change in (lambda m: m.float(), lambda m: m[0].requires_grad_(False)):
        model = seeded(conv_net)
        optimizer = method.build(model)
        change(model)
        with pytest.raises(ModelError, match="has changed"):
            x, y = batch(0)
            optimizer.step(method.closure(optimizer, model, x.to(model[6].weight.dtype), y))


@each_method
def test_closure_that_returns_nothing(method):
    model = seeded(conv_net)
    optimizer = method.build(model)
    for closure in (lambda: None, lambda: 1.0, lambda: torch.ones(2)):
        with pytest.raises(CurvscopeError, match="loss"):
            optimizer.step(closure)


@each_method
def test_models_that_cannot_be_optimized(method):
    mixed = mlp(3, 3, 2)
    mixed[2].double()
    with pytest.raises(ModelError, match="dtypes"):
        method.build(mixed)
    meta = mlp(3, 3, 2)
    meta[2].to("meta")
    with pytest.raises(ModelError, match="devices"):
        method.build(meta)
    frozen = mlp(3, 2).requires_grad_(False)
    with pytest.raises(ModelError, match="trainable"):
        method.build(frozen)
    with pytest.raises(ModelError, match="matches no parameter"):
        method.build(mlp(3, 2), params=["nowhere"])


@pytest.mark.parametrize("method", METHODS[:-1], ids=[m.name for m in METHODS[:-1]])
def test_thawed_layers_are_added(method):
    """M-FAC, whose window cannot grow, refuses (test_mfac.py)."""
    model = seeded(conv_net)
    model[6].requires_grad_(False)
    optimizer = method.build(model, update_every=50)
    run(method, model, optimizer, 2)
    model[6].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[6].parameters())})
    before = flat(model)
    run(method, model, optimizer, 1)
    assert bool((flat(model)[-5:] != before[-5:]).all())
    assert {row["rule"] for row in optimizer.coverage()} == {optimizer.method}
    assert not optimizer.curvature().uncovered
