"""What a monitor says at its end: what was taken and left out, and what never happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .budget import Budget
from .measures import Measure
from .schedules import Schedule


def rows(budget: Budget, state: str) -> list[dict[str, Any]]:
    """The last record of a run: how it ended, and a row per measure.

    Of a measure that is taken by block, ``rounds`` says how often every one of them was.
    """
    whole: dict[str, Any] = {"event": state, "spent": budget.total, "share": budget.overhead}
    if budget.outside:
        whole["outside"] = budget.outside
    found = [whole]
    for name, account in budget.accounts.items():
        row = {
            "event": "measure",
            "of": name,
            "taken": account.taken,
            "thinned": account.thinned,
            "failed": account.failed,
            "used": account.used,
            "outside": account.outside,
        }
        if account.count:
            row["rounds"] = account.rounds
        found.append(row)
    return found


def complaints(
    measures: Sequence[tuple[Measure, Schedule]], budget: Budget, steps: int | None
) -> list[str]:
    """Warnings of what never happened; ``steps`` is ``None`` if the loop never called."""
    if steps is None:
        return [
            "monitor.step() was never called, so nothing was measured: call it after every "
            "optimizer.step(), inside the loop."
        ]
    found, dear = [], []
    for measure, when in measures:
        account = budget.accounts[measure.name]
        if account.taken or account.failed:
            continue
        if account.thinned:
            need = account.estimate
            price = f" ({need:.2g} s each)" if need == need else ""
            dear.append(f"{measure.name!r}, due {account.thinned} times{price}")
        else:
            found.append(
                f"The schedule {when!r} of {measure.name!r} never came up in {steps} "
                "steps: choose one that fits the length of the training."
            )
    if dear:
        found.append(
            f"Never fitted into the budget of {100 * (budget.share or 0):g} % of "
            f"{budget.training:.3g} s: {'; '.join(dear)}. Train longer, raise "
            "budget=, take a smaller probe=, or name steps in assured=, which are measured "
            "in any case."
        )
    return found
