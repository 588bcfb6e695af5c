"""Nothing of the user's is changed by BackPACK, whether the computation succeeds or fails."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from typing import Any

import backpack
import numpy as np
import pytest
import torch
from backpack.context import CTX
from torch import Tensor, nn

import curvscope as cs
from curvscope.errors import BackpackError
from tests.curvature.backpack_models import N, Residual, classify, image, mlp, randn


def frozen_value(value: Any) -> Any:
    """Something that compares equal only if nothing inside has changed."""
    if isinstance(value, Tensor):
        return (id(value), value.requires_grad, value.detach().clone().tolist(), value.grad_fn)
    if isinstance(value, dict):
        return [(key, frozen_value(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [frozen_value(item) for item in value]
    return (id(value), repr(value)) if not isinstance(value, bool | int | str) else value


def snapshot(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name] = frozen_value(vars(module))
    for name, p in model.named_parameters():
        gradient = None if p.grad is None else (id(p.grad), p.grad.tolist())
        state[f"parameter {name}"] = (
            *(id(p), p.data_ptr(), p._version, gradient, dict(vars(p)), p.requires_grad),
            p._backward_hooks,
        )
    return state


def surroundings() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "hooks": (id(CTX.hook_handles), len(CTX.hook_handles)),
        "extensions": CTX.get_active_exts(),
        "store": backpack.disable.store_io,
        "filters": list(warnings.filters),
    }


def lively(model: nn.Module) -> nn.Module:
    """A model in use: train mode, gradients, hooks, attributes, a frozen parameter."""
    model.train()
    modules = list(model.modules())
    parameters = list(model.parameters())
    for k, p in enumerate(parameters):
        p.grad = torch.full_like(p, float(k))
    parameters[0].requires_grad_(False)
    parameters[1].mark = "mine"
    modules[1].register_forward_hook(lambda module, args, output: None)
    modules[-1].register_full_backward_hook(lambda module, gi, go: None)
    modules[1].output = "an attribute of mine"
    modules[1].kept = randn(2) * parameters[1].sum()  # part of a graph: deepcopy fails on it
    modules[-1].eval()
    return model


@pytest.mark.parametrize("extension", cs.backpack.names())
@pytest.mark.parametrize("kind", ["chain", "converted"])
def test_success_leaves_no_trace(kind: str, extension: str) -> None:
    torch.manual_seed(0)
    setting = classify(mlp(nn.ReLU(inplace=True)) if kind == "chain" else Residual(), randn(N, 3))
    model = lively(setting.model)
    problem = cs.Problem(
        model, setting.loss, [(setting.x[:1], setting.y[:1]), (setting.x, setting.y)]
    )
    problem.check()
    possible, _ = cs.backpack.supported(problem, extension)  # imports what torch.fx needs
    before, around = snapshot(model), surroundings()
    assert cs.backpack.supported(problem, extension)[0] is possible
    if possible:
        result = cs.backpack.compute(problem, extension)
        if isinstance(result, cs.Operator):
            result @ torch.ones(result.shape[0], dtype=torch.float64)
    else:
        assert kind == "converted"
        with pytest.raises(BackpackError):
            cs.backpack.compute(problem, extension)
    assert snapshot(model) == before
    assert surroundings() == around


@pytest.mark.parametrize("extension", ["DiagGGNExact", "DiagHessian", "SqrtGGNMC", "HMP"])
def test_failure_in_the_middle_leaves_no_trace(extension: str) -> None:
    """BackPACK fails at layer 2 of 6, after the later layers have got their quantities."""
    torch.manual_seed(0)
    setting = image(nn.AvgPool2d(3, 2, ceil_mode=True))
    model = lively(setting.model)
    problem = cs.Problem(model, setting.loss, (setting.x, setting.y))
    problem.check()
    before, around = snapshot(model), surroundings()
    with pytest.raises(BackpackError, match=r"layer '2'|product"):
        cs.backpack.compute(problem, extension)
    assert snapshot(model) == before
    assert surroundings() == around


def test_failure_at_a_later_batch_leaves_no_trace() -> None:
    torch.manual_seed(0)
    setting = classify(mlp(), randn(N, 3))
    bad = setting.y.clone()
    bad[0] = -100
    model = lively(setting.model)
    data = [(setting.x, setting.y), (setting.x, bad)]
    problem = cs.Problem(model, setting.loss, data, check=False)
    problem.check()
    before, around = snapshot(model), surroundings()
    with pytest.raises(BackpackError, match="ignore_index"):
        cs.backpack.kfac(problem)
    assert snapshot(model) == before
    assert surroundings() == around


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_model_that_the_user_has_extended() -> None:
    """Also inside the user's own BackPACK contexts."""
    torch.manual_seed(0)
    setting = classify(mlp(), randn(N, 3))
    plain = cs.Problem(setting.model, setting.loss, (setting.x, setting.y))
    expected = cs.backpack.diag_ggn(plain).diagonal()
    handles = len(CTX.hook_handles)
    model = backpack.extend(mlp().double())
    model.load_state_dict(setting.model.state_dict())
    loss = backpack.extend(nn.CrossEntropyLoss())
    problem = cs.Problem(model, loss, (setting.x, setting.y))
    problem.check()
    try:
        with backpack.backpack(backpack.extensions.BatchGrad()):
            value = loss(model(setting.x), setting.y)
            before, around = snapshot(model), surroundings()
            assert torch.equal(cs.backpack.diag_ggn(problem).diagonal(), expected)
            assert snapshot(model) == before and surroundings() == around
            value.backward()  # the user's pass goes on as if nothing had happened
        assert model[0].weight.grad_batch.shape == (N, 4, 3)
        with backpack.disable():
            assert torch.equal(cs.backpack.diag_ggn(problem).diagonal(), expected)
            assert not backpack.disable.store_io
    finally:
        for handle in CTX.hook_handles[handles:]:
            handle.remove()
        del CTX.hook_handles[handles:]


