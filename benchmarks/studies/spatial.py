"""What AdaHessian's averaging over kernel positions gains and loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import curvscope as cs

from . import nets
from .identity import outcome

FIRST = 100_000  # seeds of the probes, apart from those of the networks
AVERAGINGS = ("paper", "release", "none")


def kernel_mean(d: Tensor) -> Tensor:
    """Average ``[..., h, w]`` over the kernel positions."""
    return d.mean((-2, -1), keepdim=True).expand_as(d)


def relative(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).norm() / exact.norm())


def weights(model: nn.Module) -> dict[str, tuple[slice, torch.Size]]:
    """Where the convolution weights lie in the flat vector of all parameters."""
    found, start = {}, 0
    for name, p in model.named_parameters():
        if p.ndim == 4 and p.shape[-1] > 1:
            found[name.removesuffix(".weight")] = (slice(start, start + p.numel()), p.shape)
        start += p.numel()
    return found


def layer(d: Tensor, probes: Tensor, counts: list[int]) -> dict[str, Any]:
    """One layer: ``d [o, i, h, w]`` is the exact diagonal, ``probes [K, o, i, h, w]`` estimates.

    ``plain`` and ``averaged``: relative errors of means of ``m`` probes, for every ``m`` of
    ``counts``; ``bias``: what averaging leaves for ever. ``rms_*`` are about what AdaHessian
    divides by, the root mean square over all probes: energy relative to the diagonal's, and the
    rank correlation with its magnitude.
    """
    averaged = kernel_mean(probes)
    errors: dict[str, list[float]] = {"plain": [], "averaged": []}
    for m in counts:
        for key, values in (("plain", probes), ("averaged", averaged)):
            means = [group.mean(0) for group in values.split(m) if len(group) == m]
            errors[key].append(sum(relative(mean, d) for mean in means) / len(means))
    found: dict[str, Any] = {
        **errors,
        "bias": relative(kernel_mean(d), d),
        "within": float((d - kernel_mean(d)).square().sum() / (d - d.mean()).square().sum()),
    }
    for key, values in (("plain", probes), ("averaged", averaged), ("release", None)):
        if values is None:  # |Hz| = |z * Hz|, averaged without signs
            values = kernel_mean(probes.abs())
        rms = values.square().mean(0).sqrt()
        found[f"rms_energy_{key}"] = float(rms.norm() / d.norm())
        rank = spearmanr(rms.flatten(), d.abs().flatten()).statistic
        found[f"rms_rank_{key}"] = float(rank)
    return found


def estimates(
    name: str, seed: int, data: Path, *, samples: int, probes: int, steps: int, batch: int
) -> dict[str, Any]:
    """Errors of Hutchinson's diagonal with and without averaging, at init and after training."""
    images = nets.NETS[name].data(data)
    model = nets.initial(name, seed)
    counts = [2**k for k in range(20) if 2**k <= probes]
    record: dict[str, Any] = {"net": name, "seed": seed, "probes": counts}
    for when in ("init", "trained"):
        if when == "trained":
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            nets.train(model, images, optimizer, steps=steps, batch=batch, seed=seed)
        nets.calibrate(model, images.inputs[-1000:])
        problem = nets.problem(model, images, samples, chunk=samples)
        # of a piecewise linear network the blocks of Hessian and Gauss-Newton are the same
        exact = cs.exact_diagonal(problem, "ggn").diagonal()
        first = FIRST + 1000 * seed
        drawn = torch.stack(
            [
                cs.hutchinson_diagonal(problem, probes=1, seed=first + k).diagonal()
                for k in range(probes)
            ]
        )
        rows = {}
        for at, (where, shape) in weights(model).items():
            d, z = exact[where].reshape(shape), drawn[:, where].reshape(probes, *shape)
            rows[at] = layer(d.double(), z.double(), counts)
        own = cs.hutchinson_diagonal(problem, probes=1, seed=first, spatial=True).diagonal()
        gaps = [
            relative(kernel_mean(drawn[0, where].reshape(shape)), own[where].reshape(shape))
            for where, shape in weights(model).values()
        ]
        record[when] = {"layers": rows, "gap": max(gaps)}
    return record


def training(
    name: str, seed: int, data: Path, *, averaging: str, lr: float, steps: int, batch: int
) -> dict[str, Any]:
    """AdaHessian with one kind of averaging at one learning rate."""
    images = nets.NETS[name].data(data)
    model = nets.initial(name, seed)
    optimizer = cs.optim.AdaHessian(model, lr=lr, averaging=averaging, seed=seed)
    losses = nets.train(model, images, optimizer, steps=steps, batch=batch, seed=seed)
    record = {"net": name, "averaging": averaging, "lr": lr, "seed": seed, "worst": max(losses)}
    return {**record, **outcome(model, images, losses)}
