"""What the findings say in words: the sentences at the top of the page, and its warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..analysis.comparison import WHOLE, Comparison, Row
from ..analysis.remarks import AS_ZERO, OTHER_MATRIX
from ..analysis.result import listing
from .approximations import BEST, EXACT
from .findings import Findings
from .numbers import percent, shown, with_error

_NOISY = 0.1  # relative standard error of the Hutchinson diagonal worth a warning
_NEGATIVE = 1e-3  # of the largest eigenvalue
_SIGMAS = 3.0
_MODE = "although the model is in train mode."


@dataclass(frozen=True)
class Best:
    """The approximation that is closest to the GGN on a block, the best of each class aside."""

    block: str
    row: Row


def candidates(found: Findings) -> list[str]:
    """Names of the approximations that somebody may use, as against limits and exact matrices."""
    return [
        entry.name
        for entry in found.approximations
        if entry.op is not None and entry.group not in (BEST, EXACT)
    ]


def best(found: Findings, block: str) -> Best | None:
    """The closest approximation of a block by relative error; ``None`` if none has one."""
    rows = _rows(found, block)
    return Best(block, min(rows, key=lambda row: row.error)) if rows else None


def exact_on(found: Findings, block: str) -> tuple[str, ...]:
    """Approximations that equal a block up to rounding, which alone would rank them."""
    return tuple(row.approximation for row in _rows(found, block) if row.equal)


def _rows(found: Findings, block: str) -> list[Row]:
    """The rows of a block that have an error, of what somebody may use."""
    names = set(candidates(found))
    return [
        row
        for row in found.layer_comparison().rows
        if row.block == block and row.approximation in names and math.isfinite(row.error)
    ]


def summary(found: Findings) -> list[str]:
    """The story of the page in a few sentences."""
    return [
        text
        for text in (
            _objective(found),
            _closest(found),
            _kronecker_price(found),
            _block_diagonal(found),
            _curvature(found),
            _concentration(found),
        )
        if text
    ]


def warnings(found: Findings) -> list[str]:
    """What a reader must know before trusting a number."""
    texts = [*_distrust(found), *_negative(found), *_uncovered(found), *_noise(found)]
    texts += _scale(found)
    # what is not covered is said above, with its share of the energy; what is of the GGN, in tables
    said = (AS_ZERO, OTHER_MATRIX)
    texts += [
        text for result in _results(found) for text in result.warnings if not text.endswith(said)
    ]
    texts += [
        f"{entry.name} is not available here. {entry.reason}"
        for entry in found.approximations
        if entry.op is None
    ]
    texts = [*texts, *found.skipped]
    modes = [text for text in texts if text.endswith(_MODE)]
    once = [text for text in texts if text not in modes[1:]]  # said of every matrix, read once
    return list(dict.fromkeys(once))


def _results(found: Findings) -> list:
    # Warnings of the comparison with the GGN are said here per approximation, not per block.
    hessian = found.comparisons.get("Hessian")
    results = [found.coverage, found.verification, found.ends]
    return [r for r in [*results, hessian if hessian and found.same_blocks else None] if r]


def _objective(found: Findings) -> str:
    problem = found.problem
    text = (
        f"At these weights the objective is {shown(found.objective)} and its gradient has norm "
        f"{shown(found.gradient_norm)}, over {problem.n_samples:,} samples"
    )
    if found.accuracy is not None:
        text += f"; the network is right on {percent(found.accuracy)} of the test samples"
    return text + "."


def _closest(found: Findings) -> str:
    """Which approximation is closest, layer by layer."""
    winners: dict[str, list[Best]] = {}
    equal: dict[tuple[str, ...], list[str]] = {}
    for block in found.layer_comparison().blocks:
        one = best(found, block)
        if one is None:
            continue
        if same := exact_on(found, block):
            equal.setdefault(same, []).append(block)
        else:
            winners.setdefault(one.row.approximation, []).append(one)
    total = sum(map(len, equal.values())) + sum(map(len, winners.values()))
    rounded = [
        f"{listing(list(names), 12)} on {'every layer' if len(own) == total else listing(own)}"
        for names, own in equal.items()
    ]
    exact = f"Exact up to rounding: {listing(rounded, 6)}." if rounded else ""
    if not winners:
        return exact
    ranked = sorted(winners.items(), key=lambda item: -len(item[1]))
    parts = []
    for name, wins in ranked:
        errors = [win.row.error for win in wins]
        where = "every layer" if len(wins) == total else listing([win.block for win in wins])
        spread = (
            f"error {shown(min(errors), 2)}"
            if len(errors) == 1
            else f"errors {shown(min(errors), 2)} to {shown(max(errors), 2)}"
        )
        parts.append(f"{name} on {where} ({spread})")
    text = f"Closest to the exact GGN block: {listing(parts, 6)}."
    return f"{exact} Otherwise closest: {listing(parts, 6)}." if exact else text


def _kronecker_price(found: Findings) -> str:
    """What the structure costs, against what the method adds."""
    rows = [
        row
        for row in found.layer_comparison().rows
        if row.approximation == "K-FAC" and row.block != WHOLE and math.isfinite(row.excess)
    ]
    if not rows:
        return ""
    worst, good = max(rows, key=lambda r: r.excess), min(rows, key=lambda r: r.excess)
    text = (
        f"K-FAC is {shown(worst.excess, 2)} times as far off on {worst.block} as the nearest "
        f"Kronecker product would be ({shown(worst.error, 2)} against "
        f"{shown(worst.best_in_class, 2)})"
    )
    if good is not worst:
        text += f", and only {shown(good.excess, 2)} times on {good.block}, where it is nearest"
    return text + "."


def _whole_row(comparison: Comparison | None, name: str) -> Row | None:
    rows = comparison.rows if comparison is not None else ()
    return next((r for r in rows if r.block == WHOLE and r.approximation == name), None)


def _block_diagonal(found: Findings) -> str:
    parts = []
    for name, comparison in found.comparisons.items():
        rows = [r for r in comparison.rows if r.block == WHOLE and math.isfinite(r.outside)]
        if rows:
            spread = rows[0].stderr.get("outside", math.nan)
            value = percent(rows[0].outside)
            if spread > 0:
                value = f"{100 * rows[0].outside:.1f} ± {100 * spread:.1f} %"
            parts.append(f"{value} of the {name}'s energy")
    if not parts:
        return ""
    return f"Outside the diagonal blocks lies {listing(parts)}: what every layer-wise method drops."


def _curvature(found: Findings) -> str:
    """The whole Hessian's range, and how far the GGN is from it."""
    if found.ends is None:
        return ""
    low, high = found.ends.smallest[0], found.ends.largest[0]
    text = f"The Hessian's eigenvalues reach from {shown(low)} to {shown(high)}"
    row = _whole_row(found.comparisons.get("Hessian"), "GGN")
    if row is not None and math.isfinite(row.error):
        text += (
            "; the GGN differs from it by "
            f"{with_error(row.error, row.stderr.get('error', math.nan), 2)} in relative norm"
        )
    return text + "."


