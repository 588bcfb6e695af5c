"""Matrices with prescribed spectra, known by products only."""

from __future__ import annotations

import torch
from torch import Tensor

from curvscope.operators import FunctionOperator


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A dense matrix with these eigenvalues and random eigenvectors."""
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    matrix = (basis * values) @ basis.mT
    return (matrix + matrix.mT) / 2


def by_products(matrix: Tensor, **options: object) -> FunctionOperator:
    return FunctionOperator(
        lambda vectors: matrix.to(vectors) @ vectors,
        len(matrix),
        check=False,
        **options,  # type: ignore[arg-type]
    )


class Interrupted:
    """Products that stop like Ctrl-C after some calls, once."""

    def __init__(self, matrix: Tensor, after: int) -> None:
        self.matrix, self.left = matrix, after

    def __call__(self, vectors: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.matrix @ vectors


def spectra(size: int = 200) -> dict[str, Tensor]:
    """The spectra of the tests, ascending order not needed."""
    ranks = torch.arange(1, size + 1, dtype=torch.float64)
    rest = normal(size - 6, seed=1)
    return {
        "decaying": ranks**-1.5,
        "exponential": torch.exp(-ranks / 8),
        "clustered": torch.cat([3 + 0.01 * ranks[:10], ranks[10:] / size]),
        "multiple": torch.cat([torch.tensor([5.0, 5, 5, 4, 4, 3]), rest.abs().clamp(max=1.0)]),
        "outliers and bulk": torch.cat([torch.tensor([40.0, 25, 20, 15, 10, -8]), rest / 2]),
        "indefinite": torch.linspace(-1, 1, size, dtype=torch.float64) ** 3,
        "rank 7": torch.cat([ranks[:7], torch.zeros(size - 7, dtype=torch.float64)]),
        "zero": torch.zeros(size, dtype=torch.float64),
        "multiple of the identity": torch.full((size,), -2.5, dtype=torch.float64),
    }
