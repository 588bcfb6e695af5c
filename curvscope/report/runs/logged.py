"""The numbers that a training's own loop has logged: which there are, and their picture."""

from __future__ import annotations

import math
from typing import Any

from ...plotting.marks import readout
from ...plotting.style import short
from ...training.measures import REGISTRY
from ...training.snapshots import SnapshotMeasure
from ..figure_plans import Plan
from .gather import PROGRESS, Runs, band
from .lines import blank, colour_of, draw_band, legend_below, logarithmic, of_block

_PANELS = 12  # numbers that the picture shows
_COLUMNS = 4
_RECORD = ("step", "seconds", "measure", "row", "rows", "block")


def logged_numbers(runs: Runs) -> list[tuple[str, str]]:
    """Names and keys given to ``monitor.log(name, key=number)``, in the order in which they came.

    What the page shows as progress already (losses and accuracy by epoch) is not among them.
    """
    from ...training import curvature_measures, spectral_measures  # noqa: F401  (they register)

    measures = {*REGISTRY, SnapshotMeasure.name}
    found: dict[tuple[str, str], None] = {}
    for member in runs.members:
        shown = (*_RECORD, *PROGRESS) if member.has_epochs else _RECORD
        for name in member.run.measures:
            if name in measures:
                continue
            hidden = shown if name == "epoch" else _RECORD
            for row in member.rows(name):
                for key, value in row.items():
                    if key not in hidden and isinstance(value, int | float):
                        found.setdefault((name, key))
    return list(found)


def logged_plan(runs: Runs) -> Plan | None:
    """A small panel per number over the steps; ``None`` if nothing was logged."""
    numbers = logged_numbers(runs)
    if not numbers:
        return None
    kept = numbers[:_PANELS]
    several = len({name for name, _ in numbers}) > 1 or len(numbers) == 1
    columns = min(_COLUMNS, len(kept))
    rows = math.ceil(len(kept) / columns)

    def draw(figure: Any) -> None:
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax in panels[len(kept) :]:
            blank(ax)
        looks = colour_of(list(runs.groups))
        for ax, (name, key) in zip(panels, kept, strict=False):
            for optimizer, members in runs.best():
                colour, ls = looks[optimizer]
                curve = band(members, of_block(name, "", key))
                label = short(optimizer)
                draw_band(ax, curve, color=colour, ls=ls, label=label, series=optimizer)
            title = f"{name}: {key}" if several and name != key else key
            readout(ax, "step", title)
            ax.set_title(short(title, 26))
            ax.set_xlabel("step")
            ax.grid(True, axis="y")
            logarithmic(ax)
        legend_below(figure, least=2)

    more = len(numbers) - len(kept)
    return Plan(
        "logged",
        "",
        f"Over the steps: {', '.join(f'{name} {key}' for name, key in kept)}.",
        "What the training's own loop gave to monitor.log, as it gave it."
        + (f" {more} more are in csv/logged.csv." if more else ""),
        (max(4.6, 2.4 * columns + 0.6), 0.7 + 2.1 * rows),
        draw,
    )
