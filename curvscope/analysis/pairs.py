"""A reference and an approximation of it: their inner products, exact or from random probes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import NotDefinedError
from .facts import Facts
from .lanczos import leading_by_products, norm_of_dense

_BATCH = 8  # probes multiplied at once
_PROBES = 64

Quantity = float | Tensor
"""A number, or one sample of it ``[k]`` per random probe."""


@dataclass(frozen=True)
class Value:
    """A number with its standard error or residual, and how it was got."""

    value: float
    stderr: float = 0.0
    method: str = "exact"


@dataclass(frozen=True)
class Moments:
    """``<R, R>``, ``<R, B>``, ``<B, B>`` and ``||R - B||^2`` (kept apart: it cancels)."""

    rr: Quantity
    rb: Quantity
    bb: Quantity
    gap: Quantity
    method: str

    def apply(self, function: Callable[[float, float, float, float], float]) -> Value:
        """``function(rr, rb, bb, gap)``, with its standard error by the jackknife."""
        parts = (self.rr, self.rb, self.bb, self.gap)
        value = function(*(_mean(part) for part in parts))
        counts = [len(part) for part in parts if isinstance(part, Tensor)]
        if not counts or math.isnan(value):
            return Value(value, 0.0, self.method)
        count = min(counts)
        left_out = [function(*(_mean_without(part, i) for part in parts)) for i in range(count)]
        centre = math.fsum(left_out) / count
        spread = math.fsum((one - centre) ** 2 for one in left_out) * (count - 1) / count
        if max(left_out) == min(left_out):  # what is random does not enter
            return Value(value, 0.0, "structured")
        return Value(value, math.sqrt(spread), "estimated")


class Probes:
    """Random sign vectors and their products with a matrix, shared by everything compared to it.

    ``samples`` ``[k]`` are independent estimates of what ``measure(z, R z)`` has as its mean, by
    default ``||R z||^2`` for ``||R||_F^2``. Probing stops once the standard error is below the
    tolerance, relative to their mean plus ``known``, or at the budget.
    """

    def __init__(
        self,
        facts: Facts,
        measure: Callable[[Tensor, Tensor], Tensor] | None = None,
        known: float = 0.0,
    ) -> None:
        self.facts = facts
        measure = measure or (lambda vectors, images: images.square().sum(0))
        limits = facts.limits
        generator = torch.Generator().manual_seed(limits.seed)
        most = limits.products if limits.tol is not None else min(_PROBES, limits.products)
        vectors, images, samples = [], [], []
        for start in range(0, most, _BATCH):
            batch = random_signs(facts.size, min(_BATCH, most - start), generator, facts.op.device)
            image = facts.matmat(batch)
            vectors.append(batch)
            images.append(image)
            samples.append(measure(batch, image))
            if limits.tol is not None:
                found = estimate(torch.cat(samples))
                if found.stderr <= limits.tol * abs(found.value + known):
                    break
        self.vectors, self.images = torch.cat(vectors, 1), torch.cat(images, 1)
        self.samples = torch.cat(samples)

    @cached_property
    def squares(self) -> Tensor:
        """``||R z||^2`` ``[k]``, whose mean is ``||R||_F^2``."""
        return self.images.square().sum(0)

    @cached_property
    def trace(self) -> Value:
        """Hutchinson's estimate."""
        return estimate((self.vectors * self.images).sum(0))


