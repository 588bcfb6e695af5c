"""Kronecker-factored approximations: K-FAC, EKFAC, KFLR, FOOF and their diagonals.

With N samples, T positions per sample, input rows ``a_nt`` (a 1 appended where the layer has a
bias) and ``g_nt`` the gradient of sample n's unnormalised loss in output row t, a layer's block is
approximated by ``G (x) A`` on its matrix view ``[W b]``:

* ``sharing="expand"``: ``G = (1/M) sum_{n,t} E_y[g_nt g_nt^T]``,
  ``A = (1/(N T)) sum_{n,t} a_nt a_nt^T``;
* ``sharing="reduce"``: positions first, ``G = (1/M) sum_n E_y[(sum_t g_nt)(sum_t g_nt)^T]``,
  ``A = (1/N) sum_n (mean_t a_nt)(mean_t a_nt)^T``  (Eschenhagen et al. 2023).

A layer used several times counts every use as further positions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UnsupportedLossError, check_option
from ..layers import Call
from ..modes import plain_mode
from ..operators import (
    BlockDiagonalOperator,
    EigenKroneckerOperator,
    KroneckerOperator,
    MatrixView,
    Operator,
    Provenance,
    kronecker_eigenvalue_correction,
)
from ..problem import Problem, Snapshot, require_problem
from ..progress import track
from .accumulate import accumulation_dtype
from .autograd import provenance
from .exact import check_sample_axis
from .gram import cotangents, pass_count, plans_for, record_batch
from .plan import BlockPlan, broken
from .products import EMPIRICAL, FISHER, GGN, Kind
from .recording import Recording
from .whole import WholeOperator


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
    if fisher == "exact":
        return Kind(FISHER)
    return Kind(FISHER, samples=samples, seed=seed) if fisher == "mc" else Kind(EMPIRICAL)


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


_TITLES = {"exact": "exact Fisher", "mc": "sampled Fisher", "empirical": "empirical Fisher"}


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


@plain_mode()
def kfac(
    problem: Problem,
    *,
    fisher: str = "exact",
    sharing: str = "expand",
    samples: int = 1,
    seed: int = 0,
    uncovered: str = "raise",
) -> BlockDiagonalOperator:
    """K-FAC: ``G (x) A`` ``[out * in, out * in]`` for every Linear and convolution layer.

    ``A`` is the second moment of the layer's input rows, ``G`` that of the loss's gradients in its
    output rows; definitions and ``sharing`` are at the top of the module. ``fisher`` says which
    labels the gradients use: the exact expectation, ``"mc"`` (``samples`` labels per term drawn
    with ``seed``) or ``"empirical"`` (the observed ones).

    Blocks without factors are in ``op.uncovered``, with reasons in
    ``op.info.settings["uncovered"]``; products then raise ``UncoveredError`` unless
    ``uncovered="zero"``.

    Cost: per batch one forward pass and one backward pass per output (exact), per drawn label
    (mc), or one (empirical); ``O(rows * (out^2 + in^2))`` for the moments.

    Raises ``OptionError`` for unknown options, ``UnsupportedLossError`` for a loss that is no
    log-likelihood (unless ``"empirical"``), and the errors of the problem itself (``DataError``,
    ``NonFiniteError``, ``NonDeterministicError``).

    Source: Martens and Grosse 2015, eq. 1; for convolutions Grosse and Martens 2016, section 3
    (KFC, here ``"expand"``); for shared weights Eschenhagen et al. 2023, section 3.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op = cs.kfac(problem)
    >>> op.blocks["2"].G.shape, op.blocks["2"].A.shape
    (torch.Size([2, 2]), torch.Size([5, 5]))
    >>> bool(cs.compare(cs.ggn(problem), {"K-FAC": op}).best().error < 1)
    True
    """
    check_option("sharing", sharing, ("expand", "reduce"))
    kind = label_kind(problem, fisher, seed, samples)
    at = prepared(problem, kind)
    run = collect_factors(problem, kind, sharing, at)
    what = f"K-FAC ({_TITLES[fisher]}" + (", reduce)" if sharing == "reduce" else ")")
    info = kronecker_info(problem, kind, what, run, fisher=fisher, sharing=sharing)
    blocks: dict[str, Operator] = {
        n: KroneckerOperator(f.G, f.A, f.view) for n, f in run.factors.items()
    }
    return assemble(problem, blocks, info, run.reasons, uncovered)


@plain_mode()
def kflr(
    problem: Problem, *, sharing: str = "expand", uncovered: str = "raise"
) -> BlockDiagonalOperator:
    """KFLR: K-FAC with ``G`` from the exact Hessian of the loss in the outputs.

    ``G = (1/M) sum_{n,t} J_nt^T (d^2 l/dz^2) J_nt`` with ``J_nt`` the Jacobian of the outputs in
    the layer's output row, ``A`` as for :func:`kfac`, whose ``sharing`` and ``uncovered`` it has.
    Defined for any loss that is convex in the outputs; for log-likelihoods it equals K-FAC with
    the exact Fisher.

    Cost: per batch one forward pass and one backward pass per output.

    Raises ``UnsupportedLossError`` for a loss that is not convex in the outputs, ``OptionError``
    for unknown options, and the errors of the problem itself (``DataError``,
    ``NonFiniteError``, ``NonDeterministicError``).

    Source: Botev, Ritter and Barber 2017 (there for Linear layers).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> torch.allclose(cs.kflr(problem).dense(), cs.kfac(problem, fisher="exact").dense())
    True
    """
    check_option("sharing", sharing, ("expand", "reduce"))
    kind = Kind(GGN)
    run = collect_factors(problem, kind, sharing, prepared(problem, kind))
    info = kronecker_info(problem, kind, "KFLR", run, sharing=sharing)
    blocks: dict[str, Operator] = {
        n: KroneckerOperator(f.G, f.A, f.view) for n, f in run.factors.items()
    }
    return assemble(problem, blocks, info, run.reasons, uncovered)


@plain_mode()
def foof(
    problem: Problem, *, sharing: str = "expand", scaled: bool = False, uncovered: str = "raise"
) -> BlockDiagonalOperator:
    """FOOF: the input factor alone, ``I (x) A``, with ``A`` as for :func:`kfac`.

    ``scaled=True`` puts ``(tr G / out) I`` in place of ``I``, so that the trace is K-FAC's.
    ``sharing`` and ``uncovered`` are those of :func:`kfac`.

    Cost: one forward pass per batch and no backward pass; ``scaled=True`` costs what
    :func:`kflr` does.

    Raises ``OptionError`` for unknown options, ``UnsupportedLossError`` for ``scaled=True`` with a
    loss that is not convex in the outputs, and the errors of the problem itself (``DataError``,
    ``NonFiniteError``, ``NonDeterministicError``).

    Source: Benzing 2022, section 4.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op = cs.foof(problem)  # the factor of gradients is a multiple of the identity
    >>> G = op.blocks["2"].G
    >>> torch.equal(G, G[0, 0] * torch.eye(2))
    True
    """
    check_option("sharing", sharing, ("expand", "reduce"))
    kind = Kind(GGN)
    run = collect_factors(problem, kind, sharing, prepared(problem, kind), need_outputs=scaled)
    info = kronecker_info(
        problem, kind, "FOOF (scaled)" if scaled else "FOOF", run, sharing=sharing
    )
    blocks: dict[str, Operator] = {}
    for name, f in run.factors.items():
        eye = torch.eye(f.view.out, dtype=f.A.dtype, device=f.A.device).expand_as(f.G)
        mean = f.G.diagonal(dim1=-2, dim2=-1).mean() if scaled else 1.0
        blocks[name] = KroneckerOperator(eye * mean, f.A, f.view)
    return assemble(problem, blocks, info, run.reasons, uncovered)


@plain_mode()
def ekfac(
    problem: Problem,
    *,
    fisher: str = "exact",
    sharing: str = "expand",
    samples: int = 1,
    seed: int = 0,
    uncovered: str = "raise",
) -> BlockDiagonalOperator:
    """EKFAC: K-FAC's eigenbasis with the exact second moments in it.

    With ``u_i`` and ``v_j`` the eigenvectors of K-FAC's ``G`` and ``A``, the eigenvalue for
    ``u_i (x) v_j`` is ``(1/M) sum_n E_y[(sum_t u_i^T g_nt a_nt^T v_j)^2]``: with shared weights the
    sum over positions comes before the square. Of all matrices with this eigenbasis it is the
    nearest to the Fisher block in Frobenius norm. The options are those of :func:`kfac`.

    Cost: twice the passes of :func:`kfac`, and the eigen-decompositions of its factors,
    ``O(out^3 + in^3)`` per layer.

    Raises what :func:`kfac` raises.

    Source: George et al. 2018, section 3 (the diagonal of eq. 8 in the Kronecker eigenbasis).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op, exact = cs.ekfac(problem), cs.ggn(problem)
    >>> abs(op.trace() - exact.trace()) < 1e-5
    True
    """
    base = kfac(problem, fisher=fisher, sharing=sharing, samples=samples, seed=seed)
    kind = label_kind(problem, fisher, seed, samples)
    start = time.perf_counter()
    exact = WholeOperator(problem, kind, "auto", problem.snapshot())
    blocks: dict[str, Operator] = {}
    for name, block in base.blocks.items():
        assert isinstance(block, KroneckerOperator)
        _, u_g = torch.linalg.eigh(block.G)
        _, u_a = torch.linalg.eigh(block.A)
        moments = kronecker_eigenvalue_correction(exact.blocks[name], u_g, u_a, view=block.view)
        blocks[name] = EigenKroneckerOperator(u_g, u_a, moments.clamp_min(0), block.view)
    reasons = dict(base.info.settings.get("uncovered", {}))
    info = base.info.with_(
        what=base.info.what.replace("K-FAC", "EKFAC"),
        seconds=base.info.seconds + time.perf_counter() - start,
        passes=2 * base.info.passes,
    )
    return assemble(problem, blocks, info, reasons, uncovered)


def prepared(problem: Problem, kind: Kind) -> Snapshot:
    """Check the problem for a matrix of this kind, and hold on to the current parameters."""
    require_problem(problem)
    problem.check()
    at = problem.snapshot()
    if kind.needs_samples:
        check_sample_axis(problem, kind, at)
    return at
