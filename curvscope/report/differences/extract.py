"""The numbers and words of a report's document that a comparison with another one looks at."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...analysis.comparison import WHOLE
from ..cells import WHOLE_TITLE, block_title
from ..headings import setting_word
from ..write import KIND
from .model import Only, Value, Words

Key = tuple[str, str, str, str]  # table, place, name, metric
_UNIT = 1e-3  # of numbers whose natural size is 1 (errors, shares, cosines)
_LAYER = {
    "parameters": 0.0,
    "trace": 0.0,
    "norm": 0.0,
    "share": _UNIT,
    "effective_rank": 0.0,
    "negative_eigenvalues": 0.0,
    "diagonal_share": _UNIT,
    "best_error": _UNIT,
    "nearest_diagonal_error": _UNIT,
    "nearest_kronecker_error": _UNIT,
}
_CONCENTRATION = {
    "diagonal_share": _UNIT,
    "score": 1.0,
    "disjoint": 0.0,
    "dominant": _UNIT,
    "kaiser": 0.0,
    "snr": 1.0,
}
_SPECTRUM = ("largest", "smallest", "trace", "effective_rank", "positive", "negative")
_OF_WHOLE = ("smallest",)  # eigenvalues that may be rounding of the largest
_PROBLEM = ("objective", "gradient_norm", "test_accuracy")
_NEVER = ("out",)  # settings that say where, not what
_CHECKED = ("check of ", "trust in ")


def numbers_of(document: Mapping[str, Any]) -> dict[Key, Value]:
    """Every number that counts, by table, place, name and metric."""
    found = _problem_numbers(document) if document["kind"] == KIND else _run_numbers(document)
    return {key: value for key, value in found if not math.isnan(value.value)}


def _problem_numbers(document: Mapping[str, Any]) -> Iterator[tuple[Key, Value]]:
    for name in _PROBLEM:
        yield ("problem", "", "", name), _value(document["problem"].get(name))
    for layer in document["layers"]:
        tops = layer.get("top_eigenvalues") or [None]
        yield ("layers", layer["layer"], "", "largest eigenvalue"), _value(tops[0])
        for name, scale in _LAYER.items():
            yield ("layers", layer["layer"], "", name), _value(layer.get(name), scale)
    for reference, comparison in document["comparisons"].items():
        for row in comparison["rows"]:
            place = WHOLE_TITLE if row["block"] == WHOLE else row["block"]
            for metric, value in row["values"].items():
                stderr = row["stderr"].get(metric) or 0.0
                key = (f"errors against the {reference}", place, row["approximation"], metric)
                yield key, _value(value, _UNIT, stderr)
    for block, spectra in document["spectra"].items():
        for name, one in spectra.items():
            size = abs(one.get("largest") or 0.0) * 1e-2
            for metric in _SPECTRUM:
                scale = size if metric in _OF_WHOLE else 0.0
                yield ("spectra", block, name, metric), _value(one.get(metric), scale)
    for block, parts in document["concentration"].items():
        named = {"exact block": parts["block"]}
        named |= {f"factor {name}": one for name, one in parts["factors"].items()}
        for name, one in named.items():
            for metric, scale in _CONCENTRATION.items():
                yield ("concentration", block, name, metric), _value(one.get(metric), scale)
    coverage = document.get("coverage") or {}
    for method, share in (coverage.get("shares") or {}).items():
        yield ("coverage", "", method, "covered"), _value(share, _UNIT)


def _run_numbers(document: Mapping[str, Any]) -> Iterator[tuple[Key, Value]]:
    for row in document["optimizers"]:
        best = [r for r in row["rates"] if r["lr"] == row["best_lr"]]
        values = {
            "best learning rate": (row["best_lr"], 0.0),
            "training loss": (best[0]["score"] if best else None, 0.0),
            "error at the end": (row["error_at_end"], _UNIT),
            "cosine at the end": (row["cosine_at_end"], _UNIT),
        }
        for metric, (value, scale) in values.items():
            yield ("optimizers", row["optimizer"], "", metric), _value(value, scale)
    for run in document["runs"]:
        for metric in ("train_loss", "test_loss", "test_accuracy"):
            yield ("trainings", _run_name(run), "", metric), _value(run.get(metric))
        raised = [alarm for alarm in run["alarms"] if alarm.get("state") == "raised"]
        yield ("trainings", _run_name(run), "", "alarms raised"), _value(len(raised))


def _value(value: Any, scale: float = 0.0, stderr: Any = 0.0) -> Value:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return Value(float(value) if known else math.nan, float(stderr), scale)


def _run_name(run: Mapping[str, Any]) -> str:
    rate = "" if run["lr"] is None else f", lr {run['lr']:g}"
    return f"{run['optimizer']}{rate}, seed {run['seed']}"


# -- what only one has ---------------------------------------------------------------------------


def parts_of(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """The parts that a report has, by kind: those that the other lacks are named, not compared."""
    if document["kind"] != KIND:
        return {
            "optimizer": [row["optimizer"] for row in document["optimizers"]],
            "training": [_run_name(run) for run in document["runs"]],
        }
    return {
        "block": list(document["problem"]["blocks"]),
        "approximation": [e["name"] for e in document["approximations"] if e["available"]],
        "reference": list(document["comparisons"]),
        "part": [name for name in ("coverage", "verification") if document.get(name)],
    }


def only_in_one(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Only]:
    """Blocks, approximations, ... that only one of the reports has."""
    found = []
    theirs = parts_of(b)
    for what, names in parts_of(a).items():
        found += [Only(what, name, True) for name in names if name not in theirs[what]]
        found += [Only(what, name, False) for name in theirs[what] if name not in names]
    return found


def shared(key: Key, lacking: Iterable[Only]) -> bool:
    """Whether both reports have the part that a number is of."""
    table, place, name, _ = key
    for one in lacking:
        if one.what in ("block", "optimizer", "training") and one.name == place:
            return False
        if one.what == "approximation" and one.name == name and table.startswith("errors"):
            return False
        if one.what == "part" and one.name == table:
            return False
        if one.what == "reference" and table == f"errors against the {one.name}":
            return False
    return True


# -- words ---------------------------------------------------------------------------------------


def words_of(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Words]:
    """Settings, findings and versions that differ."""
    found = [
        Words("settings", name, left, right)
        for name, left, right in _differing(*map(_settings, (a, b)))
    ]
    found += [
        Words("verdicts", name, left, right)
        for name, left, right in _differing(*map(_verdicts, (a, b)))
        if not name.startswith(_CHECKED) or (a.get("verification") and b.get("verification"))
    ]
    for title in ("summary", "warnings"):
        found += _sentences(title, a[title], b[title])
    found += [
        Words("versions and machines", name, left, right, counts=False)
        for name, left, right in _differing(*map(_environment, (a, b)))
    ]
    return found


def _differing(
    a: Mapping[str, str], b: Mapping[str, str]
) -> Iterator[tuple[str, str | None, str | None]]:
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            yield name, a.get(name), b.get(name)


def _settings(document: Mapping[str, Any]) -> dict[str, str]:
    if document["kind"] != KIND:
        plan = dict(document.get("plan") or {})
        for name in ("kind", "schema", "created", "command", "runs", "problem"):
            plan.pop(name, None)
        return {
            "problem": setting_word(document["problem"]),
            **{k: setting_word(v) for k, v in plan.items()},
        }
    problem = document["problem"]
    left_out = {*_PROBLEM, "blocks", "shapes", "parameters"}
    found = {name: setting_word(v) for name, v in problem.items() if name not in left_out}
    found |= {f"shape of {name}": " × ".join(map(str, v)) for name, v in problem["shapes"].items()}
    found |= {name: setting_word(v) for name, v in document["settings"].items()}
    config = document.get("config") or {}
    given = {k: v for k, v in config.items() if k not in (*_NEVER, "problem", "verify")}
    return {**{name: setting_word(v) for name, v in given.items()}, **found}


def _verdicts(document: Mapping[str, Any]) -> dict[str, str]:
    """Words that findings end in: checks, what is trusted, closest approximations, states."""
    if document["kind"] != KIND:
        found = {f"end of {_run_name(run)}": setting_word(run["state"]) for run in document["runs"]}
        for run in document["runs"]:
            for alarm in run["alarms"]:
                if alarm.get("state") == "raised":
                    where = f", {alarm['block']}" if alarm.get("block") else ""
                    found[f"alarm of {_run_name(run)}: {alarm['alarm']}{where}"] = "raised"
        return found
    result = document.get("verification") or {}
    found = {f"check of {c['name']}": c["status"] for c in result.get("checks", ())}
    found |= {f"trust in {name}": word for name, word in (result.get("trust") or {}).items()}
    for layer in document["layers"]:
        found[f"closest to {block_title(layer['layer'])}"] = layer["best_approximation"]
    return found


def _environment(document: Mapping[str, Any]) -> dict[str, str]:
    known = dict(document["environment"])
    versions = known.pop("versions", {})
    return {
        **versions,
        **{k: setting_word(v) for k, v in known.items()},
        "command": document["command"],
    }


def _sentences(title: str, a: list[str], b: list[str]) -> list[Words]:
    """Sentences that only one report has; those that differ in numbers alone stand side by side."""
    left, right = [t for t in a if t not in b], [t for t in b if t not in a]
    found = []
    for text in left:
        twin = next((t for t in right if _shape(t) == _shape(text)), None)
        if twin is not None:
            right.remove(twin)
        found.append(Words(title, _start(text), text, twin, counts=twin is None))
    return found + [Words(title, _start(text), None, text) for text in right]


def _shape(text: str) -> str:
    return re.sub(r"[−-]?[\d.,]+(·10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?", "#", text)


def _start(text: str) -> str:
    words = text.split()
    return " ".join(words[:6]) + (" …" if len(words) > 6 else "")
