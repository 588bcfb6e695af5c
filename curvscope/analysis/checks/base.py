"""What a check is, and the registry of checks: a new check is one function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .case import Case

PASSED, FAILED, SKIPPED, NOT_APPLICABLE = "passed", "failed", "skipped", "not applicable"
STATUSES = (PASSED, FAILED, SKIPPED, NOT_APPLICABLE)

#: what a check speaks about: the user's model and data, curvscope's numbers, or other tools
PROBLEM, CURVSCOPE, OTHERS = "your problem", "curvscope", "other tools"
#: curvscope's own matrices, none of which can be right for a wrong objective or gradient
MATRICES = ("Hessian", "GGN", "Fisher", "sampled Fisher", "empirical Fisher", "K-FAC")


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    ``status`` is ``"passed"``, ``"failed"``, ``"skipped"`` (it could not be decided, or would take
    too long) or ``"not applicable"``. ``value`` is what was measured (a relative difference unless
    the sentence says otherwise; NaN where nothing was) and ``tolerance`` the bound it was held
    against. ``sentence`` says what was found, ``advice`` what to do about it (empty if nothing).
    ``details`` holds the value for each part (block, split, ...) where there are several.
    ``decides`` and ``underlies`` name the capabilities that the outcome bears on.
    """

    name: str
    status: str
    sentence: str
    about: str = PROBLEM
    value: float = math.nan
    tolerance: float = math.nan
    advice: str = ""
    details: Mapping[str, float] = field(default_factory=dict)
    decides: tuple[str, ...] = ()
    underlies: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a check function returns: a :class:`Check` without what the registry knows."""

    status: str
    sentence: str
    value: float = math.nan
    tolerance: float = math.nan
    advice: str = ""
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A registered check: its function and what its outcome says something about."""

    name: str
    about: str
    decides: tuple[str, ...]
    underlies: tuple[str, ...]
    function: Callable[[Case], Outcome]


#: every check by name, in the order in which they run
CHECKS: dict[str, Entry] = {}


def register(
    name: str, *, about: str, decides: tuple[str, ...] = (), underlies: tuple[str, ...] = ()
) -> Callable[[Callable[[Case], Outcome]], Callable[[Case], Outcome]]:
    """Add a check, a function from a :class:`~.case.Case` to an :class:`Outcome`.

    ``decides`` names the capabilities that it proves when it passes, ``underlies`` further ones
    that cannot be trusted when it fails.
    """

    def add(function: Callable[[Case], Outcome]) -> Callable[[Case], Outcome]:
        CHECKS[name] = Entry(name, about, decides, underlies, function)
        return function

    return add


def judged(
    value: float,
    tolerance: float,
    sentence: str,
    *,
    advice: str = "",
    details: Mapping[str, float] | None = None,
) -> Outcome:
    """Passed if ``value <= tolerance``, else failed (also for NaN) with the advice."""
    passed = value <= tolerance
    return Outcome(
        PASSED if passed else FAILED,
        sentence,
        value,
        tolerance,
        "" if passed else advice,
        details or {},
    )


def not_applicable(sentence: str) -> Outcome:
    """The check does not make sense for this problem, for the reason given."""
    return Outcome(NOT_APPLICABLE, sentence)


def skipped(sentence: str, advice: str = "") -> Outcome:
    """The check could not be decided, or would take too long."""
    return Outcome(SKIPPED, sentence, advice=advice)
