"""Computing everything that a report shows, one step after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .. import curvature
from ..analysis import (
    Comparison,
    Concentration,
    Coverage,
    Spectrum,
    Verification,
    compare,
    concentration,
    coverage,
    spectrum,
    verify,
)
from ..analysis.comparison import WHOLE
from ..analysis.extremes import Extremes, extremes
from ..errors import CurvscopeError, check_option
from ..operators import KroneckerOperator, Operator
from ..problem import Problem
from ..progress import track
from .approximations import BEST, EXACT, RECIPES, Approximation, Ingredients, Made, operators

DENSE_ROWS = 3000
"""Blocks with more rows are not formed for heat maps and spectra."""

_HESSIAN_SECONDS = 900.0  # a Hessian block that would take longer is left out
_WHOLE_PRODUCTS = 64  # with the whole Hessian, for its energy outside the blocks


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a report, beside the problem."""

    hessian: bool = True
    verification: bool = True
    probes: int = 32
    damping: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class CostRow:
    """What one computation took. ``passes`` are backward passes over the data, NaN if not counted."""

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
        return next(entry for entry in self.approximations if entry.name == name)

    def layer_comparison(self) -> Comparison:
        return self.comparisons["GGN"]


def collect(problem: Problem, settings: Settings) -> Findings:
    """Compute a report's content. Cost: see the page's own table of costs.

    What a single approximation or block refuses is recorded with its reason; errors of the problem
    itself (data, loss, determinism) are raised.
    """
    start = time.perf_counter()
    check_option("probes >= 2", settings.probes >= 2, (True,))
    found = Findings(problem, settings)
    steps = _steps(found)
    bar: Any = track(steps, "Report")
    for title, step in bar:
        if hasattr(bar, "set_description"):
            bar.set_description(title)
        step()
    found.seconds = time.perf_counter() - start
    return found


def _steps(found: Findings) -> list[tuple[str, Callable[[], None]]]:
    made = None

    def approximation(recipe: Any) -> Callable[[], None]:
        def step() -> None:
            nonlocal made
            if made is None:
                assert found.ggn is not None
                given = Ingredients(
                    found.problem, found.ggn, found.settings.probes, found.settings.seed
                )
                made = Made(given, found.approximations)
            made.add(recipe)
            last = found.approximations[-1]
            if last.op is not None:
                info = last.op.info
                passes = math.nan if last.group == BEST else info.passes
                found.cost.append(CostRow(last.name, last.seconds, passes, route=info.route))

        return step

    steps: list[tuple[str, Callable[[], None]]] = [
        ("Problem", lambda: _problem(found)),
        ("Exact GGN", lambda: _ggn(found)),
    ]
    steps += [(recipe.name, approximation(recipe)) for recipe in RECIPES]
    steps += [("Compared with the GGN", lambda: _compare_ggn(found))]
    if found.settings.hessian:
        steps += [
            ("Exact Hessian", lambda: _hessian(found)),
            ("Compared with the Hessian", lambda: _compare_hessian(found)),
            ("Ends of the Hessian's spectrum", lambda: _ends(found)),
        ]
    else:
        found.skipped.append("The Hessian was not asked for.")
    steps += [
        ("Spectra", lambda: _spectra(found)),
        ("Concentration", lambda: _concentration(found)),
        ("Coverage", lambda: _coverage(found)),
    ]
    if found.settings.verification:
        steps.append(("Verification", lambda: _verification(found)))
    else:
        found.skipped.append("Verification was not asked for.")
    return steps


@contextmanager
def _timed(found: Findings, name: str, **more: Any) -> Iterator[None]:
    start = time.perf_counter()
    yield
    found.cost.append(CostRow(name, time.perf_counter() - start, **more))


def _problem(found: Findings) -> None:
    problem = found.problem
    with _timed(found, "objective and gradient", passes=1.0):
        found.objective = problem.objective()
        found.gradient_norm = float(problem.gradient().norm())
    accuracy = getattr(problem, "accuracy", None)
    if callable(accuracy):
        try:
            found.accuracy = float(accuracy())
        except CurvscopeError:
            found.accuracy = None


