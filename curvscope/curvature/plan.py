"""Which route computes which block: looked up on one batch, before anything is accumulated.

Routes, from cheap to general (see the module ``exact``):

``"gram"``
    the block is ``V V^T`` with a column of ``V`` per sample and output;
``"piecewise-linear"``
    a Hessian block that equals the Gauss-Newton block;
``"rows"``
    a Hessian block ``sum_n H_n (x) a_n a_n^T`` of a layer that acts on rows;
``"autograd"``
    double backward through the live parameters, column by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..layers import Call
from ..operators import MatrixView
from ..problem import Problem
from .piecewise import is_piecewise_linear
from .recording import KnownAxis, Recording, used_elsewhere

ROUTES = ("gram", "piecewise-linear", "rows", "autograd")


@dataclass(frozen=True)
class BlockPlan:
    """How one block's parameters are used, and which routes are valid for it.

    ``weight_calls[p]``/``bias_calls[p]`` are positions in ``Recording.calls``; ``reasons`` says why
    a route is not valid.
    """

    name: str
    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    calls: tuple[int, ...]
    routes: tuple[str, ...]
    reasons: dict[str, str] = field(default_factory=dict)
    positions: int = 0  # T of a single call that acts on rows, else 0
    outputs: int = 0  # its output features
    axes: dict[int, KnownAxis] = field(default_factory=dict)  # of its calls, on the first batch
    view: MatrixView | None = None  # [g, o, i(+1)] where the block is one layer's [W] or [W b]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)


def uses_of(parameter: Tensor, calls: Sequence[Call]) -> tuple[int, ...]:
    """Positions of the calls that use a parameter."""
    return tuple(k for k, c in enumerate(calls) if c.weight is parameter or c.bias is parameter)


def is_matrix(plan: BlockPlan, recording: Recording) -> bool:
    """Whether the block is exactly the matrix view ``[W]`` or ``[W b]`` of one call."""
    if len(plan.calls) != 1:
        return False
    call = recording.calls[plan.calls[0]]
    mine = {id(p) for p in plan.parameters}
    theirs = {id(p) for p in (call.weight, call.bias) if p is not None}
    return call.weight is not None and id(call.weight) in mine and mine <= theirs


def matrix_view(parameters: Sequence[Tensor], calls: Sequence[Call]) -> MatrixView | None:
    """The matrix view of a block that is the weight (and bias) of one layer, else ``None``."""
    if not calls:
        return None
    call = calls[0]
    if not all(c.kind.kronecker and c.weight is call.weight for c in calls):
        return None
    mine, theirs = {id(p) for p in parameters}, {id(call.weight), id(call.bias)}
    if call.weight is None or id(call.weight) not in mine or not mine <= theirs:
        return None
    groups, out, inp = call.kind.sizes(call)
    order = call.kind.weight_order(call)
    if len(parameters) == 1:
        return MatrixView(groups, out, inp, order)
    rows, first = groups * out, parameters[0] is call.weight
    if first and order is None:
        return MatrixView.for_weight_and_bias(rows, inp, groups=groups)
    weight = (torch.arange(rows * inp) if order is None else order).reshape(rows, inp)
    bias = torch.arange(rows).unsqueeze(1)
    weight, bias = (weight, bias + rows * inp) if first else (weight + rows, bias)
    perm = torch.cat([weight, bias], 1).reshape(-1)
    return MatrixView(groups, out, inp + 1, perm)


def not_separable(
    recording: Recording, members: Sequence[str], own: Sequence[Tensor], elsewhere: set[int]
) -> str | None:
    """Why the parameters' gradients do not fall apart into samples; ``None`` if they do."""
    for member, p in zip(members, own, strict=True):
        if id(p) in elsewhere:
            return f"{member!r} is used outside of the layers that curvscope can take apart"
    if not recording.separable_outputs:
        return (
            f"outputs {list(recording.outputs.shape)} do not start with the "
            f"{recording.samples} samples"
        )
    for p in own:
        for k in uses_of(p, recording.calls):
            if recording.axes[k] is None:
                return f"samples influence each other behind {recording.calls[k].kind.name}"
    return None


def broken(
    problem: Problem, recording: Recording, plans: Sequence[BlockPlan], route: str = "gram"
) -> dict[str, str]:
    """Plans, made on an earlier batch, that do not hold on this one: block -> reason."""
    elsewhere = used_elsewhere(recording, problem.params.values())
    reasons = {}
    for plan in plans:
        calls = [k for p in plan.parameters for k in uses_of(p, recording.calls)]
        reason = not_separable(recording, plan.names, plan.parameters, elsewhere)
        if reason is None and tuple(sorted(set(calls))) != plan.calls:
            reason = "a later batch uses its parameters otherwise"
        if reason is None and route == "piecewise-linear":
            z = recording.calls[plan.calls[0]].outputs
            if not is_piecewise_linear(recording.outputs, z, log_softmax=_log_softmax(problem)):
                reason = "what follows the layer is not piecewise linear in a later batch"
        if reason is not None:
            reasons[plan.name] = reason
    return reasons


def _log_softmax(problem: Problem) -> bool:
    return bool(getattr(problem.loss, "log_probabilities", False))


def plan_blocks(
    problem: Problem, recording: Recording, blocks: dict[str, tuple[str, ...]]
) -> dict[str, BlockPlan]:
    """The valid routes of every block on this batch."""
    elsewhere = used_elsewhere(recording, problem.params.values())
    log_softmax = _log_softmax(problem)
    direct = problem.check().direct
    plans = {}
    for name, members in blocks.items():
        own = tuple(problem.params[m] for m in members)
        found = tuple(sorted({k for p in own for k in uses_of(p, recording.calls)}))
        reasons: dict[str, str] = {}
        reason = not_separable(recording, members, own, elsewhere)
        if reason is not None:
            reasons["gram"] = reason
        plan = BlockPlan(name, members, own, found, (), reasons)
        routes = ["autograd"]
        if "gram" not in reasons:
            routes.insert(0, "gram")
        positions = outputs = 0
        penalised = next((m for m in members if m in direct), None)
        if penalised is not None:  # its Hessian does not come through the outputs alone
            reason = f"the loss uses {penalised!r} itself, besides the outputs"
            reasons |= {"piecewise-linear": reason, "rows": reason}
        elif len(found) == 1 and "gram" not in reasons:
            call = recording.calls[found[0]]
            axis = recording.axes[found[0]]
            assert axis is not None
            if is_piecewise_linear(recording.outputs, call.outputs, log_softmax=log_softmax):
                routes.insert(0, "piecewise-linear")
            else:
                reasons["piecewise-linear"] = "what follows the layer is not piecewise linear"
            groups, out, _ = call.kind.sizes(call) if call.kind.kronecker else (0, 0, 0)
            if groups == 1 and is_matrix(plan, recording):
                outputs = out
                positions = call.outputs.numel() // (recording.samples * out)
                routes.insert(-1, "rows")
            else:
                reasons["rows"] = "not the weight (and bias) of one layer that acts on rows"
        else:
            reasons.setdefault("piecewise-linear", reasons.get("gram", "several uses"))
            reasons.setdefault("rows", reasons.get("gram", "several uses"))
        plans[name] = BlockPlan(
            name,
            members,
            own,
            found,
            tuple(routes),
            reasons,
            positions,
            outputs,
            {
                k: KnownAxis(recording.axes[k], tuple(recording.calls[k].outputs.shape))
                for k in found
            },
            matrix_view(own, [recording.calls[k] for k in found]),
        )
    return plans
