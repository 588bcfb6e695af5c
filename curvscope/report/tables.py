"""The other tables: approximations, concentration, coverage, verification, cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import counted
from .approximations import Approximation
from .cells import Cell, Column, Table, block_title, finite, number
from .findings import Findings
from .headings import heading
from .numbers import NOTHING, percent, powers, seconds, shown, with_error


def approximation_table(found: Findings) -> Table:
    """What each approximation is, and whether it is defined here."""
    columns = (
        Column("approximation", numeric=False),
        Column("what it is", numeric=False),
        Column("here", numeric=False),
        Column("time"),
    )
    rows = []
    for entry in found.approximations:
        if entry.op is None:
            here = Cell("not available", small=entry.reason)
        elif entry.uncovered:
            missing = "; ".join(f"{name}: {why}" for name, why in entry.uncovered.items())
            here = Cell(f"without {counted(len(entry.uncovered), 'block')}", small=missing)
        else:
            same = f"the same as {entry.same_as}" if entry.same_as else ""
            here = Cell("all layers", small=same)
        rows.append([Cell(entry.name, small=entry.group), Cell(entry.about), here, _time(entry)])
    return Table("The approximations of this report.", columns, rows, series=True)


def _time(entry: Approximation) -> Cell:
    return Cell(seconds(entry.seconds), sort=entry.seconds)


def concentration_records(found: Findings) -> list[dict[str, Any]]:
    """A record per block and factor: the numbers of its Concentration."""
    records = []
    for block, one in found.blocks.items():
        records.append({"block": block, "matrix": "exact block", **one.facts()})
        for name, part in found.factors.get(block, {}).items():
            records.append({"block": block, "matrix": f"factor {name}", **part.facts()})
    return records


def concentration_table(found: Findings) -> Table:
    """Diagonal share, discs, dominance, Kaiser rule and signal-to-noise, beside the null model."""
    columns = (
        Column("matrix", numeric=False),
        heading("size").column(),
        heading("diagonal_share").column("Small: the null model."),
        heading("score").column(),
        heading("disjoint").column("Small: the null model."),
        heading("dominant").column("Small: the null model."),
        heading("kaiser").column("Small: with noise."),
        heading("snr").column("Small: with noise."),
    )
    rows = []
    for record in concentration_records(found):
        spread = record["null_share_std"]
        null = f"null {percent(record['null_share'])}"
        if spread is not None and math.isfinite(spread):
            null += f" ± {percent(spread)}"
        rows.append(
            [
                Cell(f"{block_title(record['block'])}, {record['matrix']}"),
                Cell(shown(record["size"]), sort=record["size"]),
                Cell(
                    _percent(record, "diagonal_share"),
                    small=null,
                    sort=finite(record["diagonal_share"]),
                ),
                number(record["score"], 2),
                _beside(record["disjoint"], "null", record["null_disjoint"]),
                Cell(
                    _percent(record, "dominant"),
                    small=""
                    if math.isnan(record["null_dominant"])
                    else f"null {percent(record['null_dominant'])}",
                    sort=finite(record["dominant"]),
                ),
                _beside(record["kaiser"], "noisy", record["kaiser_noisy"], record["kaiser_stderr"]),
                _beside(record["snr"], "noisy", record["noisy_snr"], record["snr_stderr"]),
            ]
        )
    return Table(
        "Concentration of the exact GGN blocks and of K-FAC's factors on their diagonals.",
        columns,
        rows,
    )


def _percent(record: Mapping[str, Any], key: str) -> str:
    error = record[f"{key}_stderr"]
    return percent(record[key]) + (f" ± {percent(error)}" if error else "")


def _beside(value: Any, word: str, other: Any, error: float = 0.0) -> Cell:
    sort = None if value is None or (isinstance(value, float) and math.isnan(value)) else value
    known = other is not None and not (isinstance(other, float) and math.isnan(other))
    text = with_error(value, error) if error else shown(value)
    return Cell(text, small=f"{word} {shown(other)}" if known else "", sort=sort)


def coverage_table(found: Findings) -> Table:
    """A row per method: the share of parameters covered, by which routes, and what is missing."""
    result = found.coverage
    assert result is not None
    columns = (
        Column("method", numeric=False),
        heading("covered").column(),
        Column("routes", numeric=False),
        Column("not covered", numeric=False),
    )
    rows = []
    said: dict[str, str] = {}  # reasons -> the method at which they stand
    for method in result.methods:
        routes = ", ".join(f"{route} ({n:,})" for route, n in result.routes(method).items())
        missing: dict[str, list[str]] = {}
        for row in result.parameters:
            cell = result.cell(row.name, method)
            if cell.status == "uncovered":
                missing.setdefault(cell.reason, []).append(row.name)
        reasons = [_missing(names, why, len(result.parameters)) for why, names in missing.items()]
        if method in result.not_available:
            reasons = [result.not_available[method]]
        why = " ".join(reasons) or NOTHING
        if len(why) > 40 and said.setdefault(why, method) != method:
            why = f"as for {said[why]}"
        share = result.shares[method]
        rows.append(
            [
                Cell(method),
                Cell(percent(share), sort=share, shade=None if share >= 1 else 0.6 * (1 - share)),
                Cell(routes or NOTHING),
                Cell(why),
            ]
        )
    return Table("Which method covers which part of this network.", columns, rows)


def _missing(names: Iterable[str], reason: str, most: int) -> str:
    listed = list(names)
    text = ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
    return f"{text}: {reason}"


def verification_tables(found: Findings) -> list[Table]:
    """The checks, and what they say of each capability."""
    result = found.verification
    if result is None:
        return []
    checks = Table(
        f"Checks on {result.samples} samples in {result.dtype}.",
        (
            Column("check", numeric=False),
            Column("about", numeric=False),
            Column("status", numeric=False),
            Column("measured"),
            Column("bound"),
            Column("finding", numeric=False),
        ),
        [
            [
                Cell(check.name),
                Cell(check.about),
                Cell(check.status, strong=check.status == "failed"),
                number(check.value, 2),
                number(check.tolerance, 2),
                Cell(powers(f"{check.sentence} {check.advice}".strip())),
            ]
            for check in result.checks
        ],
    )
    trust = Table(
        "What may be trusted on this problem.",
        (
            Column("capability", numeric=False),
            Column("verdict", numeric=False),
            Column("why", numeric=False),
        ),
        [
            [
                Cell(name),
                Cell(verdict, strong=verdict != "trust"),
                Cell(powers(result.reasons[name])),
            ]
            for name, verdict in result.trust.items()
        ],
    )
    return [trust, checks]


def cost_table(found: Findings) -> Table:
    """Seconds, passes, products and route of each computation."""
    columns = (
        Column("computation", numeric=False),
        Column("time"),
        Column("backward passes", "Passes over the whole data; a double backward counts as two."),
        Column("products", "Products with a matrix that is known by its products only."),
        Column("route", numeric=False),
    )
    rows = [
        [
            Cell(row.name),
            Cell(seconds(row.seconds), sort=row.seconds),
            number(row.passes if row.passes % 1 else int(row.passes)),
            Cell(shown(row.products) if row.products else NOTHING, sort=row.products),
            Cell(row.route or NOTHING),
        ]
        for row in found.cost
    ]
    return Table("What each computation took.", columns, rows)