def _concentration(found: Findings) -> str:
    """How many Kronecker factors are more diagonal than their null model."""
    parts = [part for parts in found.factors.values() for part in parts.values()]
    known = [part for part in parts if math.isfinite(part.score)]
    if not known:
        return ""
    above = [part for part in known if part.score > _SIGMAS]
    return (
        f"{len(above)} of {len(known)} Kronecker factors concentrate on their diagonal beyond "
        f"what random eigenvectors with the same spectrum would do (by {_SIGMAS:g} standard "
        "deviations)."
    )


def _distrust(found: Findings) -> list[str]:
    result = found.verification
    if result is None:
        return []
    texts = []
    if not result.trusted:
        failed = [check for check in result.failed if check.about != "other tools"]
        texts.append(
            "Verification does not trust this problem: "
            + " ".join(f"{check.sentence} {check.advice}".strip() for check in failed)
        )
    against = [name for name, verdict in result.trust.items() if verdict == "do not trust"]
    ours = [name for name in against if "BackPACK" not in name and "torch" not in name]
    if ours:
        texts.append(f"Verification says not to trust: {listing(ours, 12)}.")
    return texts


def _negative(found: Findings) -> list[str]:
    texts = []
    if found.ends is not None:
        low, high = found.ends.smallest[0], found.ends.largest[0]
        if low < -_NEGATIVE * max(high, -low):
            texts.append(
                f"The Hessian has negative curvature: its smallest eigenvalue is {shown(low)}, "
                f"{percent(-low / high) if high > 0 else 'more'} of the largest. Positive "
                "semi-definite approximations cannot show it."
            )
    blocks = [
        name
        for name, spectra in found.spectra.items()
        if "Hessian" in spectra
        and spectra["Hessian"].smallest < -_NEGATIVE * spectra["Hessian"].spectral_norm
    ]
    if blocks:
        texts.append(f"Hessian blocks with negative eigenvalues: {listing(blocks, 8)}.")
    return texts


def _uncovered(found: Findings) -> list[str]:
    """Blocks that methods leave out, with their share of the energy, methods alike joined."""
    shares = {ref.block: ref.share for ref in found.layer_comparison().references}
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in found.approximations:
        if entry.op is not None and entry.uncovered and entry.group != BEST:
            groups.setdefault(tuple(entry.uncovered), []).append(entry.name)
    texts = []
    for blocks, names in groups.items():
        share = sum(shares.get(block, math.nan) for block in blocks)
        energy = f" ({percent(share)} of the GGN's energy)" if math.isfinite(share) else ""
        verb = "does" if len(names) == 1 else "do"
        texts.append(
            f"{listing(names, 12)} {verb} not cover {listing(list(blocks), 6)}{energy}; these "
            f"count {AS_ZERO}"
        )
    return texts


def _noise(found: Findings) -> list[str]:
    """Standard error of the Hutchinson diagonals relative to their norm."""
    names, ratios = [], []
    for entry in found.approximations:
        stderr = getattr(entry.op, "stderr", None)
        if entry.op is None or stderr is None:
            continue
        ratio = float(stderr.double().norm()) / (entry.op.frobenius_norm() or math.inf)
        if ratio > _NOISY:
            names.append(f"the {entry.name}")
            ratios.append(percent(ratio))
    if not names:
        return []
    text = (
        f"{listing(names)} {'is' if len(names) == 1 else 'are'} noisy: the standard error is "
        f"{listing(list(dict.fromkeys(ratios)))} of the norm with {found.settings.probes} probes, "
        "and is part of the errors shown."
    )
    return [text[0].upper() + text[1:]]


def _scale(found: Findings) -> list[str]:
    """Approximations whose error is mostly one of scale on the whole matrix."""
    names = []
    for row in found.layer_comparison().rows:
        off = row.error > 2 * row["error_rescaled"] and row.error > 0.2 and row["scale"] > 0
        if row.block == WHOLE and off and math.isfinite(row["error_rescaled"]):
            names.append(
                f"{row.approximation} ({shown(row.error, 2)}, {shown(row['error_rescaled'], 2)} "
                "at the best scale)"
            )
    if not names:
        return []
    return [
        f"Off in scale more than in shape: {listing(names, 12)}. A damping or learning rate "
        "absorbs a scale; the column of rescaled errors is then the one to read."
    ]
