"""All numbers of one step beside each other: a table that the page turns to any measured step."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

from ..cells import Cell, Column, Table, block_title, finite
from ..numbers import NOTHING, shown
from .gather import Runs, Values, band
from .lines import of_block

_MOST = 80  # steps that the page keeps
SHARP = "λ_max · learning rate"
_WHOSE = "of P H where P multiplies the gradient, else of H"


@dataclass(frozen=True)
class Steps:
    """The table at the last step, and for the scripts the numbers at all steps.

    ``data`` has ``steps``, ``rows`` (the names of the table's rows), and ``values``: by step, row
    and optimizer the main number and the small one below it, ``None`` where there is none.
    """

    table: Table
    data: dict[str, Any]


def step_table(runs: Runs) -> Steps | None:
    """Error and cosine of every layer and optimizer by step; ``None`` if nothing was measured."""
    curves = _curves(runs)
    steps = sorted({step for _, _, main, _ in curves for step in main})
    if not steps:
        return None
    if len(steps) > _MOST:
        kept = {round(k * (len(steps) - 1) / (_MOST - 1)) for k in range(_MOST)}
        steps = [steps[k] for k in sorted(kept)]
    names = list(runs.groups)
    rows = list(dict.fromkeys(row for row, _, _, _ in curves))
    known = {(row, name): (main, small) for row, name, main, small in curves}
    values = [
        [
            [[_latest(curve, step) for curve in known.get((row, name), ({}, {}))] for name in names]
            for row in rows
        ]
        for step in steps
    ]
    table = Table(
        "Relative error of each optimizer's curvature, and below it the cosine.",
        (Column("of", numeric=False), *(Column(name) for name in names)),
        [
            [
                Cell(row, small=_WHOSE if row == SHARP else ""),
                *(_cell(*pair) for pair in values[-1][place]),
            ]
            for place, row in enumerate(rows)
        ],
    )
    return Steps(table, {"steps": [int(s) for s in steps], "rows": rows, "values": values})


Curve = dict[float, float]


def _curves(runs: Runs) -> list[tuple[str, str, Curve, Curve]]:
    """Row, optimizer, and its numbers by step: the mean over seeds."""
    found = []
    for name, members in runs.best():

        def of(values: Values, members: Any = members) -> Curve:
            xs, mean, _, _ = band(members, values)
            return dict(zip(xs, mean, strict=True))

        for block in runs.blocks:
            error = of(of_block("error", block, "error"))
            if error:
                found.append(
                    (block_title(block), name, error, of(of_block("error", block, "cosine")))
                )
        key = "preconditioned_product"
        sharp = of(of_block("sharpness", "", key)) or of(of_block("sharpness", "", "product"))
        if sharp:
            found.append((SHARP, name, sharp, {}))
    last = [row for row in found if row[0] == SHARP]
    return [row for row in found if row[0] != SHARP] + last


def _latest(curve: Curve, step: float) -> float | None:
    """The value last measured up to ``step``."""
    places = sorted(curve)
    k = bisect.bisect_right(places, step)
    return finite(float(f"{curve[places[k - 1]]:.5g}")) if k else None


def _cell(main: float | None, small: float | None) -> Cell:
    return Cell(
        NOTHING if main is None else shown(main),
        small="" if small is None else shown(small, 2),
        sort=main,
    )
