"""Gradient and Hessian against finite differences and against plain double backward."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ...curvature.exact import hessian
from ...curvature.products import EMPIRICAL
from ...curvature.whole import WholeOperator
from .. import truth
from ..result import listing, number
from .base import CURVSCOPE, FAILED, MATRICES, PASSED, PROBLEM, Outcome, judged, register, skipped
from .case import Case, gradient_at, relative, value_at
from .differences import Difference, derivative, unit_scale

_SECONDS = 5.0  # what one check may take beyond what cannot be avoided
_SHARED = 20.0  # the same of passes that serve all blocks at once
_BACKWARD = (
    "Look at custom torch.autograd.Functions, at .detach() and .data in the forward pass, and at "
    "operations without a derivative (argmax, round, integer indexing)."
)
KINK = (
    "the objective has a kink exactly at these parameters (one-sided derivatives differ; a ReLU or "
    "max at a tie, often a zero bias on a constant region), so there is no derivative to compare"
)


@register("gradient", about=PROBLEM, decides=("gradient",), underlies=MATRICES)
def gradient(case: Case) -> Outcome:
    """Autograd's gradient against central differences along random directions."""
    problem, parts = case.few, {"all parameters": case.direction(1), "again": case.direction(2)}
    found = {name: _slope(case, v) for name, v in parts.items()}
    wrong = any(s.status == FAILED for s in found.values())
    affordable = 30 * len(problem.blocks) * case.gradient_seconds < _SECONDS
    if len(problem.blocks) > 1 and (wrong or affordable):
        for salt, (name, members) in enumerate(list(problem.blocks.items())[:64]):
            index = problem.layout.index(members).to(problem.device)
            v = torch.zeros_like(case.direction(1))
            v[index] = case.direction(10 + salt, len(index))
            found[name] = _slope(case, v, index)
    details = {name: s.value for name, s in found.items()}
    decided = {n: s for n, s in found.items() if s.status in (PASSED, FAILED)}
    if not decided:
        return skipped(f"The gradient could not be checked: {next(iter(found.values())).sentence}.")
    failed = [name for name, s in decided.items() if s.status == FAILED]
    name = max(failed or decided, key=lambda n: decided[n].value)
    worst = decided[name]
    if not failed:
        left = ""
        if len(decided) < len(found):
            other = next(s.sentence for n, s in found.items() if n not in decided)
            left = f"; in {len(found) - len(decided)} more {other}"
        sentence = (
            f"The gradient agrees with finite differences along {len(decided)} random directions "
            f"up to {number(worst.value, 2)}{left}."
        )
        return Outcome(PASSED, sentence, worst.value, worst.tolerance, details=details)
    blocks = [n for n in failed if n in problem.blocks]
    where = f" It is wrong in {listing(blocks)}." if blocks else ""
    right = [n for n in problem.blocks if n in decided and n not in failed]
    if blocks and right:
        where += (
            f" It is right in {listing(right)}, so the fault lies in or after {blocks[-1]}."
            if list(problem.blocks).index(right[-1]) > list(problem.blocks).index(blocks[-1])
            else f" It is right in {listing(right)}."
        )
    sentence = (
        f"The gradient differs from finite differences by {number(worst.value, 2)} (relative)."
        f"{where}"
    )
    return Outcome(FAILED, sentence, worst.value, worst.tolerance, _BACKWARD, details)


def _slope(case: Case, v: Tensor, index: Tensor | None = None) -> Outcome:
    """One directional derivative of the objective."""
    problem, g = case.few, case.gradient
    index = torch.arange(len(v), device=v.device) if index is None else index
    scale = unit_scale(_flat(case)[index])
    found = derivative(lambda h: value_at(problem, h * scale * v), eps=case.eps)
    expected = scale * (g @ v)
    typical = scale * float(g[index].norm()) / math.sqrt(len(index))
    floor = max(1e-6 * scale * float(g.norm()), case.eps**0.75 * abs(problem.objective()))
    return _compare(case, found, expected.reshape(1), max(typical, floor), 1e-6)


def _compare(
    case: Case, found: Difference, expected: Tensor, floor: float, tolerance: float
) -> Outcome:
    """Judge against finite differences, allowing for their own error."""
    scale = max(float(expected.norm()), floor)
    value = float((found.value - expected).norm()) / scale
    if case.double.dtype != torch.float64:
        tolerance = case.eps**0.4
    own = 20 * found.error / scale
    outcome = judged(value, tolerance + own, "")
    if outcome.status == FAILED and found.kink:
        return skipped(KINK)
    if own > 1e-2 and value < 10 * own:
        return skipped(f"finite differences are too noisy here (their own error is {own:.1g})")
    return outcome


