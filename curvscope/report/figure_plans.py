"""Which figures a report has, what each shows, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..operators import KroneckerOperator, Operator
from ..plot import (
    plot_bands,
    plot_blocks,
    plot_comparison,
    plot_cost,
    plot_coverage,
    plot_diagonal_shares,
    plot_factors,
    plot_fourier,
    plot_gershgorin,
    plot_spectra,
    plot_verification,
)
from .approximations import BEST
from .findings import DENSE_ROWS, Findings, block_operators

_PIXELS = 1_600_000  # of all heat maps of a page together, which keeps it below 5 MB
_MOST, _LEAST = 256, 64  # pixels a side of one heat map


@dataclass(frozen=True)
class Plan:
    """A figure to be drawn: ``draw`` fills it, unless ``reason`` says why it cannot be."""

    kind: str
    block: str
    alt: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Any], None]
    reason: str = ""


def plans(found: Findings) -> list[Plan]:
    """All figures of a report in the order of the page."""
    names = list(found.problem.blocks)
    side = _heat_side(found, names)
    result = [_overall_errors(found), _shares(found)]
    for block in names:
        result += [
            _errors(found, block),
            _spectra(found, block),
            _heat(found, block, side),
            _factors(found, block, side),
            _discs(found, block),
            _bands(found, block),
            _fourier(found, block),
        ]
    return [*result, _coverage(found), _checks(found), _cost(found)]


# -- over all layers -----------------------------------------------------------------------------


def _overall_errors(found: Findings) -> Plan:
    comparison = found.layer_comparison()
    chosen = [e.name for e in found.approximations if e.op and e.main]
    blocks = ["(all)", *comparison.blocks]
    many = len(blocks) > 9
    shown = blocks if not many else ["(all)", *_largest(found, 8)]
    bars = len(shown) * (len(chosen) + 1)
    return Plan(
        "errors",
        "",
        "Bar chart of the relative error of the main approximations on the whole matrix and on "
        "each layer, with a tick at the best error of the class.",
        "Relative Frobenius error against the GGN, bars in the order of the legend. The tick on a "
        "bar is the error of the nearest matrix of the same class: what the structure costs; the "
        "rest is what the method adds."
        + (" The eight layers with the most energy are shown." if many else ""),
        (7.4, 1.2 + 0.145 * bars),
        lambda f: _void(
            plot_comparison(comparison, ax=f.subplots(), blocks=shown, approximations=chosen)
        ),
    )


def _largest(found: Findings, count: int) -> list[str]:
    comparison = found.layer_comparison()
    norms = {ref.block: ref.norm for ref in comparison.references}
    ranked = sorted(comparison.blocks, key=lambda name: -norms.get(name, 0.0))[:count]
    return [name for name in comparison.blocks if name in ranked]


def _shares(found: Findings) -> Plan:
    named: dict[str, Any] = {}
    for block, one in found.blocks.items():
        named[f"{block}, block"] = one
        for factor, part in found.factors.get(block, {}).items():
            named[f"{block}, factor {factor}"] = part
    return Plan(
        "concentration",
        "",
        "Bar chart of the share of energy on the diagonal of every block and Kronecker factor, "
        "with the null model's share marked on each bar.",
        "Share of the squared entries that lies on the diagonal, for each exact GGN block and for "
        "K-FAC's factors. Diamonds: the same spectrum with random eigenvectors. A bar that ends "
        "at its diamond is no more diagonal than chance.",
        (7.0, 1.0 + 0.22 * len(named)),
        lambda f: _void(plot_diagonal_shares(named, ax=f.subplots())),
        reason="" if named else "No concentration was computed.",
    )


def _coverage(found: Findings) -> Plan:
    result = found.coverage
    assert result is not None
    return Plan(
        "coverage",
        "",
        "Grid of parameters and methods; a square is blue where the method covers the parameter "
        "and orange with a cross where it does not. The table below says the same in words.",
        "Which method covers which parameter, and which exact blocks need the slow route.",
        (2.6 + 0.27 * len(result.methods), 1.6 + 0.2 * len(result.parameters)),
        lambda f: _void(plot_coverage(result, ax=f.subplots())),
    )


def _checks(found: Findings) -> Plan:
    result = found.verification
    return Plan(
        "checks",
        "",
        "For every check of the problem the measured difference beside its tolerance; the table "
        "below has the numbers and says what was found.",
        "What each check measured (mark) and what it tolerates (tick), on a logarithmic axis. A "
        "mark to the left of its tick has passed; open marks at the edge are exactly zero.",
        (7.2, 1.3 + 0.21 * len(result.checks) if result else 1.0),
        lambda f: _void(plot_verification(result, ax=f.subplots())) if result else None,
        reason="" if result else "Verification was not asked for.",
    )


def _cost(found: Findings) -> Plan:
    seconds = {row.name: row.seconds for row in found.cost}
    return Plan(
        "cost",
        "",
        "Bar chart of the seconds that each computation took; the table below has the numbers.",
        "Wall-clock time of every computation of this report, on a logarithmic axis.",
        (7.0, 1.0 + 0.19 * len(seconds)),
        lambda f: _void(plot_cost(seconds, ax=f.subplots())),
    )


# -- per layer -----------------------------------------------------------------------------------


def _errors(found: Findings, block: str) -> Plan:
    comparison = found.layer_comparison()
    chosen = [
        e.name for e in found.approximations if e.op and not e.same_as and e.group not in (BEST,)
    ]
    return Plan(
        "errors",
        block,
        f"Bar chart of the relative errors of all approximations of the block of {block}; the "
        "table of this layer has the numbers.",
        "Relative error of every approximation of this block, the best of its class as a tick.",
        (7.4, 0.9 + 0.19 * len(chosen)),
        lambda f: _void(
            plot_comparison(comparison, ax=f.subplots(), blocks=[block], approximations=chosen)
        ),
    )


def _spectra(found: Findings, block: str) -> Plan:
    spectra = found.spectra.get(block, {})
    lines = "; ".join(
        f"{name} from {s.smallest:.2g} to {s.largest:.2g}, {s.negative} negative"
        for name, s in spectra.items()
    )
    return Plan(
        "spectra",
        block,
        f"Eigenvalues by rank of the exact block of {block} and of its approximations: {lines}.",
        "Eigenvalues in order of magnitude. An approximation whose line stays above the exact one "
        "invents curvature; below, it misses some. Open circles are negative eigenvalues.",
        (7.0, 3.3),
        lambda f: _void(plot_spectra(spectra, ax=f.subplots())),
        reason="" if spectra else "No spectrum of this block was computed (see the notes).",
    )


def _heat_operators(found: Findings, block: str) -> dict[str, Operator]:
    named = block_operators(found, block)
    keep = ("GGN", "Hessian", "K-FAC", "K-FAC (reduce)", "EKFAC", "nearest Kronecker")
    chosen = {name: op for name, op in named.items() if name in keep}
    if len(chosen) > 5:
        chosen.pop("K-FAC (reduce)", None)
    if set(chosen) <= {"GGN", "Hessian"} and "exact diagonal" in named:
        chosen["exact diagonal"] = named["exact diagonal"]
    return chosen


def _heat_side(found: Findings, blocks: list[str]) -> int:
    """Pixels a side of one heat map, so that all of them stay within the page's budget."""
    sizes = [
        min(op.shape[0], _MOST)
        for block in blocks
        for op in _heat_operators(found, block).values()
        if op.shape[0] <= DENSE_ROWS
    ]
    side = _MOST
    while side > _LEAST and sum(min(size, side) ** 2 for size in sizes) > _PIXELS:
        side -= 8
    return side