class Pair:
    """What a metric sees: both matrices, the damping, the gradient, and their moments."""

    def __init__(
        self,
        reference: Facts,
        approximation: Facts,
        *,
        damping: float | None = None,
        already_damped: bool = False,
        gradient: Tensor | None = None,
        probes: Callable[[], Probes] | None = None,
        thorough: bool = False,
    ) -> None:
        self.reference, self.approximation = reference, approximation
        self.thorough = thorough
        self.given_damping = damping
        self.damping = damping or 0.0
        self.own_damping = 0.0 if already_damped else self.damping
        self._gradient = gradient
        self._probes = probes
        self._image: Tensor | None = None

    def release(self) -> None:
        """Forget what is large; moments stay."""
        self.approximation.release()
        self._image = None
        vars(self).pop("difference", None)

    @property
    def gradient(self) -> Tensor:
        """The gradient ``[P]``; ``NotDefinedError`` where none was given or it vanishes."""
        if self._gradient is None:
            raise NotDefinedError("No gradient was given: pass gradient=problem.")
        if not float(self._gradient.abs().max()):
            raise NotDefinedError("The gradient of this block is zero.")
        return self._gradient

    @property
    def size(self) -> int:
        return self.reference.size

    @property
    def method(self) -> str:
        """How numbers that need both matrices in full are got."""
        small = self.reference.small and self.approximation.small
        return "exact" if small else "structured"

    @property
    def probes(self) -> Probes:
        assert self._probes is not None, "a pair that needs probes is given them"
        return self._probes()

    @cached_property
    def difference(self) -> Tensor:
        """``R - B``, formed."""
        return self.reference.dense - self.approximation.dense

    @cached_property
    def moments(self) -> Moments:
        return self._moments()

    def _moments(self) -> Moments:
        reference, approximation = self.reference, self.approximation
        if reference.small and approximation.small:
            rb = float((reference.dense * approximation.dense).sum())
            gap = float(torch.linalg.vector_norm(self.difference)) ** 2
            return Moments(reference.norm2, rb, approximation.norm2, gap, "exact")
        if reference.structured and approximation.structured:
            rr, bb = reference.norm2, approximation.norm2
            rb = reference.op.inner(approximation.op)
            return Moments(rr, rb, bb, max(rr - 2 * rb + bb, 0.0), "structured")
        images = approximation.matmat(self.probes.vectors)
        probes = self.probes
        return Moments(
            rr=reference.norm2 if reference.known else probes.squares,
            rb=(probes.images * images).sum(0),
            bb=approximation.norm2 if approximation.known else images.square().sum(0),
            gap=(probes.images - images).square().sum(0),
            method="estimated",
        )

    def reference_image(self, step: Tensor) -> Tensor:
        """``R s`` for the step ``s`` of the approximation, taken once."""
        if self._image is None:
            self._image = self.reference.matvec(step)
        return self._image

    @cached_property
    def difference_norm(self) -> tuple[float, float]:
        """``||R - B||_2`` and the residual where it was iterated."""
        if self.method == "exact":
            return norm_of_dense(self.difference), 0.0
        for facts in (self.reference, self.approximation):
            if not facts.known:
                raise facts.too_large("The spectral norm", "Use cs.norm(R - B, 'spectral').")
        reference, approximation = self.reference, self.approximation
        values, _, residuals = leading_by_products(
            lambda v: reference.matvec(v) - approximation.matvec(v),
            self.size,
            device=reference.op.device,
        )
        return float(values.abs()[0]), float(residuals[0])


def estimate(samples: Tensor) -> Value:
    """Mean and standard error of independent samples ``[k]``."""
    spread = float(samples.std()) / math.sqrt(len(samples))
    return Value(float(samples.mean()), spread, "estimated")


def add(left: Quantity, right: Quantity) -> Quantity:
    """The sum of two quantities; samples are paired, the longer ones cut."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        count = min(len(left), len(right))
        return left[:count] + right[:count]
    return left + right


def random_signs(
    size: int, count: int, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """Independent +1 and -1 ``[size, count]`` (Rademacher)."""
    signs = torch.randint(0, 2, (size, count), generator=generator)
    return (2 * signs - 1).to(dtype=torch.float64, device=device)


def _mean(part: Quantity) -> float:
    return float(part.mean()) if isinstance(part, Tensor) else part


def _mean_without(part: Quantity, place: int) -> float:
    if not isinstance(part, Tensor):
        return part
    return float(part.sum() - part[place]) / (len(part) - 1)
