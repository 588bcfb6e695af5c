"""Forward-mode derivatives through the live parameters, offered only where reverse mode agrees.

Forward mode gives ``J v`` in one pass, without the graph of a backward pass. For some layers it is
silently wrong in today's torch (second derivatives of affine LayerNorm), for others not
implemented, so nothing here is used before it was compared with two backward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn


@contextmanager
def moving(
    model: nn.Module, parameters: Sequence[Tensor], direction: Sequence[Tensor]
) -> Iterator[None]:
    """Inside, the parameters of the model move along ``direction``, under all their names.

    The modules' entries are exchanged for dual tensors and put back; the parameters themselves
    stay leaves that gradients can be asked for.
    """
    exchanged: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    with forward_ad.dual_level():
        duals = {
            id(p): forward_ad.make_dual(p, v.to(p.dtype))
            for p, v in zip(parameters, direction, strict=True)
        }
        try:
            for module in model.modules():
                table = module._parameters
                for name, parameter in list(table.items()):
                    if parameter is not None and id(parameter) in duals:
                        exchanged.append((table, name, parameter))
                        table[name] = duals[id(parameter)]  # type: ignore[assignment]
            yield
        finally:
            for table, name, parameter in exchanged:
                table[name] = parameter


def tangent_of(value: Tensor) -> tuple[Tensor, Tensor]:
    """The value and its derivative along the direction, inside :func:`moving`."""
    primal, tangent = forward_ad.unpack_dual(value)
    return primal, torch.zeros_like(primal) if tangent is None else tangent.detach()


def linearised(
    model: nn.Module,
    run: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    graph: bool,
) -> tuple[Tensor, Tensor]:
    """``z = run()`` and ``J v``; with ``graph`` the gradient of ``z`` can still be asked for."""
    with torch.set_grad_enabled(graph), moving(model, parameters, direction):
        return tangent_of(run())


def gradient_along(
    model: nn.Module,
    run: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
) -> list[Tensor | None]:
    """The derivative of the gradient of ``run()`` along ``direction``: forward over reverse."""
    with moving(model, parameters, direction):
        value = run()
        if not value.requires_grad:
            return [None for _ in parameters]
        gradients = torch.autograd.grad(value, list(parameters), allow_unused=True)
        return [None if g is None else tangent_of(g)[1] for g in gradients]
