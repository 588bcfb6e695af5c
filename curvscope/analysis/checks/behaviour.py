"""The user's model, loss and data: do they behave as curvature needs it?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...curvature.exact import ggn, hessian
from ...errors import counted
from ...problem import Problem, flat_gradient
from .. import truth
from ..batches import cut
from ..labels import own_loss
from ..result import listing, number
from .base import (
    CURVSCOPE,
    FAILED,
    MATRICES,
    OTHERS,
    PASSED,
    PROBLEM,
    Outcome,
    judged,
    not_applicable,
    register,
    skipped,
)
from .case import Case, relative
from .marks import Marks, changes, mark_module

_ALL = ("gradient", *MATRICES)
_SECONDS = 5.0


@register("objective", about=PROBLEM, underlies=_ALL)
def objective(case: Case) -> Outcome:
    """The user's own ``loss(model(x), y)`` on one merged batch against ``problem.objective()``."""
    problem, batch = case.double, case.merged
    if batch is None:
        return not_applicable(
            "The batches have different shapes and cannot be merged into one, on which the loss "
            "itself would take the mean."
        )
    with problem.session():
        outputs = problem.outputs(batch[0])
        total = own_loss(problem.user_loss, outputs, batch[1])
        slope = flat_gradient(total, list(problem.params.values()))
    value = total.detach()
    mine = problem.objective()
    details = {
        "value": relative(_scalar(mine), value, case.eps),
        "gradient": relative(problem.gradient(), slope, case.eps * max(1.0, abs(mine))),
    }
    worst = max(details.values())
    sentence = (
        f"The loss itself on all {problem.n_samples} samples as one batch gives "
        f"{number(float(value), 8)}, the objective over "
        f"{counted(problem.check().batches, 'batch')} {number(mine, 8)}"
    )
    sentence += (
        "; value and gradient agree."
        if worst <= case.exact
        else f": value off by {number(details['value'], 2)}, gradient by "
        f"{number(details['gradient'], 2)} (relative)."
    )
    advice = (
        "Either the loss's mean divides by something else than reduction= says (give "
        "reduction='sum' or a callable that counts the terms), or samples influence each other."
    )
    return judged(worst, case.exact, sentence, advice=advice, details=details)


@register("determinism", about=PROBLEM, underlies=_ALL)
def determinism(case: Case) -> Outcome:
    """Objective and gradient twice, under different random seeds."""
    problem = case.double
    found = []
    for seed in (0, 1):
        with problem.session():
            total = torch.zeros((), dtype=problem.dtype, device=problem.device)
            slope = torch.zeros(problem.layout.numel, dtype=problem.dtype, device=problem.device)
            for inputs, targets in problem.batches(seed):
                part = problem.batch_total(problem.outputs(inputs), targets)
                total += part.detach()
                slope += flat_gradient(part, list(problem.params.values()))
        found.append(torch.cat([total.reshape(1), slope]))
    value = relative(found[0], found[1])
    sentence = (
        "Two evaluations give the same objective and gradient, bit for bit."
        if value == 0
        else f"Two evaluations differ by {number(value, 2)} (relative)."
    )
    advice = (
        "The model draws random numbers under eval() (functional dropout without "
        "training=self.training, noise) or keeps state between calls: switch that off."
    )
    return judged(value, 1e3 * case.eps, sentence, advice=advice)


