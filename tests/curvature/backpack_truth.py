"""Dense truth by ``torch.autograd``, row by row and sample by sample, for tiny models.

Nothing here knows BackPACK or curvscope's own algorithms: only ``torch.autograd.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Total = Callable[[Tensor, Tensor], Tensor]  # unnormalised loss of a batch


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in zip(tensors, like)]
    )


def gradient(value: Tensor, wrt: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(p).reshape(-1) for p in wrt])
    parts = torch.autograd.grad(
        value, wrt, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    return flat(parts, wrt)


def dense_hessian(
    model: nn.Module, total: Total, x: Tensor, y: Tensor, wrt: Sequence[Tensor]
) -> Tensor:
    """``d^2 total / d theta^2`` ``[P, P]``, one row at a time."""
    first = gradient(total(model(x), y), wrt, create_graph=True)
    return torch.stack([gradient(entry, wrt) for entry in first])


def output_hessian(total: Total, z: Tensor, y: Tensor) -> Tensor:
    """Hessian of the loss in the outputs of one sample ``[c, c]``."""
    z = z.detach().requires_grad_()
    (first,) = torch.autograd.grad(total(z, y), z, create_graph=True)
    return torch.stack([gradient(entry, [z]) for entry in first.reshape(-1)])


def sample_jacobians(model: nn.Module, x: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
    """``[c, P]`` for every sample, each from a forward pass of its own."""
    result = []
    for n in range(len(x)):
        outputs = model(x[n : n + 1]).reshape(-1)
        result.append(torch.stack([gradient(entry, wrt) for entry in outputs]))
    return result


def sample_ggns(
    model: nn.Module, total: Total, x: Tensor, y: Tensor, wrt: Sequence[Tensor]
) -> Tensor:
    """``J_n^T H_n J_n`` for every sample ``[N, P, P]``; targets have one row per sample."""
    parts = []
    for n, jacobian in enumerate(sample_jacobians(model, x, wrt)):
        outputs = model(x[n : n + 1])
        parts.append(jacobian.T @ output_hessian(total, outputs, y[n : n + 1]) @ jacobian)
    return torch.stack(parts)


def dense_ggn(
    model: nn.Module, total: Total, x: Tensor, y: Tensor, wrt: Sequence[Tensor]
) -> Tensor:
    """``sum_n J_n^T H_n J_n`` ``[P, P]``."""
    return sample_ggns(model, total, x, y, wrt).sum(0)


def sample_gradients(
    model: nn.Module, total: Total, x: Tensor, y: Tensor, wrt: Sequence[Tensor]
) -> Tensor:
    """Gradient of every sample's own terms ``[N, P]``, each from a forward pass of its own."""
    return torch.stack(
        [gradient(total(model(x[n : n + 1]), y[n : n + 1]), wrt) for n in range(len(x))]
    )


def sample_hessians(
    model: nn.Module, total: Total, x: Tensor, y: Tensor, wrt: Sequence[Tensor]
) -> Tensor:
    """``[N, P, P]``."""
    return torch.stack(
        [dense_hessian(model, total, x[n : n + 1], y[n : n + 1], wrt) for n in range(len(x))]
    )


def relative(found: Tensor, truth: Tensor) -> float:
    """``|found - truth| / |truth|``."""
    return float((found - truth).norm() / truth.norm().clamp_min(1e-300))


# -- chains of layers: K-FAC's factors, KFRA, the positive-curvature Hessian ----------------------


def chain(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Input of every layer, and the output, each part of the graph of the one before."""
    values = [x.clone().requires_grad_()]
    for layer in model:
        values.append(layer(values[-1]))
    return values


def input_moment(rows: Tensor) -> Tensor:
    """``(1/N) sum_n a_n a_n^T``."""
    rows = rows.detach()
    return rows.T @ rows / len(rows)


def kflr_blocks(
    model: nn.Sequential, total: Total, x: Tensor, y: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """``G`` (unnormalised) and ``A`` of every Linear layer of a chain.

    A bias enters its layer's outputs as the identity, so that ``G`` is the bias's GGN block.
    """
    values = chain(model, x)
    found = {}
    for k, (name, layer) in enumerate(model.named_children()):
        if isinstance(layer, nn.Linear):
            G = dense_ggn(model, total, x, y, [layer.bias])
            found[name] = (G, input_moment(values[k]))
    return found


def kfra_blocks(
    model: nn.Sequential, total: Total, x: Tensor, y: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Botev et al. 2017, eq. 19, for Linear layers and elementwise activations (unnormalised)."""
    values = chain(model, x)
    Q = sum(output_hessian(total, values[-1][n : n + 1], y[n : n + 1]) for n in range(len(x)))
    found = {}
    for k, (name, layer) in reversed(list(enumerate(model.named_children()))):
        if isinstance(layer, nn.Linear):
            found[name] = (Q, input_moment(values[k]))
            Q = layer.weight.detach().T @ Q @ layer.weight.detach()
        else:
            (slope,) = torch.autograd.grad(values[k + 1].sum(), values[k], retain_graph=True)
            Q = Q * (slope.T @ slope) / len(x)
    return found


def positive_curvature_blocks(
    model: nn.Sequential, total: Total, x: Tensor, y: Tensor, modify: str
) -> dict[str, Tensor]:
    """Blocks of single parameters of the positive-curvature Hessian (Chen et al. 2018)."""
    blocks = {name: torch.zeros(p.numel(), p.numel()).to(x) for name, p in model.named_parameters()}
    for n in range(len(x)):
        values = chain(model, x[n : n + 1])
        H = output_hessian(total, values[-1], y[n : n + 1])
        loss = total(values[-1], y[n : n + 1])
        for k, (name, layer) in reversed(list(enumerate(model.named_children()))):
            if isinstance(layer, nn.Linear):
                a = values[k].detach()[0]
                blocks[f"{name}.weight"] += torch.kron(H, torch.outer(a, a))
                blocks[f"{name}.bias"] += H
                H = layer.weight.detach().T @ H @ layer.weight.detach()
                continue
            (g,) = torch.autograd.grad(loss, values[k + 1], retain_graph=True)
            z = values[k].detach().requires_grad_()
            (slope,) = torch.autograd.grad(layer(z).sum(), z, create_graph=True)
            bend = gradient(slope.sum(), [z]).reshape(-1) * g.reshape(-1)
            bend = bend.clamp(min=0) if modify == "clip" else bend.abs()
            slope = slope.detach().reshape(-1)
            H = slope[:, None] * H * slope + torch.diag(bend)
    return blocks
