"""Matrix-vector products and columns by double backward through the live parameters.

Works for every model that autograd can differentiate twice, whatever its layers and however its
parameters are shared. ``torch.func`` and forward mode are avoided on purpose: they are silently
wrong for some layers and can damage models whose modules are registered under two names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import memory
from ..errors import UnsupportedLayerError, UnsupportedLossError
from ..problem import Problem
from ..problem.cotangents import (
    has_no_derivative,
    output_hessian_product,
    sampled_cotangents,
    scaled_terms,
)

HESSIAN, GGN, FISHER, EMPIRICAL = "hessian", "ggn", "fisher", "empirical_fisher"
RAW = "raw"  # per=: second moments of the samples' gradients as they are, class weights included


@dataclass(frozen=True)
class Kind:
    """Which matrix: its name and what distinguishes it.

    ``samples`` is the number of sampled labels per term (``None``: exact); ``per`` says what
    the outer products of the empirical Fisher run over.
    """

    matrix: str
    samples: int | None = None
    seed: int = 0
    per: str = "sample"

    @property
    def title(self) -> str:
        if self.matrix == HESSIAN:
            return "Hessian"
        if self.matrix == GGN:
            return "GGN"
        if self.matrix == FISHER:
            return "Fisher" if self.samples is None else f"Fisher ({self.samples} sampled labels)"
        if self.per == RAW:
            return "second moment of the gradients"
        return "empirical Fisher" if self.per == "sample" else "empirical Fisher (per term)"

    @property
    def exact(self) -> bool:
        return self.matrix != FISHER or self.samples is None

    @property
    def needs_samples(self) -> bool:
        """Whether the matrix is made of gradients of single samples or draws."""
        return self.matrix == EMPIRICAL or self.samples is not None

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _flatten(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Concatenate ``[k, ...]`` gradients to ``[k, d]``; missing ones are zero."""
    size = next((len(g) for g in gradients if g is not None), 1)
    parts = [
        p.new_zeros(size, p.numel()) if g is None else g.reshape(size, -1)
        for g, p in zip(gradients, parameters, strict=True)
    ]
    return torch.cat(parts, 1)


_WORTH_A_TRIAL = 32  # cotangents below which the trial costs more than it can save


