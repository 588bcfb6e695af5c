"""What users of torch expect of an optimizer, for AdaFisher, AdaHessian and M-FAC alike."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvscope.errors import (
    OptionError,
    ParameterMismatchError,
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

# -- saving, copying ------------------------------------------------------------------------------


@each_method
def test_saved_state_continues_bit_for_bit(method):
    """Saved before every step, the first included, through a file read with weights_only=True."""
    model = seeded(conv_net, dtype=torch.float32)
    optimizer = method.build(model)
    saved = []
    for t in range(6):
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        saved.append(file)
        method.step(
            optimizer, model, *(v.float() if v.is_floating_point() else v for v in batch(t))
        )
    for t, file in enumerate(saved):
        file.seek(0)
        state = torch.load(file, weights_only=True)
        other = seeded(conv_net, seed=7, dtype=torch.float32)
        other.load_state_dict(state["model"])
        fresh = method.build(other, lr=123.0)
        fresh.load_state_dict(state["optimizer"])
        assert fresh.steps == t and fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        for k in range(t, 6):
            x, y = batch(k)
            method.step(fresh, other, x.float(), y)
        assert torch.equal(flat(model), flat(other))
        assert str(fresh.diagnostics()) == str(optimizer.diagnostics())
        assert fresh.coverage() == optimizer.coverage()


@each_method
def test_saved_state_is_a_copy_when_loaded_and_knows_its_model(method):
    model = seeded(conv_net)
    optimizer = method.build(model)
    run(method, model, optimizer, 2)
    state = optimizer.state_dict()
    twin = copy.deepcopy(model)
    other = method.build(twin)
    other.load_state_dict(state)
    run(method, twin, other, 2, start=2)
    assert optimizer.steps == 2
    continued = copy.deepcopy(model)
    third = method.build(continued)
    third.load_state_dict(state)  # untouched by what the second optimizer did
    run(method, continued, third, 2, start=2)
    assert torch.equal(flat(twin), flat(continued))
    with pytest.raises(ParameterMismatchError, match="another model"):
        method.build(mlp(4, 3).double()).load_state_dict(state)
    with pytest.raises(OptionError, match="not a state of"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    foreign = METHODS[0] if method.name.startswith(("AdaH", "M-")) else METHODS[3]
    with pytest.raises(OptionError, match="cannot continue"):
        foreign.build(copy.deepcopy(model)).load_state_dict(state)


@each_method
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_live_on_their_own(method, how):
    model = seeded(conv_net)
    optimizer = method.build(model)
    run(method, model, optimizer, 2)
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.model is twin and next(iter(other.params.values())) is next(twin.parameters())
    run(method, model, optimizer, 3, start=2)
    run(method, twin, other, 3, start=2)
    assert torch.equal(flat(model), flat(twin))
    assert other.steps == 5
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in twin.modules())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@each_method
def test_hooks_go_with_close_and_with_the_object(method):
    def hooks(model):
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    model = seeded(conv_net)
    optimizer = method.build(model)
    run(method, model, optimizer, 1)
    alive = weakref.ref(optimizer)
    taps = isinstance(optimizer, AdaFisher)
    assert (hooks(model) > 0) == taps
    optimizer.close(), optimizer.close()
    assert hooks(model) == 0
    if taps:
        with pytest.raises(OptionError, match="closed"):
            optimizer.step()
    del optimizer
    assert alive() is None  # by reference counting alone: no cycle
    optimizer = method.build(model)
    run(method, model, optimizer, 1)
    del optimizer
    assert hooks(model) == 0


@each_method
def test_no_growth_over_200_steps(method):
    """Tensors alive, with the garbage collector off: reference cycles would show."""

    def tensors():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), mlp(8, 4, 3)))
    optimizer = method.build(model)
    x, y = data(0, 4, 1, 4, 4)
    closure = method.closure(optimizer, model, x, y)
    for _ in range(6):
        optimizer.step(closure)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(200):
            optimizer.step(closure)
        after = tensors()
    finally:
        gc.enable()
    assert after <= before


def test_state_is_what_counting_says():
    """Numbers kept beside the parameters, within a tenth of what each method needs."""
    x, y = data(0, 8, 50)
    for method in METHODS:
        model = seeded(lambda: mlp(50, 80, 60))
        size = flat(model).numel()
        optimizer = method.build(model)
        method.step(optimizer, model, x, y)
        state = optimizer.state_dict()
        kept = [v for s in state["state"].values() for v in s.values() if torch.is_tensor(v)]
        kept += list(state["curvscope"].get("window", {}).values())
        factors = (51 + 80) + (81 + 60)
        needed = {"AdaF": size + factors, "AdaH": 2 * size}.get(method.name[:4])
        needed = needed or (optimizer.memory + 1) * size
        assert sum(v.numel() for v in kept) <= 1.1 * needed, method.name


# -- groups, schedules, gradients -----------------------------------------------------------------


@each_method
def test_parameter_groups_have_their_own_options(method):
    model, twin = seeded(conv_net), seeded(conv_net)
    frozen = [p for n, p in model.named_parameters() if n.startswith("6")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("6")]
    groups = [{"params": rest}, {"params": frozen, "lr": 0.0, "weight_decay": 0.0}]
    optimizer = method.build(model, params=groups)
    if not method.name.startswith("AdaF"):
        assert list(method.build(groups).params) == [f"parameter{k}" for k in range(7)]
    other = method.build(twin)
    method.step(optimizer, model, *batch(0))
    method.step(other, twin, *batch(0))
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if name.startswith("6"):
            assert not torch.equal(p, q)
            assert torch.equal(p, seeded(conv_net).get_parameter(name))
        else:
            assert torch.allclose(p, q, rtol=1e-12)


@each_method
def test_schedulers(method):
    model, twin = seeded(conv_net), seeded(conv_net)
    optimizer, other = method.build(model), method.build(twin)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for t in range(4):
        method.step(optimizer, model, *batch(t))
        method.step(other, twin, *batch(t))
        scheduler.step()
        other.param_groups[0]["lr"] *= 0.5
    assert torch.equal(flat(model), flat(twin))


@each_method
def test_step_hooks_of_torch_are_called(method):
    model = seeded(conv_net)
    optimizer = method.build(model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    run(method, model, optimizer, 1)
    assert calls == ["pre", "post"]


@each_method
@pytest.mark.parametrize("set_to_none", [True, False])
def test_closure_and_separate_steps_agree(method, set_to_none):
    model, twin = seeded(conv_net), seeded(conv_net)
    optimizer, other = method.build(model), method.build(twin)
    for t in range(3):
        x, y = batch(t)
        other.zero_grad(set_to_none=set_to_none)
        loss = F.cross_entropy(twin(x), y)
        method.backward(other, loss)
        assert other.step() is None
        returned = optimizer.step(method.closure(optimizer, model, x, y))
        assert torch.allclose(returned, loss, rtol=1e-12)
    if isinstance(optimizer, AdaHessian):  # its closure runs with second derivatives of its own
        assert relative(flat(model), flat(twin)) < 1e-12
    else:
        assert torch.equal(flat(model), flat(twin))


@each_method
def test_accumulated_gradients_are_one_large_batch(method):
    net = lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 5))  # noqa: E731
    model, twin = seeded(net), seeded(net)
    optimizer, other = method.build(model), method.build(twin)
    for t in range(3):
        x, y = batch(t)
        method.step(optimizer, model, x, y)
        other.zero_grad()
        for part in range(4):
            rows = slice(2 * part, 2 * part + 2)
            method.backward(other, F.cross_entropy(twin(x[rows]), y[rows]) / 4)
        other.step()
        assert relative(flat(twin), flat(model)) < 1e-12
    if isinstance(optimizer, AdaFisher):
        for block in optimizer.layers:
            for key, value in optimizer.factors(block).items():
                assert relative(other.factors(block)[key], value) < 1e-12


@each_method
def test_clipped_gradients_are_used_as_they_are(method):
    model = seeded(conv_net)
    optimizer = method.build(model, weight_decay=0.0)
    x, y = batch(0)
    optimizer.zero_grad()
    method.backward(optimizer, F.cross_entropy(model(x), y))
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    before = flat(model)
    optimizer.step()
    step = -optimizer.param_groups[0]["lr"] * (optimizer.preconditioner() @ clipped)
    assert float(clipped.norm()) < 1.001e-3
    assert relative(flat(model) - before, step) < 1e-9


@each_method
def test_maximize_is_minimizing_the_negative(method):
    model, twin = seeded(Sometimes), seeded(Sometimes)
    optimizer, other = method.build(model, maximize=True), method.build(twin)
    for t in range(3):
        x, y = data(t, 8, 4)
        for net, opt, sign in ((model, optimizer, 1), (twin, other, -1)):
            opt.zero_grad()
            method.backward(opt, sign * F.cross_entropy(net(x), y))
            opt.step()
    assert relative(flat(model), flat(twin)) < 1e-12


class Sometimes(nn.Module):
    """A covered layer and a parameter for the fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.b(self.a(x).tanh() * self.scale)


@each_method
def test_two_optimizers_on_one_model(method):
    model = seeded(conv_net)
    first = method.build(model, params=["0", "1"])
    second = method.build(model, params=["3", "6"])
    other = AdaFisher(model, lr=0.0, update_every=1)  # only watches
    for t in range(3):
        for optimizer in (first, second, other):
            optimizer.zero_grad()
        method_loss = F.cross_entropy(model(batch(t)[0]), batch(t)[1])
        if isinstance(first, AdaHessian):
            first.step(lambda t=t: F.cross_entropy(model(batch(t)[0]), batch(t)[1]))
            second.step(lambda t=t: F.cross_entropy(model(batch(t)[0]), batch(t)[1]))
        else:
            method_loss.backward()
            first.step(), second.step(), other.step()
    assert list(first.blocks) == ["0", "1"] and list(second.blocks) == ["3", "6"]
    assert float((flat(model) != flat(seeded(conv_net))).double().mean()) > 0.95
