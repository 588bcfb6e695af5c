"""Two reports side by side: see :func:`diff`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import OptionError, ReportError
from ..read import check_document, read_report
from ..write import KIND
from .extract import numbers_of, only_in_one, shared, words_of
from .model import Difference, Number, Only, Value, Words, state_of

__all__ = ["Difference", "Number", "Only", "Words", "diff"]

Report = str | os.PathLike[str] | Mapping[str, Any]


def diff(
    a: Report,
    b: Report,
    *,
    out: str | os.PathLike[str] | None = None,
    tolerance: float = 1e-3,
) -> Difference:
    """Compare two reports, of problems or of trainings, number by number.

    Numbers are matched by table, block, approximation and metric. What only one report has (blocks,
    approximations, trainings) is named and left out of the comparison of numbers. Times, memory,
    versions and machines never make two reports different; versions that differ are listed.

    Parameters
    ----------
    a, b
        Folders of reports, their ``report.json``, or what :func:`read_report` returned.
    out
        An HTML file to write: one page with both reports' numbers, their differences and their
        figures side by side, which needs no network. An earlier page of curvscope is replaced,
        anything else never.
    tolerance
        Relative change up to which two numbers are the same. Errors, shares and cosines are taken
        to be the same below a thousandth of it as well. Numbers further apart whose standard
        errors explain it (three of the difference's) do not count as changed either.

    Returns a :class:`Difference`; ``.same`` says whether there is any.

    Cost: that of reading some megabytes.

    Raises ``ReportError`` for what is no report, is damaged, needs a newer version, or where one
    report is of a problem and the other of trainings; ``OutputError`` if ``out`` cannot be written.

    Example::

        found = cs.report.diff("reports/before", "reports/after", out="difference.html")
        print(found)
    """
    if not (isinstance(tolerance, int | float) and 0 <= tolerance < math.inf):
        raise OptionError(f"tolerance={tolerance!r} must be a finite number of at least 0.")
    if out is not None:
        from .write import check_page

        check_page(out)
    documents, sources = [], []
    for given, name in ((a, "A"), (b, "B")):
        if isinstance(given, Mapping):
            check_document(given, name)
            documents.append(dict(given))
            sources.append(name)
        else:
            documents.append(read_report(given))
            sources.append(os.fspath(given))
    found = compare_documents(documents[0], documents[1], (sources[0], sources[1]), tolerance)
    if out is not None:
        from .write import write_page

        folders = [None if isinstance(one, Mapping) else Path(one).expanduser() for one in (a, b)]
        write_page(found, (documents[0], documents[1]), (folders[0], folders[1]), out)
    return found


def compare_documents(
    a: Mapping[str, Any], b: Mapping[str, Any], sources: tuple[str, str], tolerance: float
) -> Difference:
    """The difference of two documents that :func:`read_report` has checked."""
    if a["kind"] != b["kind"]:
        of = {True: "a problem", False: "trainings"}
        raise ReportError(
            f"{sources[0]} is a report of {of[a['kind'] == KIND]} and {sources[1]} one of "
            f"{of[b['kind'] == KIND]}; only reports of one kind can be compared."
        )
    try:
        only = only_in_one(a, b)
        left, right = numbers_of(a), numbers_of(b)
        words = words_of(a, b)
        names = _name(a), _name(b)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ReportError(
            f"{sources[0]} or {sources[1]} is damaged: an entry is missing or of another type "
            f"({type(error).__name__}: {error}). Make the report again."
        ) from error
    numbers = [
        Number(*key, _plain(left.get(key)), _plain(right.get(key)), state)
        for key in dict.fromkeys([*left, *right])
        if shared(key, only) and (state := state_of(left.get(key), right.get(key), tolerance))
    ]
    return Difference(
        str(a["kind"]), names, sources, float(tolerance), tuple(numbers), tuple(words), tuple(only)
    )


def _plain(value: Value | None) -> float:
    return math.nan if value is None else value.value


def _name(document: Mapping[str, Any]) -> str:
    problem = document["problem"]
    return str(problem["name"] if isinstance(problem, Mapping) else problem)
