"""Passes through a model that are not the training's own leave no trace in what is learned."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope.modes import aside, looks_away
from curvscope.optim import KBFGS, KFAC, AdaFisher, AdaHessian

from .every_method import METHODS, Method, each_method
from .kronecker_cases import closure_of, flat, labels, normal, relative, seeded, small

X, Y = normal(8, 5), labels(8)
OTHERS = normal(12, 5, seed=9), labels(12, seed=9)

WATCHING: dict[str, Callable[[nn.Module], Any]] = {
    "AdaFisher": lambda m: AdaFisher(m, update_every=1),
    "K-FAC, empirical": lambda m: KFAC(m, 0.1, 0.1, fisher="empirical"),
    "K-FAC, named loss": lambda m: KFAC(m, 0.1, 0.1, fisher="exact", loss=nn.CrossEntropyLoss()),
}
ANALYSES: dict[str, Callable[[cs.Problem], Any]] = {
    "hessian": lambda p: cs.hessian(p).dense(),
    "ggn": lambda p: cs.ggn(p).diagonal(),
    "kfac": cs.kfac,
    "empirical": lambda p: cs.empirical_fisher(p) @ torch.ones(57, dtype=torch.float64),
    "hutchinson": lambda p: cs.hutchinson_diagonal(p, probes=2),
}


@pytest.mark.parametrize("make", WATCHING.values(), ids=WATCHING)
def test_curvature_may_be_computed_in_the_middle_of_a_step(make: Any) -> None:
    found = []
    for asked in (False, True):
        model = small()
        optimizer = make(model)
        problem = cs.Problem(model, nn.CrossEntropyLoss(), OTHERS)
        optimizer.zero_grad()
        for moment in range(3):
            if moment == 1:
                loss = F.cross_entropy(model(X), Y)
            elif moment == 2:
                loss.backward()
            for analysis in ANALYSES.values() if asked else ():
                analysis(problem)
        optimizer.step()
        found.append({b: optimizer.factors(b) for b in optimizer.blocks})
    plain, asked_for = found
    for block, own in plain.items():
        assert all(torch.equal(asked_for[block][name], value) for name, value in own.items())


def test_other_threads_and_abandoned_passes_blind_nobody() -> None:
    def forever() -> Iterator[None]:
        with aside():
            yield

    inside, outside = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with aside():
            inside.set()
            outside.wait()

    me, thread = object(), threading.Thread(target=elsewhere)
    thread.start()
    inside.wait()
    assert not looks_away(me)
    first, second = forever(), forever()
    next(first), next(second)
    assert looks_away(me)
    first.close()  # not the one that began last
    with aside(me):
        assert not looks_away(me)
    assert looks_away(me)
    second.close()
    assert not looks_away(me)
    outside.set()
    thread.join()


BESIDE: dict[str, Callable[..., Any]] = {
    "K-BFGS": lambda m, p: KBFGS(m, 0.1, 0.3, params=p),
    "K-FAC": lambda m, p: KFAC(m, 0.1, 0.3, fisher="exact", params=p),
    "K-FAC, named loss": lambda m, p: KFAC(m, 0.1, 0.3, loss=nn.CrossEntropyLoss(), params=p),
    "AdaHessian": lambda m, p: AdaHessian(m, 0.1, params=p, n_probes=2),
}


@pytest.mark.parametrize("make", BESIDE.values(), ids=BESIDE)
def test_extra_passes_of_another_optimizer_are_no_samples(make: Any) -> None:
    """The other one's second pass, sampled labels and second derivatives, on the same model."""
    alone = small()
    expected = AdaFisher(alone, update_every=1, params="2")
    F.cross_entropy(alone(X), Y).backward()
    expected.step()
    model = small()
    other, optimizer = make(model, "0"), AdaFisher(model, update_every=1, params="2")
    optimizer.zero_grad()
    if isinstance(other, AdaHessian):
        loss = F.cross_entropy(model(X), Y)
        loss.backward(inputs=list(optimizer.params.values()), retain_graph=True)
        other.backward(loss)
        other.step()
    else:
        other.step(closure_of(other, model, X, Y))
    optimizer.step()
    for name, value in expected.factors("2").items():
        assert relative(optimizer.factors("2")[name], value) < 1e-12, name


