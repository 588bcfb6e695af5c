"""How good K-BFGS's inverse of the pre-activation Hessian is along the autoencoder's training.

The exact matrix is the mean over samples of the Hessian of a sample's loss in a layer's outputs.
The autoencoder is piecewise linear, so it equals the Gauss-Newton matrix, which is K-FAC's factor
``G`` with the exact expectation over labels; :func:`checked` computes one layer's a second way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.zoo import datasets, models

from .nets import folder

LR, DAMPING, DECAY, BATCH = 0.3, 0.3, 1e-5, 1000
EPS = math.sqrt(DAMPING)
GUARD = 3.0  # max_update_norm: at the published setting half of all seeds diverge without it


class Loss(nn.BCEWithLogitsLoss):
    """Binary cross-entropy summed over pixels, mean over images: K-BFGS's loss."""

    def __init__(self, pixels: int) -> None:
        super().__init__(weight=torch.tensor(float(pixels)))


def rank_correction_error(values: Tensor, rank: int) -> float:
    """Relative error of the best ``c I`` plus a symmetric matrix of that rank, for a matrix with
    these eigenvalues: all but ``rank`` of them, neighbours in order, are replaced by their mean."""
    kept = len(values) - rank
    if kept <= 0:
        return 0.0
    values = values.sort().values
    windows = values.unfold(0, kept, 1)
    squares = (windows - windows.mean(1, keepdim=True)).square().sum(1)
    return float((squares.min() / values.square().sum()).sqrt())


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


def beside(H: Tensor, truth: Tensor, gradient: Tensor) -> dict[str, float]:
    """One approximation of the inverse ``truth`` ``[o, o]``; ``gradient`` ``[o, i]``."""
    c = cosine(H, truth)
    return {
        "error": float((H - truth).norm() / truth.norm()),
        "rescaled": math.sqrt(max(0.0, 1 - c * c)),
        "cosine": c,
        "angle": math.degrees(math.acos(min(1.0, cosine(H @ gradient, truth @ gradient)))),
        "length": float((H @ gradient).norm() / (truth @ gradient).norm()),
    }


def measure(
    problem: cs.Problem, optimizer: cs.optim.KBFGS, batch: Tensor, step: int
) -> list[dict[str, Any]]:
    """A row per layer: ``H_g`` against ``(G + eps I)^-1``, beside others and the best in class."""
    exact = cs.kfac(problem)
    sampled = cs.kfac(
        cs.Problem(problem.user_model, problem.user_loss, (batch, batch)), fisher="mc"
    )
    gradient, offset = problem.gradient().double(), 0
    rows = []
    for name, block in exact.blocks.items():
        G = block.G.double()
        out, inp = len(G), len(block.A) - 1
        g = gradient[offset : offset + out * inp].reshape(out, inp)
        offset += out * (inp + 1)
        values, vectors = torch.linalg.eigh(G)
        truth = (vectors / (values + EPS)) @ vectors.mT
        inverse = 1 / (values + EPS)
        H = optimizer.factors(name)["H_g"].double()
        eye = torch.eye(out, dtype=torch.float64)
        kfac = torch.linalg.inv(sampled.blocks[name].G.double() + EPS * eye)
        rows.append(
            {
                "layer": name,
                "size": out,
                "G_max": float(values[-1]),
                "G_mean": float(values.mean()),
                "above": float((values > EPS).double().mean()),
                "condition": float((values[-1] + EPS) / (values[0] + EPS)),
                "H_g": beside(H, truth, g),
                "identity": beside(eye, truth, g),
                "K-FAC": beside(kfac, truth, g),
                "best_identity": rank_correction_error(inverse, 0),
                "best_diagonal": float((truth - truth.diag().diag()).norm() / truth.norm()),
                "best_rank": rank_correction_error(inverse, min(out, 2 * step)),
                # how much of the curvature that H_g claims is there: 1 / (u' G u + eps) along
                # its most contracted directions
                "forward": cosine(torch.linalg.inv(H), G + EPS * eye),
            }
        )
    return rows


def checked(problem: cs.Problem, name: str) -> float:
    """Relative distance of ``G`` from the mean pre-activation Hessian by double differentiation."""
    G = cs.kfac(problem).blocks[name].G.double()
    rows = cs.hessian(problem, route="rows").blocks[name].factors["H"]
    mean = rows[:, 0, 0, :, 0, 0, :].double().mean(0)
    mean = mean * rows.shape[0] * cs.hessian(problem, route="rows").blocks[name].scale
    return float((G - mean).norm() / mean.norm())


def batches(images: Tensor, seed: int) -> Iterator[Tensor]:
    """The first epoch in file order, then permuted."""
    generator = torch.Generator().manual_seed(seed)
    yield from images.split(BATCH)
    while True:
        order = torch.randperm(len(images), generator=generator)
        yield from (images[index] for index in order.split(BATCH))


def run(
    data: Path, *, seed: int, at: list[int], samples: int, hidden: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """K-BFGS at its published setting, measured on the last ``samples`` images at the steps ``at``.

    ``hidden`` replaces the published widths; layer 4 of 8 (or the middle one) is the code layer.
    """
    split = datasets.mnist_images(folder(data, "mnist")).train
    images = split.take(slice(0, len(split)))[0].reshape(len(split), -1)
    return follow(images, seed=seed, at=at, samples=samples, hidden=hidden)


def follow(
    images: Tensor, *, seed: int, at: list[int], samples: int, hidden: tuple[int, ...] | None
) -> dict[str, Any]:
    torch.manual_seed(seed)
    pixels = images.shape[1]
    widths = (pixels, *(hidden or (1000, 500, 250, 30, 250, 500, 1000)), pixels)
    model = models.mlp(widths, nn.ReLU, plain=(len(widths) // 2,))
    loss = Loss(pixels)
    probe = images[-samples:]
    problem = cs.Problem(model, loss, (probe, probe))
    optimizer = cs.optim.KBFGS(
        model, lr=LR, damping=DAMPING, weight_decay=DECAY, max_update_norm=GUARD
    )
    optimizer.warm_start(images.split(BATCH))
    record: dict[str, Any] = {"seed": seed, "steps": [], "losses": []}
    middle = f"fc{len(widths) // 2}"
    record["gap"] = checked(problem.subset(min(20, samples)), middle)
    for step, batch in zip(range(1, max(at) + 1), batches(images, seed)):

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            value = loss(model(batch), batch)
            value.backward()
            return value

        record["losses"].append(float(optimizer.step(closure).detach()))
        if step in at:
            counts = optimizer.diagnostics(eigenvalues=False)
            fired = {
                row["block"]: {
                    key: row[key] / step
                    for key in ("damped_on_inverse", "damped_on_identity", "skipped")
                }
                for row in counts
            }
            rows = measure(problem, optimizer, batch, step)
            record["steps"].append({"step": step, "layers": rows, "fired": fired})
    return record
