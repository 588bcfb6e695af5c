"""Would BackPACK be right on this model: as anybody would call it, and through curvscope?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature import backpack as adapter
from ...curvature.exact import ggn
from ...curvature.kfra import kfra
from ...curvature.kronecker import kflr
from ...errors import CurvscopeError
from ...operators import BlockDiagonalOperator, KroneckerOperator
from ...problem import Problem
from .. import truth
from ..batches import merge
from ..result import listing, number
from .base import (
    CURVSCOPE,
    FAILED,
    OTHERS,
    PASSED,
    Outcome,
    not_applicable,
    register,
)
from .case import Case, relative
from .tools import private_problem

_LOSSES = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)
_INSTEAD = "Use cs.{}, which is exact here."
_EXACT = {"diag_h": "hessian(problem)", "grad_batch": "empirical_fisher(problem)"}


class Refused(Exception):
    """Plain BackPACK raised, or needs what the problem does not have."""


def plain(case: Case, extension: str, field: str) -> dict[str, Any]:
    """What BackPACK itself leaves on a private copy of the model, without any precaution.

    Batch and loss are given as they are: ``extend(model)``, ``extend(loss)``, one backward pass of
    the loss on all of ``few``. Raises :class:`Refused`.
    """
    try:
        import backpack
        from backpack import extensions
    except ImportError as error:
        raise Refused(f"BackPACK is not installed ({error})") from error
    if not isinstance(case.few.user_loss, _LOSSES):
        raise Refused("BackPACK needs CrossEntropyLoss, MSELoss or BCEWithLogitsLoss as a module")
    problem = private_problem(case)
    batch, standard = _one_batch(problem), torch.get_default_dtype()
    with problem.session(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # some of its rules make tensors of the default dtype
            torch.set_default_dtype(problem.dtype)
            backpack.extend(problem.model)
            loss = backpack.extend(copy.deepcopy(problem.user_loss).to(problem.dtype))
            value = loss(problem.outputs(batch[0]), batch[1])
            with backpack.backpack(getattr(extensions, extension)()):
                value.backward()
        except Exception as error:  # BackPACK raises many kinds
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise Refused(f"BackPACK refuses it: {text[0][:200]}") from error
        finally:
            torch.set_default_dtype(standard)
        found = {name: vars(p).get(field) for name, p in problem.params.items()}
    if all(value is None for value in found.values()):
        raise Refused("BackPACK computes nothing here: it knows no layer of the model")
    return found


def _one_batch(problem: Problem) -> tuple[Any, Any]:
    batches = truth.materialised(problem)
    batch = merge(batches)
    return batches[0] if batch is None else batch


def _exactly(
    case: Case, extension: str, field: str, true: Callable[[], Tensor], rows: list[int]
) -> Outcome:
    """Entries ``rows`` of a flat quantity of plain BackPACK against the truth in them."""
    try:
        found = plain(case, extension, field)
    except Refused as refusal:
        return not_applicable(f"{refusal}.")
    layout = case.few.layout
    missing = [name for name, value in found.items() if value is None]
    theirs = torch.full((layout.numel,), float("nan"), dtype=torch.float64)
    for name, piece in layout.slices().items():
        value = found[name]
        if value is not None:
            value = value.sum(0) if field == "grad_batch" else value
            theirs[piece] = value.detach().reshape(-1).cpu().double()
    where, mine = torch.tensor(rows), true().cpu().double()
    known = ~theirs[where].isnan()
    value = relative(theirs[where][known], mine[known], case.eps * float(case.gradient.norm()))
    advice = _INSTEAD.format(_EXACT.get(field, "ggn(problem)"))
    if value <= case.exact:
        if missing:
            sentence = (
                f"BackPACK's {extension} silently gives nothing for {listing(missing)}; the rest "
                f"is right up to {number(value, 2)}."
            )
            return Outcome(FAILED, sentence, value, case.exact, advice)
        sentence = f"BackPACK's {extension} is right on this problem, up to {number(value, 2)}."
        return Outcome(PASSED, sentence, value, case.exact)
    details = {}
    for name, piece in layout.slices().items():
        inside = (where >= piece.start) & (where < piece.stop) & known
        if bool(inside.any()):
            floor = 1e-6 * float(mine.norm())
            details[name] = relative(theirs[where][inside], mine[inside], floor)
    wrong = [f"{n} ({number(100 * v, 2)} %)" for n, v in details.items() if not v <= case.exact]
    sentence = f"BackPACK's {extension} is silently wrong by {number(100 * value, 2)} %: "
    left_out = f" It gives nothing for {listing(missing)}." if missing else ""
    sentence += f"{listing(wrong)}.{_suspicion(case)}{left_out}"
    return Outcome(FAILED, sentence, value, case.exact, advice, details)


def _suspicion(case: Case) -> str:
    """Known reasons for BackPACK's silent errors that the problem has."""
    model, found = case.few.model, []
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    if len(names) > len(list(model.parameters())):
        found.append("tied weights, which it overwrites instead of adding up")
    index = getattr(case.few.user_loss, "ignore_index", None)
    if index is not None:
        with case.few.session():
            if any(bool((t == index).any()) for _, t in case.few.batches()):
                found.append("targets equal to ignore_index, which it divides by all the same")
    return f" The problem has {listing(found)}." if found else ""


