"""Computing everything that a report shows, one step after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .. import curvature
from ..analysis import Concentration, Spectrum, compare, concentration, coverage, spectrum, verify
from ..errors import CurvscopeError
from ..operators import KroneckerOperator, Operator
from ..problem import Problem
from ..progress import stage, track
from .approximations import BEST, Ingredients, Made, mark_twins, operators, recipes
from .findings import DENSE_ROWS, CostRow, Findings, Settings, block_operators
from .hessian import compare_hessian, hessian_blocks, hessian_ends


def collect(problem: Problem, settings: Settings) -> Findings:
    """Compute a report's content. Cost: see the page's own table of costs.

    What a single approximation or block refuses is recorded with its reason; errors of the problem
    itself (data, loss, determinism) are raised.
    """
    start = time.perf_counter()
    found = Findings(problem, settings)
    steps = _steps(found)
    bar: Any = track(steps, "Report")
    for title, step in bar:
        if hasattr(bar, "set_description"):
            bar.set_description(title)
        stage(title)
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
    steps += [(recipe.name, approximation(recipe)) for recipe in recipes()]
    steps += [("Compared with the GGN", lambda: _compare_ggn(found))]
    if found.settings.hessian:
        steps += [
            ("Exact Hessian", lambda: hessian_blocks(found)),
            ("Compared with the Hessian", lambda: compare_hessian(found)),
            ("Ends of the Hessian's spectrum", lambda: hessian_ends(found)),
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
    found.approximations = mark_twins(found.approximations, result)


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
    few = min(32, found.problem.n_samples)  # a page needs the verdict, not the last digit
    result = verify(found.problem, seed=found.settings.seed, samples=few)
    found.verification = result
    found.cost.append(CostRow("verification", result.cost.seconds))
