"""A report of runs as data: ``report.json``."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Any

from ..document import environment
from ..figures import Picture
from ..write import RUNS_KIND, SCHEMAS
from .gather import Member, Runs
from .places import Places
from .words import last, median, summary, warnings

SCHEMA = SCHEMAS[RUNS_KIND]
"""Version of the layout; it grows when a reader of the old one would break."""


def make_document(
    runs: Runs, places: Places, pictures: Sequence[Picture], command: str
) -> dict[str, Any]:
    """Everything in the report as JSON types, except the list of files."""
    device = str(runs.plan.get("device") or "cpu")
    return {
        "kind": RUNS_KIND,
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "environment": environment(device.partition(":")[0]),
        "problem": runs.problem,
        "plan": runs.plan or None,
        "summary": summary(runs),
        "warnings": [*warnings(runs), *places.notes],
        "optimizers": [
            {
                "optimizer": group.optimizer,
                "best_lr": group.best_rate,
                "rates": [
                    {"lr": rate, "score": group.score(rate), "runs": [m.path for m in members]}
                    for rate, members in group.rates.items()
                ],
                "error_at_end": median(group.best, "error", "error"),
                "cosine_at_end": median(group.best, "error", "cosine"),
            }
            for group in runs.groups.values()
        ],
        "runs": [_run(member) for member in runs.members],
        "trajectories": None if places.paths is None else places.paths.to_dict(),
        "ellipses": [
            {
                "of": name,
                "matrix": one.matrix.tolist(),
                "centre": one.centre.tolist(),
                "distance": one.distance,
                "uncovered": list(one.uncovered),
            }
            for name, group in places.ellipses.items()
            for one in group
        ],
        "surface": None if places.surface is None else places.surface.to_dict(),
        "figures": [
            {"name": p.name, "optimizer": p.block or None, "caption": p.caption, "alt": p.alt}
            for p in pictures
            if p.svg
        ],
    }


def _run(member: Member) -> dict[str, Any]:
    training, spent = member.monitored
    return {
        "path": member.path,
        "optimizer": member.optimizer,
        "lr": member.lr,
        "seed": member.seed,
        "state": member.state,
        "reason": member.reason,
        "train_loss": member.final_loss,
        "test_loss": last(member, "test_loss"),
        "test_accuracy": last(member, "test_accuracy"),
        "training_seconds": training,
        "monitor_seconds": spent,
        "monitor_outside_seconds": member.outside,
        "overhead": spent / training if training else math.nan,
        "settings": member.run.settings,
        "versions": member.run.versions,
        "progress": member.progress.to_dict("records"),
        "alarms": [
            {key: row[key] for key in ("step", "alarm", "block", "state", "message") if key in row}
            for row in member.rows("alarm")
        ],
    }
