"""Random vectors and their products with a matrix that is known by its products only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import memory
from ..progress import track
from .estimators.common import generator_for
from .quantity import Quantity, estimate, product_of_means, square_of_mean

if TYPE_CHECKING:
    from .facts import Facts

_BATCH = 8  # probes multiplied at once
_PROBES = 64
_FEWEST = 8
_STREAM = 11


class Probes:
    """Random sign vectors and their products with a matrix, shared by everything compared to it.

    ``samples`` ``[k]`` are independent estimates of what ``measure(z, R z)`` has as its mean, by
    default ``||R z||^2`` for ``||R||_F^2``. Probing stops once the standard error is below the
    tolerance, relative to their mean plus ``known``, or at the budget, or where a quarter of the
    free memory is filled with products.
    """

    def __init__(
        self,
        facts: Facts,
        measure: Callable[[Tensor, Tensor], Tensor] | None = None,
        known: Quantity = 0.0,
        *,
        count: int | None = None,
    ) -> None:
        self.facts = facts
        limits = facts.limits
        # a product of a matrix in float32 has no more digits than that
        self.dtype = facts.op.dtype
        fitting = memory.available_bytes("cpu") // (4 * facts.size * self.dtype.itemsize)
        most = limits.products if limits.tol is not None else min(_PROBES, limits.products)
        most = count or max(_FEWEST, min(most, fitting // _BATCH * _BATCH))
        self._images: list[Tensor] = []
        samples, squares, traces = [], [], []
        for start in track(range(0, most, _BATCH), f"Probes of the {facts.name}"):
            vectors = self._vectors(start, min(_BATCH, most - start))
            images = facts.matmat(vectors)
            self._images.append(images.to(self.dtype))
            squares.append(images.square().sum(0))
            traces.append((vectors * images).sum(0))
            samples.append(squares[-1] if measure is None else measure(vectors, images))
            if limits.tol is not None and count is None:
                found = estimate(torch.cat(samples))
                if found.stderr <= limits.tol * abs(found.value + estimate(known).value):
                    break
        self.samples, self.squares = torch.cat(samples).cpu(), torch.cat(squares).cpu()
        self.traces = torch.cat(traces).cpu()
        self.count = len(self.samples)

    def _vectors(self, start: int, count: int) -> Tensor:
        return random_signs(
            self.facts.size, self.facts.limits.seed, start, count, self.facts.op.device
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of vectors and images ``[P, b]`` in float64, multiplied again once released."""
        for place, start in enumerate(range(0, self.count, _BATCH)):
            vectors = self._vectors(start, min(_BATCH, self.count - start))
            kept = self._images[place] if self._images else self.facts.matmat(vectors)
            yield vectors, kept.to(torch.float64)

    def release(self) -> None:
        """Forget the images; numbers that were asked for stay."""
        self._images = []
        vars(self).pop("diagonals", None)

    @cached_property
    def diagonals(self) -> DiagonalSamples:
        """The samples ``z * (R z)`` of the diagonal."""
        return DiagonalSamples(self)


class DiagonalSamples:
    """Unbiased samples ``s_k = z_k * (R z_k)`` of the diagonal, each of length ``P``."""

    def __init__(self, probes: Probes) -> None:
        self.probes = probes
        self.total = torch.zeros(
            probes.facts.size, dtype=torch.float64, device=probes.facts.op.device
        )
        for part in self:
            self.total += part.sum(1)
        squares = [part.square().sum(0) for part in self]
        self.squares, self.overlaps = torch.cat(squares).cpu(), self.dots(self.total)

    def __iter__(self) -> Iterator[Tensor]:
        for vectors, images in self.probes:
            yield vectors * images

    def dots(self, vector: Tensor) -> Tensor:
        """``s_k . vector`` ``[n]``."""
        return torch.cat([part.mT @ vector.to(part) for part in self]).cpu()

    @property
    def energy(self) -> Tensor:
        """Samples of the squared length of the diagonal."""
        total = float(self.total.square().sum())
        return square_of_mean(total, self.overlaps, self.squares)

    def times(self, other: DiagonalSamples) -> Tensor:
        """Samples of the inner product with another diagonal, known by the same probes."""
        pairs = torch.cat([(s * t).sum(0) for s, t in zip(self, other)]).cpu()
        total = float(self.total @ other.total)
        return product_of_means(total, self.dots(other.total), other.dots(self.total), pairs)


def squared_trace(traces: Quantity) -> Quantity:
    """Samples of the squared trace from samples of the trace."""
    if not isinstance(traces, Tensor):
        return traces**2
    total = float(traces.sum())
    return square_of_mean(total**2, traces * total, traces.square())


def random_signs(
    size: int, seed: int, start: int, count: int, device: torch.device | str
) -> Tensor:
    """Random signs ``start`` to ``start + count`` ``[size, count]`` (Rademacher)."""
    rows = [
        torch.randint(
            0, 2, (size,), generator=generator_for(seed, _STREAM, index), dtype=torch.int8
        )
        for index in range(start, start + count)
    ]
    return (2 * torch.stack(rows, 1) - 1).to(dtype=torch.float64, device=device)


def random_rows(size: int, seed: int, count: int) -> Tensor:
    """``count`` different rows of a matrix ``[count]``, ascending."""
    generator = generator_for(seed, _STREAM + 1)
    if size <= count:
        return torch.arange(size)
    if size < 10 * count:
        return torch.randperm(size, generator=generator)[:count].sort().values
    found: set[int] = set()
    while len(found) < count:  # a permutation of millions of rows would be a waste
        found.add(int(torch.randint(0, size, (1,), generator=generator)))
    return torch.tensor(sorted(found))


def sampling_error(left_out: list[float], share: float) -> float:
    """Jackknife error of a statistic of ``n`` rows drawn without replacement, of that share."""
    count = len(left_out)
    centre = math.fsum(left_out) / count
    spread = math.fsum((one - centre) ** 2 for one in left_out) * (count - 1) / count
    return math.sqrt(spread * (1 - share))
