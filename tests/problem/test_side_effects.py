"""Nothing of the user's is changed, also when a call fails half-way.

Every call in these tests is watched by ``tests/fixtures_side_effects``, which compares models,
data, random states and modes before and after. The tests make calls fail in the middle, use models
that change themselves, and make sure that the watch would notice.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvscope as cs
from tests.curvature.nets import seeded
from tests.fixtures_side_effects import module_state, unchanged, watched

from .refusals import CE, X, Y, net

CALLS: dict[str, Callable[[cs.Problem], Any]] = {
    "check": lambda p: p.check(),
    "objective": lambda p: p.objective(),
    "gradient": lambda p: p.gradient(),
    "subset": lambda p: p.subset(2).objective(),
    "hessian": lambda p: cs.hessian(p).dense(),
    "hessian blocks": lambda p: [b.dense() for b in cs.hessian(p).blocks.values()],
    "hessian product": lambda p: cs.hessian(p) @ torch.ones(p.layout.numel),
    "ggn": lambda p: cs.ggn(p).dense(),
    "ggn blocks": lambda p: [b.dense() for b in cs.ggn(p).blocks.values()],
    "ggn product": lambda p: cs.ggn(p, route="autograd") @ torch.ones(p.layout.numel),
    "sampled fisher": lambda p: cs.fisher(p, samples=2).dense(),
    "empirical fisher": lambda p: cs.empirical_fisher(p).dense(),
    "kfac": lambda p: cs.kfac(p, uncovered="zero"),
    "kfac mc": lambda p: cs.kfac(p, fisher="mc", uncovered="zero"),
    "ekfac": lambda p: cs.ekfac(p, uncovered="zero"),
    "kflr": lambda p: cs.kflr(p, uncovered="zero"),
    "foof": lambda p: cs.foof(p, uncovered="zero"),
    "diagonal_kf": lambda p: cs.diagonal_kf(p, uncovered="zero"),
    "adafisher": lambda p: cs.diagonal_kf(p, scale="adafisher", uncovered="zero"),
    "exact_diagonal": lambda p: cs.exact_diagonal(p),
    "hutchinson": lambda p: cs.hutchinson_diagonal(p, probes=2),
}


class Busy(nn.Module):
    """Changes everything it can while it runs, draws from every generator, and fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("later", None)
        self.counter, self.history, self.cache = 0, [], {}
        self.recent, self.kinds = deque(maxlen=2), {"a"}
        self.memory = torch.zeros(2)
        self.fail_at: int | None = None
        self.error: BaseException = RuntimeError("the model failed")

    def forward(self, x: Tensor) -> Tensor:
        self.counter += 1
        self.seen += 1
        self.later = x.detach()
        self.history.append(x)
        self.cache["x"] = x
        self.recent.append(x)
        self.kinds.add("b")
        self.memory += 1
        self.new_attribute = x
        torch.rand(3), np.random.rand(), random.random()
        with torch.no_grad():
            self.inner[0].weight.clamp_(-0.4, 0.4)
        self.inner.train()  # as some models do by mistake
        self.inner.eval()
        if self.fail_at == self.counter:
            raise self.error
        return self.head(self.inner(x))


def busy() -> Busy:
    model = seeded(Busy).train()
    assert isinstance(model, Busy)
    model.inner[0].register_forward_hook(lambda m, i, o: o)
    model.head.register_full_backward_hook(lambda m, gi, go: None)
    model.inner[0].weight.register_hook(lambda g: g)
    model(X).sum().backward()
    model.head.bias.grad = None
    model.requires_grad_(True)
    return model


def problem(model: nn.Module, loss: Any = None, **options: Any) -> cs.Problem:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=generator)
    return cs.Problem(model, CE() if loss is None else loss, loader, **options)


@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_changes_itself(call: str) -> None:
    model = busy()
    before = module_state(model)
    assert model.counter == 1
    CALLS[call](problem(model))
    assert model.counter == 1
    assert len(model.history) == 1
    assert before["module '' (training)"] is True


