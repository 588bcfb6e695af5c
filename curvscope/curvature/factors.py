"""The Kronecker factors of a network's blocks: sums over the data of input and output rows.

What :mod:`.kronecker`, :mod:`.kfra` and :mod:`.diagonal` share; the definitions of ``A`` and ``G``
are in :mod:`.kronecker`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UnsupportedLossError, check_count, check_option, check_seed
from ..layers import Call
from ..operators import BlockDiagonalOperator, MatrixView, Operator, Provenance
from ..problem import Problem, Snapshot, require_problem
from ..progress import track
from .accumulate import accumulation_dtype
from .autograd import provenance
from .exact import check_sample_axis
from .gram import cotangents, pass_count, plans_for, record_batch
from .plan import BlockPlan, broken
from .products import EMPIRICAL, FISHER, Kind
from .recording import Recording


@dataclass
class Factors:
    """Running sums of one block's Kronecker factors, not yet normalised."""

    view: MatrixView
    A: Tensor
    G: Tensor
    rows: int = 0  # N * T for expand, N for reduce
    extra: dict[str, Tensor] = field(default_factory=dict)


def kronecker_reason(plan: BlockPlan, recording: Recording) -> str | None:
    """Why Kronecker factors are not defined for a block; ``None`` where they are."""
    if "gram" in plan.reasons:
        return plan.reasons["gram"]
    calls = [recording.calls[k] for k in plan.calls]
    if not calls:
        return "the block's parameters are not used"
    other = next((c for c in calls if not c.kind.kronecker), None)
    if other is not None:
        return f"{other.kind.name} has no input and output factors"
    first = calls[0]
    for call in calls:
        if call.weight is not first.weight:
            return "the block spans several layers"
        if call.bias is not first.bias:
            return "its weight is shared by layers with different biases"
    mine = {id(p) for p in plan.parameters}
    if not mine <= {id(p) for p in (first.weight, first.bias) if p is not None}:
        return "the block spans several layers"
    return None


def _view(plan: BlockPlan, call: Call) -> tuple[MatrixView, bool, bool]:
    """Matrix view, whether it has the weight's columns, whether it has the bias's column."""
    mine = {id(p) for p in plan.parameters}
    weight = call.weight is not None and id(call.weight) in mine
    bias = call.bias is not None and id(call.bias) in mine
    if weight:
        assert plan.view is not None
        return plan.view, True, bias
    groups, out, _ = call.kind.sizes(call)
    return MatrixView(groups, out, 1), False, True


def _input_rows(
    plan: BlockPlan, recording: Recording, sharing: str, weight: bool, bias: bool
) -> Tensor:
    """``a [N, T, g, i]`` of all calls together; averaged over positions for ``"reduce"``."""
    parts = []
    for k in plan.calls:
        axis = recording.axes[k]
        assert axis is not None
        call = recording.calls[k]
        rows = call.kind.input_rows(call, axis, recording.samples)
        ones = rows.new_ones(*rows.shape[:-1], 1)
        columns = ([rows] if weight else []) + ([ones] if bias else [])
        parts.append(torch.cat(columns, -1))
    joined = torch.cat(parts, 1)
    return joined.mean(1, keepdim=True) if sharing == "reduce" else joined


def output_rows(
    plan: BlockPlan, recording: Recording, gradients: list[Tensor | None], sharing: str
) -> Tensor | None:
    """``g [N, T, g, o]`` of all calls together; summed over positions for ``"reduce"``."""
    parts = []
    for k in plan.calls:
        axis, gradient = recording.axes[k], gradients[k]
        assert axis is not None
        call = recording.calls[k]
        if gradient is None:
            gradient = torch.zeros_like(call.outputs)
        parts.append(call.kind.output_rows(call, gradient, axis, recording.samples))
    joined = torch.cat(parts, 1)
    return joined.sum(1, keepdim=True) if sharing == "reduce" else joined


