"""All matrices of a problem in one form, and the dense truth of the usual data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import curvscope as cs
from tests.truth import dense_ggn, dense_hessian

from .refusals import CE, X, Y

S, T = nn.Sequential, nn.Tanh
MATRICES: dict[str, Callable[[cs.Problem], Tensor]] = {
    "hessian": lambda p: cs.hessian(p).dense(),
    "hessian blocks": lambda p: joined(cs.hessian(p)),
    "ggn": lambda p: cs.ggn(p).dense(),
    "ggn blocks": lambda p: joined(cs.ggn(p)),
    "empirical fisher": lambda p: cs.empirical_fisher(p).dense(),
    "kfac": lambda p: cs.kfac(p, uncovered="zero").dense(),
    "ekfac": lambda p: cs.ekfac(p, uncovered="zero").dense(),
    "kflr": lambda p: cs.kflr(p, uncovered="zero").dense(),
    "foof": lambda p: cs.foof(p, uncovered="zero").dense(),
    "diagonal_kf": lambda p: cs.diagonal_kf(p, uncovered="zero").dense(),
    "exact_diagonal": lambda p: cs.exact_diagonal(p).dense(),
    "gradient": lambda p: p.gradient(),
}


def joined(op: cs.Operator) -> Tensor:
    return torch.block_diag(*[block.dense() for block in op.blocks.values()])


def truth_of(model: nn.Module, loss: Any = None) -> tuple[Tensor, Tensor]:
    """Dense Hessian and GGN on the usual data."""
    loss, parameters = CE() if loss is None else loss, list(model.parameters())
    z = model(X)
    return dense_hessian(loss(z, Y), parameters), dense_ggn(lambda v: loss(v, Y), z, parameters)


def close(value: Tensor, truth: Tensor, tolerance: float) -> bool:
    return float((value.double() - truth).norm()) <= tolerance * max(float(truth.norm()), 1e-6)


def exact(problem: cs.Problem, hessian: Tensor, ggn: Tensor, tolerance: float = 1e-12) -> None:
    for op, truth in ((cs.hessian(problem), hessian), (cs.ggn(problem), ggn)):
        assert close(op.dense(), truth, tolerance)
        for name, members in op.members.items():
            index = problem.layout.index(members)
            part = truth[index][:, index]
            assert close(op.blocks[name].dense(), part, tolerance), name