FAILURES: dict[str, BaseException] = {
    "error": RuntimeError("the model failed"),
    "interrupt": KeyboardInterrupt(),
    "exit": SystemExit(1),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("call", CALLS)
def test_failing_in_the_middle(call: str, failure: str) -> None:
    """At the second batch, at the first one, and as late as the call still runs the model."""
    model = busy()
    p = problem(model)
    p.check()
    model.error = FAILURES[failure]
    failed = 0
    for number in (1, 2, 3, 4, 6):
        model.fail_at = model.counter + number
        try:
            CALLS[call](p)
        except (RuntimeError, cs.errors.CurvscopeError, KeyboardInterrupt, SystemExit):
            failed += 1
    assert failed or call in ("check", "subset")
    # afterwards everything works, and the numbers are the same
    model.fail_at = None
    CALLS[call](p)


@pytest.mark.parametrize("call", CALLS)
def test_a_loss_that_fails(call: str) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.fail_at = 0, -1

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == self.fail_at:
                raise KeyboardInterrupt
            return F.cross_entropy(z, y, reduction="sum")

    if call.startswith(("sampled", "kfac", "ekfac")):
        return  # no likelihood, so no Fisher
    loss = Failing()
    p = problem(net(), lambda z, y: loss(z, y), reduction="sum")
    p.check()
    for number in (1, 2):
        loss.fail_at = loss.calls + number
        try:
            CALLS[call](p)
        except KeyboardInterrupt:
            continue
        assert call in ("check", "subset", "foof") or number > 1


def test_data_that_fail() -> None:
    class Torn(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if self.tensors[0] is X and index == 4 and torn:
                raise OSError("the file is gone")
            return super().__getitem__(index)

    torn = False
    p = cs.Problem(busy(), CE(), DataLoader(Torn(X, Y), batch_size=2, shuffle=True))
    p.check()
    torn = True
    for call in ("gradient", "hessian", "kfac"):
        with pytest.raises(OSError):
            CALLS[call](p)


def test_training_goes_on_as_without_curvature() -> None:
    """A seeded training run gives the same numbers with and without calls between its steps."""

    def train(look: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        loader = DataLoader(TensorDataset(X.float(), Y), batch_size=4, shuffle=True)
        p = cs.Problem(model, CE(), loader)
        losses = []
        for _ in range(3):
            for x, y in loader:
                optimizer.zero_grad()
                loss = CE()(model(x), y)
                loss.backward()
                if look:
                    cs.ggn(p).blocks["0"].dense()
                    cs.hessian(p) @ torch.ones(p.layout.numel)
                    cs.kfac(p, uncovered="zero", fisher="mc")
                optimizer.step()
                losses.append(float(loss.detach()))
        return losses

    assert train(True) == train(False)


def test_a_graph_of_the_user_survives() -> None:
    """Curvature between forward and backward: parameters keep their versions and storage."""
    model = net()
    loss = CE()(model(X), Y)
    cs.hessian(cs.Problem(model, CE(), (X, Y))).dense()
    loss.backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    CE()(expected(X), Y).backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


# -- the watch itself --------------------------------------------------------------------------


class Sneaky(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3))
        self.items = [1]


CHANGES: dict[str, tuple[Callable[[cs.Problem], Any], str]] = {
    "flag": (lambda p: p.user_model.eval(), "training"),
    "flag of a child": (lambda p: p.user_model[0].eval(), "module '0' (training)"),
    "value": (lambda p: p.user_model[0].weight.data.add_(1), "'0.weight' (values)"),
    "storage": (lambda p: setattr(p.user_model[0].weight, "data", torch.zeros(3, 3)), "storage"),
    "parameter": (
        lambda p: setattr(p.user_model[0], "bias", nn.Parameter(torch.zeros(3))),
        "_parameters",
    ),
    "gradient": (lambda p: setattr(p.user_model[0].bias, "grad", torch.ones(3)), "grad"),
    "requires_grad": (lambda p: p.user_model.requires_grad_(False), "requires_grad"),
    "forward hook": (lambda p: p.user_model.register_forward_hook(print), "_forward_hooks"),
    "backward hook": (lambda p: p.user_model.register_full_backward_hook(print), "_backward_hooks"),
    "tensor hook": (lambda p: p.user_model[0].weight.register_hook(print), "hooks"),
    "attribute": (lambda p: setattr(p.user_model, "extra", 1), "extra"),
    "attribute of a parameter": (
        lambda p: setattr(p.user_model[0].weight, "extra", 1),
        "attributes",
    ),
    "list": (lambda p: p.user_model.items.append(2), "items of items"),
    "buffer": (lambda p: p.user_model.register_buffer("extra", torch.ones(1)), "_buffers"),
    "torch random state": (lambda p: torch.rand(1), "random state of torch"),
    "numpy random state": (lambda p: np.random.rand(), "random state of numpy"),
    "python random state": (lambda p: random.random(), "random state of python"),
    "loader": (lambda p: next(iter(p.data.loader)), "random state"),
    "default dtype": (lambda p: torch.set_default_dtype(torch.float64), "default dtype"),
    "class": (lambda p: setattr(p.user_model[0], "__class__", nn.Identity), "class"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_watch_notices(name: str) -> None:
    change, what = CHANGES[name]
    p = cs.Problem(Sneaky(), CE(), DataLoader(TensorDataset(X.float(), Y), shuffle=True))
    with pytest.raises(AssertionError, match="The call changed") as caught:
        watched(change)(p)
    torch.set_default_dtype(torch.float32)
    assert what in str(caught.value)


def test_the_watch_notices_when_a_call_fails() -> None:
    def half_way(p: cs.Problem) -> None:
        p.user_model.eval()
        raise RuntimeError

    p = cs.Problem(Sneaky(), CE(), (X.float(), Y))
    with pytest.raises(AssertionError, match="training"):
        watched(half_way)(p)


def test_the_watch_is_on() -> None:
    for name in ("hessian", "ggn", "kfac", "verify", "compare", "coverage"):
        assert hasattr(getattr(cs, name), "watched"), name
    with unchanged(cs.Problem(Sneaky(), CE(), (X.float(), Y))):
        pass
