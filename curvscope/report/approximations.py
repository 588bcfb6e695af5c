"""What a report compares: every approximation, how it is made, and a sentence about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .. import curvature
from ..analysis import Comparison
from ..curvature.registered import REGISTERED, Registered
from ..errors import CurvscopeError
from ..operators import (
    Operator,
    best_diagonal_kronecker,
    best_identity,
    best_kronecker,
)
from ..problem import Problem

KRONECKER, DIAGONAL, EXACT, BEST = "Kronecker", "diagonal", "other exact matrix", "best of a class"
OWN = "your own"
"""Groups of approximations, in the order of the page."""


@dataclass(frozen=True)
class Ingredients:
    """What the makers of approximations need."""

    problem: Problem
    ggn: Operator
    probes: int
    seed: int


@dataclass(frozen=True)
class Recipe:
    """One approximation: ``make`` gives its operator or raises a ``CurvscopeError``.

    ``main`` marks those that are also drawn (heat maps, spectra), where all would be too many.
    """

    name: str
    group: str
    about: str
    make: Callable[[Ingredients], Operator]
    main: bool = False


@dataclass(frozen=True)
class Approximation:
    """An approximation as the report has it: its operator, or the reason why there is none."""

    name: str
    group: str
    about: str
    main: bool
    op: Operator | None
    reason: str = ""
    seconds: float = 0.0
    same_as: str = ""

    @property
    def uncovered(self) -> Mapping[str, str]:
        """Reasons by name of the blocks that the method does not define."""
        if self.op is None:
            return {}
        reasons = self.op.info.settings.get("uncovered", {})
        return {name: str(reasons.get(name, "not defined")) for name in self.op.uncovered}


def _kfac(fisher: str, sharing: str) -> Callable[[Ingredients], Operator]:
    return lambda i: curvature.kfac(i.problem, fisher=fisher, sharing=sharing, seed=i.seed)


def _hutchinson(spatial: bool) -> Callable[[Ingredients], Operator]:
    return lambda i: curvature.hutchinson_diagonal(
        i.problem, probes=i.probes, seed=i.seed, spatial=spatial
    )


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        "K-FAC",
        KRONECKER,
        "One Kronecker product per layer, output gradients under the model's own distribution "
        "(exact expectation), every position for itself.",
        _kfac("exact", "expand"),
        main=True,
    ),
    Recipe(
        "K-FAC (reduce)",
        KRONECKER,
        "K-FAC with gradients summed and inputs averaged over positions first.",
        _kfac("exact", "reduce"),
        main=True,
    ),
    Recipe(
        "K-FAC (sampled)",
        KRONECKER,
        "K-FAC with one label per term drawn from the model, as most optimizers do.",
        _kfac("mc", "expand"),
    ),
    Recipe(
        "K-FAC (sampled, reduce)",
        KRONECKER,
        "The same with positions reduced first.",
        _kfac("mc", "reduce"),
    ),
    Recipe(
        "K-FAC (empirical)",
        KRONECKER,
        "K-FAC with the gradients at the observed labels: factors of the empirical Fisher.",
        _kfac("empirical", "expand"),
    ),
    Recipe(
        "K-FAC (empirical, reduce)",
        KRONECKER,
        "The same with positions reduced first.",
        _kfac("empirical", "reduce"),
    ),
    Recipe(
        "EKFAC",
        KRONECKER,
        "K-FAC's eigenvectors with exact second moments along them.",
        lambda i: curvature.ekfac(i.problem),
        main=True,
    ),
    Recipe(
        "KFLR",
        KRONECKER,
        "Output factor from the Hessian of the loss in the outputs; for log-likelihoods K-FAC.",
        lambda i: curvature.kflr(i.problem),
    ),
    Recipe(
        "KFRA",
        KRONECKER,
        "Output factor averaged over samples layer by layer, from the last to the first.",
        lambda i: curvature.kfra(i.problem),
    ),
    Recipe(
        "FOOF",
        KRONECKER,
        "The input factor alone; its scale is not that of the curvature.",
        lambda i: curvature.foof(i.problem),
    ),
    Recipe(
        "diagonal K-FAC",
        DIAGONAL,
        "The diagonals of the two factors of K-FAC (empirical).",
        lambda i: curvature.diagonal_kf(i.problem),
    ),
    Recipe(
        "AdaFisher factors",
        DIAGONAL,
        "AdaFisher's diagonal factors in its own scale, before normalisation.",
        lambda i: curvature.diagonal_kf(i.problem, scale="adafisher"),
    ),
    Recipe(
        "AdaFisher factors (min-max)",
        DIAGONAL,
        "The same after AdaFisher's min-max normalisation, as its optimizer uses them.",
        lambda i: curvature.diagonal_kf(i.problem, scale="adafisher", normalise="minmax"),
    ),
    Recipe(
        "Hutchinson diagonal",
        DIAGONAL,
        "Random-probe estimate of the Hessian's diagonal (AdaHessian without averaging).",
        _hutchinson(False),
    ),
    Recipe(
        "Hutchinson diagonal (spatial)",
        DIAGONAL,
        "The same, averaged over kernel positions of convolutions, as AdaHessian does.",
        _hutchinson(True),
    ),
    Recipe(
        "exact diagonal",
        DIAGONAL,
        "The diagonal of the GGN itself, the nearest of all diagonal matrices.",
        lambda i: curvature.exact_diagonal(i.problem),
        main=True,
    ),
    Recipe(
        "empirical Fisher",
        EXACT,
        "Outer products of the samples' gradients at the observed labels: no Fisher, and often "
        "taken for one.",
        lambda i: curvature.empirical_fisher(i.problem),
    ),
    Recipe(
        "nearest Kronecker",
        BEST,
        "The nearest Kronecker product to each exact block: the limit for K-FAC and its relatives.",
        lambda i: best_kronecker(i.ggn, tol=1e-8),
        main=True,
    ),
    Recipe(
        "nearest diagonal Kronecker",
        BEST,
        "The nearest Kronecker product of two diagonal matrices: the limit for diagonal factors.",
        lambda i: best_diagonal_kronecker(i.ggn, tol=1e-8),
    ),
    Recipe(
        "nearest identity",
        BEST,
        "The nearest multiple of the identity per block: a learning rate per layer.",
        lambda i: best_identity(i.ggn),
    ),
)


def recipes() -> tuple[Recipe, ...]:
    """All recipes, those of approximations that the user registered last."""
    return RECIPES + tuple(
        Recipe(name, OWN, found.about, _made(found), main=True)
        for name, found in REGISTERED.items()
    )


def _made(found: Registered) -> Callable[[Ingredients], Operator]:
    return lambda i: found.make(i.problem)


@dataclass
class Made:
    """All approximations, made one after the other by :meth:`add`."""

    ingredients: Ingredients
    entries: list[Approximation] = field(default_factory=list)

    def add(self, recipe: Recipe) -> None:
        """Make one; an approximation that refuses the problem is kept with its reason."""
        start = time.perf_counter()
        op: Operator | None = None
        reason = ""
        try:
            op = recipe.make(self.ingredients)
            if recipe.group == BEST or recipe.name == "empirical Fisher":
                list(op.blocks.values())  # lazy ones are computed here, not in the comparison
        except CurvscopeError as error:
            op, reason = None, str(error)
        except (RuntimeError, MemoryError) as error:  # of torch: no convergence, no memory
            op, reason = None, f"It failed with {type(error).__name__}: {error}"
        if op is not None and op.uncovered and not op.blocks:
            reasons = op.info.settings.get("uncovered", {})
            first = next(iter(reasons.values()), "no layer of this network has one")
            op, reason = None, f"It covers no block of this network: {first}."
        self.entries.append(
            Approximation(
                recipe.name,
                recipe.group,
                recipe.about,
                recipe.main,
                op,
                reason,
                time.perf_counter() - start,
            )
        )


def operators(entries: Sequence[Approximation]) -> dict[str, Operator]:
    """Those that exist, by name."""
    return {entry.name: entry.op for entry in entries if entry.op is not None}


_TWIN = ("error", "cosine", "trace_ratio")


def mark_twins(entries: list[Approximation], result: Comparison) -> list[Approximation]:
    """Mark approximations whose every block has the same numbers as that of an earlier one."""
    marked: list[Approximation] = []
    seen: list[tuple[str, list[tuple[Any, ...]]]] = []
    for entry in entries:
        if entry.op is None:
            marked.append(entry)
            continue
        fingerprint = [
            (row.family, *(row[key] for key in _TWIN))
            for row in result.rows
            if row.approximation == entry.name
        ]
        twin = next((name for name, other in seen if _alike(fingerprint, other)), "")
        marked.append(replace(entry, same_as=twin))
        if not twin:
            seen.append((entry.name, fingerprint))
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
