"""The difference between two reports, as data: numbers, words, settings, and what only one has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..cells import block_title
from ..headings import heading, setting_title
from ..numbers import shown

if TYPE_CHECKING:
    import pandas as pd

SAME, NOISE, CHANGED, ONLY_A, ONLY_B = "same", "within error", "changed", "only in A", "only in B"
_SIGMAS = 3.0
_MOST = 5  # names in a sentence
_HEADLINE = {
    *("error", "error at the end", "cosine at the end", "trace", "norm", "largest eigenvalue"),
    *("objective", "gradient_norm", "test_accuracy", "training loss", "train_loss", "test_loss"),
    *("diagonal_share", "effective_rank", "best learning rate", "covered"),
}


@dataclass(frozen=True)
class Value:
    """A number of a report. ``scale``: below which absolute size a difference means nothing."""

    value: float
    stderr: float = 0.0
    scale: float = 0.0


@dataclass(frozen=True)
class Number:
    """One number in both reports.

    ``table`` and ``metric`` say which, ``place`` (a block, a factor, an optimizer, ...) and
    ``name`` (an approximation, or nothing) of what. ``state`` is ``"same"`` (up to the tolerance),
    ``"within error"`` (further apart, but not beyond three standard errors of the difference),
    ``"changed"``, ``"only in A"`` or ``"only in B"``; a missing number is NaN.
    """

    table: str
    place: str
    name: str
    metric: str
    a: float
    b: float
    state: str

    @property
    def difference(self) -> float:
        """B minus A."""
        return self.b - self.a

    @property
    def relative(self) -> float:
        """The difference over the size of A; NaN where A is 0 or either is missing."""
        return self.difference / abs(self.a) if self.a else math.nan

    @property
    def where(self) -> str:
        """What the number is of, in words."""
        return ", ".join(part for part in (self.name, block_title(self.place)) if part)


@dataclass(frozen=True)
class Words:
    """A pair of words or sentences that differ; ``None`` in a report that has none there.

    ``counts`` says whether the reports differ for it: not for versions, machines and commands.
    """

    table: str
    name: str
    a: str | None
    b: str | None
    counts: bool = True


@dataclass(frozen=True)
class Only:
    """A block, an approximation, a figure, ... that only one report has; ``in_a`` says which."""

    what: str
    name: str
    in_a: bool


@dataclass(frozen=True)
class Difference:
    """What :func:`curvscope.report.diff` found.

    ``numbers`` are all that either report has in the parts that both have; ``only`` those parts
    that one lacks; ``words`` what differs among settings, versions and findings. ``names`` are the
    two reports' names, ``sources`` where they were read.
    """

    kind: str
    names: tuple[str, str]
    sources: tuple[str, str]
    tolerance: float
    numbers: tuple[Number, ...]
    words: tuple[Words, ...]
    only: tuple[Only, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs but versions, machines, times and what is within error."""
        return not (self.changed or self.only or any(w.counts for w in self.words))

    @property
    def changed(self) -> tuple[Number, ...]:
        """Numbers that differ beyond tolerance and error.

        The main ones (errors, traces, losses, ...) come before derived metrics, and those that
        changed most, relative to their size, first.
        """
        moved = [n for n in self.numbers if n.state not in (SAME, NOISE)]
        return tuple(sorted(moved, key=lambda n: (n.metric not in _HEADLINE, _rank(n))))

    def of(self, table: str) -> list[Number]:
        """The numbers of one table."""
        return [number for number in self.numbers if number.table == table]

    def counts(self) -> dict[str, int]:
        """How many numbers are in each state."""
        return dict(Counter(number.state for number in self.numbers))

    def sentences(self) -> list[str]:
        """The difference in a few sentences."""
        if self.same:
            texts = [f"The two reports say the same{self._tolerated()}."]
        else:
            texts = [self._numbers()]
            texts += self._largest()
        texts += self._only()
        for table in dict.fromkeys(word.table for word in self.words):
            texts.append(self._differing(table))
        return [text for text in texts if text]

    def summary(self) -> str:
        """The difference as text, the names of both reports first."""
        lines = [
            f"A: {self.names[0]} ({self.sources[0]})",
            f"B: {self.names[1]} ({self.sources[1]})",
        ]
        return "\n".join([*lines, *self.sentences()])

    __str__ = summary

    def to_frame(self) -> pd.DataFrame:
        """One row per number."""
        import pandas as pd

        return pd.DataFrame(
            [
                {**asdict(n), "difference": n.difference, "relative": n.relative}
                for n in self.numbers
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the numbers that are the same, as JSON types."""
        from ...analysis.result import plain

        return dict(
            plain(
                {
                    "kind": "curvscope difference of reports",
                    "reports": self.kind,
                    "same": self.same,
                    "names": list(self.names),
                    "sources": list(self.sources),
                    "tolerance": self.tolerance,
                    "summary": self.sentences(),
                    "counts": self.counts(),
                    "numbers": [
                        {**asdict(n), "difference": n.difference, "relative": n.relative}
                        for n in self.numbers
                        if n.state != SAME
                    ],
                    "words": [asdict(word) for word in self.words],
                    "only": [asdict(one) for one in self.only],
                }
            )
        )

    def _tolerated(self) -> str:
        noise = self.counts().get(NOISE, 0)
        count = len(self.numbers)
        text = f": {count:,} numbers agree to a relative {self.tolerance:g}"
        return text + (f" or within three standard errors ({noise:,})" if noise else "")

    def _numbers(self) -> str:
        counts = self.counts()
        parts = [
            f"{counts[state]:,} {word}"
            for state, word in (
                (CHANGED, "differ"),
                (NOISE, "differ within three standard errors"),
                (SAME, f"agree to a relative {self.tolerance:g}"),
                (ONLY_A, "are in A alone"),
                (ONLY_B, "are in B alone"),
            )
            if counts.get(state)
        ]
        return f"Of {len(self.numbers):,} numbers {', '.join(parts)}." if parts else ""

    def _largest(self) -> list[str]:
        moved = [n for n in self.changed if n.state == CHANGED][:3]
        if not moved:
            return []
        return [
            "Largest relative changes: "
            + "; ".join(
                f"{heading(n.metric).title} of {n.where or 'the problem'}, from {shown(n.a)} to "
                f"{shown(n.b)}"
                for n in moved
            )
            + "."
        ]

    def _only(self) -> list[str]:
        texts = []
        for in_a, side in ((True, "A"), (False, "B")):
            for what in dict.fromkeys(one.what for one in self.only):
                names = [one.name for one in self.only if one.what == what and one.in_a == in_a]
                if names:
                    has = {"part": "has the", "reference": "compares with the"}.get(
                        what, f"has the {what}{'s' if len(names) > 1 else ''}"
                    )
                    texts.append(f"Only {side} {has} {_listed(names)}.")
        return texts

    def _differing(self, table: str) -> str:
        names = [word.name for word in self.words if word.table == table]
        if table == "settings":
            names = [setting_title(name) for name in names]
        if table in ("summary", "warnings"):
            verb = "differs" if table == "summary" else "differ"
            count = f"{len(names)} sentence{'s' if len(names) > 1 else ''}"
            return f"The {table} {verb} in {count}."
        title = "versions, machines and commands" if table == "versions and machines" else table
        return f"{title[0].upper()}{title[1:]} that differ: {_listed(list(dict.fromkeys(names)))}."


def state_of(a: Value | None, b: Value | None, tolerance: float) -> str:
    """How two numbers compare; see :class:`Number`."""
    if a is None or math.isnan(a.value):
        return ONLY_B
    if b is None or math.isnan(b.value):
        return ONLY_A
    if a.value == b.value:
        return SAME
    apart = abs(a.value - b.value)
    if apart <= tolerance * max(abs(a.value), abs(b.value), a.scale, b.scale):
        return SAME
    spread = math.hypot(a.stderr, b.stderr)
    return NOISE if spread > 0 and apart <= _SIGMAS * spread else CHANGED


def _rank(number: Number) -> float:
    """Large changes first; a number that one report lacks comes last."""
    if number.state != CHANGED:
        return math.inf
    size = max(abs(number.a), abs(number.b))
    return -abs(number.difference) / size if size and math.isfinite(size) else -2.0


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = len(found) - _MOST
    return ", ".join(found[:_MOST]) + (f" and {more} more" if more > 0 else "")
