"""Checking the user's own problem: what is right, what is not, and what to trust."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..curvature.registered import place_of
from ..errors import (
    ApproximationError,
    BackpackError,
    MemoryLimitError,
    NotDefinedError,
    OptionError,
    UnsupportedLossError,
    check_count,
)
from ..problem import Problem
from ..progress import stage, track
from .checks import (
    CHECKS,
    FAILED,
    NOT_APPLICABLE,
    OTHERS,
    PASSED,
    SKIPPED,
    Case,
    Check,
    Entry,
    Marks,
    Outcome,
    prepare,
    registered,
)
from .result import Cost, Result, listing

if TYPE_CHECKING:
    import pandas as pd

TRUST, DISTRUST, UNKNOWN = "trust", "do not trust", "unknown"

__all__ = ["Check", "Verification", "verify"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Verification(Result):
    """What :func:`verify` found out about a problem.

    ``checks`` holds a :class:`Check` for everything that was looked at, on ``samples`` samples in
    precision ``dtype``. ``trust`` says for each capability (``"Hessian"``, ``"GGN"``,
    ``"torch.func.hessian"``, ``"plain BackPACK KFLR"``, ...) ``"trust"``, ``"do not trust"`` or
    ``"unknown"``, and ``reasons`` why, in a sentence.
    """

    problem: str
    samples: int
    dtype: str
    checks: tuple[Check, ...]
    trust: Mapping[str, str]
    reasons: Mapping[str, str]

    @property
    def trusted(self) -> bool:
        """Whether no check of the problem or of curvscope failed (other tools do not count)."""
        return not any(c.status == FAILED and c.about != OTHERS for c in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed, other tools included."""
        return tuple(c for c in self.checks if c.status == FAILED)

    def check(self, name: str) -> Check:
        """One check by name. Raises ``OptionError`` for an unknown one."""
        for found in self.checks:
            if found.name == name:
                return found
        names = ", ".join(c.name for c in self.checks)
        raise OptionError(f"There is no check {name!r}. Checks: {names}.")

    def records(self) -> list[dict[str, Any]]:
        """A record per check."""
        return [
            {
                "check": c.name,
                "about": c.about,
                "status": c.status,
                "value": c.value,
                "tolerance": c.tolerance,
                "sentence": c.sentence,
                "advice": c.advice,
                "seconds": c.seconds,
            }
            for c in self.checks
        ]

    def trust_frame(self) -> pd.DataFrame:
        """A row per capability: verdict and reason."""
        import pandas as pd

        rows = [(name, verdict, self.reasons[name]) for name, verdict in self.trust.items()]
        return pd.DataFrame(rows, columns=["capability", "verdict", "reason"])

    def to_dict(self) -> dict[str, Any]:
        """The fields and the overall verdict."""
        return {**super().to_dict(), "trusted": self.trusted}

    def summary(self) -> str:
        """What was checked, what to trust, what not and why."""
        count = {s: sum(c.status == s for c in self.checks) for s in (PASSED, FAILED, SKIPPED)}
        verdict = (
            "the problem can be trusted" if self.trusted else "the problem must not be trusted yet"
        )
        others = sum(c.about == OTHERS for c in self.failed)
        of_them = "" if others == count[FAILED] else f"{others} of them "
        of_others = f" ({of_them}of other tools or approximations)" if others else ""
        lines = [
            f"{self.problem}: {verdict}. Of {len(self.checks)} checks {count[PASSED]} passed, "
            f"{count[FAILED]} failed{of_others}, {count[SKIPPED]} undecided, "
            f"{len(self.checks) - sum(count.values())} not applicable (on {self.samples} samples "
            f"in {self.dtype}, {self.cost})."
        ]
        lines += [
            f"Failed: {c.name}. {c.sentence} {c.advice}".rstrip()
            for c in self.failed
            if c.about != OTHERS
        ]
        for verdict in (TRUST, UNKNOWN):
            names = [name for name, found in self.trust.items() if found == verdict]
            if names:
                lines.append(f"{verdict.capitalize()}: {listing(names, len(names))}.")
        lines += [f"Undecided: {c.name}. {c.sentence}" for c in self.checks if c.status == SKIPPED]
        against: dict[str, list[str]] = {}
        for name, found in self.trust.items():
            if found == DISTRUST:
                against.setdefault(self.reasons[name], []).append(name)
        for reason, names in against.items():
            lines.append(f"Do not trust {listing(names, len(names))}: {reason}")
        return "\n".join(lines)


