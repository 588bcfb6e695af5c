"""The result of a comparison: a row per block and approximation, and facts about the reference."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..display import Card, Table
from ..errors import NotDefinedError, UnknownBlockError, check_option, counted, nearest
from .result import Result, number

if TYPE_CHECKING:
    import pandas as pd

WHOLE = "(all)"
"""Name of the row for the whole matrix."""

SAME = 1e-10
"""Relative errors up to here are rounding, in double precision."""

NO_GRADIENT = "No gradient was given: pass gradient=problem."

_FIRST = ("block", "approximation", "status", "size", "family", "damping", "error", "error_stderr")
_BESIDE = ("best_class", "best_in_class", "excess", "outside", "outside_stderr")


@dataclass(frozen=True, eq=False)
class Row:
    """One approximation of one block.

    ``values`` maps every metric (the keys of :data:`curvscope.analysis.metrics.METRICS`, and
    ``best_in_class``, ``excess``, ``outside``) to a number; NaN where it is not defined or was not
    computed, and then ``reasons`` says why. ``method`` says how a number was got: ``"exact"`` (from
    the entries), ``"structured"`` (exact too, from the factors, without forming the matrix) or
    ``"estimated"``, with its standard error or residual bound in ``stderr``.

    ``status`` is ``"compared"``, ``"partial"`` (some parameters of the block are uncovered and were
    taken as zero), ``"uncovered"`` (the approximation does not define the block) or ``"failed"``;
    ``note`` explains it. Errors up to ``rounding`` are those of the number type. ``family`` is the
    class of matrices that the approximation belongs to, ``best_class`` the class whose nearest
    member stands beside it (they differ where the nearest member of the family itself is not
    known).
    """

    block: str
    approximation: str
    status: str = "compared"
    size: int = 0
    family: str = ""
    best_class: str | None = None
    damping: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    stderr: Mapping[str, float] = field(default_factory=dict)
    method: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    rounding: float = SAME

    def __getitem__(self, metric: str) -> float:
        """The value of a metric; NaN if it was not computed."""
        return self.values.get(metric, math.nan)

    @property
    def error(self) -> float:
        """Relative Frobenius error ``||R - B|| / ||R||``."""
        return self["error"]

    @property
    def best_in_class(self) -> float:
        """Relative Frobenius error of the member of ``best_class`` nearest to the reference."""
        return self["best_in_class"]

    @property
    def excess(self) -> float:
        """``error / best_in_class``: 1 is as good as the class allows."""
        return self["excess"]

    @property
    def outside(self) -> float:
        """Whole matrix only: share of the reference's energy outside its diagonal blocks."""
        return self["outside"]

    @property
    def equal(self) -> bool:
        """Whether the error is known and no more than rounding."""
        return self.error <= self.rounding and not self.stderr.get("error")

    def why(self) -> str:
        """The note, and why metrics are NaN: ``"step_angle, step_efficiency: The GGN ..."``."""
        groups: dict[str, list[str]] = {}
        for metric, reason in self.reasons.items():
            if math.isnan(self[metric]) and reason != NO_GRADIENT:
                groups.setdefault(reason, []).append(metric)
        missing = [f"{', '.join(names)}: {reason}" for reason, names in groups.items()]
        return " ".join([self.note] * bool(self.note) + missing)

    def record(self, metrics: tuple[str, ...], noisy: Collection[str] = ()) -> dict[str, Any]:
        """The row of :meth:`Comparison.to_frame`; ``noisy`` names what has a ``_stderr`` column."""
        first: dict[str, Any] = {
            "block": self.block,
            "approximation": self.approximation,
            "status": self.status,
            "size": self.size,
            "family": self.family,
            "damping": math.nan if self.damping is None else self.damping,
            "error": self["error"],
            "error_stderr": self.stderr.get("error", math.nan),
            "best_class": self.best_class,
            "best_in_class": self["best_in_class"],
            "excess": self["excess"],
            "outside": self["outside"],
            "outside_stderr": self.stderr.get("outside", math.nan),
        }
        rest: dict[str, float] = {}
        for name in metrics:
            rest[name] = self[name]
            if name in noisy:
                rest[f"{name}_stderr"] = self.stderr.get(name, math.nan)
        for name in ("best_in_class", "excess"):
            if name in noisy:
                rest[f"{name}_stderr"] = self.stderr.get(name, math.nan)
        rest = {name: value for name, value in rest.items() if name not in first}
        return {**first, **rest, "note": self.why()}

    def sentence(self) -> str:
        """``"K-FAC is off by 0.42 on conv1, of which 0.40 is the price of being Kronecker."``"""
        where = place(self.block)
        if self.status in ("uncovered", "failed"):
            return f"{self.approximation} says nothing about {where}: {self.note.rstrip('.')}."
        if math.isnan(self.error):
            reason = self.reasons.get("error", "not computed")
            return f"{self.approximation}'s error on {where} is not known: {reason}"
        spread = self.stderr.get("error", 0.0)
        bars = f" ± {number(spread, 2)}" if spread else ""
        note = f" ({self.note})" if self.note else ""
        if self.equal:
            return f"{self.approximation} equals the reference on {where} up to rounding{note}."
        text = f"{self.approximation} is off by {number(self.error)}{bars} on {where}"
        if self.best_class not in (None, "dense") and not math.isnan(self.best_in_class):
            least = self.best_in_class
            same = least <= self.rounding
            price = "none of which is" if same else f"of which {number(least)} is"
            text += f", {price} the price of being {_in_words(str(self.best_class))}"
            if self.status == "partial" and not same:
                text += " and of leaving out what it does not cover"
        return text + note + "."


