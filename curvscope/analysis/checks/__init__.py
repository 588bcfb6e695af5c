"""The checks behind :func:`curvscope.verify`, in the order in which they run.

To add one, write a function from a :class:`Case` to an :class:`Outcome` under ``@register``.
"""

from . import backpack, behaviour, derivatives, gaussnewton, matrices, registered, tools
from .base import (
    CHECKS,
    CURVSCOPE,
    FAILED,
    NOT_APPLICABLE,
    OTHERS,
    PASSED,
    PROBLEM,
    SKIPPED,
    STATUSES,
    Check,
    Entry,
    Outcome,
    judged,
    not_applicable,
    register,
    skipped,
)
from .case import Case, prepare
from .marks import Marks

# in this order, but what concerns other tools at the end; side effects of all of it last
_MODULES = (behaviour, derivatives, gaussnewton, matrices, backpack, tools)
_PLACE = {module.__name__: place for place, module in enumerate(_MODULES)}
for _name, _entry in sorted(
    CHECKS.items(), key=lambda item: (item[1].about == OTHERS, _PLACE[item[1].function.__module__])
):
    CHECKS[_name] = CHECKS.pop(_name)
CHECKS["side effects"] = CHECKS.pop("side effects")

__all__ = [
    "CHECKS",
    "CURVSCOPE",
    "FAILED",
    "NOT_APPLICABLE",
    "OTHERS",
    "PASSED",
    "PROBLEM",
    "SKIPPED",
    "STATUSES",
    "Case",
    "Check",
    "Entry",
    "Marks",
    "Outcome",
    "backpack",
    "behaviour",
    "derivatives",
    "gaussnewton",
    "judged",
    "matrices",
    "not_applicable",
    "prepare",
    "register",
    "registered",
    "skipped",
    "tools",
]
