"""The page about trainings: runs and pictures put into the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..figures import Picture
from ..skeleton import Choice, Link, render_page
from ..svg import share_styles
from .gather import Runs
from .places import Places
from .steps import step_table
from .tables import alarm_table, grid_table, monitor_table, result_table
from .watched import settings
from .words import facts, summary, warnings

_SECTIONS = {
    "summary": "Summary",
    "loss": "Loss and accuracy",
    "logged": "Logged by the loop",
    "curvature": "Curvature against the exact one",
    "steps": "Step by step",
    "stability": "Stability",
    "alarms": "Alarms",
    "paths": "Trajectories",
    "cost": "Cost of watching",
    "trainings": "All trainings",
    "settings": "Settings",
}


def render(
    runs: Runs, places: Places, pictures: Sequence[Picture], document: dict[str, Any]
) -> str:
    """The whole page as HTML. Everything that comes from outside is escaped."""
    figures, rules = share_styles([picture.svg for picture in pictures])
    pictures = [replace(p, svg=svg) for p, svg in zip(pictures, figures, strict=True)]
    by_kind = {picture.kind: picture for picture in pictures}
    steps = step_table(runs)
    sections = {
        k: v
        for k, v in _SECTIONS.items()
        if {"steps": steps, "logged": "logged" in by_kind}.get(k, True)
    }
    own = [p for p in pictures if p.kind.startswith("beside-")]
    return render_page(
        "runs.html.j2",
        kicker="curvscope report of trainings",
        title=runs.problem,
        subtitle=", ".join(runs.groups),
        links=[Link(title, f"#{name}") for name, title in sections.items()],
        created=document["created"],
        alone=runs.alone,
        choices=[Choice(name) for name in runs.groups] if len(runs.groups) > 1 else (),
        rules=rules,
        scripts=("steps.js",),
        steps=steps,
        summary=summary(runs),
        warnings=warnings(runs),
        facts=facts(runs),
        results=result_table(runs),
        trainings=grid_table(runs),
        alarms=alarm_table(runs),
        monitor=monitor_table(runs),
        beside=own,
        notes=places.notes,
        paths=str(places.paths.summary()).splitlines() if places.paths else [],
        settings=settings(runs),
        picture=lambda kind: by_kind.get(kind),
    )
