"""Running one check of verify, or all once per problem."""

from __future__ import annotations

from collections.abc import Callable

import torch

import curvscope as cs
from curvscope.analysis import Verification
from curvscope.analysis.checks import (
    CHECKS,
    Case,
    Check,
    Marks,
    prepare,
)
from curvscope.analysis.checks.base import Entry
from curvscope.analysis.verify import run as run_check
from tests.analysis import verify_models as models
from tests.fixtures_side_effects import unchanged


def case(problem: cs.Problem, **options: int) -> Case:
    before = Marks.of(problem)
    with unchanged(problem):
        problem.check()
        return prepare(problem, options.get("samples"), 2, options.get("seed", 0), before)


def run(entry: Entry, at: Case) -> Check:
    """One check, watched as a whole: watching every call in it would take longer than it does."""
    with unchanged(at.problem):
        return run_check(entry, at)


def check(problem: cs.Problem, name: str, **options: int) -> Check:
    """One check alone."""
    return run(CHECKS[name], case(problem, **options))


def verifier() -> Callable[[str], Verification]:
    """Each healthy problem is verified once, in train mode and with gradients in place."""
    kept: dict[str, Verification] = {}

    def get(name: str) -> Verification:
        if name not in kept:
            problem = models.problem(name)
            model = problem.user_model.train()
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            before = Marks.of(problem)
            kept[name] = cs.verify(problem)
            assert before.changes(Marks.of(problem)) == []
        return kept[name]

    return get