def _heat(found: Findings, block: str, side: int) -> Plan:
    shown = _heat_operators(found, block)
    rows = next(iter(shown.values())).shape[0]
    reason = ""
    if rows > DENSE_ROWS:
        reason = (
            f"The block has {rows:,} rows; blocks of more than {DENSE_ROWS:,} are not formed, so "
            "there is no heat map."
        )
    names = ", ".join(shown)
    pooled = f" Each pixel is the largest entry of a {-(-rows // side)} by " if rows > side else ""
    if pooled:
        pooled += f"{-(-rows // side)} tile."
    return Plan(
        "blocks",
        block,
        f"Heat maps of the block of {block}, {rows} rows, on one colour scale: {names}.",
        "The exact block and its approximations on one scale: red positive, blue negative, "
        "logarithmic beyond a thousandth of the largest entry. Rows and columns are parameters in "
        f"the model's order.{pooled}",
        (2.35 * len(shown) + 0.9, 2.9),
        lambda f: _void(
            plot_blocks(shown, axes=list(f.subplots(1, len(shown), squeeze=False)[0]), most=side)
        ),
        reason=reason,
    )


def _kfac_block(found: Findings, block: str) -> KroneckerOperator | None:
    op = found.entry("K-FAC").op
    part = op.blocks[block] if op is not None and block in op.blocks else None
    return part if isinstance(part, KroneckerOperator) else None


