"""What a report has found out: results and operators of one problem, gathered step by step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from ..analysis import Comparison, Concentration, Coverage, Spectrum, Verification
from ..analysis.extremes import Extremes
from ..operators import Operator
from ..problem import Problem
from .approximations import Approximation

DENSE_ROWS = 3000
"""Blocks with more rows are not formed for heat maps and spectra."""


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a report, beside the problem."""

    hessian: bool = True
    verification: bool = True
    probes: int = 16
    damping: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class CostRow:
    """What one computation took.

    ``passes`` are backward passes over the data, NaN where they were not counted.
    """

    name: str
    seconds: float
    passes: float = math.nan
    products: int = 0
    route: str = ""


@dataclass
class Findings:
    """Everything that a report shows; only results and operators, and sentences about them."""

    problem: Problem
    settings: Settings
    objective: float = math.nan
    gradient_norm: float = math.nan
    accuracy: float | None = None
    damping: float = math.nan
    ggn: Operator | None = None
    hessian: Operator | None = None
    hessian_blocks: tuple[str, ...] = ()
    same_blocks: bool = False  # every Hessian block is the GGN's by its route
    approximations: list[Approximation] = field(default_factory=list)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    spectra: dict[str, dict[str, Spectrum]] = field(default_factory=dict)
    ends: Extremes | None = None
    blocks: dict[str, Concentration] = field(default_factory=dict)
    factors: dict[str, dict[str, Concentration]] = field(default_factory=dict)
    coverage: Coverage | None = None
    verification: Verification | None = None
    cost: list[CostRow] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def entry(self, name: str) -> Approximation:
        """The approximation of that name."""
        return next(entry for entry in self.approximations if entry.name == name)

    def slug(self, block: str) -> str:
        """A block's name for files and links: letters, digits, ``.``, ``-`` and ``_``, unique."""
        taken: set[str] = set()
        for name in self.problem.blocks:
            base = slug = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80]
            count = 1
            while slug.lower() in taken:
                count += 1
                slug = f"{base}-{count}"
            taken.add(slug.lower())
            if name == block:
                return slug
        raise KeyError(block)

    def layer_comparison(self) -> Comparison:
        """The comparison by block that layers are described by."""
        return self.comparisons["GGN"]


def exact_operators(found: Findings) -> dict[str, Operator]:
    """The exact matrices that have blocks of their own."""
    assert found.ggn is not None
    named = {"GGN": found.ggn}
    if found.hessian is not None and not found.same_blocks:
        named["Hessian"] = found.hessian
    return named


def block_operators(found: Findings, block: str, *, main: bool = True) -> dict[str, Operator]:
    """The exact block and the approximations of it that are drawn."""
    named: dict[str, Operator] = {}
    for name, op in exact_operators(found).items():
        if name != "Hessian" or block in found.hessian_blocks:
            named[name] = op.blocks[block]
    for entry in found.approximations:
        if entry.op is None or (main and not entry.main) or entry.same_as:
            continue
        if block in entry.op.blocks:
            named[entry.name] = entry.op.blocks[block]
    return named
