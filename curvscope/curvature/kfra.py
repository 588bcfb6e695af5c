"""KFRA: Kronecker factors with a recursively averaged output factor (Botev et al. 2017, eq. 19)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UnsupportedLayerError, UnsupportedLossError
from ..modes import plain_mode
from ..operators import BlockDiagonalOperator, KroneckerOperator, Operator
from ..problem import Problem
from ..problem.cotangents import root_cotangents
from ..progress import track
from .accumulate import accumulation_dtype
from .factors import FactorRun, assemble, collect_factors, kronecker_info, prepared
from .gram import plans_for, record_batch
from .piecewise import downstream
from .products import GGN, Kind
from .recording import Recording

_LENGTHS = (
    "KFRA averages over samples of equal size, but the number of positions differs from batch to "
    "batch; use cs.kflr or cs.kfac, or pad."
)


@plain_mode()
def kfra(problem: Problem, *, uncovered: str = "raise") -> BlockDiagonalOperator:
    """KFRA: ``G (x) A`` with ``G`` by a recursion of averages from the last layer to the first.

    With ``z_l`` the output of layer l (all positions together) and ``J_n = dz_{l+1}/dz_l`` of
    sample n, ``Q_l = (1/N) sum_n J_n^T Q_{l+1} J_n``, started with the mean Hessian of the loss in
    the outputs; ``G_l`` is the sum of ``Q_l`` over positions and ``A_l`` is that of
    :func:`~curvscope.kfac`, as is ``uncovered``. On one sample it is exact.

    Only defined for chains, in which each layer's output reaches the loss through the next layer
    alone.

    Cost: as many backward passes between two layers as the later one has outputs, and a matrix of
    that size squared.

    Raises ``UnsupportedLayerError`` for residual connections, layers that are used twice, and
    paths that change from batch to batch; ``UnsupportedLossError`` for a loss that is not convex in
    the outputs; the errors of the problem itself (``DataError``,
    ``NonFiniteError``, ``NonDeterministicError``).

    Source: Botev, Ritter and Barber 2017, eq. 19, for Linear layers with elementwise activations.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op = cs.kfra(problem)
    >>> list(op.blocks)
    ['0', '2']
    """
    start = time.perf_counter()
    kind = Kind(GGN)
    at = prepared(problem, kind)
    plans = plans_for(problem, dict(problem.blocks), at)
    run = collect_factors(problem, kind, "expand", at, need_outputs=False)
    with problem.session(at):
        inputs, targets = next(problem.batches())
        recording = record_batch(problem, inputs, targets)
        order = chain(recording, problem.params)
        layers = [id(recording.calls[k].weight) for k in order]
    # weight and bias may be blocks of their own, which share the layer's output factor
    positions: dict[int, list[str]] = {}
    for name in run.factors:
        for k in plans[name].calls:
            positions.setdefault(k, []).append(name)
    facts = problem.check()
    curvature: Tensor | None = None
    factors: dict[str, Tensor] = {}
    passes = 0.0
    for level in range(len(order), 0, -1):
        total: Tensor | None = None
        with problem.session(at):
            label = f"KFRA level {level}"
            for inputs, targets in track(problem.batches(), label, total=facts.batches):
                recording = record_batch(problem, inputs, targets)
                found = chain(recording, problem.params)
                if found != order or [id(recording.calls[k].weight) for k in found] != layers:
                    raise UnsupportedLayerError(
                        "KFRA needs the same chain of layers for every batch, but the model takes "
                        "another path in a later one; use cs.kflr or cs.kfac."
                    )
                part, count = _level(problem, recording, targets, order, level, curvature)
                total = part if total is None else _sum(total, part)
                passes += count / facts.batches
        assert total is not None
        # the loss's own normaliser at the top, plain averages over samples below it
        top = curvature is None
        curvature = total * (problem.scale if top else 1.0 / facts.samples)
        k = order[level - 1]
        for name in positions.get(k, ()):
            view = run.factors[name].view
            factors[name] = _output_factor(curvature, view.groups, view.out, problem, at, k)
    blocks: dict[str, Operator] = {
        name: KroneckerOperator(factors[name].to(f.A), f.A, f.view)
        for name, f in run.factors.items()
    }
    done = FactorRun(run.factors, run.reasons, time.perf_counter() - start, passes)
    return assemble(
        problem, blocks, kronecker_info(problem, kind, "KFRA", done), run.reasons, uncovered
    )


def _sum(left: Tensor, right: Tensor) -> Tensor:
    if left.shape != right.shape:
        raise UnsupportedLayerError(_LENGTHS)
    return left + right


def _level(
    problem: Problem,
    recording: Recording,
    targets: object,
    order: list[int],
    level: int,
    curvature: Tensor | None,
) -> tuple[Tensor, int]:
    """``sum_n J_n^T Q J_n`` of one batch, from level ``level + 1`` (or the loss) to ``level``."""
    k, n = order[level - 1], recording.samples
    z, axis = recording.calls[k].outputs, recording.axes[k]
    assert axis is not None
    size, dtype = z.numel() // n, accumulation_dtype(z.dtype)
    total = torch.zeros(size, size, dtype=dtype, device=z.device)
    if curvature is None:
        source = recording.outputs
        seeds = root_cotangents(problem.loss, source, targets, n)
        cotangents = []
        for u, sign in seeds:
            if sign is not None and bool((sign < 0).any()):
                raise UnsupportedLossError(
                    f"{problem.loss.name} is not convex in the outputs; KFRA needs that."
                )
            cotangents.append(u)
    else:
        later = order[level]
        source, later_axis = recording.calls[later].outputs, recording.axes[later]
        assert later_axis is not None
        if curvature.shape[0] != source.numel() // n:
            raise UnsupportedLayerError(_LENGTHS)
        values, vectors = torch.linalg.eigh(curvature)
        keep = values > values.max().clamp_min(0) * torch.finfo(z.dtype).eps * len(values)
        roots = (vectors[:, keep] * values[keep].sqrt()).mT
        index = torch.arange(source.numel(), device=z.device).reshape(source.shape)
        order_of = later_axis.first(index, n).reshape(n, -1)
        cotangents = []
        for root in roots.to(z.dtype):
            flat = torch.zeros(source.numel(), dtype=z.dtype, device=z.device)
            flat[order_of.reshape(-1)] = root.expand(n, -1).reshape(-1)
            cotangents.append(flat.reshape(source.shape))
    for u in cotangents:
        (gradient,) = torch.autograd.grad(source, z, u, retain_graph=True, allow_unused=True)
        if gradient is not None:
            rows = axis.first(gradient, n).reshape(n, -1).to(dtype)
            total.addmm_(rows.mT, rows)
    return total, len(cotangents)


def _output_factor(
    curvature: Tensor, groups: int, out: int, problem: Problem, at: object, k: int
) -> Tensor:
    """``G [g, o, o]``: the sum over positions of the diagonal blocks of ``Q [T o, T o]``."""
    with problem.session(at):  # type: ignore[arg-type]
        inputs, targets = next(problem.batches())
        recording = record_batch(problem, inputs, targets)
        call, axis, n = recording.calls[k], recording.axes[k], recording.samples
        assert axis is not None
        size = call.outputs.numel() // n
        # where each (position, group, feature) lies in a sample's flattened output
        flat = torch.arange(size, device=curvature.device).repeat(n, 1)
        back = torch.empty(call.outputs.numel(), dtype=torch.long, device=curvature.device)
        index = torch.arange(call.outputs.numel(), device=curvature.device)
        back[axis.first(index.reshape(call.outputs.shape), n).reshape(-1)] = flat.reshape(-1)
        where = call.kind.output_rows(call, back.reshape(call.outputs.shape), axis, n)[0]
    result = curvature.new_zeros(groups, out, out)
    for position in where:
        for g in range(groups):
            rows = position[g]
            result[g] += curvature[rows.unsqueeze(1), rows]
    return result


def chain(recording: Recording, params: Mapping[str, Tensor]) -> list[int]:
    """The calls from input to output, each of which cuts the graph; refuses anything else.

    ``params`` are the parameters by name, from which layers are named.
    """
    layers = {id(p): name.rpartition(".")[0] or "(root)" for name, p in params.items()}

    def layer(k: int) -> str:
        call = recording.calls[k]
        known = [layers[id(p)] for p in (call.weight, call.bias) if id(p) in layers]
        return f"layer {known[0]!r}" if known else f"layer {k + 1} ({call.kind.name})"

    calls = [k for k, c in enumerate(recording.calls) if c.kind.kronecker]
    seen: dict[int, int] = {}
    for k in calls:
        weight = recording.calls[k].weight
        if weight is not None and id(weight) in seen:
            raise UnsupportedLayerError(
                f"KFRA is not defined for a layer that is used twice, as {layer(k)} is; use "
                "cs.kflr or cs.kfac."
            )
        seen[id(weight)] = k
        if recording.axes[k] is None:
            raise UnsupportedLayerError(
                f"KFRA needs samples that do not influence each other, which "
                f"{recording.calls[k].kind.name} does not show; use cs.ggn."
            )
    for first, second in itertools.pairwise(calls):
        z, later = recording.calls[first].outputs, recording.calls[second].outputs
        between = downstream(later.grad_fn, z.grad_fn)
        around = downstream(recording.outputs.grad_fn, z.grad_fn)
        after = downstream(recording.outputs.grad_fn, later.grad_fn) | {later.grad_fn}
        inside = between - {later.grad_fn}
        for node in around - inside - {later.grad_fn}:
            # a node behind the later layer may depend on z only through that layer
            if any(f in inside or f is z.grad_fn for f, _ in node.next_functions):
                raise UnsupportedLayerError(
                    f"KFRA is defined for chains of layers only, but the output of {layer(first)} "
                    f"also reaches the loss around {layer(second)} (a residual "
                    "connection, attention or a branch); use cs.kflr or cs.kfac."
                )
            if node not in after:
                raise UnsupportedLayerError(
                    "KFRA is defined for chains of layers only, and the model has parallel "
                    "branches; use cs.kflr or cs.kfac."
                )
    return calls
