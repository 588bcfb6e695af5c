"""One row per layer: its exact curvature and what comes closest to it."""

from __future__ import annotations

import math
from typing import Any

from ..analysis.result import listing
from .cells import Cell, Column, Table, block_title, finite, number, shade
from .findings import Findings
from .headings import heading
from .numbers import NOTHING, percent, shown
from .summary import best, exact_on

_TIMES = "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}"  # a shape stays in one line


def layer_records(found: Findings) -> list[dict[str, Any]]:
    """A record per layer: what it is, its exact curvature, and what is closest to it."""
    comparison = found.layer_comparison()
    references = {ref.block: ref for ref in comparison.references}
    modules = dict(found.problem.model.named_modules())
    records = []
    for name, members in found.problem.blocks.items():
        ref = references.get(name)
        spectra = found.spectra.get(name, {})
        own = spectra.get("GGN")
        curved = spectra.get("Hessian", own if found.same_blocks else None)
        winner = best(found, name)
        specs = [spec for spec in found.problem.layout if spec.name in members]
        module = modules.get(name)
        concentrated = found.blocks.get(name)
        record: dict[str, Any] = {
            "layer": name,
            "type": type(module).__name__ if module is not None and name else "",
            "parameters": sum(spec.numel for spec in specs),
            "shapes": {spec.name: list(spec.shape) for spec in specs},
            "ggn_route": ref.route if ref else "",
            "hessian_route": _hessian_route(found, name),
            "trace": ref.trace if ref else math.nan,
            "norm": ref.norm if ref else math.nan,
            "share": ref.share if ref else math.nan,
            "top_eigenvalues": own.top(3).tolist() if own else [],
            "effective_rank": own.effective_rank if own else math.nan,
            "negative_eigenvalues": curved.negative if curved else None,
            "smallest_eigenvalue": curved.smallest if curved else math.nan,
            "diagonal_share": concentrated.diagonal_share if concentrated else math.nan,
            "null_diagonal_share": concentrated.null.diagonal_share if concentrated else math.nan,
            "best_approximation": winner.row.approximation if winner else "",
            "best_error": winner.row.error if winner else math.nan,
        }
        for kind in ("diagonal", "Kronecker"):
            key = f"nearest_{kind.lower()}_error"
            record[key] = ref.best.get(kind, math.nan) if ref else math.nan
        records.append(record)
    return records


def _hessian_route(found: Findings, name: str) -> str:
    if found.hessian is None or name not in found.hessian_blocks:
        return ""
    return found.hessian.blocks[name].info.route


def layer_table(found: Findings) -> Table:
    """One row per layer."""
    columns = (
        Column("layer", numeric=False),
        Column("parameters"),
        heading("route").column(numeric=False),
        heading("trace").column(),
        heading("norm").column(),
        heading("share").column(),
        heading("top_eigenvalues").column(),
        heading("negative_eigenvalues").column("Small: the smallest one."),
        heading("diagonal_share").column("Small: the null model."),
        heading("best_approximation").column(),
    )
    rows = []
    for record in layer_records(found):
        shapes = ", ".join(
            f"{name.rpartition('.')[2]} {_TIMES.join(map(str, shape))}"
            for name, shape in record["shapes"].items()
        )
        negative = record["negative_eigenvalues"]
        routes = [r for r in dict.fromkeys([record["ggn_route"], record["hessian_route"]]) if r]
        rows.append(
            [
                Cell(
                    block_title(record["layer"]),
                    small=f"{record['type']}: {shapes}" if record["type"] else shapes,
                    link=f"#{anchor(found, record['layer'])}",
                ),
                Cell(shown(record["parameters"]), sort=record["parameters"]),
                Cell(routes[0] if routes else NOTHING, small=", ".join(routes[1:])),
                number(record["trace"]),
                number(record["norm"]),
                Cell(percent(record["share"]), sort=finite(record["share"])),
                Cell(
                    shown(record["top_eigenvalues"][0]) if record["top_eigenvalues"] else NOTHING,
                    small=", ".join(shown(v) for v in record["top_eigenvalues"][1:]),
                    sort=record["top_eigenvalues"][0] if record["top_eigenvalues"] else None,
                ),
                Cell(
                    NOTHING if negative is None else shown(negative),
                    small=f"down to {shown(record['smallest_eigenvalue'])}" if negative else "",
                    sort=negative,
                    title="" if negative is not None else "The Hessian block was not computed.",
                ),
                Cell(
                    percent(record["diagonal_share"]),
                    small=f"null {percent(record['null_diagonal_share'])}",
                    sort=finite(record["diagonal_share"]),
                ),
                Cell(
                    _closest(found, record),
                    small=f"nearest Kronecker {shown(record['nearest_kronecker_error'], 2)}",
                    sort=finite(record["best_error"]),
                    shade=shade(record["best_error"]),
                ),
            ]
        )
    return Table("Every layer: its exact curvature and what comes closest to it.", columns, rows)


def _closest(found: Findings, record: dict[str, Any]) -> str:
    if same := exact_on(found, record["layer"]):
        return f"exact up to rounding: {listing(list(same), 3)}"
    return f"{record['best_approximation'] or NOTHING} {shown(record['best_error'], 2)}"


def anchor(found: Findings, block: str) -> str:
    """The id of a layer's section."""
    return f"layer-{found.slug(block)}"
