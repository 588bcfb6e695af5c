"""What a reader of a comparison must know, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..operators import Operator
from .comparison import WHOLE, Row, place
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
    notes: dict[str, dict[str, None]] = {}
    for op in (reference, *approximations.values()):
        for note in op.info.notes:
            notes.setdefault(note, {})[op.info.what] = None
    found += [f"{listing(list(names))}: {note}." for note, names in notes.items()]
    for name, op in approximations.items():
        found += _elsewhere(name, reference, op)
        own = [row for row in rows if row.approximation == name]
        for row in own:
            if row.status == "failed" and row.block != WHOLE:
                found.append(f"{name} on {place(row.block)} failed: {row.note}")
        found += _scale(name, own)
        found += _drawn(name, reference, op)
        broken = [r for r in own if "NaN or infinite entries" in r.reasons.get("error", "")]
        if broken:
            places = listing([place(row.block) for row in broken])
            found.append(f"{name} has NaN or infinite entries on {places}: not compared there.")
    return list(dict.fromkeys([*found, *_damped(approximations), *_uncovered(approximations)]))


def _damped(approximations: Mapping[str, Operator]) -> list[str]:
    """A sentence on matrices that contain a damping of their own."""
    settings = {name: op.info.settings for name, op in approximations.items()}
    names = [n for n, s in settings.items() if s.get("damped") is True and s.get("damping")]
    if not names:
        return []
    one = len(names) == 1
    found = (
        f"{listing(names)} {'contains its' if one else 'contain their'} damping, which errors and "
        "scales count as part of the matrix; steps are compared with the reference damped alike."
    )
    varying = [n for n in names if isinstance(settings[n]["damping"], Mapping)]
    if varying:
        found += (
            f" That of {listing(varying)} differs between blocks: the whole reference is not "
            "damped unless damping= is given."
        )
    return [found]


AS_ZERO = "as zero in the whole matrix."


def _uncovered(approximations: Mapping[str, Operator]) -> list[str]:
    """A sentence per set of blocks that approximations leave out."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, op in approximations.items():
        if op.uncovered:
            groups.setdefault(tuple(op.uncovered), []).append(name)
    return [
        f"{listing(names)} {'does' if len(names) == 1 else 'do'} not cover "
        f"{listing([place(n) for n in blocks])}, which "
        f"{'counts' if len(blocks) == 1 else 'count'} {AS_ZERO}"
        for blocks, names in groups.items()
    ]


OTHER_MATRIX = "between these two matrices."
_FEW = 4  # probes up to which an estimate is mostly noise
_TITLES = {
    "hessian": "Hessian",
    "ggn": "GGN",
    "fisher": "Fisher",
    "empirical_fisher": "empirical Fisher",
}


def _drawn(name: str, reference: Operator, op: Operator) -> list[str]:
    """That an approximation is of another matrix than the reference, and from few probes."""
    settings, found = op.info.settings, []
    own, whole = _TITLES.get(str(settings.get("matrix"))), reference.info.what
    alike = {"GGN", "Fisher"}  # equal for every loss that has a Fisher
    if own and whole in _TITLES.values() and own != whole and {own, whole} != alike:
        found.append(
            f"{name} is of the {own}, the reference is the {whole}: errors contain the difference "
            f"{OTHER_MATRIX}"
        )
    probes = settings.get("probes")
    if isinstance(probes, int) and 0 < probes <= _FEW:
        found.append(
            f"{name} is an estimate from {probes} random probe{'s' * (probes > 1)}: its errors are "
            "mostly noise; raise probes= to see those of the approximation."
        )
    return found


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
    """A sentence on all blocks where only the scale is far off, and one where it is the sign."""
    wrong = [
        row
        for row in rows
        if (row["trace_ratio"] > _FACTOR or row["trace_ratio"] < 1 / _FACTOR)
        and row["error_rescaled"] < _MENDED * row.error
    ]
    if not wrong:
        return []
    found = []
    opposite = [row for row in wrong if row["trace_ratio"] < 0]
    if opposite:
        places = listing([place(row.block) for row in opposite])
        worst = min(opposite, key=lambda row: row["trace_ratio"])
        found.append(
            f"{name} has a trace of the opposite sign on {places} "
            f"({number(worst['trace_ratio'])} times that of the reference): no positive scale "
            "mends that."
        )
    scaled = [row for row in wrong if row["trace_ratio"] >= 0]
    if scaled:
        places = listing([place(row.block) for row in scaled])
        worst = max(scaled, key=lambda row: row.error)
        found.append(
            f"{name} is off in scale on {places}: its trace is {number(worst['trace_ratio'])} "
            f"times that of the reference; at the best scale its error is "
            f"{number(worst['error_rescaled'])} instead of {number(worst.error)}."
        )
    return found