@register("plain BackPACK: DiagGGNExact", about=OTHERS, decides=("plain BackPACK DiagGGN",))
def plain_ggn(case: Case) -> Outcome:
    """Plain BackPACK's GGN diagonal against the exact one."""
    rows = _entries(case)
    return _exactly(
        case, "DiagGGNExact", "diag_ggn_exact", lambda: ggn(case.few).diagonal()[rows], rows
    )


@register("plain BackPACK: DiagHessian", about=OTHERS, decides=("plain BackPACK DiagHessian",))
def plain_hessian(case: Case) -> Outcome:
    """Plain BackPACK's Hessian diagonal against double backward, in a few random entries."""
    rows = _entries(case)
    return _exactly(case, "DiagHessian", "diag_h", lambda: _hessian_entries(case), rows)


@register("plain BackPACK: BatchGrad", about=OTHERS, decides=("plain BackPACK BatchGrad",))
def plain_gradients(case: Case) -> Outcome:
    """The sum of plain BackPACK's sample gradients against the gradient."""
    rows = _entries(case)
    return _exactly(case, "BatchGrad", "grad_batch", lambda: case.gradient[rows], rows)


def _entries(case: Case) -> list[int]:
    """Random rows of every parameter, four of each (fewer where there are many parameters)."""
    layout, rows = case.few.layout, []
    each = max(1, min(4, 200 // max(len(layout), 1)))
    for salt, (spec, piece) in enumerate(zip(layout, layout.slices().values(), strict=True)):
        rows += [piece.start + i for i in case.draw(spec.numel, each, 700 + salt)]
    return rows


def _hessian_entries(case: Case) -> Tensor:
    """The Hessian's diagonal in :func:`_entries`, by plain double backward."""
    rows = _entries(case)

    def compute() -> Tensor:
        columns = truth.hessian_columns(case.few, rows, dtype=case.few.dtype)
        return columns[rows, torch.arange(len(rows))]

    return case.keep("Hessian diagonal", compute)


def _factors(
    case: Case, extension: str, field: str, make: Callable[[Problem], BlockDiagonalOperator]
) -> Outcome:
    """Kronecker factors of weights against curvscope's, which are those of the objective."""
    try:
        found = plain(case, extension, field)
    except Refused as refusal:
        return not_applicable(f"{refusal}.")
    problem = case.few.with_data([_one_batch(case.few)], blocks="parameter")
    try:
        mine = make(problem)
    except CurvscopeError as error:
        return not_applicable(f"There is nothing to compare with: {error}")
    details, ratios, kinds = {}, {}, {}
    for name, block in mine.blocks.items():
        factors = found.get(name)
        if factors is None or len(factors) != 2 or not isinstance(block, KroneckerOperator):
            continue
        theirs = KroneckerOperator(
            factors[0].detach().unsqueeze(0), factors[1].detach().unsqueeze(0), block.view
        )
        norm = block.frobenius_norm()
        gap = theirs.inner(theirs) - 2 * theirs.inner(block) + norm**2
        details[name] = max(gap, 0.0) ** 0.5 / norm if norm else 0.0
        ratios[name] = theirs.trace() / block.trace() if block.trace() else float("nan")
        kinds[name] = "conv" if len(problem.params[name].shape) > 2 else "Linear"
    if not details:
        return not_applicable(f"BackPACK's {extension} gives no Kronecker factors here.")
    # a difference of squares of nearly equal numbers loses half of the digits
    tolerance = max(case.eps**0.5 * 10, case.exact)
    value = max(details.values())
    if value <= tolerance:
        named = listing(list(details))
        sentence = f"BackPACK's {extension} factors of {named} are those of the objective."
        return Outcome(PASSED, sentence, value, tolerance, details=details)
    wrong = [n for n, v in details.items() if not v <= tolerance]
    shown = [f"{n} ({kinds[n]}: trace off by a factor {number(ratios[n])})" for n in wrong]
    return Outcome(
        FAILED,
        f"BackPACK's {extension} is wrong in {listing(shown)}.{_suspicion(case)}",
        value,
        tolerance,
        _INSTEAD.format(f"{extension.lower()}(problem)"),
        details,
    )


@register(
    "plain BackPACK: KFLR",
    about=OTHERS,
    decides=("plain BackPACK KFLR", "plain BackPACK KFAC"),
)
def plain_kflr(case: Case) -> Outcome:
    """Plain BackPACK's KFLR factors (its KFAC is the same with sampled labels)."""
    return _factors(case, "KFLR", "kflr", kflr)


@register("plain BackPACK: KFRA", about=OTHERS, decides=("plain BackPACK KFRA",))
def plain_kfra(case: Case) -> Outcome:
    """Plain BackPACK's KFRA factors."""
    return _factors(case, "KFRA", "kfra", kfra)


@register("cs.backpack", about=CURVSCOPE, decides=("cs.backpack",))
def adapted(case: Case) -> Outcome:
    """What curvscope's adapter accepts of this problem, against autograd."""
    problem, details, refused = case.few, {}, {}
    rows = _entries(case)
    tests: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "DiagGGNExact": lambda: (
            adapter.diag_ggn(problem).diagonal(),
            ggn(problem, route="autograd").diagonal()
            if problem.layout.numel <= 400
            else ggn(problem).diagonal(),
        ),
        "DiagHessian": lambda: (
            adapter.diag_hessian(problem).diagonal()[rows],
            _hessian_entries(case),
        ),
        "SqrtGGNExact": lambda: _square_root(case),
        "BatchGrad": lambda: (adapter.batch_grad(problem).total(), case.gradient),
    }
    for name, test in tests.items():
        supported, reason = adapter.supported(problem, name)
        if not supported:
            refused[name] = reason
            continue
        try:
            found, true = test()
        except CurvscopeError as error:
            refused[name] = str(error)
            continue
        details[name] = relative(found, true, case.eps * float(case.gradient.norm()))
    if not details:
        reason = next(iter(refused.values()))
        return not_applicable(f"The adapter refuses this problem: {reason}")
    value = max(details.values())
    wrong = [n for n, v in details.items() if not v <= case.exact]
    rest = f" It refuses {listing(list(refused))}." if refused else ""
    if wrong:
        sentence = f"cs.backpack differs from autograd in {listing(wrong)} by {number(value, 2)}."
        advice = "Report this with the model; use cs.ggn and cs.hessian meanwhile."
        return Outcome(FAILED, sentence + rest, value, case.exact, advice, details)
    sentence = (
        f"cs.backpack ({listing(list(details))}) agrees with autograd up to {number(value, 2)}."
    )
    return Outcome(PASSED, sentence + rest, value, case.exact, details=details)


def _square_root(case: Case) -> tuple[Tensor, Tensor]:
    """A product of the block-diagonal GGN made from BackPACK's square root, and the exact one."""
    v = case.direction(8)
    op, exact = adapter.sqrt_ggn(case.few), ggn(case.few)
    true = torch.zeros_like(v)
    for name, members in case.few.blocks.items():
        index = case.few.layout.index(members).to(v.device)
        true[index] = exact.blocks[name] @ v[index]
    return op @ v, true