def _ggn(found: Findings) -> None:
    start = time.perf_counter()
    found.ggn = curvature.ggn(found.problem)
    blocks = list(found.ggn.blocks.values())
    found.cost.append(
        CostRow(
            "GGN, all blocks",
            time.perf_counter() - start,
            sum(block.info.passes for block in blocks),
            route=", ".join(dict.fromkeys(block.info.route for block in blocks)),
        )
    )
    if found.settings.damping is None:
        mean = found.ggn.trace() / found.problem.layout.numel
        found.damping = float(f"{mean:.1e}") if mean > 0 else 1e-3
    else:
        found.damping = found.settings.damping


def _compare_ggn(found: Findings) -> None:
    assert found.ggn is not None
    result = compare(
        found.ggn,
        operators(found.approximations),
        gradient=found.problem,
        damping=found.damping,
        seed=found.settings.seed,
    )
    found.comparisons["GGN"] = result
    found.cost.append(
        CostRow("comparison with the GGN", result.cost.seconds, products=result.cost.products)
    )
    found.approximations = _without_twins(found.approximations, result)


def _hessian(found: Findings) -> None:
    """The blocks, except those by a route that would take too long."""
    start = time.perf_counter()
    whole = curvature.hessian(found.problem)
    found.hessian = whole
    routes = {name: whole.route_of(name) for name in whole.blocks}
    found.same_blocks = all(route == "piecewise-linear" for route in routes.values())
    names: list[str] = []
    expected, spent, done = _column_seconds(found, whole), 0.0, 0.0
    for name in track(list(routes), "Hessian blocks"):
        columns = _columns(whole, name, routes[name])
        if columns * expected > _HESSIAN_SECONDS:
            found.skipped.append(
                f"The Hessian block of {name} was left out: {columns:,} double backward passes "
                f"would take about {columns * expected / 60:.0f} minutes. "
                f'cs.hessian(problem).blocks["{name}"] computes it.'
            )
            continue
        begun = time.perf_counter()
        try:
            block = whole.blocks[name]
            if routes[name] == "autograd":
                block.dense()  # kept by the operator
        except CurvscopeError as error:
            found.skipped.append(f"The Hessian block of {name} was left out: {error}")
            continue
        names.append(name)
        if columns:
            spent, done = spent + time.perf_counter() - begun, done + columns
            expected = spent / done
    found.hessian_blocks = tuple(names)
    found.cost.append(
        CostRow(
            "Hessian, blocks",
            time.perf_counter() - start,
            sum(whole.blocks[name].info.passes for name in names),
            route=", ".join(dict.fromkeys(routes.values())),
        )
    )


def _columns(whole: Any, name: str, route: str) -> int:
    """Double backward passes over the data that a block takes; 0 where it takes none."""
    plan = whole.plans[name]
    if route == "rows":
        return int(plan.positions * plan.outputs)
    return int(plan.size) if route == "autograd" else 0


def _column_seconds(found: Findings, whole: Any) -> float:
    """Seconds of one product with the Hessian."""
    vector = found.problem.gradient()
    start = time.perf_counter()
    whole @ vector
    return time.perf_counter() - start


def _compare_hessian(found: Findings) -> None:
    """Its blocks with everything, or with the GGN alone where they are the same matrices."""
    assert found.ggn is not None and found.hessian is not None
    others: dict[str, Operator] = {"GGN": found.ggn}
    if not found.same_blocks:
        others |= {
            entry.name: entry.op
            for entry in found.approximations
            if entry.op is not None and entry.group not in (BEST, EXACT) and not entry.same_as
        }
    result = compare(
        found.hessian,
        others,
        gradient=found.problem,
        damping=found.damping,
        budget=_WHOLE_PRODUCTS,
        blocks=[*found.hessian_blocks, WHOLE],
        seed=found.settings.seed,
    )
    found.comparisons["Hessian"] = result
    found.cost.append(
        CostRow("comparison with the Hessian", result.cost.seconds, products=result.cost.products)
    )


