"""How diagonal Kronecker factors are, beside the null model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import curvscope as cs

from . import nets

LARGE = 300  # rows from which the null model's expectation is enough: no bases are drawn
DRAWN = 4


def describe(matrix: Tensor) -> dict[str, float]:
    """The numbers of ``cs.concentration`` that the page shows."""
    found = cs.concentration(matrix, samples=DRAWN if len(matrix) < LARGE else 0)
    return {
        "size": found.size,
        "share": found.diagonal_share,
        "null": found.null.diagonal_share,
        "null_std": found.null.diagonal_share_std,
        "dominant": found.dominant,
        "null_dominant": found.null.dominant,
        "snr": found.snr,
        "null_snr": found.null.snr,
    }


def centred(A: Tensor) -> Tensor:
    """Covariance of a layer's inputs from the second moment ``A`` with the bias's 1 at the end."""
    mean = A[:-1, -1]
    return A[:-1, :-1] - torch.outer(mean, mean)


def measure(problem: cs.Problem) -> list[dict[str, Any]]:
    """A row per layer and factor: ``A``, its covariance, ``G`` (Fisher) and ``G`` (observed)."""
    exact, observed = cs.kfac(problem), cs.kfac(problem, fisher="empirical")
    modules = dict(problem.model.named_modules())
    rows = []
    for name, block in exact.blocks.items():
        matrices = {"A": block.A, "G": block.G, "G observed": observed.blocks[name].G}
        if modules[name].bias is not None:  # the mean is known
            matrices["A centred"] = centred(block.A)
        found = {key: describe(m.double()) for key, m in matrices.items()}
        # what is lost with everything off the diagonals of G (x) A
        lost = math.sqrt(max(0.0, 1 - found["A"]["share"] * found["G"]["share"]))
        for key, numbers in found.items():
            rows.append({"layer": name, "factor": key, **numbers, "lost": lost})
    return rows


def errors(problem: cs.Problem) -> list[dict[str, Any]]:
    """Errors against the exact Gauss-Newton blocks: K-FAC, the diagonals of its factors, and the
    nearest diagonal matrix (the exact diagonal)."""
    others = {
        "K-FAC": cs.kfac(problem),
        "diagonal factors": cs.diagonal_kf(problem, fisher="exact"),
        "exact diagonal": cs.exact_diagonal(problem, "ggn"),
    }
    ggn = cs.ggn(problem)
    found = cs.compare(ggn, others, blocks=list(ggn.blocks), metrics=["error", "error_rescaled"])
    return [
        {
            "layer": row.block,
            "method": row.approximation,
            "error": row.error,
            "scaled": row["error_rescaled"],
            "best": row.best_in_class,
        }
        for row in found.rows
    ]


def run(
    name: str,
    seed: int,
    data: Path,
    *,
    samples: int,
    steps: int,
    batch: int,
    compared: int = 0,
) -> dict[str, Any]:
    """Factors at the initial weights and after training by Adam."""
    images = nets.NETS[name].data(data)
    model = nets.initial(name, seed)
    record: dict[str, Any] = {"net": name, "seed": seed}
    for when in ("init", "trained"):
        if when == "trained":
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            nets.train(model, images, optimizer, steps=steps, batch=batch, seed=seed)
        nets.calibrate(model, images.inputs[-1000:])
        problem = nets.problem(model, images, samples)
        loss, accuracy = nets.evaluate(model, images.test_inputs, images.test_labels)
        record[when] = {"rows": measure(problem), "test": loss, "accuracy": accuracy}
        if compared:
            record[when]["errors"] = errors(problem.subset(compared, seed))
    return record
