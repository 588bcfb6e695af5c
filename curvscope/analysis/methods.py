"""For each method: which blocks it covers, read off the plans. A new method is one entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..curvature import backpack as adapter
from ..curvature.diagonal import adafisher_reason
from ..curvature.exact import empirical_fisher, ggn, hessian
from ..curvature.factors import kronecker_reason
from ..curvature.gram import record_batch
from ..curvature.kfra import chain
from ..curvature.recording import Recording, graph_uses
from ..curvature.registered import REGISTERED, Registered
from ..curvature.whole import WholeOperator
from ..errors import CurvscopeError
from ..memory import format_bytes
from ..operators import Operator
from ..problem import Problem
from ..problem.cotangents import root_cotangents

_OUTPUTS = 256  # outputs per sample up to which the curvature of an unknown loss is looked at
_TRIAL_BYTES = 10**9  # what BackPACK may take to be tried


@dataclass
class Look:
    """One batch of a problem, as the methods see it before they compute anything.

    ``uses`` counts how often each parameter enters the outputs; ``convex`` whether the loss is
    convex in them (``None``: not looked at); ``samples`` and ``chained`` say why single samples,
    or a chain of layers, cannot be made out (``None`` where they can).
    """

    problem: Problem
    hessian: WholeOperator
    ggn: WholeOperator
    recording: Recording
    uses: dict[str, int]
    convex: bool | None
    samples: str | None
    chained: str | None

    @classmethod
    def at(cls, problem: Problem) -> Look:
        """Record the first batch of a small problem."""
        with problem.session():
            inputs, targets = next(problem.batches())
            recording = record_batch(problem, inputs, targets)
            uses = graph_uses(recording.outputs, problem.params.values())
            found = {name: uses[id(p)] for name, p in problem.params.items()}
            convex = _convex(problem, recording)
            chained = _why(lambda: chain(recording, problem.params))
        return cls(
            problem,
            hessian(problem),
            ggn(problem),
            recording,
            found,
            convex,
            _why(lambda: empirical_fisher(problem)),
            chained,
        )

    @property
    def outputs_per_sample(self) -> int:
        return max(1, self.recording.outputs.numel() // self.recording.samples)


def _why(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except CurvscopeError as error:
        return str(error)
    return None


def _convex(problem: Problem, recording: Recording) -> bool | None:
    if problem.loss.likelihood is not None:
        return True
    outputs = recording.outputs
    if not recording.separable_outputs or outputs[0].numel() > _OUTPUTS:
        return None
    seeds = root_cotangents(problem.loss, outputs, recording.targets, recording.samples)
    return not any(sign is not None and bool((sign < 0).any()) for _, sign in seeds)


Refusal = Callable[[Look], str | None]
Cover = Callable[[Look, str], tuple[str, str]]


@dataclass(frozen=True)
class Method:
    """``refusal(look)``: why it is not defined for the problem at all, or ``None``.

    ``cover(look, block)``: the route (empty if the block is not covered) and the reason why it is
    not covered, or why only by the slowest route.
    """

    refusal: Refusal
    cover: Cover


def _always(look: Look) -> str | None:
    return None


def _likelihood(look: Look) -> str | None:
    loss = look.problem.loss
    return loss.no_likelihood("Its Fisher") if loss.likelihood is None else None


def _no_samples(look: Look) -> str | None:
    return look.samples


def _not_convex(look: Look) -> str | None:
    if look.convex is False:
        return f"{look.problem.loss.name} is not convex in the outputs; use cs.ggn."
    return None


def _exact(name: str) -> Cover:
    def cover(look: Look, block: str) -> tuple[str, str]:
        op: WholeOperator = getattr(look, name)
        route = op.route_of(block)
        reasons = op.plans[block].reasons
        slow = reasons.get("gram", reasons.get("rows", "")) if route == "autograd" else ""
        return route, slow

    return cover


def _kronecker(look: Look, block: str) -> tuple[str, str]:
    reason = kronecker_reason(look.ggn.plans[block], look.recording)
    return ("Kronecker", "") if reason is None else ("", reason)


def _adafisher(look: Look, block: str) -> tuple[str, str]:
    plan = look.ggn.plans[block]
    calls = [look.recording.calls[k] for k in plan.calls]
    reason = adafisher_reason(plan, calls)
    if reason is None and any(look.recording.axes[k] is None for k in plan.calls):
        reason = plan.reasons.get("gram", "samples influence each other")
    return ("diagonal Kronecker", "") if reason is None else ("", reason)


def _diagonal_kronecker(look: Look, block: str) -> tuple[str, str]:
    route, reason = _kronecker(look, block)
    return ("diagonal Kronecker" if route else ""), reason


def _fixed(route: str) -> Cover:
    return lambda look, block: (route, "")


def _backpack(extension: str) -> Method:
    def refusal(look: Look) -> str | None:
        # BackPACK keeps a vector of all parameters for every output of three samples
        size = look.problem.layout.numel * look.problem.dtype.itemsize
        needed = 3 * look.outputs_per_sample * size
        if adapter.table.spec_of(extension).curved and needed > _TRIAL_BYTES:
            return (
                f"Not tried, because BackPACK may need {format_bytes(needed)} for three samples; "
                "see cs.backpack.supported(problem, ...)."
            )
        supported, reason = adapter.supported(look.problem, extension)
        return None if supported else reason

    return Method(refusal, _fixed("BackPACK"))


#: every method by name, in the order of the columns
METHODS: dict[str, Method] = {
    "Hessian": Method(_always, _exact("hessian")),
    "GGN": Method(_always, _exact("ggn")),
    "Fisher": Method(_likelihood, _exact("ggn")),
    "empirical Fisher": Method(_no_samples, _exact("ggn")),
    "K-FAC": Method(_likelihood, _kronecker),
    "EKFAC": Method(_likelihood, _kronecker),
    "KFLR": Method(_not_convex, _kronecker),
    "KFRA": Method(lambda look: _not_convex(look) or look.chained, _kronecker),
    "FOOF": Method(_always, _kronecker),
    "diagonal K-FAC": Method(_no_samples, _diagonal_kronecker),
    "AdaFisher factors": Method(_no_samples, _adafisher),
    "Hutchinson diagonal": Method(_always, _fixed("Hutchinson")),
    **{
        f"BackPACK {name}": _backpack(name)
        for name in (
            "DiagGGNExact",
            "DiagHessian",
            "SqrtGGNExact",
            "KFAC",
            "KFLR",
            "KFRA",
            "BatchGrad",
        )
    },
}


def own_methods() -> dict[str, Method]:
    """Approximations that the user registered: made on the small problem, and asked."""
    return {name: _own(found) for name, found in REGISTERED.items()}


def _own(found: Registered) -> Method:
    made: list[Operator] = []

    def refusal(look: Look) -> str | None:
        return _why(lambda: made.append(found.make(look.problem)))

    def cover(look: Look, block: str) -> tuple[str, str]:
        reasons = made[0].info.settings.get("uncovered", {})
        missing = block in made[0].uncovered
        return ("", str(reasons.get(block, "not defined"))) if missing else ("your own", "")

    return Method(refusal, cover)


__all__ = ["METHODS", "Look", "Method", "own_methods"]
