"""The whole matrix: put together from its blocks, and what lies outside them by probes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..operators import BlockDiagonalOperator, MatrixView, Operator
from .classes import Nearest
from .facts import Facts, Limits
from .pairs import Pair
from .probes import Probes
from .quantity import Moments, Quantity, add
from .structure import diagonal_form


class WholeFacts(Facts):
    """The whole reference, whose diagonal blocks are known as well.

    It is formed where it is small and ``form`` allows; else sums come from the blocks, and the
    energy outside them from the probes: ``E ||(R - D) z||^2 = ||R - D||_F^2`` with ``D`` the block
    diagonal and ``z`` random signs.
    """

    def __init__(
        self,
        op: Operator,
        limits: Limits,
        parts: Sequence[tuple[tuple[str, ...], Facts]],
        *,
        form: bool = True,
    ) -> None:
        super().__init__(op, limits, by_products=limits.by_products)
        self.small = self.small and form
        self.known = self.small or self.structured
        self.parts = list(parts)
        self.rows: list[Tensor] = []
        if op.layout is not None:
            self.rows = [op.layout.index(names).to(op.device) for names, _ in self.parts]
        self.complete = bool(parts) and sum(len(rows) for rows in self.rows) == self.size

    @cached_property
    def probes(self) -> Probes:
        if not self.by_blocks:
            return Probes(self)
        return Probes(self, self._beside, math.fsum(part.norm2 for _, part in self.parts))

    def _beside(self, vectors: Tensor, images: Tensor) -> Tensor:
        """``||(R - D) z||^2``."""
        images = images.clone()
        for rows, (_, part) in zip(self.rows, self.parts):
            before = part.products
            images[rows] -= part.matmat(vectors[rows])
            self.products += part.products - before
        return images.square().sum(0)

    @property
    def by_blocks(self) -> bool:
        """Whether sums are taken from the blocks."""
        return not self.known and self.complete and all(part.known for _, part in self.parts)

    @cached_property
    def outside(self) -> Quantity:
        """Energy outside the diagonal blocks."""
        if self.small:
            beside = self.dense.clone()
            for rows in self.rows:
                beside[rows.unsqueeze(1), rows] = 0.0
            return float(torch.linalg.vector_norm(beside)) ** 2
        if inside_blocks(self.given, self.parts):
            return 0.0
        if self.known:
            return max(self.norm2 - math.fsum(part.norm2 for _, part in self.parts), 0.0)
        if self.by_blocks:
            return self.probes.samples
        return torch.cat([self._beside(*pair) for pair in self.probes]).cpu()

    @cached_property
    def energy(self) -> Quantity:
        """``||R||_F^2``."""
        if self.known:
            return self.norm2
        if not self.by_blocks:
            return self.probes.squares
        return add(math.fsum(part.norm2 for _, part in self.parts), self.outside)

    def _trace(self) -> float:
        if self.by_blocks:
            return math.fsum(part.trace for _, part in self.parts)
        return super()._trace()

    @cached_property
    def diagonal(self) -> Tensor:
        if not self.by_blocks:
            return super().diagonal
        result = torch.zeros(self.size, dtype=torch.float64, device=self.op.device)
        for rows, (_, part) in zip(self.rows, self.parts):
            result[rows] = part.diagonal
        return result


def inside_blocks(op: Operator, parts: Sequence[tuple[tuple[str, ...], Facts]]) -> bool:
    """Whether the structure of ``op`` says that it is zero outside the blocks."""
    if diagonal_form(op) is not None:
        return True
    if not isinstance(op, BlockDiagonalOperator):
        return False
    blocks = [set(names) for names, _ in parts]
    return all(any(set(op.members[n]) <= block for block in blocks) for n in op.blocks)


class WholePair(Pair):
    """The whole reference and an approximation, whose pairs on the blocks are known as well.

    ``blocks`` holds one pair per block, ``None`` where the approximation does not define it.
    """

    def __init__(
        self,
        reference: WholeFacts,
        approximation: Facts,
        blocks: Sequence[Pair | None] | None,
        **options: object,
    ) -> None:
        super().__init__(reference, approximation, **options)  # type: ignore[arg-type]
        self.whole = reference
        self.blocks = blocks

    def _moments(self) -> Moments:
        whole = self.whole
        if not whole.by_blocks or self.blocks is None or not self._inside_blocks():
            return super()._moments()
        rb, bb, gap = 0.0, 0.0, 0.0
        for pair, (_, part) in zip(self.blocks, whole.parts):
            if pair is None:
                gap += part.norm2
                continue
            moments = pair.moments
            assert not isinstance(moments.rb, Tensor), "known blocks have exact moments"
            rb, bb = rb + float(moments.rb), bb + float(moments.bb)
            gap += float(moments.gap)
        return Moments(whole.energy, rb, bb, add(gap, whole.outside), "estimated")

    def _inside_blocks(self) -> bool:
        """Whether the approximation is zero outside the blocks and known inside."""
        if not all(pair is None or pair.approximation.known for pair in self.blocks or ()):
            return False
        return inside_blocks(self.approximation.given, self.whole.parts)


class WholeNearest(Nearest):
    """Nearest members of classes of the whole matrix, also where its norm is an estimate."""

    reference: WholeFacts

    @property
    def energy(self) -> Quantity:
        return self.reference.energy

    def _gap(self, name: str, view: MatrixView | None) -> Quantity:
        whole = self.reference
        if whole.known or not whole.by_blocks or name not in ("identity", "diagonal"):
            return super()._gap(name, view)
        if name == "identity":
            return add(self.energy, -(whole.trace**2) / whole.size)
        return add(self.energy, -float(whole.diagonal.square().sum()))