def place(block: str) -> str:
    """Where a sentence is about: a name alone, unless it is a number (``"block 0"``)."""
    if block == WHOLE:
        return "the whole matrix"
    return f"block {block}" if block[:1].isdigit() else block


def _in_words(kind: str) -> str:
    """A class as the end of a sentence: ``"block-diagonal and Kronecker"``."""
    inner = kind.rpartition("block-diagonal ")[2]
    words = inner.replace("Kronecker-eigenbasis", "diagonal in its Kronecker eigenbasis")
    if words.startswith("rank-"):
        words = f"of rank {words[5:]}"
    words = words.replace("identity", "a multiple of the identity")
    if kind != inner and words == "dense":
        return "block-diagonal"
    return f"block-diagonal and {words}" if kind != inner else words


@dataclass(frozen=True, eq=False)
class ReferenceBlock:
    """Facts about one block of the reference, and the best that each class of matrices can do.

    ``share`` is the block's part of the whole matrix's energy (squared Frobenius norm). ``best``
    maps ``"identity"`` (a multiple of it), ``"diagonal"``, ``"Kronecker"`` and
    ``"diagonal-Kronecker"`` to the relative Frobenius error of the nearest such matrix; NaN where
    there is none, with the reason in ``reasons``. ``stderr`` has the standard errors of ``norm``,
    ``trace`` and those errors where they are estimates.
    """

    block: str
    size: int
    what: str
    route: str
    norm: float
    trace: float
    share: float = math.nan
    best: Mapping[str, float] = field(default_factory=dict)
    stderr: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison(Result):
    """How far approximations are from a reference matrix; returned by :func:`compare`.

    ``rows`` holds a :class:`Row` per block and approximation, those of the whole matrix (block
    ``"(all)"``) last; ``references`` a :class:`ReferenceBlock` per block. ``metrics`` are the
    names of the metrics in the order of the frame.
    """

    reference: str
    approximations: tuple[str, ...]
    blocks: tuple[str, ...]
    rows: tuple[Row, ...]
    references: tuple[ReferenceBlock, ...]
    metrics: tuple[str, ...]

    def row(self, block: str, approximation: str) -> Row:
        """The row of one block (``"(all)"`` for the whole matrix) and approximation."""
        for row in self.rows:
            if row.block == block and row.approximation == approximation:
                return row
        blocks = list(dict.fromkeys(row.block for row in self.rows))
        wrong = []
        if block not in blocks:
            wrong.append(f"There is no block {block!r}.{nearest(block, blocks)}")
        if approximation not in self.approximations:
            hint = nearest(approximation, self.approximations)
            wrong.append(f"There is no approximation {approximation!r}.{hint}")
        if not wrong:
            wrong.append(f"{approximation!r} was not compared on {place(block)}.")
        raise UnknownBlockError(
            f"{' '.join(wrong)} Blocks are {blocks}, approximations {list(self.approximations)}."
        )

    def best(self, block: str = WHOLE, metric: str = "error") -> Row:
        """The approximation that is best on a block by a metric (by default the least error).

        Raises ``NotDefinedError`` where no approximation has that metric.
        """
        from .metrics import METRICS

        ranked = [name for name, each in METRICS.items() if each.better is not None]
        check_option("metric", metric, ranked)
        rows = [r for r in self.rows if r.block == block]
        if not rows:
            names = list(dict.fromkeys(r.block for r in self.rows))
            raise UnknownBlockError(f"There is no block {block!r}.{nearest(block, names)}")
        rows = [r for r in rows if not math.isnan(r[metric])]
        if not rows:
            raise NotDefinedError(f"No approximation has {metric!r} on block {block!r}.")
        return min(rows, key=lambda r: METRICS[metric].badness(r[metric]))

    def records(self) -> list[dict[str, Any]]:
        """A record per row: identity, error and best in class first, then all other metrics."""
        return [row.record(self.metrics, self.noisy) for row in self.rows]

    @property
    def noisy(self) -> tuple[str, ...]:
        """Names of the metrics of which some row has a standard error or residual bound."""
        found = {name for row in self.rows for name in row.stderr}
        return tuple(n for n in (*self.metrics, "best_in_class", "excess") if n in found)

    def to_frame(self) -> pd.DataFrame:
        """A row per block and approximation.

        Columns: ``block, approximation, status, size, family, damping, error, error_stderr,
        best_class, best_in_class, excess, outside, outside_stderr``, then every other metric, and
        ``note``. A metric that was estimated in some row is followed by ``<metric>_stderr``, NaN
        where it is exact. How each number was got stands in :meth:`details`.
        """
        import pandas as pd

        records = self.records()
        rest = [name for name in self.metrics if name not in _FIRST]
        columns = list(records[0]) if records else [*_FIRST, *_BESIDE, *rest, "note"]
        return pd.DataFrame.from_records(records, columns=columns)

    def details(self) -> pd.DataFrame:
        """A row per number: ``block, approximation, metric, value, stderr, method, reason``."""
        import pandas as pd

        records = [
            {
                "block": row.block,
                "approximation": row.approximation,
                "metric": name,
                "value": row[name],
                "stderr": row.stderr.get(name, math.nan),
                "method": row.method.get(name, ""),
                "reason": row.reasons.get(name, ""),
            }
            for row in self.rows
            for name in dict.fromkeys([*self.metrics, *row.values, *row.reasons])
        ]
        columns = ["block", "approximation", "metric", "value", "stderr", "method", "reason"]
        return pd.DataFrame.from_records(records, columns=columns)

    def best_frame(self) -> pd.DataFrame:
        """What each class of matrices can do: a row per block.

        Columns: ``block, size, norm, trace, share``, then the relative error of the nearest
        ``identity``, ``diagonal``, ``Kronecker`` and ``diagonal-Kronecker``; and the standard
        errors of those that are estimates in some row (``norm_stderr``, ...).
        """
        import pandas as pd

        noisy = list(dict.fromkeys(name for ref in self.references for name in ref.stderr))
        classes = list(dict.fromkeys(name for ref in self.references for name in ref.best))
        records = [
            {
                "block": ref.block,
                "size": ref.size,
                "norm": ref.norm,
                "trace": ref.trace,
                "share": ref.share,
                **{name: ref.best.get(name, math.nan) for name in classes},
                **{f"{name}_stderr": ref.stderr.get(name, math.nan) for name in noisy},
            }
            for ref in self.references
        ]
        columns = ["block", "size", "norm", "trace", "share", *classes]
        columns += [f"{name}_stderr" for name in noisy]
        return pd.DataFrame.from_records(records, columns=columns)

    def summary(self) -> str:
        """A sentence per approximation: the whole matrix, and the block where it is worst."""
        size = max((row.size for row in self.rows), default=0)
        lines = [
            f"Compared with the {self.reference} ({size:,} parameters"
            + (f", {counted(len(self.blocks), 'block')}" if self.blocks else "")
            + "):"
        ]
        for name in self.approximations:
            rows = [row for row in self.rows if row.approximation == name]
            known = [r for r in rows if r.block != WHOLE and not math.isnan(r.error)]
            whole = [row for row in rows if row.block == WHOLE]
            text = whole[0].sentence() if whole else ""
            if known:
                worst = max(known, key=lambda row: row.error)
                if worst.equal:
                    text += f"{' ' if text else ''}{name} equals it on every block up to rounding."
                else:
                    text += (" Worst block: " if text else "") + worst.sentence()
            lines.append(text or f"{name}: nothing was compared.")
        return "\n".join(lines)

    def _card_(self) -> Card:
        """Errors first; every other metric and the reference's blocks behind a fold."""
        records = [
            {**record, "note": row.note}
            for record, row in zip(self.records(), self.rows, strict=True)
        ]
        constant = all(row.status == "compared" for row in self.rows)
        shown = ["block", "approximation", "size", "error", "best_in_class", "best_class"]
        shown += ["excess", "outside", "cosine", "trace_ratio"]
        shown += ["note"] if constant else ["status", "note"]
        present = [name for name in shown if records and name in records[0]]
        beside = ("error_stderr", "outside_stderr")
        tables = [Table(records, columns=[*present, *beside], bars=("error",))]
        others = [name for name in self.metrics if name not in present]
        if others:
            every = ["block", "approximation", "family", "damping", *others]
            tables.append(
                Table(records, columns=every, title=f"{len(others)} more metrics", folded=True)
            )
        best = [
            {"block": r.block, "size": r.size, "norm": r.norm, "trace": r.trace, "share": r.share}
            | {f"nearest {name}": value for name, value in r.best.items()}
            for r in self.references
        ]
        if best:
            title = f"The {self.reference} by block, and the error of the nearest of each class"
            tables.append(Table(best, title=title, folded=True, where="best_frame()"))
        return replace(
            super()._card_(),
            tables=tables,
            hints=("result.plot()", "result.to_frame()", "result.details()", "cs.explore(result)"),
        )
