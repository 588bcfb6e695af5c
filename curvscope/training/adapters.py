"""The curvature that an optimizer of another library believes in, read from its state.

An adaptive method steps by ``-lr P m``; the inverse of ``P`` is the matrix that it takes for the
curvature. For a second moment it is diagonal, ``sqrt(v^) + eps``; Shampoo's is a Kronecker product.
An adapter is one function ``(parameter, state, group) -> Operator | None`` for one parameter, in
its own flattened order; :func:`register_adapter` adds one under a class name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    KroneckerOperator,
    Layout,
    MatrixView,
    Operator,
    Provenance,
)
from ..problem import Problem

Adapter = Callable[[Tensor, Mapping[str, Any], Mapping[str, Any]], Operator | None]

_ADAPTERS: dict[str, Adapter] = {}


def register_adapter(*names: str) -> Callable[[Adapter], Adapter]:
    """Use the decorated function for optimizers whose class (or a base of it) has such a name."""

    def add(adapter: Adapter) -> Adapter:
        _ADAPTERS.update(dict.fromkeys(names, adapter))
        return adapter

    return add


def adapter_of(optimizer: Any) -> Adapter | None:
    """The adapter of an optimizer's class or the nearest of its bases; ``None`` without one."""
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _ADAPTERS:
            return _ADAPTERS[kind.__name__]
    return None


def curvature_of(optimizer: Any, problem: Problem) -> Operator | None:
    """The matrix that an optimizer believes in, over the parameters of the problem.

    ``optimizer.curvature()`` where there is one, else by its adapter; ``None`` where neither is
    there or no step has been taken.
    """
    own = getattr(optimizer, "curvature", None)
    if callable(own):
        op = own()
        return op if op.blocks or not op.uncovered else None
    adapter = adapter_of(optimizer)
    return None if adapter is None else _assembled(optimizer, problem, adapter)


def preconditioner_of(optimizer: Any, problem: Problem) -> Operator | None:
    """The inverse of :func:`curvature_of`, which the optimizer's step is multiplied by."""
    own = getattr(optimizer, "preconditioner", None)
    if callable(own):
        op = own()
        return op if op.blocks or not op.uncovered else None
    op = curvature_of(optimizer, problem)
    return None if op is None else op.inverse()


def _assembled(optimizer: Any, problem: Problem, adapter: Adapter) -> Operator | None:
    names = {id(p): n for n, p in problem.user_model.named_parameters() if n in problem.params}
    found: dict[str, Operator] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if id(p) in names and state:
                op = adapter(p.detach(), state, group)
                if op is not None:
                    found[names[id(p)]] = op
    if not found:
        return None
    title = type(optimizer).__name__
    info = Provenance(
        what=f"{title} curvature",
        route="optimizer state",
        exact=False,
        settings={"damped": True, "uncovered": {}},
    )
    blocks: dict[str, Operator] = {}
    missing: dict[str, str] = {}
    for block, members in problem.blocks.items():
        absent = [name for name in members if name not in found]
        if absent:
            missing[block] = f"{title} has no state for {', '.join(absent)}"
            continue
        layout = problem.layout.restrict(members)
        blocks[block] = _joined([found[name] for name in members], layout, members)
        blocks[block].layout, blocks[block].info = layout, info
    info = info.with_(settings={**info.settings, "uncovered": missing})
    if not blocks:
        return None
    return BlockDiagonalOperator(blocks, problem.layout, problem.blocks, info=info)


def _joined(parts: list[Operator], layout: Layout, members: tuple[str, ...]) -> Operator:
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, DiagonalOperator) for part in parts):
        return DiagonalOperator(torch.cat([part.diagonal() for part in parts]))
    named = dict(zip(members, parts, strict=True))
    for name, part in named.items():
        part.layout = layout.restrict([name])
    return BlockDiagonalOperator(named, layout, {name: (name,) for name in members})


# -- diagonal second moments -------------------------------------------------------------------