def _ends(found: Findings) -> None:
    assert found.hessian is not None
    result = extremes(found.hessian)
    found.ends = result
    found.cost.append(
        CostRow(
            "ends of the Hessian's spectrum", result.cost.seconds, products=result.cost.products
        )
    )


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


def _spectra(found: Findings) -> None:
    with _timed(found, "spectra"):
        for block in track(list(found.problem.blocks), "Spectra"):
            spectra: dict[str, Spectrum] = {}
            for name, op in block_operators(found, block).items():
                if op.shape[0] > DENSE_ROWS and not _cheap_spectrum(op):
                    found.skipped.append(
                        f"The spectrum of the {name} of {block} was left out: "
                        f"{op.shape[0]:,} rows, and no structure that gives its eigenvalues."
                    )
                    continue
                try:
                    spectra[name] = spectrum(op)
                except CurvscopeError as error:
                    found.skipped.append(f"No spectrum of the {name} of {block}: {error}")
            found.spectra[block] = spectra


def _cheap_spectrum(op: Operator) -> bool:
    return op.shape[0] <= 10**6 and type(op).__name__ in (
        "KroneckerOperator",
        "EigenKroneckerOperator",
        "DiagonalOperator",
        "DiagonalKroneckerOperator",
        "IdentityOperator",
    )


def _concentration(found: Findings) -> None:
    assert found.ggn is not None
    kfac = next((e.op for e in found.approximations if e.name == "K-FAC" and e.op), None)
    with _timed(found, "concentration"):
        for name in track(list(found.problem.blocks), "Concentration"):
            block = found.ggn.blocks[name]
            try:
                found.blocks[name] = concentration(block, seed=found.settings.seed)
            except CurvscopeError as error:
                found.skipped.append(f"No concentration of the block {name}: {error}")
            factor = kfac.blocks[name] if kfac is not None and name in kfac.blocks else None
            if isinstance(factor, KroneckerOperator) and factor.view.groups == 1:
                found.factors[name] = _factors(found, name, factor)


def _factors(found: Findings, block: str, op: KroneckerOperator) -> dict[str, Concentration]:
    parts: dict[str, Concentration] = {}
    for name, factor in op.factors.items():
        if factor.shape[0] > DENSE_ROWS:
            found.skipped.append(
                f"The concentration of factor {name} of {block} was left out: "
                f"{factor.shape[0]:,} rows."
            )
            continue
        parts[name] = concentration(factor, seed=found.settings.seed)
    return parts


def _coverage(found: Findings) -> None:
    with _timed(found, "coverage"):
        found.coverage = coverage(found.problem)


def _verification(found: Findings) -> None:
    result = verify(found.problem, seed=found.settings.seed)
    found.verification = result
    found.cost.append(CostRow("verification", result.cost.seconds))


_TWIN = ("error", "cosine", "trace_ratio")


def _without_twins(entries: list[Approximation], result: Comparison) -> list[Approximation]:
    """Mark approximations whose every block has the same numbers as that of an earlier one."""
    from dataclasses import replace

    marked: list[Approximation] = []
    seen: list[tuple[str, list[tuple[str, float, float, float]]]] = []
    for entry in entries:
        if entry.op is None:
            marked.append(entry)
            continue
        print_ = [
            (row.family, *(row[key] for key in _TWIN))
            for row in result.rows
            if row.approximation == entry.name
        ]
        twin = next((name for name, other in seen if _alike(print_, other)), "")
        marked.append(replace(entry, same_as=twin))
        if not twin:
            seen.append((entry.name, print_))
    return marked


def _alike(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        a[0] == b[0]
        and all(
            (math.isnan(x) and math.isnan(y)) or math.isclose(x, y, rel_tol=2e-5)
            for x, y in zip(a[1:], b[1:], strict=True)
        )
        for a, b in zip(left, right, strict=True)
    )