def verify(
    problem: Problem, *, columns: int = 2, seed: int = 0, samples: int | None = None
) -> Verification:
    """Check a problem from all sides, in seconds: what is right on *this* model and data?

    Gradient and Hessian against finite differences, every Hessian and GGN block's route against
    plain double backward, the Fisher against enumerated labels, symmetry and definiteness, how the
    data are split, determinism, rounding, side effects; and whether plain BackPACK and
    ``torch.func.hessian`` would be right here.

    Parameters
    ----------
    columns
        In how many random columns each block is compared.
    seed
        Of all random choices (samples, columns, directions).
    samples
        How many samples to work on; by default at most 64, or 16 for models with more than
        100,000 parameters, of which also fewer blocks are looked at. The costly checks take up to
        eight samples.

    A check that raises counts as failed, with the message.

    Cost: seconds for small networks; some tens of passes over ``samples`` samples in float64 and,
    for each block looked at, ``columns`` products. ``.checks`` has the seconds of each.

    Raises ``OptionError`` for options that do not fit, and the errors of the problem itself
    (``NonFiniteError``, ``NonDeterministicError``, ``TargetError``, ``DataError``).

    Source: each check states its own reference; plain double backward (Pearlmutter 1994) and
    central differences stand behind most of them.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> found = cs.verify(problem)
    >>> found.trusted, found.trust["GGN"]
    (True, 'trust')
    """
    start = time.perf_counter()
    if not isinstance(problem, Problem):
        raise OptionError(f"A Problem is needed, not {type(problem).__name__}.")
    columns = None if columns is None else check_count("columns", columns)
    samples = None if samples is None else check_count("samples", samples)
    before = Marks.of(problem)
    problem.check()
    case = prepare(problem, samples, columns, seed, before)
    case.double.check()
    entries = list(CHECKS.values())
    entries[-1:-1] = registered.entries()  # side effects of all of it last
    stage(f"{len(entries)} checks")
    checks = tuple(run(entry, case) for entry in track(entries, "Checks"))
    trust, reasons = _trust(checks)
    return Verification(
        problem=problem.name,
        samples=case.double.n_samples,
        dtype=str(case.double.dtype)[6:],
        checks=checks,
        trust=trust,
        reasons=reasons,
        cost=Cost(seconds=time.perf_counter() - start),
        settings={"columns": columns, "seed": seed, "samples": samples},
        converged=not any(c.status == SKIPPED for c in checks),
        warnings=tuple(case.notes),
    )


def run(entry: Entry, case: Case) -> Check:
    """Run one check; whatever it raises becomes its outcome."""
    start = time.perf_counter()
    try:
        outcome = entry.function(case)
    except MemoryLimitError as error:
        outcome = Outcome(SKIPPED, str(error))
    except (UnsupportedLossError, NotDefinedError, BackpackError) as error:
        outcome = Outcome(NOT_APPLICABLE, str(error))
    except ApproximationError as error:
        outcome = Outcome(FAILED, str(error))
    except Exception as error:  # a check that cannot run has found something out
        text = str(error).strip().splitlines() or ["without a message"]
        advice = "" if isinstance(error, _PLAIN) else _TWICE
        sentence = f"It raised {type(error).__name__}: {text[0]}{place_of(error)}"
        outcome = Outcome(FAILED, sentence, advice=advice)
    return Check(
        name=entry.name,
        about=entry.about,
        status=outcome.status,
        sentence=outcome.sentence,
        value=outcome.value,
        tolerance=outcome.tolerance,
        advice=outcome.advice,
        details=outcome.details,
        decides=entry.decides,
        underlies=entry.underlies,
        seconds=time.perf_counter() - start,
    )


_PLAIN = (ArithmeticError, AttributeError, ImportError, LookupError, NameError, TypeError)
_TWICE = (
    "If the message names an operation of the model, that operation cannot be differentiated "
    "(twice)."
)


def _trust(checks: tuple[Check, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Capability -> verdict and reason.

    One failed check that decides or underlies a capability is enough against it; for it, one that
    decides it must have passed.
    """
    verdicts: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for capability in dict.fromkeys(name for check in checks for name in check.decides):
        against = [
            c
            for c in checks
            if c.status == FAILED and (capability in c.decides or capability in c.underlies)
        ]
        deciding = [c for c in checks if capability in c.decides]
        passed = [c for c in deciding if c.status == PASSED]
        if against:
            verdicts[capability], reason = DISTRUST, against[0]
        elif passed:
            verdicts[capability], reason = TRUST, max(passed, key=lambda c: len(c.details))
        else:
            verdicts[capability], reason = UNKNOWN, deciding[0]
        reasons[capability] = reason.sentence
    return verdicts, reasons
