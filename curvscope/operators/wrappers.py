"""Operators that hold another one: a part of it, or the same in another number type."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import OptionError, ShapeError
from .base import Layout, Operator, Provenance
from .blocks import MappedBlocks
from .numerics import chunks, symmetric, unit_columns


class Wrapper(Operator):
    """Shared by the expressions that hold one operator."""

    _stored = True

    def __init__(self, base: Operator, info: Provenance) -> None:
        self.base = base
        self.shape, self.dtype, self.device = base.shape, base.dtype, base.device
        self.layout, self.view, self.info = base.layout, base.view, info

    @property
    def uncovered(self) -> tuple[str, ...]:
        return self.base.uncovered


class Restricted(Wrapper):
    """The principal submatrix of the rows ``index`` ``[d]``, by products with the whole matrix."""

    def __init__(self, base: Operator, index: Tensor, *, layout: Layout | None = None) -> None:
        super().__init__(base, base.info)
        index = index.detach().to(base.device)
        rows = base.shape[0]
        if index.ndim != 1 or index.dtype != torch.long:
            raise ShapeError("index must be a vector of integers (torch.long).")
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
            raise OptionError(f"index must lie in 0 ... {rows - 1}.")
        if index.unique().numel() != index.numel():
            raise OptionError("index names a row twice.")
        self.index = index
        self.shape = (index.numel(), index.numel())
        self.layout, self.view = layout, None
        self.positive_semidefinite = base.positive_semidefinite

    def _matmat(self, vectors: Tensor) -> Tensor:
        result = torch.empty_like(vectors, memory_format=torch.contiguous_format)
        for columns in chunks(vectors.shape[1], self.base.shape[0]):
            padded = vectors.new_zeros(self.base.shape[0], columns.stop - columns.start)
            padded[self.index] = vectors[:, columns]
            result[:, columns] = (self.base @ padded)[self.index]
        return result

    def diagonal(self) -> Tensor:
        return self.base.diagonal()[self.index]

    def frobenius_norm(self) -> float:
        return norm_by_columns(self)

    def _restricted(self, index: Tensor, layout: Layout) -> Operator:
        return Restricted(self.base, self.index[index.to(self.device)])


class Converted(Wrapper):
    """``base`` in another floating-point type or on another device, converted at each product."""

    def __init__(self, base: Operator, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(base, base.info)
        self.dtype, self.device = dtype, device
        self.positive_semidefinite = base.positive_semidefinite

    def _matmat(self, vectors: Tensor) -> Tensor:
        return (self.base @ vectors).to(dtype=self.dtype, device=self.device)

    def _dense(self) -> Tensor:
        # rounding of the narrower type would pass for asymmetry in the wider one
        matrix = symmetric(f"The {self.info.what}", self.base.dense())
        return matrix.to(dtype=self.dtype, device=self.device)

    def diagonal(self) -> Tensor:
        return self.base.diagonal().to(dtype=self.dtype, device=self.device)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Operator:
        return self.base.to(dtype or self.dtype, device or self.device)

    @property
    def blocks(self) -> Mapping[str, Operator]:
        own = self.base.blocks
        return MappedBlocks(list(own), lambda name: own[name].to(self.dtype, self.device))


def norm_by_columns(op: Operator) -> float:
    """Frobenius norm from products with unit vectors, never holding the whole matrix."""
    like = torch.empty(0, dtype=op.dtype, device=op.device)
    square = 0.0
    for columns in chunks(op.shape[0], 2 * op.shape[0]):
        block = op @ unit_columns(op.shape[0], columns, like)
        square += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
    return math.sqrt(square)
