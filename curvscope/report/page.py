"""The page: findings and pictures put into the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..analysis.comparison import WHOLE
from ..analysis.result import listing
from ..errors import counted
from .cells import Table, block_title
from .error_tables import error_table, metric_table
from .figures import Picture
from .findings import Findings
from .headings import setting_title, setting_word
from .layer_table import anchor, layer_table
from .numbers import percent, seconds, shown
from .skeleton import Choice, Link, render_page
from .summary import best, exact_on, summary, warnings
from .svg import share_styles
from .tables import (
    approximation_table,
    concentration_table,
    cost_table,
    coverage_table,
    verification_tables,
)


@dataclass(frozen=True)
class Layer:
    """What the page shows of one layer."""

    name: str
    anchor: str
    sentence: str
    tables: list[Table]
    pictures: list[Picture]


def render(found: Findings, pictures: Sequence[Picture], document: dict[str, Any]) -> str:
    """The whole page as HTML. Everything that comes from outside is escaped."""
    figures, rules = share_styles([picture.svg for picture in pictures])
    pictures = [replace(p, svg=svg) for p, svg in zip(pictures, figures, strict=True)]
    by_kind = {(picture.kind, picture.block): picture for picture in pictures}
    layers = [_layer(found, pictures, block) for block in found.problem.blocks]
    return render_page(
        "report.html.j2",
        kicker="curvscope report",
        title=found.problem.name,
        subtitle=document["problem"]["description"],
        links=_links(layers),
        created=document["created"],
        choices=_choices(found),
        rules=rules,
        summary=summary(found),
        warnings=warnings(found),
        facts=_facts(found, document),
        layer_table=layer_table(found),
        errors=[(name, error_table(found, name)) for name in found.comparisons],
        whole_metrics=[
            metric_table(found, name, WHOLE)
            for name, comparison in found.comparisons.items()
            if any(row.block == WHOLE for row in comparison.rows)
        ],
        same_blocks=found.same_blocks,
        damping=shown(found.damping, 2),
        layers=layers,
        approximations=approximation_table(found),
        concentration=concentration_table(found),
        coverage=coverage_table(found),
        coverage_text=str(found.coverage.summary()) if found.coverage else "",
        verification=verification_tables(found),
        verification_text=_verdict(found),
        cost=cost_table(found),
        total=seconds(found.seconds),
        memory=_memory(document["peak_memory_bytes"]),
        settings=_settings(document),
        picture=lambda kind: by_kind.get((kind, "")),
    )


def _links(layers: list[Layer]) -> list[Link]:
    """The side bar: every section, and every layer below its section."""
    titles = {
        "summary": "Summary",
        "layers": "Layers at a glance",
        "errors": "Errors of approximations",
        "each-layer": "Layer by layer",
        "concentration": "Concentration",
        "coverage": "Coverage",
        "verification": "Verification",
        "methods": "The approximations",
        "cost": "Cost",
        "settings": "Settings",
    }
    own = [Link(layer.name, f"#{layer.anchor}") for layer in layers]
    return [
        Link(title, f"#{name}", own if name == "each-layer" else [])
        for name, title in titles.items()
    ]


def _choices(found: Findings) -> list[Choice]:
    """What the reader may switch: every approximation that is defined here."""
    return [
        Choice(entry.name, entry.group, entry.main)
        for entry in found.approximations
        if entry.op is not None
    ]


def _facts(found: Findings, document: dict[str, Any]) -> list[tuple[str, str]]:
    """The problem in a few pairs of words and numbers."""
    problem = document["problem"]
    pairs = [
        ("parameters", f"{problem['parameters']:,} in {counted(len(problem['blocks']), 'block')}"),
        ("data", f"{problem['samples']:,} samples{_batches(problem['batches'])}"),
        ("loss", f"{problem['loss']}, {problem['reduction']} over {problem['terms']:,.6g} terms"),
        ("objective", shown(found.objective)),
        ("gradient norm", shown(found.gradient_norm)),
    ]
    if found.accuracy is not None:
        pairs.append(("test accuracy", percent(found.accuracy)))
    pairs.append(("computed in", f"{problem['dtype']} on {problem['device']}"))
    if problem["recipe"]:
        pairs.append(("trained by", problem["recipe"]))
    return pairs


def _batches(count: int) -> str:
    return f" in {count} batches" if count > 1 else ""


def _layer(found: Findings, pictures: Sequence[Picture], block: str) -> Layer:
    tables = [
        metric_table(found, name, block)
        for name, comparison in found.comparisons.items()
        if block in comparison.blocks and not (name == "Hessian" and found.same_blocks)
    ]
    return Layer(
        block_title(block),
        anchor(found, block),
        _layer_sentence(found, block),
        tables,
        [picture for picture in pictures if picture.block == block],
    )


def _layer_sentence(found: Findings, block: str) -> str:
    """What is closest on this layer, and how its curvature looks."""
    texts = []
    one = best(found, block)
    if same := exact_on(found, block):
        verb = "equals" if len(same) == 1 else "equal"
        texts.append(f"{listing(list(same), 12)} {verb} the exact GGN block up to rounding.")
    elif one is not None:
        texts.append(one.row.sentence())
    spectra = found.spectra.get(block, {})
    if "GGN" in spectra:
        own = spectra["GGN"]
        texts.append(
            f"The exact GGN block has {own.positive:,} of {own.size:,} eigenvalues above "
            f"rounding, up to {shown(own.largest)}; effective rank {shown(own.effective_rank, 2)}."
        )
    if "Hessian" in spectra:
        curved = spectra["Hessian"]
        texts.append(
            f"The Hessian block has {curved.negative:,} negative eigenvalues, down to "
            f"{shown(curved.smallest)}."
            if curved.negative
            else "The Hessian block has no negative eigenvalue."
        )
    elif found.same_blocks:
        texts.append("Only piecewise linear operations follow, so the Hessian block is the same.")
    concentrated = found.blocks.get(block)
    if concentrated is not None:
        verdict = concentrated.verdict()
        texts.append(verdict[0].upper() + verdict[1:] + ".")
    return " ".join(texts)


def _verdict(found: Findings) -> str:
    if found.verification is None:
        return "Verification was not asked for."
    return found.verification.summary().splitlines()[0]


def _memory(used: int | None) -> str:
    return "" if used is None else f"{used / 2**20:,.0f} MiB"


def _settings(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Settings and versions in one list."""
    pairs = [
        (setting_title(name), shown(value) if isinstance(value, float) else setting_word(value))
        for name, value in document["settings"].items()
    ]
    environment = document["environment"]
    pairs += [(setting_title(name), text) for name, text in environment["versions"].items()]
    pairs += [
        ("system", environment["system"]),
        ("processors", str(environment["processors"])),
        ("threads", str(environment["threads"])),
    ]
    if "gpu" in environment:
        pairs.append(("GPU", environment["gpu"]))
    if document["command"]:
        pairs.insert(0, ("command", document["command"]))
    return pairs
