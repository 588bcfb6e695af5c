"""Reading what a report has written: see :func:`read_report`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ReportError
from .write import KIND, RUNS_KIND, SCHEMAS, newer

_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a number"}
_SHARED: dict[str, type] = {
    "created": str,
    "command": str,
    "environment": dict,
    "summary": list,
    "warnings": list,
    "figures": list,
}
_ENTRIES: dict[str, dict[str, type]] = {
    KIND: {
        **_SHARED,
        "settings": dict,
        "problem": dict,
        "layers": list,
        "approximations": list,
        "comparisons": dict,
        "spectra": dict,
        "concentration": dict,
        "cost": list,
    },
    RUNS_KIND: {**_SHARED, "problem": str, "optimizers": list, "runs": list},
}


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a report's ``report.json``, checked.

    Parameters
    ----------
    path
        The folder of a report, or a file in it (``report.json``, ``report.html``, ``report.toml``).

    Undefined numbers are ``None``. ``document["kind"]`` says which kind of report it is. Cost: that
    of reading some megabytes of JSON.

    Raises ``ReportError`` where there is no report, where it is damaged or another program's, and
    where a newer version of curvscope has written it in a layout that this version does not know.
    """
    place = report_file(path)
    try:
        text = place.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(place, "it is no text in UTF-8") from error
    except OSError as error:
        raise ReportError(f"{place} cannot be read ({error.strerror or error}).") from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = "it is empty" if not text.strip() else f"it is no JSON ({error})"
        raise _damaged(place, where) from error
    check_document(found, place)
    return dict(found)


def report_file(path: str | os.PathLike[str]) -> Path:
    """The ``report.json`` that ``path`` means. Raises ``ReportError`` if there is none."""
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix == ".json":
            return place
        place = place.parent
    if not place.exists():
        raise ReportError(
            f"There is no {os.fspath(path)}; give the folder of a report, or its report.json."
        )
    if not (place / "report.json").is_file():
        inner = place / "report" / "report.json"
        hint = f" Did you mean {inner.parent}?" if inner.is_file() else ""
        raise ReportError(
            f"{os.fspath(path)} holds no report.json, so it is no report.{hint} Make one with: "
            "curvscope report PROBLEM --out FOLDER"
        )
    return place / "report.json"


def check_document(found: Any, where: str | os.PathLike[str]) -> None:
    """Raise ``ReportError`` unless ``found`` is a report of a layout that this version knows."""
    place = os.fspath(where)
    kind = found.get("kind") if isinstance(found, dict) else None
    if kind not in SCHEMAS:
        raise ReportError(
            f"{place} is not a report of curvscope: its entry 'kind' is "
            f"{'missing' if kind is None else repr(kind)}."
        )
    layout, known = found.get("schema"), SCHEMAS[kind]
    if isinstance(layout, bool) or not isinstance(layout, int) or layout < 1:
        raise _damaged(place, f"its entry 'schema' is {layout!r}")
    if layout > known:
        raise ReportError(newer(found, place))
    for name, wanted in _ENTRIES[kind].items():
        if name not in found:
            raise _damaged(place, f"its entry {name!r} is missing")
        if not isinstance(found[name], wanted):
            raise _damaged(place, f"its entry {name!r} is not {_NAMES[wanted]}")


def _damaged(place: str | os.PathLike[str], what: str) -> ReportError:
    return ReportError(
        f"{os.fspath(place)} is damaged: {what}. Make the report again, or take it from a backup."
    )
