"""Operators that are defined above the operators package, in the same registry."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from curvscope.curvature import empirical_fisher, ggn, hessian
from curvscope.curvature.autograd import AutogradOperator
from curvscope.curvature.whole import WholeOperator
from curvscope.operators import Operator
from curvscope.problem import Problem
from tests.operators.cases import cases_of, randn
from tests.truth import dense_ggn, dense_hessian


def problem() -> tuple[Problem, Tensor, Tensor]:
    """Twelve parameters in two blocks, cross-entropy on six samples; inputs and targets."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 4, bias=False))
    model = model.double()
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p.copy_(randn(*p.shape, seed=seed))
    x, y = randn(6, 2, seed=2), torch.tensor([0, 1, 2, 3, 1, 0])
    return Problem(model, nn.CrossEntropyLoss(), (x, y)), x, y


@cases_of(WholeOperator, slow=True)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    p, x, y = problem()
    parameters, loss = list(p.model.parameters()), nn.CrossEntropyLoss()
    yield "hessian", hessian(p), dense_hessian(loss(p.model(x), y), parameters)
    yield "ggn", ggn(p), dense_ggn(lambda z: loss(z, y), p.model(x), parameters).detach()
    truth = torch.zeros(12, 12, dtype=torch.float64)
    for n in range(6):
        grads = torch.autograd.grad(loss(p.model(x[n : n + 1]), y[n : n + 1]), parameters)
        g = torch.cat([part.flatten() for part in grads])
        truth += torch.outer(g, g) / 6
    yield "empirical Fisher", empirical_fisher(p), truth


@cases_of(AutogradOperator, slow=True)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    p, x, y = problem()
    parameters, loss = list(p.model.parameters()), nn.CrossEntropyLoss()
    op = hessian(p)
    restricted = AutogradOperator(p, op.kind, list(p.params), op.at)
    yield "hessian", restricted, dense_hessian(loss(p.model(x), y), parameters)
