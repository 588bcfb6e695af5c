"""Steps that an exception ends half-way: what they leave behind, and that training goes on."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope.errors import NonFiniteError, SingularError
from curvscope.optim import KBFGS, KFAC, kbfgs_block, kfac

from .every_method import ROWS, Method, each_method, mlp, snapshot
from .kronecker_cases import closure_of, flat, labels, normal, run, small

KBFGS_KINDS = pytest.mark.parametrize("memory", [None, 2], ids=["K-BFGS", "K-BFGS(L)"])
X, Y = normal(8, 5), labels(8)


class Interrupted:
    """A closure whose ``when``-th call raises before it looks at the model."""

    def __init__(self, optimizer: Any, model: nn.Module, when: int, error: BaseException) -> None:
        self.inner, self.calls = closure_of(optimizer, model, X, Y), 0
        self.when, self.error = when, error

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls == self.when:
            raise self.error
        return self.inner()


ERRORS = [KeyboardInterrupt(), torch.OutOfMemoryError("no memory"), ValueError("of the user")]


@KBFGS_KINDS
@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("error", ERRORS, ids=["interrupt", "memory", "user"])
def test_a_second_call_that_fails_is_a_step_without_pairs(
    memory: int | None, taken: int, error: BaseException
) -> None:
    model = mlp()
    optimizer = KBFGS(model, 0.05, 0.3, memory=memory)
    run(optimizer, model, taken)
    twin = copy.deepcopy(optimizer)  # takes the same step, uninterrupted
    before = copy.deepcopy(optimizer.state_dict())
    counted = [row["skipped"] for row in optimizer.diagnostics() if "skipped" in row]
    with pytest.raises(type(error)):
        optimizer.step(Interrupted(optimizer, model, 2, error))
    twin.step(closure_of(twin, twin.model, X, Y))

    # the first half is that of the other step, with gradients, buffers, and requires_grad
    for (name, p), q in zip(model.named_parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad, name
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
    for b, c in zip(model.buffers(), twin.model.buffers(), strict=True):
        assert torch.equal(b, c)
    assert optimizer.steps == twin.steps == taken + 1
    assert optimizer._seen == {}
    for block in optimizer.layers:
        state, other = optimizer.block_state(block), twin.block_state(block)
        assert torch.equal(state["M"], other["M"]) and torch.equal(state["A"], other["A"])
        index = list(optimizer.params).index(optimizer.blocks[block][0])
        for name in ("H_g", "H_a", "s", "y", "pairs", "filled"):
            if name in before["state"].get(index, {}):
                assert torch.equal(state[name], before["state"][index][name]), name
    rows = [row for row in optimizer.diagnostics() if row["block"] in optimizer.layers]
    assert [row["skipped"] for row in rows] == [n + 1 for n in counted or [0, 0]]
    assert all(row["age"] == 0 and "secant_residual" not in row for row in rows)

    # and the state is whole: a copy of it goes on exactly like the optimizer itself
    fresh = KBFGS(copy.deepcopy(model), 0.05, 0.3, memory=memory)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, model, 3)
    run(fresh, fresh.model, 3)
    assert torch.equal(flat(model), flat(fresh.model)) and bool(torch.isfinite(flat(model)).all())
    assert optimizer.steps == taken + 4


@KBFGS_KINDS
def test_a_first_call_that_fails_leaves_everything(memory: int | None) -> None:
    model = mlp()
    optimizer = KBFGS(model, 0.05, 0.3, memory=memory)
    for taken in (0, 2):
        run(optimizer, model, taken)
        before = snapshot(optimizer, model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(Interrupted(optimizer, model, 1, KeyboardInterrupt()))
        assert snapshot(optimizer, model) == before


def singular_from(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """From the ``call``-th on, inverses fail."""
    inner, calls = getattr(module, name), []

    def inverse(*args: Any) -> Any:
        calls.append(1)
        if len(calls) >= call:
            raise SingularError("not positive definite")
        return inner(*args)

    monkeypatch.setattr(module, name, inverse)


@KBFGS_KINDS
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_kbfgs_begins_with_all_layers_or_none(
    memory: int | None, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    optimizer = KBFGS(model, 0.05, 0.3, memory=memory)
    if warm:
        optimizer.warm_start([X])
    before = snapshot(optimizer, model)
    with monkeypatch.context() as patch:
        singular_from(patch, kbfgs_block, "symmetric_inverse", 2)
        with pytest.raises(SingularError):
            run(optimizer, model, 1)
    assert snapshot(optimizer, model) == before
    run(optimizer, model, 1)
    assert optimizer.steps == 1


@pytest.mark.parametrize("taken", [0, 2])
def test_kfac_inverts_all_layers_or_none(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = KFAC(model, 0.05, 0.3)
    run(optimizer, model, taken)
    before = snapshot(optimizer, model)
    with monkeypatch.context() as patch:
        singular_from(patch, kfac, "damped_inverses", 2)
        with pytest.raises(SingularError):
            run(optimizer, model, 1)
    assert snapshot(optimizer, model) == before
    run(optimizer, model, 1)
    assert optimizer.steps == taken + 1


@pytest.mark.parametrize("make", [KBFGS, KFAC], ids=["K-BFGS", "K-FAC"])
def test_a_warm_start_sets_all_layers_or_none(make: Any) -> None:
    model = small(dtype=torch.float32)
    optimizer = make(model, 0.05, 0.3)
    with torch.no_grad():
        model[0].weight.mul_(1e30)  # only squares of the second layer's inputs overflow
    x = X.float()
    batches, options = ([x], {}) if make is KBFGS else ([(x, Y)], {"loss": F.cross_entropy})
    with pytest.raises(NonFiniteError):
        optimizer.warm_start(batches, **options)
    assert not optimizer.state


# -- the group of a parameter ---------------------------------------------------------------------


def groups_are_right(optimizer: Any) -> bool:
    return all(
        any(p is q for q in optimizer.group_of(p)["params"])
        and any(optimizer.group_of(p) is group for group in optimizer.param_groups)
        for p in optimizer.params.values()
    )


@each_method
def test_every_parameter_has_its_group(method: Method) -> None:
    def build() -> Any:
        model = mlp()
        parts = [{"params": list(model[3].parameters()), "lr": 0.0}]
        optimizer = method.build(model, params=[{"params": list(model[0].parameters())}, *parts])
        return optimizer

    optimizer = build()
    norm = {"params": list(optimizer.model[1].parameters())}
    assert groups_are_right(optimizer)
    optimizer.add_param_group(norm)
    assert groups_are_right(optimizer) and len(optimizer.param_groups) == 3
    with pytest.raises(ValueError):
        optimizer.add_param_group(norm)
    assert groups_are_right(optimizer)
    method.run(optimizer, optimizer.model, ROWS, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert groups_are_right(optimizer)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert groups_are_right(twin) and twin.param_groups[1]["lr"] == 0.0
        assert not any(p is q for p in twin.params.values() for q in optimizer.params.values())
        last = flat(twin.model[3])
        method.run(twin, twin.model, ROWS, 1)
        assert torch.equal(flat(twin.model[3]), last)