def second_moment(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum_{n,t} x x^T`` as ``[g, i, i]`` for rows ``[N, T, g, i]``."""
    flat = rows.reshape(-1, *rows.shape[2:]).movedim(1, 0).to(dtype)
    return flat.mT @ flat


@dataclass(frozen=True)
class FactorRun:
    """Factors of all blocks that have them, and why the others have none."""

    factors: dict[str, Factors]
    reasons: dict[str, str]
    seconds: float
    passes: float


def collect_factors(
    problem: Problem,
    kind: Kind,
    sharing: str,
    at: Snapshot,
    *,
    need_outputs: bool = True,
    diagonal: bool = False,
) -> FactorRun:
    """One pass over the data: ``A`` and ``G`` sums of every block (or their diagonals)."""
    start = time.perf_counter()
    plans = plans_for(problem, dict(problem.blocks), at)
    generator, dtype = kind.generator(), accumulation_dtype(problem.dtype)
    found: dict[str, Factors] = {}
    reasons: dict[str, str] = {}
    passes = 0.0
    facts = problem.check()

    def moment(rows: Tensor) -> Tensor:
        if diagonal:
            return rows.reshape(-1, *rows.shape[2:]).to(dtype).square().sum(0)
        return second_moment(rows, dtype)

    with problem.session(at):
        for inputs, targets in track(
            problem.batches(), f"{kind.title} Kronecker factors", total=facts.batches
        ):
            recording = record_batch(problem, inputs, targets)
            if not found and not reasons:
                for name, plan in plans.items():
                    reason = kronecker_reason(plan, recording)
                    if reason is not None:
                        reasons[name] = reason
            chosen = [plans[n] for n in plans if n not in reasons]
            if found:  # what holds for the first batch need not hold for this one
                reasons.update(broken(problem, recording, chosen))
                chosen = [plan for plan in chosen if plan.name not in reasons]
            for plan in chosen:
                view, weight, bias = _view(plan, recording.calls[plan.calls[0]])
                rows = _input_rows(plan, recording, sharing, weight, bias)
                shape = (view.groups, view.out) if diagonal else (view.groups, view.out, view.out)
                if plan.name not in found:
                    zero_a = torch.zeros_like(moment(rows[:0]))
                    zero_g = torch.zeros(shape, dtype=dtype, device=problem.device)
                    found[plan.name] = Factors(view, zero_a, zero_g)
                found[plan.name].A += moment(rows)
                found[plan.name].rows += rows.shape[0] * rows.shape[1]
            if not need_outputs:
                continue
            wanted = sorted({k for plan in chosen for k in plan.calls})
            for u, sign in cotangents(problem, kind, recording, generator):
                gradients = recording.gradients(u, wanted)
                for plan in chosen:
                    g = output_rows(plan, recording, gradients, sharing)
                    assert g is not None
                    if sign is not None:
                        if bool((sign < 0).any()):
                            raise UnsupportedLossError(
                                f"{problem.loss.name} is not convex in the outputs, so its factor "
                                "G is not positive semi-definite; use cs.ggn."
                            )
                        g = g * sign.reshape(-1, 1, 1, 1).to(g)
                    found[plan.name].G += moment(g)
            passes += pass_count(problem, kind, recording)
    found = {name: factors for name, factors in found.items() if name not in reasons}
    for factors in found.values():
        factors.A /= max(factors.rows, 1)
        factors.G *= problem.scale
    return FactorRun(found, reasons, time.perf_counter() - start, passes / max(facts.batches, 1))


def label_kind(problem: Problem, fisher: str, seed: int, samples: int = 1) -> Kind:
    """The distribution of labels behind ``fisher="exact"|"mc"|"empirical"``."""
    require_problem(problem)
    check_option("fisher", fisher, ("exact", "mc", "empirical"))
    if fisher != "empirical" and problem.loss.likelihood is None:
        raise UnsupportedLossError(problem.loss.no_likelihood("Its Fisher"))
    if fisher == "mc":
        return Kind(FISHER, samples=check_count("samples", samples), seed=check_seed(seed))
    return Kind(FISHER if fisher == "exact" else EMPIRICAL)


def assemble(
    problem: Problem,
    blocks: dict[str, Operator],
    info: Provenance,
    reasons: dict[str, str],
    uncovered: str,
) -> BlockDiagonalOperator:
    """Block-diagonal operator over the problem's blocks; reasons go into the provenance."""
    for name, block in blocks.items():
        block.layout = problem.layout.restrict(problem.blocks[name])
        block.info = info
    if reasons:
        info = info.with_(settings={**info.settings, "uncovered": dict(reasons)})
    op = BlockDiagonalOperator(
        blocks, problem.layout, dict(problem.blocks), uncovered=uncovered, info=info
    )
    if not blocks:
        op.dtype, op.device = accumulation_dtype(problem.dtype), problem.device
    return op


def kronecker_info(
    problem: Problem, kind: Kind, what: str, run: FactorRun, **settings: object
) -> Provenance:
    """Provenance of an approximation made of Kronecker factors."""
    base = provenance(problem, kind, "Kronecker factors")
    return base.with_(
        what=what,
        exact=False,
        seconds=run.seconds,
        passes=run.passes,
        settings={**base.settings, **settings},
    )


def prepared(problem: Problem, kind: Kind) -> Snapshot:
    """Check the problem for a matrix of this kind, and hold on to the current parameters."""
    require_problem(problem)
    problem.check()
    at = problem.snapshot()
    if kind.needs_samples:
        check_sample_axis(problem, kind, at)
    return at
