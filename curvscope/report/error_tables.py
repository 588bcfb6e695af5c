"""Errors and all other metrics of approximations, beside the best of their classes."""

from __future__ import annotations

import math

from ..analysis.comparison import WHOLE, Comparison, Row
from .approximations import Approximation
from .cells import Cell, Column, Table, block_title, shade
from .findings import Findings
from .headings import heading
from .numbers import NOTHING, shown, with_error
from .summary import candidates


def error_table(found: Findings, reference: str) -> Table:
    """A row per approximation, a column for the whole matrix and for each block."""
    comparison = found.comparisons[reference]
    blocks = [*(row for row in (WHOLE,) if _has_whole(comparison)), *comparison.blocks]
    columns = [Column("approximation", numeric=False)]
    columns += [Column(block_title(name)) for name in blocks]
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


METRIC_COLUMNS = (
    *("error", "best_in_class", "excess", "error_rescaled", "cosine", "trace_ratio"),
    *("spectral_error", "spectrum_distance", "diagonal_correlation", "eigenspace_overlap"),
    *("step_angle", "step_efficiency", "decrease_ratio", "stein_divergence"),
)
"""What a table of all metrics shows, in order."""


def metric_table(found: Findings, reference: str, block: str) -> Table:
    """A row per approximation of one block, a column per metric."""
    comparison = found.comparisons[reference]
    columns = [Column("approximation", numeric=False)]
    columns += [heading(key).column() for key in METRIC_COLUMNS]
    rows = []
    for name in comparison.approximations:
        row = comparison.row(block, name)
        head = Cell(name, small=row.status if row.status != "compared" else "", title=row.note)
        if row.status in ("uncovered", "failed"):
            rows.append([head, *(Cell(NOTHING, title=row.note) for _ in METRIC_COLUMNS)])
            continue
        rows.append([head, *(_metric_cell(row, key) for key in METRIC_COLUMNS)])
    where = block_title(block)
    return Table(
        f"All approximations of the {reference}, {where}.", tuple(columns), rows, series=True
    )


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