def test_the_copy_shares_storage_and_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    setting = classify(mlp(), randn(N, 3))
    problem = cs.Problem(setting.model, setting.loss, (setting.x, setting.y))
    seen = []
    original = backpack.extend

    def watching(module: nn.Module, **options: Any) -> nn.Module:
        if isinstance(module, nn.Sequential):
            assert module is not setting.model
            for mine, theirs in zip(module.parameters(), setting.model.parameters(), strict=True):
                assert mine is not theirs and mine.data_ptr() == theirs.data_ptr()
            seen.append(weakref.ref(module))
        return original(module, **options)

    monkeypatch.setattr(backpack, "extend", watching)
    cs.backpack.sqrt_ggn(problem)
    op = cs.backpack.hmp(problem)
    op @ torch.ones(op.shape[0], dtype=torch.float64)
    gc.collect()
    assert len(seen) == 5  # one, one to try, and one per block of the product
    assert all(reference() is None for reference in seen)


def test_no_grad_and_autocast_do_not_matter() -> None:
    torch.manual_seed(0)
    setting = classify(mlp(), randn(N, 3))
    problem = cs.Problem(
        setting.model, setting.loss, (setting.x.float(), setting.y), dtype=torch.float32
    )
    expected = cs.backpack.diag_hessian(problem).diagonal()
    with torch.no_grad():
        assert torch.equal(cs.backpack.diag_hessian(problem).diagonal(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cs.backpack.diag_hessian(problem).diagonal(), expected)


def test_train_mode_is_evaluated_and_said() -> None:
    torch.manual_seed(0)
    setting = classify(mlp(nn.Dropout(0.5)), randn(N, 3))
    problem = cs.Problem(setting.model, setting.loss, (setting.x, setting.y))
    expected = cs.backpack.diag_ggn(problem)
    assert not any("eval()" in note for note in expected.info.notes)
    setting.model.train()
    trained = cs.backpack.diag_ggn(problem)
    assert torch.equal(trained.diagonal(), expected.diagonal())
    assert any("eval()" in note for note in trained.info.notes)