@register("splitting into batches", about=PROBLEM, underlies=_ALL)
def splits(case: Case) -> Outcome:
    """Objective, gradient and a GGN product on the same samples cut into batches differently."""
    problem, batch = case.double, case.merged
    if problem.batchnorm == "batch":
        return not_applicable(
            'Under batchnorm="batch" the objective is defined by the batches as they are.'
        )
    if batch is None or problem.n_samples < 2:
        return not_applicable("The samples cannot be put into batches in another way.")
    n = problem.n_samples
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(case.seed))
    third = max(n // 3, 1)
    ways = {
        "one batch": [batch],
        "thirds": cut(batch, [third] * (n // third) + ([n % third] if n % third else [])),
        "permuted": cut(batch, [n - third, third], shuffled),
    }
    if n * case.gradient_seconds < _SECONDS:
        ways["single samples"] = cut(batch, [1] * n)
    reference = _fingerprint(problem, case)
    details, trouble = {}, []
    for name, batches in ways.items():
        try:
            details[name] = relative(_fingerprint(problem.with_data(batches), case), reference)
        except Exception as error:  # the user's model may fail on batches of another size
            details[name] = float("nan")
            trouble.append(f"{name} raised {type(error).__name__}: {str(error).splitlines()[0]}")
    wrong = [name for name, v in details.items() if not v <= case.exact]
    value = max(details.values(), key=lambda v: float("inf") if v != v else v)
    if not wrong:
        sentence = (
            f"Objective, gradient and a GGN product are the same however the samples are cut into "
            f"batches ({listing(list(ways))}), up to {number(value, 2)}."
        )
        return Outcome(PASSED, sentence, value, case.exact, details=details)
    shown = [f"{name} ({number(details[name], 2)})" for name in wrong if details[name] >= 0]
    sentence = "Objective, gradient or GGN depend on how the samples are cut into batches: "
    advice = (
        "Samples influence each other (batch statistics, attention or softmax over the batch "
        "axis), or the model depends on the batch size (squeeze(), view with fixed sizes). "
        "Curvature of the whole data is then not defined; let the model treat samples "
        "independently."
    )
    return Outcome(
        FAILED, sentence + listing([*shown, *trouble]) + ".", value, case.exact, advice, details
    )


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _fingerprint(problem: Problem, case: Case) -> Tensor:
    """Objective, gradient and a GGN product, each scaled to norm one in the reference problem."""
    v = case.direction(4)
    parts = [_scalar(problem.objective()).reshape(1), problem.gradient(), ggn(problem) @ v]
    parts = [p.detach().cpu().double() for p in parts]
    if "scales" not in case.kept:
        norms = [float(p.norm()) for p in parts]
        case.kept["scales"] = torch.tensor([s if s > case.eps else 1.0 for s in norms])
    scales = case.kept["scales"].tolist()
    return torch.cat([p / s for p, s in zip(parts, scales, strict=True)])


@register("duplication", about=PROBLEM, underlies=_ALL)
def duplication(case: Case) -> Outcome:
    """The data twice: the same for a mean, twice as much for a sum."""
    problem = case.double
    batches = truth.materialised(problem)
    summed = problem.loss.reduction == "sum"
    twice = _fingerprint(problem.with_data([*batches, *batches]), case)
    value = relative(twice, (2.0 if summed else 1.0) * _fingerprint(problem, case))
    what = "twice as much (the loss is a sum)" if summed else "the same (the loss is a mean)"
    sentence = (
        f"The data twice give {what}, up to {number(value, 2)}."
        if value <= case.exact
        else f"The data twice do not give {what}, but are off by {number(value, 2)}."
    )
    advice = "Check reduction=: it must count what the loss's own mean divides by."
    return judged(value, case.exact, sentence, advice=advice)


@register("train and eval mode", about=PROBLEM)
def mode(case: Case) -> Outcome:
    """Which layers compute differently in training than here."""
    model = case.problem.user_model
    drops, norms = [], []
    for name, module in model.named_modules():
        rate = getattr(module, "p", 0.0)
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            rate = module.dropout
        elif not isinstance(module, nn.modules.dropout._DropoutNd):
            rate = 0.0
        if rate:
            drops.append(f"{name or '(root)'} (p={rate:g})")
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            norms.append(name or "(root)")
    if not drops and not norms:
        return not_applicable("No layer computes differently in training than in evaluation.")
    flag = "in train mode" if any(m.training for m in model.modules()) else "in eval mode"
    sentence = f"The model is {flag}; everything is computed as under eval()"
    if drops:
        sentence += f", without dropout in {listing(drops)}"
    if norms:
        batch = case.problem.batchnorm == "batch"
        sentence += f", {listing(norms)} with {'batch' if batch else 'running'} statistics"
    return Outcome(PASSED, sentence + ". Training sees another objective.")


@register("precision", about=PROBLEM, decides=("the problem's own precision",))
def precision(case: Case) -> Outcome:
    """Gradient and curvature in the model's precision against the float64 copy."""
    own, double = case.own, case.double
    name = str(own.dtype)[6:]
    if own.dtype == torch.float64:
        return Outcome(PASSED, "The model computes in float64, where rounding hardly matters.")
    if double is own:
        return skipped("The model does not run in float64, so its rounding errors are unknown.")
    v = case.direction(5)
    details = {"gradient": relative(own.gradient(), double.gradient(), case.eps)}
    for make in (ggn, hessian):
        exact = make(double)
        details[exact.info.what] = relative(make(own) @ v, exact @ v, case.eps)
    value = max(details.values())
    tolerance = float(torch.finfo(own.dtype).eps) ** 0.5
    shown = [f"{what} {number(v, 2)}" for what, v in details.items()]
    sentence = f"Rounding in {name}, relative to float64: {listing(shown)}."
    advice = f"Curvature in {name} has lost its digits here; use Problem(..., dtype=torch.float64)."
    return judged(value, tolerance, sentence, advice=advice, details=details)


@register("state of the model", about=OTHERS, decides=("calling the model without side effects",))
def own_state(case: Case) -> Outcome:
    """Whether a forward pass under ``eval()`` changes the model itself."""
    import copy

    problem = case.few
    try:
        model = copy.deepcopy(problem.user_model)
    except Exception as error:  # locks, handles, generators: whatever the user keeps there
        return skipped(f"The model cannot be copied ({error}), so its state was not watched.")
    twin = problem.with_data(truth.materialised(problem), model=model, dtype=None)
    model.eval()
    before: dict[str, object] = {}
    mark_module(before, model, "the model")
    inputs, _ = truth.materialised(twin)[0]
    twin.outputs(inputs)
    after: dict[str, object] = {}
    mark_module(after, model, "the model")
    found = changes(before, after)
    if not found:
        return Outcome(PASSED, "A forward pass under eval() leaves the model as it is.")
    sentence = f"A forward pass under eval() changes the model: {listing(found)}."
    advice = (
        "curvscope puts flags, buffers and attributes back after every computation (not what is "
        "nested inside containers and objects); other tools do not. Keep state out of forward(), "
        "or guard it with self.training."
    )
    return Outcome(FAILED, sentence, float(len(found)), 0.0, advice, dict.fromkeys(found, 1.0))


@register("side effects", about=CURVSCOPE, decides=("leaving your objects unchanged",))
def side_effects(case: Case) -> Outcome:
    """Whether anything of the user's differs from before the first check."""
    found = [c for c in case.before.changes(Marks.of(case.problem)) if c not in case.blamed]
    if not found:
        return Outcome(
            PASSED,
            "Parameters, gradients, buffers, flags, hooks, attributes and random states are as "
            "they were before all of this.",
            0.0,
            0.0,
        )
    advice = (
        "curvscope puts back what lies in the modules themselves. What a forward pass changes in "
        "nested containers or other objects stays changed: keep such state out of it."
    )
    sentence = f"Not as before: {listing(found)}."
    return Outcome(FAILED, sentence, float(len(found)), 0.0, advice, dict.fromkeys(found, 1.0))
