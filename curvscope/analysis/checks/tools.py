"""Can torch.func be trusted on this model? Always on private copies, which it may damage."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...problem import Problem
from .. import truth
from ..batches import merge
from ..labels import own_loss
from ..result import listing, number
from .base import FAILED, OTHERS, PASSED, Outcome, register
from .case import Case, relative

_REVERSE = (
    "Use reverse mode twice (torch.autograd.grad with create_graph=True), as cs.hessian does, "
    "not forward mode."
)
_NORMS = (nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


class Shim(nn.Module):
    """A private problem as a module whose output is the objective, for ``functional_call``.

    On one batch it is the user's own loss with its own reduction, as the user would write it.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model = problem.model
        self._problem = [problem]  # in a list: it is no submodule
        self._batches = truth.materialised(problem)

    def forward(self) -> Tensor:
        problem = self._problem[0]
        if len(self._batches) == 1:
            inputs, targets = self._batches[0]
            return own_loss(problem.user_loss, problem.outputs(inputs), targets)
        total: Any = 0.0
        for inputs, targets in self._batches:
            total = total + problem.batch_total(problem.outputs(inputs), targets)
        return problem.scale * total

    def parameters_of_problem(self) -> dict[str, Tensor]:
        return {f"model.{n}": p.detach().clone() for n, p in self._problem[0].params.items()}


def private_problem(case: Case) -> Problem:
    """``few`` as one batch on a deep copy of the model."""
    few = case.few
    batches = truth.materialised(few)
    batch = merge(batches)
    return few.with_data(batches if batch is None else [batch], model=copy.deepcopy(few.model))


def functional_product(
    case: Case, gradient: Callable[[Callable[..., Tensor]], Callable[..., Any]]
) -> Tensor:
    """``jvp`` of ``gradient(objective)``: a Hessian product by forward over reverse mode."""
    problem = private_problem(case)
    with problem.session():
        shim = Shim(problem)
        parameters = shim.parameters_of_problem()
        pieces = problem.layout.split(case.direction(6))
        tangents = {f"model.{name}": piece.clone() for name, piece in pieces.items()}

        def objective(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(shim, values, ())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what forward mode is made of
            product = torch.func.jvp(gradient(objective), (parameters,), (tangents,))[1]
        return torch.cat([product[name].detach().reshape(-1) for name in parameters])


def _forward_mode(case: Case, gradient: Any, what: str) -> Outcome:
    true = case.keep(
        "Hessian product",
        lambda: truth.hessian_product(case.few, case.direction(6), dtype=case.few.dtype),
    )
    try:
        found = functional_product(case, gradient)
    except Exception as error:  # torch.func raises whatever the operation at fault raises
        text = str(error).strip().splitlines() or [type(error).__name__]
        sentence = f"{what} raises {type(error).__name__} on this model: {text[0][:150]}"
        return Outcome(FAILED, sentence, advice=_REVERSE)
    value = relative(found, true, case.eps * float(case.gradient.norm()))
    if value <= case.exact:
        return Outcome(
            PASSED,
            f"{what} agrees with double backward up to {number(value, 2)}.",
            value,
            case.exact,
        )
    kinds = sorted({type(m).__name__ for m in case.few.model.modules() if isinstance(m, _NORMS)})
    because = f" for {listing(kinds)}" if kinds else ""
    return Outcome(
        FAILED,
        f"{what} is {_percent(value)} off{because}: forward mode is silently wrong here.",
        value,
        case.exact,
        _REVERSE,
        _by_block(case, found, true),
    )


def _by_block(case: Case, found: Tensor, true: Tensor) -> dict[str, float]:
    details = {}
    for name, members in case.few.blocks.items():
        index = case.few.layout.index(members)
        floor = 1e-6 * float(true.norm())
        details[name] = relative(found.cpu()[index], true.cpu()[index], floor)
    return details


def _percent(value: float) -> str:
    return f"{number(100 * value, 2)} %" if value < 10 else f"a factor {number(value, 2)}"


@register("torch.func.hessian", about=OTHERS, decides=("torch.func.hessian",))
def func_hessian(case: Case) -> Outcome:
    """``jvp`` of ``jacrev``, which ``torch.func.hessian`` is made of, against double backward."""
    return _forward_mode(case, torch.func.jacrev, "torch.func.hessian (jvp of jacrev)")


@register("torch.func.jvp of grad", about=OTHERS, decides=("torch.func.jvp of torch.func.grad",))
def func_jvp(case: Case) -> Outcome:
    """``jvp`` of ``grad``, the usual Hessian-vector product in forward mode."""
    return _forward_mode(case, torch.func.grad, "torch.func.jvp of torch.func.grad")


@register("torch.func.functional_call", about=OTHERS, decides=("torch.func.functional_call",))
def func_call(case: Case) -> Outcome:
    """Whether ``functional_call`` leaves a copy of the model as it was."""
    problem = private_problem(case)
    with problem.session():
        shim = Shim(problem)
        before = _identities(shim)
        try:
            torch.func.functional_call(shim, shim.parameters_of_problem(), ())
        except Exception as error:
            return Outcome(
                FAILED, f"functional_call raises {type(error).__name__}: {error}", advice=_REVERSE
            )
        after = _identities(shim)
    damaged = [name.removeprefix("model.") for name, key in before.items() if after[name] != key]
    if not damaged:
        return Outcome(PASSED, "functional_call leaves the model's parameters in place.")
    return Outcome(
        FAILED,
        f"functional_call damages this model: {listing(damaged)} would no longer be the parameter "
        "that an optimizer holds, and would silently stop training.",
        float(len(damaged)),
        0.0,
        "One module is registered under two names; call functional_call on a deep copy only, or "
        "with tie_weights=False, or differentiate the live parameters with torch.autograd.",
    )


def _identities(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """What sits under each parameter's name, in every place of the module tree."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module._parameters.items():
            found[f"{path}.{name}"] = (id(value), isinstance(value, nn.Parameter))
    return found
