"""Errors and all other metrics of approximations, beside the best of their classes."""

from __future__ import annotations

import math

from ..analysis.comparison import WHOLE, Comparison, Row
from .approximations import Approximation
from .cells import WHOLE_TITLE, Cell, Column, Table, shade
from .findings import Findings
from .numbers import NOTHING, shown, with_error
from .summary import candidates


def error_table(found: Findings, reference: str) -> Table:
    """A row per approximation, a column for the whole matrix and for each block."""
    comparison = found.comparisons[reference]
    blocks = [*(row for row in (WHOLE,) if _has_whole(comparison)), *comparison.blocks]
    columns = [Column("approximation", numeric=False)]
    columns += [Column(WHOLE_TITLE if name == WHOLE else name) for name in blocks]
    users = set(candidates(found))
    least = {
        name: min(
            (r.error for r in comparison.rows if r.block == name and r.approximation in users),
            key=lambda e: e if math.isfinite(e) else math.inf,
            default=math.nan,
        )
        for name in blocks
    }
    known = {entry.name: entry for entry in found.approximations}
    rows = []
    for name in comparison.approximations:
        entry = known.get(name)
        head = Cell(name, small=_remark(entry), title=entry.about if entry else "")
        own = least if name in users else {}
        cells = [
            _error_cell(comparison.row(block, name), own.get(block, math.nan)) for block in blocks
        ]
        rows.append([head, *cells])
    return Table(
        f"Relative Frobenius error against the {reference}; below each, the best that a matrix of "
        "the same class can do.",
        tuple(columns),
        rows,
        series=True,
    )


def _has_whole(comparison: Comparison) -> bool:
    return any(row.block == WHOLE for row in comparison.rows)


def _remark(entry: Approximation | None) -> str:
    if entry is None:
        return ""
    return f"the same as {entry.same_as}" if entry.same_as else entry.group


def _error_cell(row: Row, least: float) -> Cell:
    if not math.isfinite(row.error):
        word = row.status if row.status in ("uncovered", "failed") else NOTHING
        return Cell(word, title=row.note or row.reasons.get("error", ""))
    small = ""
    if math.isfinite(row.best_in_class) and row.best_class not in (None, "dense"):
        small = f"best {shown(row.best_in_class, 2)}"
    return Cell(
        with_error(row.error, row.stderr.get("error", math.nan)),
        small=small,
        sort=row.error,
        title=row.sentence(),
        shade=shade(row.error),
        strong=bool(math.isfinite(least) and row.error <= least * (1 + 1e-9)),
    )


_METRICS = (
    ("error", "error"),
    ("best_in_class", "best of class"),
    ("excess", "error / best"),
    ("error_rescaled", "error, best scale"),
    ("cosine", "cosine"),
    ("trace_ratio", "trace ratio"),
    ("spectral_error", "spectral error"),
    ("spectrum_distance", "distance of spectra"),
    ("diagonal_correlation", "diagonal correlation"),
    ("eigenspace_overlap", "eigenspace overlap"),
    ("step_angle", "step angle (°)"),
    ("step_efficiency", "step efficiency"),
    ("decrease_ratio", "actual / predicted"),
    ("stein_divergence", "log-det divergence"),
)


def metric_table(found: Findings, reference: str, block: str) -> Table:
    """A row per approximation of one block, a column per metric."""
    from ..analysis.metrics import METRICS

    comparison = found.comparisons[reference]
    docs = {key: _plain(METRICS[key].doc) if key in METRICS else "" for key, _ in _METRICS}
    docs["best_in_class"] = "Error of the nearest matrix of the same class."
    docs["excess"] = "How many times the error is that of the nearest matrix of the class."
    columns = [Column("approximation", numeric=False)]
    columns += [Column(title, docs[key]) for key, title in _METRICS]
    rows = []
    for name in comparison.approximations:
        row = comparison.row(block, name)
        head = Cell(name, small=row.status if row.status != "compared" else "", title=row.note)
        if row.status in ("uncovered", "failed"):
            rows.append([head, *(Cell(NOTHING, title=row.note) for _ in _METRICS)])
            continue
        rows.append([head, *(_metric_cell(row, key) for key, _ in _METRICS)])
    where = WHOLE_TITLE if block == WHOLE else block
    return Table(
        f"All approximations of the {reference}, {where}.", tuple(columns), rows, series=True
    )


def _plain(doc: str) -> str:
    return " ".join(doc.replace("``", "").split())


def _metric_cell(row: Row, key: str) -> Cell:
    value = row[key]
    if math.isnan(value):
        return Cell(NOTHING, title=row.reasons.get(key, ""))
    text = with_error(value, row.stderr.get(key, math.nan))
    colour = shade(value) if key == "error" else None
    return Cell(
        text,
        sort=value,
        title="estimated" if row.method.get(key) == "estimated" else "",
        shade=colour,
    )
