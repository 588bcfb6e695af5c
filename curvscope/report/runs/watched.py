"""What the monitor of the runs watched, and how, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import counted
from ...training import alarms
from ...training.measures import REGISTRY, Measure
from ...training.snapshots import SnapshotMeasure
from ..headings import setting_word
from .gather import Runs

_REFERENCES = {"ggn": "GGN (generalised Gauss-Newton)", "hessian": "Hessian"}
_OPTIONS = {"tol": "tolerance", "names": "approximations", "damped": "with the optimizer's damping"}
_KINDS = {
    "full": "all parameters",
    "strided": "every {stride}th entry",
    "projection": "random projections to {size} numbers",
}


def settings(runs: Runs) -> list[tuple[str, str]]:
    """What gives the runs again, as pairs of names and words."""
    first = runs.members[0].run
    found = [("command", str(runs.plan["command"]))] if runs.plan.get("command") else []
    for name, value in first.settings.items():
        if name != "measures":
            found.append(_setting(name, value, runs))
    return found + [(k, str(v)) for k, v in first.versions.items()]


def _setting(name: str, value: Any, runs: Runs) -> tuple[str, str]:
    if name == "budget":
        share = f"at most {100 * value:g} % of the training's time" if value is not None else ""
        return "budget of the monitor", share or "none: it takes every measurement"
    if name == "assured":
        steps = (
            f"at {counted(len(value), 'step')}: {setting_word(value)}" if value else "at no step"
        )
        return "measured whatever the budget", steps
    if name == "probe":
        size = dict(runs.plan.get("monitor") or {}).get("probe")
        fixed = f"{size:,} samples" if isinstance(size, int) else "samples"
        words = {"fixed": f"{fixed}, the same at all steps", "current": "each step's batch"}
        return "data that curvature is measured on", words.get(
            str(value), f"{setting_word(value)} of it"
        )
    if name == "reference":
        return "exact matrix", _REFERENCES.get(str(value), str(value))
    if name == "seed":
        return "seed of the monitor", str(value)
    if name == "alarms":
        return "alarms looked out for", "; ".join(map(_alarm, value)) or "none"
    if name == "snapshots":
        if not value:
            return "snapshots of the parameters", "none"
        kind = str(value.get("kind", ""))
        return "snapshots of the parameters", _KINDS.get(kind, kind).format_map(_Known(value))
    return f"monitor: {name.replace('_', ' ')}", setting_word(value)


class _Known(dict[str, Any]):
    """What is not known stays a question mark."""

    def __missing__(self, key: str) -> str:
        return "?"


def _alarm(text: str) -> str:
    """``"TooSharp(limit=2.0, steps=20)"`` as ``"too sharp (limit 2.0, steps 20)"``."""
    kind, _, options = text.rstrip(")").partition("(")
    name = getattr(getattr(alarms, kind, None), "name", "") or kind
    return f"{name} ({options.replace('=', ' ')})" if options else name


def measured(name: str) -> str:
    """What a measure is, in words; its own name for one that does not say."""
    known: Mapping[str, type[Measure]] = {**REGISTRY, SnapshotMeasure.name: SnapshotMeasure}
    kind = known.get(name)
    return kind.about if kind is not None and kind.about else name


def when(runs: Runs, name: str) -> str:
    """The schedule of a measure in words."""
    return scheduled(str(_options(runs, name).get("schedule", "")))


def scheduled(text: str) -> str:
    """``"Every(n=10)"`` as ``"every 10 steps"``; what is not known stays as it is."""
    if match := re.fullmatch(r"Every\(n=(\d+)\)", text):
        return "every step" if match[1] == "1" else f"every {int(match[1]):,} steps"
    if text == "PowersOfTwo()":
        return "steps 1, 2, 4, 8, ..."
    if match := re.fullmatch(r"At\(\[(.*)\]\)", text):
        steps = match[1].split(", ")
        more = f", ... ({counted(len(steps), 'step')})" if len(steps) > 6 else ""
        return f"step{'s' if len(steps) > 1 else ''} {', '.join(steps[:6])}{more}"
    if match := re.fullmatch(r"Share\(share=([\d.e-]+)\)", text):
        return f"as often as {100 * float(match[1]):g} % of the time allow"
    return text


def how(runs: Runs, name: str) -> str:
    """The options of a measure in words."""
    options = {k: v for k, v in _options(runs, name).items() if k != "schedule"}
    named = ((_OPTIONS.get(k, k.replace("_", " ")), v) for k, v in options.items())
    return "; ".join(f"{key}: {setting_word(value)}" for key, value in named)


def _options(runs: Runs, name: str) -> dict[str, Any]:
    """The schedule and the options of a measure, from the first run that has it."""
    each = (member.run.settings.get("measures", {}).get(name) for member in runs.members)
    return dict(next(filter(None, each), {}))