def _steps(state: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    return float(state.get("step", group.get("step", 0)))


def _moment(state: Mapping[str, Any], *keys: str) -> Tensor | None:
    value = next((state[key] for key in keys if isinstance(state.get(key), Tensor)), None)
    return None if value is None else value.detach()


def _diagonal(values: Tensor) -> DiagonalOperator:
    return DiagonalOperator(values.reshape(-1).to(torch.promote_types(values.dtype, torch.float32)))


@register_adapter("Adam", "AdamW", "NAdam", "AdaBelief")
def adam(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Operator | None:
    """``sqrt(v / (1 - beta2^t)) + eps``; AMSGrad's maximum, AdaBelief's variance likewise.

    Source: Kingma and Ba 2015, algorithm 1; Zhuang et al. 2020, algorithm 2 for AdaBelief.
    """
    v = _moment(state, "max_exp_avg_sq", "max_exp_avg_var", "exp_avg_sq", "exp_avg_var")
    t = _steps(state, group)
    if v is None or t < 1:
        return None
    if group.get("rectify"):
        return _rectified_moment(v, t, group)
    correction = 1 - float(group["betas"][1]) ** t
    return _diagonal((v / correction).sqrt() + float(group["eps"]))


@register_adapter("EXAdam")
def exadam(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Operator | None:
    """``(sqrt(v~) + eps) / d``, which multiplies ``m / (1 - beta1^t) + g / (1 - beta1^t)``.

    ``v~ = v / (1 - beta2^t) * (1 + beta1^t m^2 / (m^2 + eps))`` and
    ``d = 1 + beta2^t v / (v + eps)`` are the second moment and the factor of both. As the gradient
    is added to its mean, a step is about twice that of Adam by the same matrix. Source: Adly 2024
    (arXiv 2412.20302), algorithm 1.
    """
    m, v, t = _moment(state, "exp_avg"), _moment(state, "exp_avg_sq"), _steps(state, group)
    if m is None or v is None or t < 1:
        return None
    (beta1, beta2), eps = (float(b) for b in group["betas"]), float(group["eps"])
    second = v / (1 - beta2**t) * (1 + beta1**t * m.square() / (m.square() + eps))
    return _diagonal((second.sqrt() + eps) / (1 + beta2**t * v / (v + eps)))


@register_adapter("RAdam")
def radam(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Operator | None:
    """``(sqrt(v) + eps) / (r sqrt(1 - beta2^t))``; none in the first steps, which do not adapt.

    Source: Liu et al. 2020, algorithm 2.
    """
    v, t = _moment(state, "exp_avg_sq"), _steps(state, group)
    return None if v is None or t < 1 else _rectified_moment(v, t, group)


def _rectified_moment(v: Tensor, t: float, group: Mapping[str, Any]) -> Operator | None:
    factor = _rectified(t, group)
    if not factor:
        return None
    correction = math.sqrt(1 - float(group["betas"][1]) ** t)
    return _diagonal((v.sqrt() + float(group["eps"])) / (factor * correction))


def _rectified(t: float, group: Mapping[str, Any]) -> float:
    """RAdam's factor of the adaptive step; 0 where it does not adapt."""
    beta2 = float(group["betas"][1])
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    if length <= 5:
        return 0.0
    above = (length - 4) * (length - 2) * longest
    return math.sqrt(above / ((longest - 4) * (longest - 2) * length))


@register_adapter("RMSprop")
def rmsprop(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Operator | None:
    """``sqrt(v) + eps``; ``sqrt(v - m^2) + eps`` for the centred variant.

    Source: Tieleman and Hinton 2012; Graves 2013 for the centred one.
    """
    v = _moment(state, "square_avg")
    if v is None:
        return None
    mean = _moment(state, "grad_avg") if group.get("centered") else None
    v = v if mean is None else v - mean.square()
    return _diagonal(v.sqrt() + float(group["eps"]))


@register_adapter("Adagrad")
def adagrad(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Operator | None:
    """``sqrt(sum of squares) + eps``, divided by the decay of the learning rate.

    Source: Duchi, Hazan and Singer 2011.
    """
    total, t = _moment(state, "sum"), _steps(state, group)
    if total is None or t < 1:
        return None
    decay = 1 + (t - 1) * float(group.get("lr_decay", 0.0))
    return _diagonal((total.sqrt() + float(group["eps"])) * decay)


# -- Kronecker products ------------------------------------------------------------------------


@register_adapter("Shampoo", "ScalableShampoo", "DistributedShampoo")
def shampoo(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Operator | None:
    """``L^(1/4) (x) R^(1/4)`` of a matrix with statistics ``L`` ``[m, m]`` and ``R`` ``[n, n]``.

    Of a tensor with k axes the product of k factors to the power ``1/2k``, the first one on the
    output side. Read from ``pre_cond_0``, ``pre_cond_1``, ... or ``precond_0``, ... (statistics
    that begin at a multiple of the identity). Source: Gupta, Koren and Singer 2018, algorithms 1
    and 2.
    """
    found = [_moment(state, f"pre_cond_{axis}", f"precond_{axis}") for axis in range(p.ndim)]
    factors = [_power(f, 1 / (2 * p.ndim)) for f in found if f is not None and f.ndim == 2]
    if not factors or [f.shape[0] for f in factors] != list(p.shape):
        return None
    if len(factors) == 1:
        return DenseOperator(factors[0])
    inner = factors[1]
    for factor in factors[2:]:
        inner = torch.kron(inner, factor)
    view = MatrixView(1, factors[0].shape[0], inner.shape[0])
    return KroneckerOperator(factors[0], inner, view, positive_semidefinite=True)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix.detach().double())
    floor = values.abs().max() * torch.finfo(torch.float64).eps
    power = (vectors * values.clamp_min(floor).pow(exponent)) @ vectors.mT
    return ((power + power.mT) / 2).to(torch.promote_types(matrix.dtype, torch.float32))
