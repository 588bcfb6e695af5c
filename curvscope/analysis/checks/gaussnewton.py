"""GGN, Fisher and Kronecker factors against enumerated labels and against their definitions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...curvature.exact import empirical_fisher, fisher, ggn
from ...curvature.kronecker import kfac
from ...operators import KroneckerOperator
from ...problem import Problem
from .. import truth
from ..batches import cut, merge
from ..labels import label_distributions
from ..result import listing, number
from .base import (
    CURVSCOPE,
    FAILED,
    Outcome,
    judged,
    not_applicable,
    register,
    skipped,
)
from .case import Case, relative, shifted
from .derivatives import KINK, compare_blocks, unit_columns
from .differences import derivative, unit_scale

_PASSES = 1500  # backward passes that one check may take for labels or outputs
_SECONDS = 20.0  # how long they may take
_REPORT = (
    "If the gradient check fails as well, mend that first; otherwise report this with the model "
    "and the loss, and do not use this matrix meanwhile."
)


@register(
    "GGN by definition",
    about=CURVSCOPE,
    decides=("GGN",),
    underlies=("Fisher", "sampled Fisher"),
)
def ggn_forms(case: Case) -> Outcome:
    """``u^T G v`` against ``(J u)^T (d^2 l / dz^2) (J v)`` with ``J u`` by finite differences."""
    problem, op = case.few, ggn(case.few)
    forms, error, kink = _forms(
        case, lambda x, y, z, du, dv: du.reshape(-1) @ _curved(problem, z, y, dv)
    )
    vectors = _directions(case)
    found = (vectors.T @ (op @ vectors)).cpu().double()
    scale = unit_scale(_flat(problem)) ** 2
    value = relative(scale * found, forms, case.eps)
    tolerance = max(1e-6 if case.double.dtype == torch.float64 else case.eps**0.4, 20 * error)
    if error > 1e-2 or (kink and value > tolerance):
        because = KINK if kink else f"they are too noisy (their own error is {number(error, 2)})"
        return skipped(
            "Products with the GGN could not be compared with finite differences of the outputs: "
            f"{because}."
        )
    return judged(
        value,
        tolerance,
        _agreement(value, tolerance, "GGN products", "finite differences of the outputs"),
        advice=_REPORT,
    )


@register("GGN blocks", about=CURVSCOPE, decides=("GGN",))
def ggn_blocks(case: Case) -> Outcome:
    """Every block against ``J^T (d^2 l / dz^2) J`` with the Jacobian row by row."""
    rows, _ = case.block_columns()
    op = ggn(case.few)
    passes = case.outputs_per_sample * case.few.n_samples
    size = passes * (passes + op.shape[0])
    if _affordable(case, passes) and size < 2e8:
        true, against = truth.ggn_columns(case.few, rows, dtype=case.few.dtype), "the definition"
    else:
        true, against = op @ unit_columns(rows, op.shape[0], op), "matrix-free products"
    return compare_blocks(case, op, true, against)


@register("Fisher by enumerating labels", about=CURVSCOPE, decides=("Fisher",))
def fisher_labels(case: Case) -> Outcome:
    """The Fisher against gradients of ``-log p(y)`` for every label, weighted by ``p(y)``."""
    problem = case.few
    if problem.loss.likelihood is None:
        return not_applicable(problem.loss.no_likelihood("Its Fisher"))
    how = "the closed form" if problem.loss.likelihood.startswith("normal") else "every label"
    op = fisher(problem)
    labels = 2 if problem.loss.likelihood == "Bernoulli" else 1
    passes = labels * case.outputs_per_sample * problem.n_samples
    if _affordable(case, passes):
        rows, _ = case.block_columns()
        true = truth.fisher_columns(problem, rows, dtype=problem.dtype)
        found = op @ unit_columns(rows, op.shape[0], op)
        value, tolerance = relative(found, true), case.exact
        how += f" ({passes} gradients)"
    else:
        forms, error, kink = _forms(case, _label_form(problem))
        vectors = _directions(case)
        found = (vectors.T @ (op @ vectors)).cpu().double()
        value = relative(unit_scale(_flat(problem)) ** 2 * found, forms, case.eps)
        tolerance = max(1e-6 if case.double.dtype == torch.float64 else case.eps**0.4, 20 * error)
        how += " (finite differences of log p along random directions)"
        if error > 1e-2 or (kink and value > tolerance):
            return skipped(f"The Fisher could not be compared with finite differences: {KINK}.")
    return judged(value, tolerance, _agreement(value, tolerance, "The Fisher", how), advice=_REPORT)


@register("sampled Fisher", about=CURVSCOPE, decides=("sampled Fisher",))
def fisher_samples(case: Case) -> Outcome:
    """The mean over drawn labels against the exact Fisher, in standard errors."""
    problem = case.few
    if problem.loss.likelihood is None:
        return not_applicable(problem.loss.no_likelihood("Its Fisher"))
    if problem.batchnorm == "batch":
        return not_applicable(_BATCH)
    v, seeds = case.direction(1), 16
    exact = float(v @ (fisher(problem) @ v))
    drawn = torch.tensor(
        [
            float(v @ (fisher(problem, samples=4, seed=1000 * case.seed + s) @ v))
            for s in range(seeds)
        ],
        dtype=torch.float64,
    )
    spread = float(drawn.std())
    if spread <= 1e-12 * abs(exact):
        return skipped("Drawn labels hardly vary here, so their mean says nothing.")
    # of a confident model the rare labels carry the Fisher, and draws without them vary too little
    spread = max(spread, _label_spread(case) / math.sqrt(4)) / math.sqrt(seeds)
    if 6.0 * spread > abs(exact):
        return skipped(
            f"Labels that carry the Fisher are so rare here that {4 * seeds} draws of each decide "
            "nothing (the model is sure of its answers)."
        )
    score = abs(float(drawn.mean()) - exact) / spread
    sentence = (
        f"The mean of {4 * seeds} sampled Fisher matrices lies {number(score, 2)} standard errors "
        "from the exact one along a random direction."
    )
    return judged(score, 6.0, sentence, advice=_REPORT)


@register("empirical Fisher by sample", about=CURVSCOPE, decides=("empirical Fisher",))
def empirical(case: Case) -> Outcome:
    """The empirical Fisher against gradients of single samples, each passed forward alone."""
    problem = case.few
    if problem.batchnorm == "batch":
        return not_applicable(_BATCH)
    rows, _ = case.block_columns()
    op = empirical_fisher(problem)
    gradients = truth.sample_gradients(problem, dtype=problem.dtype)
    true = problem.scale * (gradients.T @ gradients[:, rows])
    value = relative(op @ unit_columns(rows, op.shape[0], op), true)
    outcome = judged(
        value,
        case.exact,
        _agreement(value, case.exact, "The empirical Fisher", "gradients of single samples"),
        advice="If samples influence each other (batch statistics, attention across the batch), "
        "single-sample gradients are not defined. Otherwise report this with the model.",
    )
    if outcome.status == FAILED:
        return outcome
    return compare_blocks(case, op, true, "gradients of single samples")


@register("K-FAC on one sample", about=CURVSCOPE, decides=("K-FAC",))
def one_sample(case: Case) -> Outcome:
    """For one sample and a layer that acts on it once, K-FAC is exact, scale included."""
    problem = case.few
    if problem.loss.likelihood is None:
        return not_applicable(problem.loss.no_likelihood("Its Fisher"))
    if problem.batchnorm == "batch":
        return not_applicable(_BATCH)
    one = _with_terms(problem, case.seed)
    if one is None:
        return skipped("No single sample has a term that counts.")
    exact = ggn(one)
    once = [name for name, plan in exact.plans.items() if plan.positions == 1]
    if once and case.outputs_per_sample * case.gradient_seconds > _SECONDS:
        return skipped(f"It would take {case.outputs_per_sample} backward passes.")
    details = {}
    blocks = kfac(one).blocks if once else {}
    for salt, name in enumerate(n for n in once if n in blocks):
        block = blocks[name]
        if not isinstance(block, KroneckerOperator):
            continue
        columns = case.draw(block.shape[0], case.columns, 400 + salt)
        units = unit_columns(columns, block.shape[0], block)
        details[name] = relative(block @ units, exact.blocks[name] @ units, case.eps**2)
    if not details:
        return not_applicable(
            "No layer with Kronecker factors acts exactly once per sample, so that K-FAC is an "
            "approximation even for one sample; cs.compare measures it."
        )
    value = max(details.values())
    wrong = [n for n, v in details.items() if not v <= case.exact]
    what = f"K-FAC of {listing(wrong or list(details))} on one sample"
    sentence = _agreement(value, case.exact, what, "the exact block, which it must equal,")
    return judged(value, case.exact, sentence, advice=_REPORT, details=details)


def _label_spread(case: Case) -> float:
    """At most this is the standard deviation, over one drawn label per term, of ``v^T F v``."""
    problem = case.few
    if problem.loss.likelihood not in ("softmax", "Bernoulli"):
        return 0.0  # the normal has no rare labels

    def form(_: object, targets: object, z: Tensor, du: Tensor, dv: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        total = torch.zeros((), dtype=z.dtype)
        with torch.enable_grad():
            for logs, weights in label_distributions(problem, z, targets):
                slope = _directional(logs, z, du)
                total = total + (weights**2 / logs.exp().detach() * slope**4).nansum().cpu()
        return total

    forms, _, _ = _forms(case, form)
    return math.sqrt(problem.scale * float(forms[0, 0])) / unit_scale(_flat(problem)) ** 2


# -- pieces -----------------------------------------------------------------------------------

_BATCH = 'under batchnorm="batch" there are no gradients of single samples'


def _affordable(case: Case, passes: int) -> bool:
    return passes <= _PASSES and passes * case.gradient_seconds <= _SECONDS


def _agreement(value: float, tolerance: float, what: str, against: str) -> str:
    if value <= tolerance:
        return f"{what}: agreement with {against} up to {number(value, 2)}."
    return f"{what}: off from {against} by {number(value, 2)} (relative)."


def _with_terms(problem: Problem, seed: int) -> Problem | None:
    """One sample with at least one term of positive weight."""
    batches = truth.materialised(problem)
    for batch in batches if (merged := merge(batches)) is None else [merged]:
        total = problem.count_samples(*batch)
        for single in cut(batch, [1] * total):
            with problem.session():
                if problem.loss.count(problem.outputs(single[0]), single[1]) > 0:
                    return problem.with_data([single])
    return None


def _flat(problem: Problem) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in problem.params.values()])


def _directions(case: Case) -> Tensor:
    return torch.stack([case.direction(1), case.direction(2)], 1)


def _forms(
    case: Case, form: Callable[[object, object, Tensor, Tensor, Tensor], Tensor]
) -> tuple[Tensor, float, bool]:
    """``form`` of every pair of two directions, summed over ``few``; its relative error; kinks.

    ``form(inputs, targets, outputs, du, dv)`` gets the outputs and their derivatives along the two
    directions (times the length scale of the parameters).
    """
    problem = case.few
    scale = unit_scale(_flat(problem))
    total, worst, kink = torch.zeros(2, 2, dtype=torch.float64), 0.0, False
    for inputs, targets in truth.materialised(problem):

        def along(h: float, v: Tensor) -> Tensor:
            with problem.session(shifted(problem, h * scale * v)):
                return problem.outputs(inputs).detach()  # noqa: B023

        outputs = along(0.0, case.direction(1))
        slopes = []
        for v in (case.direction(1), case.direction(2)):
            found = derivative(functools.partial(along, v=v), eps=case.eps)
            slopes.append(found.value)
            kink = kink or found.kink
            worst = max(worst, found.error / max(float(found.value.norm()), 1e-300))
        for i, du in enumerate(slopes):
            for j, dv in enumerate(slopes):
                total[i, j] += float(form(inputs, targets, outputs, du, dv))
    return problem.scale * total, worst, kink


def _curved(problem: Problem, z: Tensor, targets: object, dv: Tensor) -> Tensor:
    """``(d^2 total / dz^2) dv``, flat."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        value = problem.batch_total(z, targets)
        (first,) = torch.autograd.grad(value, z, create_graph=True)
        if not first.requires_grad:
            return torch.zeros_like(z).reshape(-1)
        (second,) = torch.autograd.grad(first, z, dv, allow_unused=True)
    return torch.zeros_like(z).reshape(-1) if second is None else second.reshape(-1)


def _label_form(
    problem: Problem,
) -> Callable[[object, object, Tensor, Tensor, Tensor], Tensor]:
    """``sum_m c_m sum_y p(y) (d_u log p(y)) (d_v log p(y))`` over all labels."""

    def form(_: object, targets: object, z: Tensor, du: Tensor, dv: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        total = torch.zeros((), dtype=z.dtype)
        with torch.enable_grad():
            for logs, weights in label_distributions(problem, z, targets):
                slopes = [_directional(logs, z, d) for d in (du, dv)]
                total = total + (weights * slopes[0] * slopes[1]).sum().cpu()
        return total

    return form


def _directional(logs: Tensor, z: Tensor, direction: Tensor) -> Tensor:
    """The derivative of ``logs(z)`` along ``direction``, by two backward passes."""
    if logs is z:
        return direction
    w = torch.zeros_like(logs, requires_grad=True)
    (back,) = torch.autograd.grad(logs, z, w, create_graph=True)
    (slope,) = torch.autograd.grad(back, w, direction, retain_graph=True)
    return slope
