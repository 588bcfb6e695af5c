"""The rules for parameters that a method does not define."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: learning rate of each rule where the user gives none
FALLBACK_LR = {"adam": 1e-3, "sgd": 1e-2}
_BETAS = (0.9, 0.999)
_EPS = 1e-8


def adam_update(
    theta: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """One step of Adam (Kingma and Ba 2015, algorithm 1), in place.

    ``m <- 0.9 m + 0.1 g``, ``v <- 0.999 v + 0.001 g^2``,
    ``theta <- theta - lr m^ / (sqrt(v^) + 1e-8)`` with bias-corrected ``m^``, ``v^``; weight decay
    is added to the gradient.
    """
    if weight_decay:
        gradient = gradient.add(theta, alpha=weight_decay)
    m.lerp_(gradient, 1 - _BETAS[0])
    v.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
    m_hat = m / (1 - _BETAS[0] ** step)
    v_hat = v / (1 - _BETAS[1] ** step)
    theta.sub_((lr * m_hat / (v_hat.sqrt() + _EPS)).to(theta.dtype))


def sgd_update(
    theta: Tensor, gradient: Tensor, m: Tensor, *, lr: float, weight_decay: float
) -> None:
    """``m <- 0.9 m + 0.1 g``, ``theta <- theta - lr m``, in place."""
    if weight_decay:
        gradient = gradient.add(theta, alpha=weight_decay)
    m.lerp_(gradient, 1 - _BETAS[0])
    theta.sub_((lr * m).to(theta.dtype))


def fallback_update(
    rule: str,
    theta: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """One step of ``rule``; its state lives in ``state`` under names of its own."""
    dtype = torch.promote_types(theta.dtype, torch.float32)
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    gradient = gradient.to(dtype)
    if "fallback_step" not in state:
        state["fallback_step"] = 0
        state["fallback_m"] = torch.zeros_like(theta, dtype=dtype)
        if rule == "adam":
            state["fallback_v"] = torch.zeros_like(theta, dtype=dtype)
    state["fallback_step"] += 1
    m = state["fallback_m"]
    if rule == "adam":
        v, step = state["fallback_v"], state["fallback_step"]
        adam_update(theta, gradient, m, v, step, lr=lr, weight_decay=weight_decay)
    else:
        sgd_update(theta, gradient, m, lr=lr, weight_decay=weight_decay)
