"""Backward passes whose gradients no step will have: adversarial examples, batches left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope import errors
from curvscope.optim import KBFGS, KFAC, AdaFisher, AdaHessian

from .kronecker_cases import labels, normal, seeded

MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "K-BFGS": lambda model: KBFGS(model, 0.05, 0.3),
    "K-FAC, exact": lambda model: KFAC(model, 0.05, 0.3, fisher="exact"),
    "K-FAC, named": lambda model: KFAC(
        model, 0.05, 0.3, fisher="exact", loss=nn.CrossEntropyLoss()
    ),
    "K-FAC, empirical": lambda model: KFAC(model, 0.05, 0.3, fisher="empirical"),
    "AdaFisher": lambda model: AdaFisher(model, update_every=1),
}
WITHOUT_CLOSURE = ["K-FAC, named", "K-FAC, empirical", "AdaFisher"]


def net() -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return normal(8, 5, seed=seed), labels(8, seed=seed)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def adversarial(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor, how: str) -> Tensor:
    """The inputs moved along the sign of the loss's derivative in them."""
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    if how == "grad":
        (gradient,) = torch.autograd.grad(loss, x)
    else:
        loss.backward()
        assert x.grad is not None
        gradient = x.grad
        (optimizer if how == "optimizer.zero_grad" else model).zero_grad()
    return (x + 0.1 * gradient.sign()).detach()


CASES = [(n, h) for n in MAKERS for h in ("optimizer.zero_grad", "model.zero_grad", "grad")]
CASES = [c for c in CASES if c[0] != "K-BFGS" or c[1] == "optimizer.zero_grad"]


@pytest.mark.parametrize("name, how", CASES, ids=[f"{n}, {h}" for n, h in CASES])
def test_adversarial_training_learns_from_the_adversarial_pass_alone(name: str, how: str) -> None:
    """Against a run whose adversarial inputs come from elsewhere."""
    model, twin = net(), net()
    optimizer, other = MAKERS[name](model), MAKERS[name](twin)
    for k in range(3):
        x, y = batch(k)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(adversarial(optimizer, model, x, y, how)), y)
            loss.backward()
            return loss

        def plain(x: Tensor = x, y: Tensor = y) -> Tensor:
            other.zero_grad()
            copy = net()
            copy.load_state_dict(twin.state_dict())
            loss = F.cross_entropy(twin(adversarial(None, copy, x, y, "grad")), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        other.step(plain)
    assert equal(model, twin)


@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
@pytest.mark.parametrize("again", [False, True], ids=["dropped", "accumulated"])
def test_a_batch_that_is_left_out_does_not_count(name: str, again: bool) -> None:
    """``model.zero_grad()`` in place of a step; without it the pass counts."""
    model, twin = net(), net()
    optimizer, other = MAKERS[name](model), MAKERS[name](twin)
    for k in range(3):
        for seed in (10 + k, k):
            x, y = batch(seed)
            F.cross_entropy(model(x), y).backward()
            if seed >= 10 and not again:
                model.zero_grad()
            if seed < 10 or again:
                F.cross_entropy(twin(x), y).backward()
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    assert equal(model, twin)


def test_gradients_that_are_added_up_by_hand_are_one_batch() -> None:
    """``torch.autograd.grad`` leaves no ``.grad``, and its passes count all the same."""
    model, twin = net(), net()
    optimizer, other = AdaFisher(model, update_every=1), AdaFisher(twin, update_every=1)
    for k in range(3):
        x, y = batch(k)
        parts = [
            torch.autograd.grad(F.cross_entropy(model(x[i]), y[i]), list(model.parameters()))
            for i in (slice(4), slice(4, 8))
        ]
        for p, *g in zip(model.parameters(), *parts, strict=True):
            p.grad = g[0] + g[1]
        for i in (slice(4), slice(4, 8)):
            F.cross_entropy(twin(x[i]), y[i]).backward()
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    assert equal(model, twin)


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_without_a_layer_that_the_method_covers(name: str) -> None:
    """All of the method would otherwise be its fallback without a word."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(normal(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    model = Own()
    optimizer = MAKERS[name](model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = batch(0)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="covers none of the model's layers") as told:
        optimizer.step(closure)
    assert told[0].filename == __file__
    assert {row["rule"] for row in optimizer.coverage()} == {"adam"}


def test_a_trainer_that_calls_backward_itself_is_told_of() -> None:
    model = net()
    optimizer = AdaHessian(model)

    def closure() -> Tensor:
        x, y = batch(0)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    with pytest.raises(errors.UnsupportedLossError, match="manual optimization"):
        optimizer.step(closure)


@pytest.mark.parametrize("memory", [None, 3])
def test_gradients_from_before_the_closure_are_named(memory: int | None) -> None:
    """Accumulated outside of it: K-BFGS would see the last part only."""
    model, (x, y) = net(), batch(0)
    optimizer = KBFGS(model, 0.05, 0.3, memory=memory)

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x[4:]), y[4:]) / 2
        loss.backward()
        return loss

    (F.cross_entropy(model(x[:4]), y[:4]) / 2).backward()
    with pytest.warns(UserWarning, match="added to gradients from before it: K-BFGS"):
        optimizer.step(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for clear in (model.zero_grad, optimizer.zero_grad):
            for to_none in (True, False):

                def cleared(clear: Any = clear, to_none: bool = to_none) -> Tensor:
                    clear(set_to_none=to_none)
                    return closure()

                optimizer.step(cleared)
        optimizer.zero_grad()
        optimizer.step(closure)
