"""Cotangents of the outputs: what is sent backwards to get Gauss-Newton and Fisher matrices.

A cotangent is a tensor of the outputs' shape. One backward pass turns it into a gradient in the
parameters for every sample at once; the outer products of these gradients are the matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedLayerError, UnsupportedLossError
from .losses import Loss


def require_differentiable(first: Iterable[Tensor | None]) -> None:
    """Refuse gradients that autograd would silently take for constant somewhere.

    The mark ``once_differentiable`` of a custom ``autograd.Function`` raises only if the way
    through it leads on to a parameter; otherwise its second derivatives are zero, without a word.
    """
    seen: set[Any] = set()
    stack = [value.grad_fn for value in first if value is not None]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise UnsupportedLayerError(
                "A custom torch.autograd.Function of the model is marked once_differentiable: "
                "autograd takes its second derivatives for zero, without a word. Write its "
                "backward with differentiable operations and leave out the mark."
            )
        stack.extend(follower for follower, _ in node.next_functions)


def has_no_derivative(error: RuntimeError) -> bool:
    """Whether torch says that an operation has no (second) derivative."""
    text = str(error)
    return "differentiate twice" in text or (
        "derivative for" in text and "is not implemented" in text
    )


def output_hessian_product(loss: Loss, outputs: Tensor, targets: Any, vectors: Tensor) -> Tensor:
    """``(d^2 total / dz^2) vectors`` for a tensor of the outputs' shape.

    In closed form where the loss has one, else by autograd.
    """
    closed = loss.hessian_product(outputs.detach(), targets, vectors)
    if closed is not None:
        return closed
    z = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss.total(z, targets), z, create_graph=True)
    require_differentiable([gradient])
    if gradient.grad_fn is None and not gradient.requires_grad:
        return torch.zeros_like(vectors)
    try:
        (product,) = torch.autograd.grad(gradient, z, vectors, allow_unused=True)
    except RuntimeError as error:
        if not has_no_derivative(error):
            raise
        raise UnsupportedLossError(
            f"The loss {loss.name} uses an operation without second derivative ({error}), which "
            "the GGN and the Hessian need. cs.empirical_fisher does not; or write the loss with "
            "functions that torch differentiates twice."
        ) from error
    return torch.zeros_like(vectors) if product is None else product


def root_cotangents(
    loss: Loss, outputs: Tensor, targets: Any, samples: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield ``(u, sign)``: cotangents of the outputs' shape whose outer products, sample by
    sample, sum to the Hessian of the sample's loss in its outputs.

    ``sign`` is ``None`` for a positive semi-definite loss, else ``[N]`` in {-1, 0, 1}. The number
    of pairs is (terms per sample) x (outputs per term); for losses without closed form the
    Hessian per sample comes from autograd and its roots from an eigen-decomposition.
    """
    z = outputs.detach()
    if loss.likelihood is None:
        yield from _generic_roots(loss, z, targets, samples)
        return
    terms = loss.terms(z, samples)
    root = loss.weights(z, targets, samples).clamp_min(0).sqrt()
    # [N, T, C, R], scaled by sqrt(c_m)
    columns = loss.term_roots(terms) * root[..., None, None]
    for t in range(terms.shape[1]):
        for r in range(columns.shape[-1]):
            u = torch.zeros_like(terms)
            u[:, t] = columns[:, t, :, r]
            yield loss.unterms(u, z), None


def _generic_roots(
    loss: Loss, z: Tensor, targets: Any, samples: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    flat = z.reshape(samples, -1)
    size = flat.shape[1]
    columns = []
    for j in range(size):
        unit = torch.zeros_like(flat)
        unit[:, j] = 1.0
        product = output_hessian_product(loss, z, targets, unit.reshape(z.shape))
        columns.append(product.reshape(samples, size))
    hessians = torch.stack(columns, -1).to(torch.promote_types(z.dtype, torch.float32))
    values, vectors = torch.linalg.eigh((hessians + hessians.mT) / 2)
    tiny = values.abs().amax(-1, keepdim=True) * torch.finfo(z.dtype).eps * size
    signs = torch.where(values.abs() > tiny, values.sign(), torch.zeros_like(values))
    roots = vectors * values.abs().sqrt().unsqueeze(-2)
    for j in range(size):
        if bool(signs[:, j].any()):
            yield roots[:, :, j].reshape(z.shape).to(z.dtype), signs[:, j]


def sampled_cotangents(
    loss: Loss, outputs: Tensor, targets: Any, samples: int, generator: torch.Generator
) -> Tensor:
    """Gradient of ``-log p(y)`` in the outputs at one drawn label per term, times ``sqrt(c_m)``."""
    z = outputs.detach()
    terms = loss.terms(z, samples)
    scores = loss.term_scores(terms, generator)
    root = loss.weights(z, targets, samples).clamp_min(0).sqrt()
    return loss.unterms(scores * root.unsqueeze(-1), z)


def observed_cotangents(
    loss: Loss, outputs: Tensor, targets: Any, samples: int, *, raw: bool = False
) -> Tensor:
    """Gradient of each term at the observed label, scaled by ``1/sqrt(c_m)`` unless ``raw``.

    With this scaling a class of weight 2 gives the empirical Fisher of duplicated samples.
    """
    z = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss.total(z, targets), z)
    if raw or loss.likelihood is None:
        return gradient
    c = loss.weights(z.detach(), targets, samples)
    scale = torch.where(c > 0, c.clamp_min(torch.finfo(c.dtype).tiny).rsqrt(), torch.zeros_like(c))
    return loss.unterms(loss.terms(gradient, samples) * scale.unsqueeze(-1), z)


def scaled_terms(loss: Loss, outputs: Tensor, targets: Any, samples: int, per: str) -> list[Tensor]:
    """Cotangents whose outer products, sample by sample, make up the empirical Fisher.

    ``per="sample"``: one, with all terms of a sample together; ``per="term"``: one for every
    position of a term in its sample, zero elsewhere. ``per="raw"``: the samples' own gradients.
    """
    whole = observed_cotangents(loss, outputs, targets, samples, raw=per == "raw")
    if per in ("sample", "raw"):
        return [whole]
    terms = loss.terms(whole, samples)
    parts = []
    for t in range(terms.shape[1]):
        u = torch.zeros_like(terms)
        u[:, t] = terms[:, t]
        parts.append(loss.unterms(u, whole))
    return parts
