"""Checks of approximations that the user registered: a check each, on the problem at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ...curvature.registered import REGISTERED, Registered
from ...operators import Operator
from ...problem import Problem
from ..batches import merge
from ..result import listing, number
from ..truth import materialised
from .base import FAILED, OTHERS, PASSED, Entry, Outcome, judged
from .case import Case
from .marks import Marks

_RANDOM = ("seed", "probes")  # settings of an approximation that draws random numbers


def entries() -> list[Entry]:
    """A check per registered approximation."""
    return [
        Entry(f"your approximation {name}", OTHERS, (name,), (), _check(found))
        for name, found in REGISTERED.items()
    ]


def _check(found: Registered) -> Callable[[Case], Outcome]:
    def properties(case: Case) -> Outcome:
        problem = case.few
        op, again = found.make(problem), found.make(problem)
        dense = _dense(op)
        size = max(float(dense.norm()), 1e-300)

        def off(other: torch.Tensor) -> float:
            return float((other - dense).norm()) / size

        v = case.direction(60).to(dense)
        details = {
            "not symmetric": off(dense.mT),
            "product is not that of the matrix": float(
                (_zeroed(op) @ v.to(op.dtype).to(op.device) - (dense @ v).to(op.dtype)).norm()
            )
            / size,
            "another matrix when made again": off(_dense(again)),
        }
        if not any(op.info.settings.get(key) is not None for key in _RANDOM):
            batches = materialised(problem)
            one = merge(batches)
            if one is not None:
                whole = _dense(found.make(problem.with_data([one])))
                details["depends on how the data are cut into batches"] = off(whole)
            twice = _dense(found.make(problem.with_data([*batches, *batches])))
            details["scale: every sample twice is another objective"] = off(twice / _times(problem))
        tolerance = max(case.exact, 200 * float(torch.finfo(op.dtype).eps))
        wrong = [name for name, value in details.items() if not value <= tolerance]
        # the first one explains those after it
        worst = wrong[0] if wrong else max(details, key=lambda name: details[name])
        if not bool(torch.isfinite(dense).all()):
            return Outcome(FAILED, f"{found.name} has entries that are not finite.")
        sentence = (
            f"{found.name} is symmetric, multiplies as its entries do, and is the same for any way "
            "to cut the data."
            if not wrong
            else f"{found.name}: {worst} (relative difference {number(details[worst], 2)})."
        )
        return judged(
            details[worst],
            tolerance,
            sentence,
            advice="Matrices are those of the mean objective; multiply sums by problem.scale.",
            details=details,
        )

    def check(case: Case) -> Outcome:
        before = Marks.of(case.problem)
        try:
            outcome = properties(case)
        finally:
            changed = before.changes(Marks.of(case.problem))
            case.blamed += changed
            before.restore_random()
        if not changed:
            return outcome
        said = f"{found.name} changes what is not its own: {listing(changed)}."
        return replace(
            outcome,
            status=FAILED,
            sentence=said if outcome.status == PASSED else f"{outcome.sentence} {said}",
            advice="Draw from a torch.Generator with a seed of its own, and work on copies.",
        )

    return check


def _times(problem: Problem) -> float:
    return 2.0 if problem.loss.reduction == "sum" else 1.0


def _zeroed(op: Operator) -> Operator:
    return op.with_uncovered("zero") if op.uncovered else op  # type: ignore[attr-defined]


def _dense(op: Operator) -> torch.Tensor:
    return _zeroed(op).dense().to(torch.float64)
