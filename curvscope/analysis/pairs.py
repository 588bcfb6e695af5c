"""A reference and an approximation of it: their inner products, exact or from random probes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ..errors import NotDefinedError
from .comparison import NO_GRADIENT
from .facts import Facts
from .lanczos import norm_of_dense
from .probes import Probes
from .quantity import Moments, Value
from .unformed import bounded_norm

__all__ = ["Moments", "Pair", "Value"]


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
    ) -> None:
        self.reference, self.approximation = reference, approximation
        if not (reference.known or approximation.known):
            approximation.partner = reference  # the same probes for both
        self.given_damping = damping
        self.damping = damping or 0.0
        self.own_damping = 0.0 if already_damped else self.damping
        self._gradient = gradient
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
            raise NotDefinedError(NO_GRADIENT)
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
        """Those that both matrices are, or may be, multiplied with."""
        known = self.reference.known and not self.approximation.known
        return self.approximation.probes if known else self.reference.probes

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
        sums: list[Tensor] = []
        for ours, theirs in self.images():
            parts = (ours * theirs, theirs.square(), (ours - theirs).square())
            sums.append(torch.stack([part.sum(0) for part in parts]))
        overlap, sampled, gap = torch.cat(sums, 1).cpu()
        return Moments(
            reference.energy, overlap, approximation.energy, gap, "estimated", sampled=sampled
        )

    @cached_property
    def sampled_traces(self) -> Tensor:
        """Samples of the approximation's trace, from the probes of the reference."""
        probes, approximation = self.reference.probes, self.approximation
        return torch.cat([(z * approximation.matmat(z)).sum(0) for z, _ in probes]).cpu()

    def images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Products of both matrices with the probes, some at a time."""
        reference, approximation = self.reference, self.approximation
        if not (reference.known or approximation.known):
            for (_, ours), (_, theirs) in zip(reference.probes, approximation.probes):
                yield ours, theirs
            return
        for vectors, images in self.probes:
            if self.probes is reference.probes:
                yield images, approximation.matmat(vectors)
            else:
                yield reference.matmat(vectors), images

    def reference_image(self, step: Tensor) -> Tensor:
        """``R s`` for the step ``s`` of the approximation, taken once."""
        if self._image is None:
            self._image = self.reference.matvec(step)
        return self._image

    @cached_property
    def difference_norm(self) -> tuple[float, float]:
        """``||R - B||_2``, and how much larger it may be where it was iterated."""
        if self.method == "exact":
            return norm_of_dense(self.difference), 0.0
        reference, approximation = self.reference, self.approximation
        found = bounded_norm(
            reference, lambda v: (reference.matmat(v) - approximation.matmat(v)).to(v)
        )
        return found.value, found.stderr