def _factors(found: Findings, block: str, side: int) -> Plan:
    part = _kfac_block(found, block)
    reason = "" if part is not None else f"K-FAC has no factors for {block}."
    if part is not None:
        largest = max(factor.shape[-1] * part.view.groups for factor in part.factors.values())
        if largest > DENSE_ROWS:
            reason = f"The larger factor has {largest:,} rows, too many for a heat map."

    def draw(figure: Any) -> None:
        assert part is not None
        plot_factors(part, axes=list(figure.subplots(1, 2)), most=side)

    return Plan(
        "factors",
        block,
        f"Heat maps of K-FAC's output factor G and input factor A of {block}.",
        "K-FAC's two factors, each on a scale of its own. Structure in them (a bright diagonal, "
        "dead rows, blocks) is structure of every approximation built on them.",
        (6.6, 2.9),
        draw,
        reason=reason,
    )


def _discs(found: Findings, block: str) -> Plan:
    parts: Mapping[str, Any] = {
        f"factor {name}": one
        for name, one in found.factors.get(block, {}).items()
        if one.disjoint is not None
    }
    if not parts and block in found.blocks and found.blocks[block].disjoint is not None:
        parts = {"the exact block": found.blocks[block]}

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(parts), squeeze=False)[0]
        for ax, (name, one) in zip(axes, parts.items(), strict=True):
            plot_gershgorin(one, ax=ax, title=name)

    alone = ", ".join(f"{name}: {one.disjoint} of {one.size}" for name, one in parts.items())
    return Plan(
        "discs",
        block,
        f"Gershgorin discs of {block}; discs that touch no other: {alone}.",
        "Every eigenvalue lies in a disc around a diagonal entry, as wide as its row's other "
        "entries. Small discs that touch no other mean that the diagonal alone tells the "
        "eigenvalues. Circles on the axis: the eigenvalues after normal noise was added to the "
        "entries off the diagonal.",
        (4.4 * max(len(parts), 1), 3.6),
        draw,
        reason="" if parts else f"The discs of {block} were not computed.",
    )


def _bands(found: Findings, block: str) -> Plan:
    named: dict[str, Any] = {}
    if block in found.blocks:
        named["exact block"] = found.blocks[block]
    named |= {f"factor {name}": one for name, one in found.factors.get(block, {}).items()}
    named = {name: one for name, one in named.items() if len(one.band_shares)}
    return Plan(
        "bands",
        block,
        f"Cumulative share of energy by distance from the diagonal for {block}, with the null "
        "model's expectation dotted.",
        "Share of energy within a distance of the diagonal. Only what lies above the dotted line "
        "of the same colour is more concentrated than random eigenvectors would make it.",
        (6.4, 3.1),
        lambda f: _void(plot_bands(named, ax=f.subplots())),
        reason="" if named else "The block is too large to be formed, so its bands are not known.",
    )


def _fourier(found: Findings, block: str) -> Plan:
    named: dict[str, Any] = {}
    if block in found.blocks:
        named["exact block"] = found.blocks[block]
    named |= {f"factor {name}": one for name, one in found.factors.get(block, {}).items()}
    named = {name: one for name, one in named.items() if one.fourier.numel() and one.fourier.any()}

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(named), squeeze=False)[0]
        for ax, (name, one) in zip(axes, named.items(), strict=True):
            plot_fourier(one, ax=ax, title=name)

    return Plan(
        "fourier",
        block,
        f"Two-dimensional Fourier spectra of {block}, zero frequency in the middle: "
        f"{', '.join(named)}.",
        "Magnitude of the two-dimensional Fourier transform. A diagonal matrix has all of it on "
        "the falling diagonal, where the two frequencies cancel; lines along the axes through the "
        "middle are rows and columns that are large as a whole.",
        (3.3 * max(len(named), 1), 3.0),
        draw,
        reason="" if named else f"The Fourier spectra of {block} were not computed.",
    )


def _void(_: Any) -> None:
    """Drawing functions return axes, which nobody needs here."""
