"""Dense truth by ``torch.autograd``, column by column, independent of the package's own code."""

from __future__ import annotations

import torch
from torch import Tensor


def flat_grad(value: Tensor, params: list[Tensor], **options) -> Tensor:
    grads = torch.autograd.grad(value, params, allow_unused=True, **options)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(params, grads, strict=True)
        ]
    )


def jacobian_rows(vector: Tensor, params: list[Tensor]) -> Tensor:
    """``d vector / d params`` as ``[len(vector), P]``, one backward pass per row."""
    rows = [flat_grad(v, params, retain_graph=True) for v in vector.reshape(-1)]
    return torch.stack(rows)


def dense_hessian(value: Tensor, params: list[Tensor]) -> Tensor:
    """Hessian of a scalar by double backward."""
    gradient = flat_grad(value, params, create_graph=True)
    rows = []
    for g in gradient:
        if g.requires_grad:
            rows.append(flat_grad(g, params, retain_graph=True))
        else:
            rows.append(torch.zeros_like(gradient))
    return torch.stack(rows).detach()


def dense_ggn(loss, outputs: Tensor, params: list[Tensor]) -> Tensor:
    """``J^T (d^2 loss/dz^2) J`` for the scalar ``loss(outputs)``."""
    z = outputs.detach().requires_grad_()
    middle = dense_hessian(loss(z), [z])
    jacobian = jacobian_rows(outputs, params)
    return jacobian.T @ middle @ jacobian


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm().clamp_min(1e-300))
