"""The Hessian of a report: the blocks that can be had, its comparison, its spectrum's ends."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from .. import curvature
from ..analysis import Comparison, compare
from ..analysis.comparison import WHOLE
from ..analysis.extremes import extremes
from ..errors import CurvscopeError
from ..operators import Operator
from ..progress import track
from .approximations import BEST, EXACT
from .findings import CostRow, Findings

_HESSIAN_SECONDS = 900.0  # a Hessian block that would take longer is left out
_WHOLE_METRICS = ("error", "trace_ratio")
_WHOLE_PRODUCTS = 64  # with the whole Hessian, for its energy outside the blocks


def hessian_blocks(found: Findings) -> None:
    """The blocks, except those by a route that would take too long."""
    start = time.perf_counter()
    whole = curvature.hessian(found.problem)
    found.hessian = whole
    routes = {name: whole.route_of(name) for name in whole.blocks}
    found.same_blocks = all(route == "piecewise-linear" for route in routes.values())
    names: list[str] = []
    expected, spent, done = _column_seconds(found, whole), 0.0, 0.0
    ready = _rows_together(whole, routes, expected)
    for name in track(list(routes), "Hessian blocks"):
        columns = 0 if name in ready else _columns(whole, name, routes[name])
        if columns * expected > _HESSIAN_SECONDS:
            found.skipped.append(
                f"The Hessian block of {name} was left out: {columns:,} double backward passes "
                f"would take about {columns * expected / 60:.0f} minutes. "
                f'cs.hessian(problem).blocks["{name}"] computes it.'
            )
            continue
        begun = time.perf_counter()
        try:
            block = whole.blocks[name]
            if routes[name] == "autograd":
                block.dense()  # kept by the operator
        except CurvscopeError as error:
            found.skipped.append(f"The Hessian block of {name} was left out: {error}")
            continue
        names.append(name)
        if columns:
            spent, done = spent + time.perf_counter() - begun, done + columns
            expected = spent / done
    found.hessian_blocks = tuple(names)
    found.cost.append(
        CostRow(
            "Hessian, blocks",
            time.perf_counter() - start,
            sum(whole.blocks[name].info.passes for name in names),
            route=", ".join(dict.fromkeys(routes.values())),
        )
    )


def _rows_together(whole: Any, routes: dict[str, str], expected: float) -> list[str]:
    """Compute the blocks by rows, except the very long ones, in the same passes: their names."""
    rows = [name for name, route in routes.items() if route == "rows"]
    rows = [n for n in rows if _columns(whole, n, "rows") * expected <= _HESSIAN_SECONDS]
    try:
        whole.compute_rows(rows)
    except CurvscopeError:  # they are tried one by one, and the one that is refused says why
        return []
    return rows


def _columns(whole: Any, name: str, route: str) -> int:
    """Double backward passes over the data that a block takes; 0 where it takes none."""
    plan = whole.plans[name]
    if route == "rows":
        return int(plan.positions * plan.outputs)
    return int(plan.size) if route == "autograd" else 0


def _column_seconds(found: Findings, whole: Any) -> float:
    """Seconds of one product with the Hessian."""
    vector = found.problem.gradient()
    start = time.perf_counter()
    whole @ vector
    return time.perf_counter() - start


def compare_hessian(found: Findings) -> None:
    """Its blocks with everything, or with the GGN alone where they are the same matrices.

    Of the whole matrix, which is known by its products only, the metrics that come with the probes
    for its norm; all others would take many products per approximation.
    """
    assert found.ggn is not None and found.hessian is not None
    others: dict[str, Operator] = {"GGN": found.ggn}
    if not found.same_blocks:
        others |= {
            entry.name: entry.op
            for entry in found.approximations
            if entry.op is not None and entry.group not in (BEST, EXACT) and not entry.same_as
        }
    result = compare(
        found.hessian,
        others,
        damping=found.damping,
        budget=_WHOLE_PRODUCTS,
        blocks=[*found.hessian_blocks, WHOLE],
        metrics=_WHOLE_METRICS,
        seed=found.settings.seed,
    )
    if not found.same_blocks and found.hessian_blocks:
        blocks = compare(
            found.hessian,
            others,
            gradient=found.problem,
            damping=found.damping,
            blocks=list(found.hessian_blocks),
            seed=found.settings.seed,
        )
        result = _joined(blocks, result)
    found.comparisons["Hessian"] = result
    found.cost.append(
        CostRow("comparison with the Hessian", result.cost.seconds, products=result.cost.products)
    )


def _joined(blocks: Comparison, whole: Comparison) -> Comparison:
    """The rows of blocks of one comparison, and those of the whole matrix of another."""
    return replace(
        blocks,
        rows=blocks.rows + tuple(row for row in whole.rows if row.block == WHOLE),
        references=whole.references,
        cost=blocks.cost + whole.cost,
        settings={**blocks.settings, "whole": dict(whole.settings)},
        warnings=tuple(dict.fromkeys(blocks.warnings + whole.warnings)),
        converged=blocks.converged and whole.converged,
    )


def hessian_ends(found: Findings) -> None:
    """The largest and the most negative eigenvalues of the whole matrix."""
    assert found.hessian is not None
    result = extremes(found.hessian)
    found.ends = result
    found.cost.append(
        CostRow(
            "ends of the Hessian's spectrum", result.cost.seconds, products=result.cost.products
        )
    )