class VectorJacobian:
    """``cotangents [k, *y] -> [k, d]``: products with ``dy/dx``, one by one or vectorised.

    Vectorising over the cotangents halves the time of small transformers and multiplies that of
    convolutions, so the first call times both on a few cotangents.
    """

    def __init__(self, y: Tensor, x: Sequence[Tensor], chunk: int = 16) -> None:
        self.y, self.x, self.chunk = y, list(x), chunk
        self.vectorised: bool | None = None

    def __call__(self, cotangents: Tensor) -> Tensor:
        if not self.y.requires_grad:
            return self.y.new_zeros(len(cotangents), sum(p.numel() for p in self.x))
        if self.vectorised is None and len(cotangents) >= _WORTH_A_TRIAL:
            self._trial(cotangents[:8])
        if self.vectorised:
            parts = [self._batched(part) for part in cotangents.split(self.chunk)]
        else:
            parts = [self._single(c) for c in cotangents]
        return torch.cat(parts)

    def _single(self, cotangent: Tensor) -> Tensor:
        gradients = torch.autograd.grad(
            self.y, self.x, cotangent, retain_graph=True, allow_unused=True
        )
        return _flatten([None if g is None else g.unsqueeze(0) for g in gradients], self.x)

    def _batched(self, cotangents: Tensor) -> Tensor:
        gradients = torch.autograd.grad(
            self.y,
            self.x,
            cotangents,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        if all(g is None for g in gradients):
            return cotangents.new_zeros(len(cotangents), sum(p.numel() for p in self.x))
        return _flatten(gradients, self.x)

    def _trial(self, cotangents: Tensor) -> None:
        start = time.perf_counter()
        reference = torch.cat([self._single(c) for c in cotangents[:4]])
        single = (time.perf_counter() - start) / 4
        try:
            start = time.perf_counter()
            value = self._batched(cotangents)
            batched = (time.perf_counter() - start) / len(cotangents)
        except Exception:  # operations without a batching rule: many error types
            self.vectorised = False
            return
        scale = float(reference.abs().max()) + 1e-300
        same = float((value[:4] - reference).abs().max()) <= 1e-3 * scale
        self.vectorised = same and batched < 0.8 * single


def draw(
    problem: Problem,
    kind: Kind,
    outputs: Tensor,
    targets: Any,
    samples: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Cotangents of the labels that a sampled Fisher draws for a batch."""
    draws = kind.samples or 1
    return [
        sampled_cotangents(problem.loss, outputs, targets, samples, generator) / draws**0.5
        for _ in range(draws)
    ]


def output_product(
    problem: Problem,
    kind: Kind,
    outputs: Tensor,
    targets: Any,
    samples: int,
    generator: torch.Generator,
    *,
    drawn: list[Tensor] | None = None,
) -> Callable[[Tensor], Tensor]:
    """The matrix between ``J^T`` and ``J``: maps a tensor of the outputs' shape to another.

    ``drawn``: labels of a sampled Fisher that have been drawn before.
    """
    if kind.matrix == GGN:
        return lambda v: output_hessian_product(problem.loss, outputs, targets, v)
    if kind.matrix == FISHER and kind.samples is None:
        if problem.loss.likelihood is None:
            raise UnsupportedLossError(problem.loss.no_likelihood("Its Fisher"))
        return lambda v: output_hessian_product(problem.loss, outputs, targets, v)
    if kind.matrix == FISHER:
        us = drawn or draw(problem, kind, outputs, targets, samples, generator)
    else:
        us = scaled_terms(problem.loss, outputs, targets, samples, kind.per)

    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        flat = v.reshape(samples, -1)
        for u in us:
            rows = u.reshape(samples, -1)
            total += (rows * (rows * flat).sum(1, keepdim=True)).reshape(v.shape)
        return total

    return product


Product = Callable[[Tensor], Tensor]


class NotLinear(Exception):
    """Double backward does not give ``J v``: a custom function hides its derivative."""


def by_rows(
    outputs: Tensor, parameters: Sequence[Tensor], middle: Product, vectors: Tensor
) -> Tensor:
    """``J^T M J V`` with the Jacobian itself, one backward pass per output."""
    flat, d = outputs.reshape(-1), vectors.shape[0]
    memory.require(
        flat.numel() * d * outputs.element_size(),
        f"The Jacobian [{flat.numel()}, {d}] of a batch, needed because the model cannot be "
        "differentiated twice,",
        "Use smaller batches or fewer parameters (params=).",
        device=outputs.device,
    )
    rows = []
    for value in flat:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            _flatten([None if g is None else g.unsqueeze(0) for g in gradients], parameters)
        )
    jacobian = torch.cat(rows).to(vectors.dtype)
    jv = jacobian @ vectors
    columns = [
        middle(column.reshape(outputs.shape).to(outputs.dtype)).reshape(-1) for column in jv.mT
    ]
    return jacobian.mT @ torch.stack(columns, 1).to(vectors.dtype)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Turn torch's refusal to differentiate twice into an error that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not has_no_derivative(error):
            raise
        raise UnsupportedLayerError(
            f"The model or the loss uses an operation without second derivative ({error}), so the "
            "Hessian cannot be computed. cs.ggn, cs.fisher and cs.empirical_fisher need first "
            "derivatives of the model only; or write the operation with functions that torch "
            "differentiates twice."
        ) from error


def symmetrised(matrix: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """``(H + H^T) / 2`` of ``[..., d, d]`` after checking that H is symmetric to rounding.

    Raises ``UnsupportedLayerError`` otherwise: what was differentiated is then no gradient.
    """
    gap, size = float((matrix - matrix.mT).norm()), float(matrix.norm())
    # rounding grows where the curvature is small beside the terms that cancel in it
    tolerance = {torch.float64: 1e-4, torch.float32: 0.05}.get(dtype, 1.0)
    if gap > tolerance * size:
        raise UnsupportedLayerError(
            f"{what} comes out asymmetric ({gap / size:.2g} of its norm): an operation of the "
            "model has a wrong second derivative. Look for custom autograd functions whose "
            "backward is not made of torch operations (cs.ggn needs first derivatives only), or "
            "take dtype=torch.float64 if rounding is the cause."
        )
    return (matrix + matrix.mT) / 2
