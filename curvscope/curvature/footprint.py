"""What products allocate, by the number of samples, to cut batches so that they fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .. import memory
from ..errors import MemoryLimitError


@dataclass(frozen=True)
class Line:
    """``fixed + each * samples`` bytes."""

    fixed: float
    each: float

    @classmethod
    def through(cls, few: int, small: float, more: int, large: float) -> Line:
        """Through two measurements; of one only, everything is put down to the samples."""
        if more == few:
            return cls(0.0, small / few)
        each = max((large - small) / (more - few), 0.0)
        return cls(max(small - few * each, 0.0), each)

    def at(self, samples: int) -> float:
        return self.fixed + self.each * samples


@dataclass(frozen=True)
class Footprint:
    """The most that a product holds at a time, and what its graph keeps afterwards."""

    peak: Line
    kept: Line
    coupled: bool = False

    @classmethod
    def measure(
        cls,
        sizes: Callable[[int], tuple[float, float]],
        samples: int,
        *,
        coupled: bool,
        limit: int | None = None,
    ) -> Footprint:
        """From ``sizes(count) -> (peak, kept)`` for a few samples of a batch (coupled: for all).

        With a limit, the number that would fit is measured, too: peaks are the larger of several
        stages' and may grow faster than between the first two.
        """
        if coupled:
            peak, kept = sizes(samples)
            return cls(Line(peak, 0.0), Line(kept, 0.0), True)
        few = max(1, samples // 8)
        more = min(samples, 2 * few)
        small = sizes(few)
        large = small if more == few else sizes(more)
        found = cls.through(few, small, more, large)
        if limit is None or large[0] > limit:
            return found
        most = min(samples, found.samples_within(limit))
        if most <= more:
            return found
        return cls.through(more, large, most, sizes(most))

    @classmethod
    def through(
        cls, few: int, small: tuple[float, float], more: int, large: tuple[float, float]
    ) -> Footprint:
        return cls(
            Line.through(few, small[0], more, large[0]), Line.through(few, small[1], more, large[1])
        )

    def samples_within(self, limit: int) -> int:
        """How many samples a part may have. Raises ``MemoryLimitError`` where not even one fits."""
        count = int((limit - self.peak.fixed) / max(self.peak.each, 1.0))
        if count >= 1:
            return count
        unit = "batch, whose samples are coupled," if self.coupled else "single sample"
        needed = int(self.peak.at(1))
        raise MemoryLimitError(
            f"A product of a {unit} takes {memory.format_bytes(needed)} ({needed} bytes), more "
            f"than memory={limit} bytes. Raise memory=, or ask for single blocks."
        )
