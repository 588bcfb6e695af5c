"""Trainings in one page: see :func:`make_runs_report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import ReportPaths
from ..write import atomic_folder

__all__ = ["holds_runs", "make_runs_report"]


def holds_runs(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one of ``curvscope train``, a run, or has runs in it."""
    from ...training.plans import PLAN
    from ...training.store import HEADER

    place = Path(folder).expanduser()
    if not place.is_dir():
        return False
    return (place / PLAN).exists() or next(place.rglob(HEADER), None) is not None


def make_runs_report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    surface: bool = True,
    command: str = "",
) -> ReportPaths:
    """Write one page about the trainings in a folder, with its data.

    The page shows loss over epochs and over seconds, with bands over seeds, of every optimizer at
    its best learning rate (lowest training loss of the last epoch, in the mean over seeds); error
    and cosine of each optimizer's curvature over training, layer by layer, beside fresh
    approximations; alarms; largest eigenvalue times learning rate; the paths in one plane above the
    objective evaluated there, with level lines of the exact GGN and of the optimizers' own
    curvature at their ends; what the monitor took. Runs may still be under way.

    Parameters
    ----------
    folder
        One of :func:`curvscope.training.train`, a single run, or a folder with runs in it.
    out
        The folder to write: ``folder/report`` if not given. It may exist if it is empty or an
        earlier report and nothing else.
    surface
        Whether to evaluate the objective on the plane of the paths, and curvature at their ends (on
        500 samples; for runs of ``train`` only, which say how their problem is made).
    command
        How the report was asked for, repeated in it.

    Cost: reading the runs, some seconds for the pictures, and a few hundred forward passes for the
    surface.

    Returns the paths. Raises ``RunError`` if there are no runs, ``OutputError`` for a folder that
    cannot be written or holds something else.
    """
    from .gather import gather

    source = Path(folder).expanduser()
    runs = gather(source)
    with atomic_folder(source / "report" if out is None else out) as (draft, target):
        _write(runs, draft, surface, command)
    return ReportPaths.of(target)


def _write(runs: Any, folder: Path, surface: bool, command: str) -> None:
    from ...progress import stage, track
    from ..document import write_json
    from ..figures import draw_plan
    from .document import make_document
    from .figure_plans import plans
    from .page import render
    from .places import find_places, place_plans
    from .tables import write_tables

    (folder / "figures").mkdir()
    (folder / "csv").mkdir()
    places = find_places(runs, surface=surface)
    stage("Figures")
    wanted = [*plans(runs), *place_plans(places)]
    drawn = (draw_plan(plan, plan.kind, folder / "figures") for plan in wanted)
    pictures = list(track(drawn, "Figures", total=len(wanted)))
    document = make_document(runs, places, pictures, command)
    (folder / "report.html").write_text(render(runs, places, pictures, document), encoding="utf-8")
    write_tables(runs, places, folder / "csv")
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    document["files"] = sorted([*files, "report.json"])
    write_json(document, folder / "report.json")
