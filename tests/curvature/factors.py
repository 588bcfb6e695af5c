"""Kronecker factors by their definition, written with hooks and loops over terms and labels.

Nothing here uses the package. Rows: ``a [N, T, g, i]`` (with a 1 appended for a bias) and output
gradients ``[N, T, g, o]`` of the layers of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .reference import _rows, likelihood, term_weights

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Uses:
    """Inputs and outputs of every call of one layer in one forward pass."""

    module: nn.Module
    inputs: list[Tensor]
    outputs: list[Tensor]


def watch(model: nn.Module, x: Any) -> tuple[Tensor, dict[str, Uses]]:
    """Outputs of the model and what went through its Linear and convolution layers."""
    uses: dict[str, Uses] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, *CONV)):
            entry = uses.setdefault(name, Uses(module, [], []))

            def hook(_m: Any, inputs: Any, output: Tensor, entry: Uses = entry) -> None:
                entry.inputs.append(inputs[0].detach())
                entry.outputs.append(output)

            handles.append(module.register_forward_hook(hook))
    outputs = model(x)
    for handle in handles:
        handle.remove()
    return outputs, uses


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """Input rows ``[N, T, g, i]`` of one call, by slicing: one window at a time."""
    if isinstance(module, nn.Linear):
        return x.reshape(x.shape[0], -1, 1, x.shape[-1])
    pads = [p for size in reversed(module.padding) for p in (size, size)]
    x = F.pad(x, pads)
    dims = x.ndim - 2
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    counts = [
        (x.shape[2 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(dims)
    ]
    windows = []
    for position in torch.cartesian_prod(*[torch.arange(c) for c in counts]).reshape(-1, dims):
        part = x
        for d in range(dims):
            start = int(position[d]) * stride[d]
            index = start + dilation[d] * torch.arange(kernel[d])
            part = part.index_select(2 + d, index)
        windows.append(part.reshape(len(x), module.groups, -1))
    return torch.stack(windows, 1)


def output_rows(module: nn.Module, g: Tensor) -> Tensor:
    """``[N, T, g, o]`` of a gradient in the layer's output."""
    if isinstance(module, nn.Linear):
        return g.reshape(g.shape[0], -1, 1, g.shape[-1])
    return g.reshape(*g.shape[:2], -1).mT.reshape(
        g.shape[0], -1, module.groups, g.shape[1] // module.groups
    )


def with_one(module: nn.Module, a: Tensor) -> Tensor:
    if module.bias is None:
        return a
    return torch.cat([a, torch.ones_like(a[..., :1])], -1)


def enumerate_labels(loss: Any, z: Tensor, y: Tensor) -> Iterator[tuple[float, Tensor]]:
    """``(weight, -log p(label))`` for every term and label: the exact expectation."""
    kind, c = likelihood(loss), term_weights(loss, z, y).detach()
    if kind == "softmax":
        logp = _rows(z).log_softmax(-1)
        for m, weight in enumerate(c.reshape(-1)):
            for value in logp[m]:
                yield float(weight * value.detach().exp()), -value
    elif kind == "bernoulli":
        for value, weight in zip(z.reshape(-1), c.reshape(-1), strict=True):
            for logp in (F.logsigmoid(value), F.logsigmoid(-value)):
                yield float(weight * logp.detach().exp()), -logp
    else:
        for value in z.reshape(-1):
            for node in (-1.0, 1.0):
                yield 0.5, (value.detach() + node * 0.5**0.5 - value) ** 2


def gradients(value: Tensor, entry: Uses) -> list[Tensor]:
    found = torch.autograd.grad(value, entry.outputs, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(z) if g is None else g for g, z in zip(found, entry.outputs, strict=True)
    ]


@dataclass
class Factors:
    G: Tensor  # [g, o, o]
    A: Tensor  # [g, i, i]
    moments: Tensor  # sum of outer products of vec(sum_t g a^T): the exact block, in the view


def factors(
    model: nn.Module, loss: Any, batches: Any, scale: float, sharing: str
) -> dict[str, Factors]:
    """K-FAC's factors with the exact Fisher, layer by layer."""
    sums: dict[str, list[Any]] = {}
    for x, y in batches:
        z, uses = watch(model, x)
        for name, entry in uses.items():
            module = entry.module
            a = torch.cat([with_one(module, patches(module, v)) for v in entry.inputs], 1)
            own = sums.setdefault(name, [0, 0, 0, 0])
            rows = a.mean(1, keepdim=True) if sharing == "reduce" else a
            own[0] = own[0] + torch.einsum("ntgi,ntgj->gij", rows, rows)
            own[1] += rows.shape[0] * rows.shape[1]
            for weight, value in enumerate_labels(loss, z, y):
                g = torch.cat([output_rows(module, v) for v in gradients(value, entry)], 1)
                v = torch.einsum("ntgo,ntgi->ngoi", g, a).flatten(1)
                own[3] = own[3] + scale * weight * v.T @ v
                g = g.sum(1, keepdim=True) if sharing == "reduce" else g
                own[2] = own[2] + scale * weight * torch.einsum("ntgo,ntgp->gop", g, g)
    return {n: Factors(G, A / rows, block) for n, (A, rows, G, block) in sums.items()}


def empirical_factors(
    model: nn.Module, loss: Any, batches: Any, scale: float, terms: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """``(G, A)`` with the observed labels: ``g_nt`` of sample n's own summed (scaled) terms."""
    sums: dict[str, list[Any]] = {}
    for x, y in batches:
        z, uses = watch(model, x)
        losses, c = terms(loss, z, y)
        scaled = torch.where(c > 0, losses / c.clamp_min(1e-300).sqrt(), 0.0)
        per_sample = scaled.reshape(len(x), -1).sum(1)
        for name, entry in uses.items():
            module = entry.module
            a = torch.cat([with_one(module, patches(module, v)) for v in entry.inputs], 1)
            own = sums.setdefault(name, [0, 0, 0])
            own[0] = own[0] + torch.einsum("ntgi,ntgj->gij", a, a)
            own[1] += a.shape[0] * a.shape[1]
            for value in per_sample:
                g = torch.cat([output_rows(module, v) for v in gradients(value, entry)], 1)
                own[2] = own[2] + scale * torch.einsum("ntgo,ntgp->gop", g, g)
    return {n: (G, A / rows) for n, (A, rows, G) in sums.items()}


def vector_order(module: nn.Module) -> Tensor:
    """Where each entry of the view ``[g, o, i(+1)]`` lies in ``[weight.flatten(), bias]``."""
    weight = torch.arange(module.weight.numel()).reshape(module.weight.shape[0], -1)
    if module.bias is not None:
        bias = module.weight.numel() + torch.arange(len(module.bias))
        weight = torch.cat([weight, bias.unsqueeze(1)], 1)
    return weight.reshape(-1)


def dense(module: nn.Module, blocks: list[Tensor]) -> Tensor:
    """A block-diagonal matrix over groups, put into the order of the parameters."""
    order = vector_order(module)
    matrix = torch.block_diag(*blocks)
    result = torch.empty_like(matrix)
    result[order.unsqueeze(1), order] = matrix
    return result


def kron(module: nn.Module, G: Tensor, A: Tensor) -> Tensor:
    return dense(module, [torch.kron(g, a) for g, a in zip(G, A, strict=True)])