@register("Hessian by finite differences", about=PROBLEM, decides=("Hessian",))
def hessian_differences(case: Case) -> Outcome:
    """Hessian products against central differences of the gradient."""
    problem, op = case.few, hessian(case.few)
    scale = unit_scale(_flat(case))
    results = []
    for salt in (1, 2):
        v = case.direction(salt)

        def gradient_along(h: float, v: Tensor = v) -> Tensor:
            return gradient_at(problem, h * scale * v)

        found = derivative(gradient_along, eps=case.eps)
        floor = case.eps**0.6 * float(case.gradient.norm())
        results.append(_compare(case, found, scale * (op @ v), floor, 1e-5))
    decided = [r for r in results if r.status in (PASSED, FAILED)]
    if not decided:
        return skipped(
            "Hessian products could not be compared with finite differences: "
            f"{results[0].sentence}."
        )
    worst = max(decided, key=lambda r: r.value)
    wrong = any(r.status == FAILED for r in decided)
    verb = "differ from" if wrong else "agree with"
    sentence = (
        f"Hessian products {verb} finite differences of the gradient by {number(worst.value, 2)} "
        "(relative)."
        if wrong
        else f"Hessian products agree with finite differences of the gradient up to "
        f"{number(worst.value, 2)}."
    )
    advice = f"The gradient's own derivative is wrong. {_BACKWARD}" if wrong else ""
    return replace(worst, status=FAILED if wrong else PASSED, sentence=sentence, advice=advice)


@register("Hessian by double backward", about=CURVSCOPE, decides=("Hessian",))
def hessian_products(case: Case) -> Outcome:
    """Hessian products against plain double backward on the live parameters."""
    rows, _ = case.block_columns()
    op = hessian(case.few)
    units = unit_columns(rows, op.shape[0], op)
    found, true = op @ units, hessian_truth(case)
    value = relative(found, true, _floor(case))
    return judged(
        value,
        case.exact,
        f"Hessian products in {len(rows)} random coordinates agree with double backward up to "
        f"{number(value, 2)}."
        if value <= case.exact
        else f"Hessian products differ from double backward by {number(value, 2)} (relative).",
        advice="Report this with the model; meanwhile use curvscope.analysis.truth.hessian.",
    )


@register("Hessian blocks", about=CURVSCOPE, decides=("Hessian",))
def hessian_blocks(case: Case) -> Outcome:
    """Every block's route (piecewise linear, rows, autograd) against double-backward columns."""
    return compare_blocks(case, hessian(case.few), hessian_truth(case), "double backward")


def hessian_truth(case: Case) -> Tensor:
    """Columns of the Hessian of ``few`` by plain double backward, kept."""
    rows, _ = case.block_columns()
    dtype = case.few.dtype
    return case.keep("Hessian", lambda: truth.hessian_columns(case.few, rows, dtype=dtype))


def compare_blocks(case: Case, op: WholeOperator, true: Tensor, against: str) -> Outcome:
    """Random columns of every block against those columns of the whole matrix.

    ``true`` ``[P, k]`` holds the columns that :meth:`Case.block_columns` names, block after block.
    """
    _, local = case.block_columns()
    details, routes, left_out, start = {}, {}, [], 0
    # a block of zeros (an attention key's bias) has nothing but rounding to compare
    floor = 1e-6 * float(true.norm(dim=0).max()) if true.numel() else 0.0
    for name, columns in local.items():
        mine = true[:, start : start + len(columns)]
        start += len(columns)
        routes[name] = op.route_of(name)
        seconds = _price(case, op, name)
        if seconds > (_SECONDS if routes[name] == "rows" else _SHARED):
            price = f"about {seconds:.0f} s" if math.isfinite(seconds) else "too large"
            left_out.append(f"{name} ({price} by {routes[name]!r})")
            continue
        block = op.blocks[name]
        routes[name] = block.info.route
        index = case.few.layout.index(case.few.blocks[name])
        found = block @ unit_columns(columns, block.shape[0], block)
        details[name] = relative(found, mine[index], floor)
    what = op.info.what
    if not details:
        return skipped(
            f"No block of the {what} was cheap enough: {listing(left_out)}.",
            "Pass a smaller samples=.",
        )
    worst = max(details, key=lambda n: details[n])
    wrong = {n: v for n, v in details.items() if not v <= case.exact}
    used = sorted({routes[n] for n in details})
    left = f" Left out for their price: {listing(left_out)}." if left_out else ""
    if wrong:
        named = [f"{n} (route {routes[n]!r}: {number(v, 2)})" for n, v in wrong.items()]
        sentence = f"{what} blocks differ from {against}: {listing(named)}.{left}"
    else:
        sentence = (
            f"{len(details)} of {len(case.few.blocks)} {what} blocks (routes {', '.join(used)}) "
            f"agree with {against} in random columns up to {number(details[worst], 2)}.{left}"
        )
    advice = "Report this with the model; meanwhile force route='autograd'."
    return judged(details[worst], case.exact, sentence, advice=advice, details=details)


def unit_columns(rows: list[int], size: int, like: object) -> Tensor:
    """Unit vectors ``[size, k]`` in the dtype and on the device of an operator."""
    units = torch.zeros(size, len(rows), dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
    units[rows, torch.arange(len(rows))] = 1.0
    return units


def _price(case: Case, op: WholeOperator, name: str) -> float:
    """Seconds that computing a block will take, roughly."""
    plan, route = op.plans[name], op.route_of(name)
    if route == "rows":
        if plan.positions > 1 and plan.size > 4096:  # would be formed densely
            return math.inf
        return 3 * plan.positions * plan.outputs * case.gradient_seconds
    if route == "autograd" or op.kind.matrix == EMPIRICAL:
        return 0.0  # a product per column, or one backward pass
    return case.outputs_per_sample * case.gradient_seconds


def _floor(case: Case) -> float:
    """Below this norm a column is nothing but rounding."""
    return case.eps * float(case.gradient.norm())


def _flat(case: Case) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in case.few.params.values()])
