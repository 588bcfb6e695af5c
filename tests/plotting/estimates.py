"""Results of estimators to draw."""

from __future__ import annotations

import torch

from curvscope.analysis import density, diagonal, eigsh, negative_curvature, solve, trace
from curvscope.operators import FunctionOperator


def _matrix() -> FunctionOperator:
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    matrix = (root + root.mT) / 8
    return FunctionOperator(lambda vectors: matrix @ vectors, 60)


def estimate_pictures() -> dict[str, object]:
    """A call per picture, each returning axes."""
    op = _matrix()
    results = {
        "trace": trace(op, budget=40),
        "exact trace": trace(op, method="exact"),
        "entries": diagonal(op, budget=20),
        "eigenpairs": eigsh(op, 4, budget=12),
        "negative curvature": negative_curvature(op),
        "solution": solve(op, torch.eye(60, 3), damping=0.5, method="minres"),
        "density": density(op, probes=3, steps=20),
        "exact density": density(op.dense()),
    }
    return {name: result.plot for name, result in results.items()}