def test_a_warm_start_beside_another_optimizer() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    watching = AdaFisher(model, update_every=1, params="2")
    KFAC(model, 0.1, 0.3, params="0").warm_start([OTHERS], loss=F.cross_entropy)
    KBFGS(model, 0.1, 0.3, params="0").warm_start([OTHERS])
    assert not watching._collector.sums


# -- what a closure differentiates besides its loss ------------------------------------------------


def by_autograd(model: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(z.sum(), x, create_graph=True)[0]


def by_transforms(model: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda one: model(one).sum()))(x)


def by_forward_mode(model: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]


SLOPES = [by_autograd, by_transforms, by_forward_mode]


@each_method
@pytest.mark.parametrize("slope", SLOPES, ids=[s.__name__ for s in SLOPES])
@pytest.mark.filterwarnings("ignore:K-FAC reads a part")
def test_derivatives_in_the_inputs_are_no_gradients_of_the_loss(method: Method, slope: Any) -> None:
    """As in a gradient penalty, or an equation: here with weight 0, so that nothing may change."""
    found = []
    for weight in (None, 0.0):
        model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
        optimizer = method.build(model)
        for k in range(3):
            x, y = normal(8, 5, seed=k).requires_grad_(), labels(8, seed=k)

            def loss(z: Tensor, y: Tensor, x: Any = x, model: Any = model, w: Any = weight) -> Any:
                value = F.cross_entropy(z, y)
                return value if w is None else value + w * slope(model, x, z).square().sum()

            optimizer.step(method.closure(optimizer, model, x, y, loss))
        found.append(flat(model))
    assert relative(found[1], found[0]) < 1e-12


@each_method
def test_gradients_outside_the_model_are_those_of_one_pass(method: Method) -> None:
    """An encoder that another optimizer trains, and inputs that require a gradient."""
    if not method.calls_backward:
        return
    model, encoder = small(), seeded(lambda: nn.Linear(5, 5))
    optimizer, x = method.build(model), X.clone().requires_grad_()
    outside = [*encoder.parameters(), x]
    expected = torch.autograd.grad(F.cross_entropy(model(encoder(x)), Y), outside)
    for tensor in outside[1:]:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step(method.closure(optimizer, lambda x: model(encoder(x)), x, Y))  # type: ignore[arg-type]
    for k, (tensor, gradient) in enumerate(zip(outside, expected, strict=True)):
        assert tensor.grad is not None
        assert relative(tensor.grad, gradient + bool(k)) < 1e-12


def test_two_losses_of_one_pass() -> None:
    """``retain_graph=True``: the factor is that of their sum."""
    found = []
    for apart in (False, True):
        model = small()
        optimizer = KFAC(model, 0.0, 0.1, fisher="exact")

        def closure(apart: bool = apart, model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            z = model(X)
            losses = F.cross_entropy(z, Y), 0.3 * F.mse_loss(z, torch.ones_like(z))
            if apart:
                losses[0].backward(retain_graph=True)
                losses[1].backward()
            else:
                sum(losses).backward()
            return sum(losses)

        optimizer.step(closure)
        found.append(optimizer.factors("0"))
    assert all(relative(found[1][name], value) < 1e-12 for name, value in found[0].items())


@pytest.mark.parametrize("name", ["K-BFGS", "K-FAC, empirical", "AdaFisher"])
def test_a_method_that_sees_no_layer_says_so(name: str) -> None:
    """As of a model that was compiled before: the whole method would be its fallback."""
    method = next(m for m in METHODS if m.name == name)
    model = small()
    optimizer = method.build(model)
    closure = method.closure(optimizer, torch.func.vmap(model), X, Y)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"None of the layers .* torch.compiler.reset"):
        optimizer.step(closure)
    optimizer.step(closure)  # once is enough
