"""Matrix-vector products and columns by double backward through the live parameters.

Works for every model that autograd can differentiate twice, whatever its layers and however its
parameters are shared. ``torch.func`` and forward mode are avoided on purpose: they are silently
wrong for some layers and can damage models whose modules are registered under two names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedLossError
from ..problem import Problem
from ..problem.cotangents import output_hessian_product, sampled_cotangents, scaled_terms

HESSIAN, GGN, FISHER, EMPIRICAL = "hessian", "ggn", "fisher", "empirical_fisher"


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
        if self.vectorised is None and len(cotangents) >= 8:
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


def output_product(
    problem: Problem,
    kind: Kind,
    outputs: Tensor,
    targets: Any,
    samples: int,
    generator: torch.Generator,
) -> Callable[[Tensor], Tensor]:
    """The matrix between ``J^T`` and ``J``: maps a tensor of the outputs' shape to another."""
    if kind.matrix == GGN:
        return lambda v: output_hessian_product(problem.loss, outputs, targets, v)
    if kind.matrix == FISHER and kind.samples is None:
        if problem.loss.likelihood is None:
            raise UnsupportedLossError(problem.loss.no_likelihood("Its Fisher"))
        return lambda v: output_hessian_product(problem.loss, outputs, targets, v)
    if kind.matrix == FISHER:
        draws = kind.samples or 1
        us = [
            sampled_cotangents(problem.loss, outputs, targets, samples, generator) / draws**0.5
            for _ in range(draws)
        ]
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


def batch_product(
    problem: Problem,
    kind: Kind,
    parameters: Sequence[Tensor],
    inputs: Any,
    targets: Any,
    vectors: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Unnormalised product of one batch's matrix with the columns of ``vectors [d, k]``."""
    outputs = problem.outputs(inputs)
    d = vectors.shape[0]
    result = torch.zeros_like(vectors, memory_format=torch.contiguous_format)
    if not outputs.requires_grad:
        return result
    split = [p.numel() for p in parameters]

    def pieces(column: Tensor) -> list[Tensor]:
        return [
            part.reshape(p.shape) for part, p in zip(column.split(split), parameters, strict=True)
        ]

    if kind.matrix == HESSIAN:
        total = problem.batch_total(outputs, targets)
        flat = _flatten(
            [
                None if g is None else g.unsqueeze(0)
                for g in torch.autograd.grad(
                    total, parameters, create_graph=True, allow_unused=True
                )
            ],
            parameters,
        )[0]
        result += VectorJacobian(flat, parameters)(vectors.mT.to(flat.dtype)).mT
        return result
    samples = problem.count_samples(inputs, targets)
    middle = output_product(problem, kind, outputs, targets, samples, generator)
    # J v by two backward passes: J^T w is linear in w
    w = torch.zeros_like(outputs, requires_grad=True)
    back = torch.autograd.grad(outputs, parameters, w, create_graph=True, allow_unused=True)
    used = [(g, i) for i, g in enumerate(back) if g is not None and g.requires_grad]
    if not used:
        return result
    for j in range(vectors.shape[1]):
        v = pieces(vectors[:, j].to(outputs.dtype))
        (jv,) = torch.autograd.grad(
            [g for g, _ in used], w, [v[i] for _, i in used], retain_graph=True
        )
        gradients = torch.autograd.grad(
            outputs, parameters, middle(jv), retain_graph=True, allow_unused=True
        )
        result[:, j] = _flatten(
            [None if g is None else g.unsqueeze(0) for g in gradients], parameters
        )[0].to(result.dtype)
    assert result.shape[0] == d
    return result
