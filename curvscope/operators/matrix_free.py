"""A matrix that is known only by its products."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import OptionError, ShapeError
from .base import Layout, Operator, Provenance
from .dense import set_parameters
from .numerics import chunks, unit_columns
from .view import MatrixView
from .wrappers import norm_by_columns


class FunctionOperator(Operator):
    """The symmetric matrix whose product with ``[P, k]`` is ``product(vectors)``.

    ``check=True`` compares ``x^T (M y)`` with ``y^T (M x)`` for one pair of random vectors, and
    refuses a function that is not symmetric. Diagonal, trace, norm and spectrum take ``P``
    products.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        size: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        layout: Layout | None = None,
        view: MatrixView | None = None,
        info: Provenance | None = None,
        positive_semidefinite: bool | None = None,
        check: bool = True,
    ) -> None:
        self._product = product
        self.shape = (size, size)
        self.dtype, self.device = dtype, torch.device(device)
        set_parameters(self, layout, view, info)
        self.positive_semidefinite = positive_semidefinite
        if check and size:
            self._check_symmetry()

    def _matmat(self, vectors: Tensor) -> Tensor:
        result = self._product(vectors)
        if result.shape != vectors.shape:
            raise ShapeError(
                f"The product of {list(vectors.shape)} came back as {list(result.shape)}."
            )
        return result.detach()

    def diagonal(self) -> Tensor:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        result = like.new_empty(self.shape[0])
        for columns in chunks(self.shape[0], 2 * self.shape[0]):
            products = self @ unit_columns(self.shape[0], columns, like)
            result[columns] = products[columns].diagonal()
        return result

    def frobenius_norm(self) -> float:
        return norm_by_columns(self)

    def _check_symmetry(self) -> None:
        generator = torch.Generator().manual_seed(0)
        pair = torch.randn(self.shape[0], 2, generator=generator, dtype=torch.float64)
        pair = pair.to(dtype=self.dtype, device=self.device)
        images = self @ pair
        there, back = float(pair[:, 0] @ images[:, 1]), float(pair[:, 1] @ images[:, 0])
        size = float(pair.norm() * images.norm())
        if abs(there - back) > math.sqrt(torch.finfo(self.dtype).eps) * size:
            raise OptionError(
                f"The product is not symmetric: x.(M y) = {there:.6g}, but y.(M x) = {back:.6g}."
            )
