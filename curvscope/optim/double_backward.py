"""Gradients and Hessian-vector products of a user's loss, by differentiating it twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import OptionError, ShapeError, UnsupportedLayerError, UnsupportedLossError
from ..modes import apart
from ..problem.wrappers import distributed
from .second_derivatives import FastSecondDerivatives


def check_differentiable(loss: Any, method: str) -> None:
    """Refuse what is not a loss in a graph."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise OptionError(
            f"{method} needs the loss, a tensor of one number, but got {found}. Write: "
            "def closure(): return loss_function(model(inputs), targets); optimizer.step(closure)."
        )
    if not loss.requires_grad or not loss.is_floating_point():
        raise UnsupportedLossError(
            f"The loss has no graph, so {method} cannot differentiate it: return it as it comes "
            "out of the loss function, without detach(), item() or torch.no_grad(), and before "
            "backward(). Where a trainer calls backward() itself, use its manual optimization."
        )


def gradient_and_products(
    loss: Tensor,
    parameters: Sequence[Tensor],
    probes: Sequence[Sequence[Tensor]],
    method: str,
) -> tuple[Sequence[Tensor | None], list[list[Tensor]]]:
    """The gradient, ``None`` where the loss does not depend on a parameter, and ``H z`` per probe.

    Without ``.backward(create_graph=True)``, whose ``.grad`` would keep the graph alive. Frees
    the graph.
    """
    try:
        gradients = torch.autograd.grad(
            loss.reshape(()), list(parameters), create_graph=bool(probes), allow_unused=True
        )
        last = len(probes) - 1
        products = [
            hessian_product(gradients, parameters, z, keep_graph=k < last)
            for k, z in enumerate(probes)
        ]
        return [None if g is None else _dense(g.detach()) for g in gradients], products
    except RuntimeError as error:
        text = str(error)
        if "second time" in text or "have already been freed" in text:
            raise OptionError(
                f"The graph of the loss is gone. {method}'s closure returns the loss and does not "
                "call backward(); outside a closure call optimizer.backward(loss)."
            ) from error
        if "not implemented" in text or "double backward" in text or "twice" in text:
            raise UnsupportedLayerError(
                f"A layer of the model has no second derivative ({text.splitlines()[0]}). "
                "Attention has one under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), and a "
                'compiled model under torch.compiler.set_stance("force_eager"): step(closure) '
                "evaluates its closure under both."
            ) from error
        raise


def hessian_product(
    gradients: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    keep_graph: bool = False,
) -> list[Tensor]:
    """``H z`` by differentiating ``gradients^T z``; zero where no gradient depends on them."""
    pairs = [(g, z) for g, z in zip(gradients, vectors) if g is not None and g.requires_grad]
    if not pairs:
        return [torch.zeros_like(p) for p in parameters]
    with apart():
        found = torch.autograd.grad(
            [g for g, _ in pairs],
            list(parameters),
            [z for _, z in pairs],
            allow_unused=True,
            retain_graph=keep_graph,
        )
    return [torch.zeros_like(p) if h is None else _dense(h) for h, p in zip(found, parameters)]


def _dense(gradient: Tensor) -> Tensor:
    """Embeddings may have sparse ones."""
    return gradient.to_dense() if gradient.is_sparse else gradient


@contextmanager
def twice_differentiable(model: nn.Module, wrapper: nn.Module) -> Iterator[None]:
    """Kernels that have a second derivative, and a cheap one, while the forward pass lasts.

    ``wrapper`` is the ``DistributedDataParallel`` around the model, where there is one: it must not
    wait for gradients in ``.grad`` that will never come.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(FastSecondDerivatives())
        if "torch._dynamo" in sys.modules:  # compiled code has none, so it runs uncompiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        parallel = distributed(wrapper)
        if parallel is not None:
            stack.enter_context(parallel.no_sync())
        yield


def rademacher(parameters: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Independent +1 and -1 with equal probability, in the parameters' shapes.

    Eight signs are taken from every random byte: several times faster than one draw per sign.
    """
    sizes = [p.numel() for p in parameters]
    device = parameters[0].device
    drawn = torch.randint(
        256, (-(-sum(sizes) // 8), 1), dtype=torch.uint8, device=device, generator=generator
    )
    masks = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=device)
    bits = drawn.bitwise_and(masks).ne_(0).flatten()[: sum(sizes)]
    signs = bits.to(torch.int8).mul_(2).sub_(1)
    return [
        part.to(dtype=p.dtype, device=p.device).view(p.shape)
        for part, p in zip(signs.split(sizes), parameters)
    ]


def fitting(vectors: Any, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A user's probes, refused unless there is one of its shape for every parameter."""
    found = list(vectors) if isinstance(vectors, list | tuple) else None
    if found is None or [getattr(v, "shape", None) for v in found] != [p.shape for p in parameters]:
        raise ShapeError(
            "probes(parameters) must return a list of one tensor per parameter, of the same shape: "
            "lambda parameters: [torch.randn_like(p) for p in parameters]."
        )
    return [v.detach().to(dtype=p.dtype, device=p.device) for v, p in zip(found, parameters)]
