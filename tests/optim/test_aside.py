"""Passes through a model that are not the training's own leave no trace in what is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvscope as cs
from curvscope.optim import KBFGS, KFAC, AdaFisher, AdaHessian

from .kronecker_cases import closure_of, labels, normal, relative, seeded, small

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
        other.backward(loss)
        for p in optimizer.params.values():  # any gradient will do, for its factors
            p.grad = torch.ones_like(p)
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
