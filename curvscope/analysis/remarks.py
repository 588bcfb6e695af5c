"""What a reader of a comparison must know, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..operators import Operator
from .comparison import WHOLE, Row
from .result import listing, number

_FACTOR = 2.0  # a trace that is off by more is an error of scale
_MENDED = 0.7  # if the best scale brings the error below this share of it


def remarks(
    reference: Operator, approximations: Mapping[str, Operator], rows: Sequence[Row]
) -> list[str]:
    """Warnings about operators and rows, without repetition."""
    found = []
    if not reference.info.exact:
        found.append(f"The reference ({reference.info.what}) is itself an approximation.")
    if reference.uncovered:
        found.append(f"The reference does not define {listing(reference.uncovered)}: not compared.")
    for op in (reference, *approximations.values()):
        found += [f"{op.info.what}: {note}." for note in op.info.notes]
    for name, op in approximations.items():
        found += _elsewhere(name, reference, op)
        own = [row for row in rows if row.approximation == name]
        if op.uncovered:
            found.append(
                f"{name} does not cover {listing(op.uncovered)}, which count as zero in the whole "
                "matrix."
            )
        for row in own:
            if row.status == "failed" and row.block != WHOLE:
                found.append(f"{name} on {row.block} failed: {row.note}")
        found += _scale(name, own)
    return list(dict.fromkeys(found))


_SAME = {
    "parameters": "other parameter values",
    "reduction": "another reduction of the loss",
    "samples": "another number of samples",
    "terms": "another number of terms",
    "loss": "another loss",
    "batchnorm": "another treatment of BatchNorm",
}


def _elsewhere(name: str, reference: Operator, op: Operator) -> list[str]:
    """One sentence if the two matrices were not taken at the same place, of the same objective."""
    here, there = reference.info.settings, op.info.settings
    differing = [
        words
        for key, words in _SAME.items()
        if key in here and key in there and here[key] != there[key]
    ]
    if not differing:
        return []
    return [f"{name} and the reference were computed with {listing(differing)}."]


def _scale(name: str, rows: Sequence[Row]) -> list[str]:
    """One sentence on all blocks where only the scale is far off."""
    wrong = [
        row
        for row in rows
        if (row["trace_ratio"] > _FACTOR or row["trace_ratio"] < 1 / _FACTOR)
        and row["error_rescaled"] < _MENDED * row.error
    ]
    if not wrong:
        return []
    places = ["the whole matrix" if row.block == WHOLE else row.block for row in wrong]
    worst = max(wrong, key=lambda row: row.error)
    return [
        f"{name} is off in scale on {listing(places)}: its trace is {number(worst['trace_ratio'])} "
        f"times that of the reference; at the best scale its error is "
        f"{number(worst['error_rescaled'])} instead of {number(worst.error)}."
    ]
