"""Diagonal and diagonal-Kronecker approximations: exact diagonals, Hutchinson's, AdaFisher's."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, check_count, check_option, check_seed
from ..layers import Call, Scale
from ..modes import plain_mode
from ..operators import (
    BlockDiagonalOperator,
    DiagonalKroneckerOperator,
    DiagonalOperator,
    MatrixView,
    Operator,
)
from ..problem import Problem
from ..progress import track
from .accumulate import accumulation_dtype
from .autograd import provenance
from .factors import FactorRun, assemble, collect_factors, kronecker_info, label_kind, prepared
from .gram import RouteFailed, gram_blocks, plans_for, record_batch
from .plan import BlockPlan, broken
from .products import EMPIRICAL, FISHER, GGN, HESSIAN, Kind
from .whole import WholeOperator

_KINDS = {"hessian": HESSIAN, "ggn": GGN, "fisher": FISHER, "empirical_fisher": EMPIRICAL}


@plain_mode()
def exact_diagonal(problem: Problem, matrix: str = "ggn") -> BlockDiagonalOperator:
    """The exact diagonal ``[P]`` of a matrix: ``"hessian"``, ``"ggn"``, ``"fisher"`` or
    ``"empirical_fisher"``.

    Of all diagonal matrices it is the nearest to the exact one. Gauss-Newton and Fisher diagonals
    are sums of squared gradients and never form a block; the Hessian's come from its blocks.

    Cost: one backward pass per output; for the Hessian, and for blocks that only autograd covers,
    that of the blocks.

    Raises ``OptionError`` for an unknown ``matrix``, ``UnsupportedLossError`` for the Fisher of a
    loss that is no log-likelihood, ``MemoryLimitError`` where a block has to be formed and does
    not fit, and the errors of the problem itself (``DataError``,
    ``NonFiniteError``, ``NonDeterministicError``).

    Source: the definition; by squares of back-propagated vectors as in Dangel, Kunstner and Hennig
    2020, section 2.3.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op = cs.exact_diagonal(problem, "ggn")
    >>> torch.allclose(op.diagonal(), cs.ggn(problem).dense().diagonal(), atol=1e-6)
    True
    """
    check_option("matrix", matrix, _KINDS)
    kind = Kind(_KINDS[matrix])
    at = prepared(problem, kind)
    start = time.perf_counter()
    whole = WholeOperator(problem, kind, "auto", at)
    blocks: dict[str, Operator] = {}
    passes = 0.0
    if matrix != "hessian":
        plans = [plan for plan in whole.plans.values() if "gram" in plan.routes]
        try:
            blocks, passes = gram_blocks(problem, kind, plans, at, form="diagonal")
        except RouteFailed:
            blocks = {}
    blocks = {
        name: blocks[name] if name in blocks else DiagonalOperator(whole.blocks[name].diagonal())
        for name in problem.blocks
    }
    base = provenance(problem, kind, "diagonal")
    info = base.with_(
        what=f"diagonal of the {kind.title}",
        exact=False,
        seconds=time.perf_counter() - start,
        passes=passes,
        settings={**base.settings, "matrix": matrix},
    )
    return assemble(problem, blocks, info, {}, "raise")


def rademacher(size: int, probes: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """``[size, probes]`` independent entries, +1 or -1 with equal probability."""
    bits = torch.randint(0, 2, (probes, size), generator=generator)
    return (2 * bits - 1).mT.to(like)


def kernel_axes(problem: Problem) -> dict[str, int]:
    """Parameter -> how many of its last axes are positions of a convolution's kernel."""
    modules = dict(problem.model.named_modules())
    found = {}
    for spec in problem.layout:
        layer = modules.get(spec.name.rpartition(".")[0])
        kernel = len(getattr(layer, "kernel_size", ()))
        convolution = isinstance(layer, nn.modules.conv._ConvNd)
        found[spec.name] = kernel if convolution and len(spec.shape) == kernel + 2 else 0
    return found


def spatial_average(vector: Tensor, problem: Problem) -> Tensor:
    """Average the weights of convolutions over their kernel positions, as cs.optim.AdaHessian does.

    ``vector`` is ``[P]`` or ``[P, k]``. Source: AdaHessian (Yao et al. 2021, section 3.2).
    """
    result = vector.clone()
    axes = kernel_axes(problem)
    for spec, rows in zip(problem.layout, problem.layout.slices().values(), strict=True):
        if not axes[spec.name]:
            continue
        kernel = math.prod(spec.shape[-axes[spec.name] :])
        part = vector[rows].reshape(-1, kernel, *vector.shape[1:])
        result[rows] = part.mean(1, keepdim=True).expand_as(part).reshape(vector[rows].shape)
    return result


@plain_mode()
def hutchinson_diagonal(
    problem: Problem,
    *,
    probes: int = 1,
    seed: int = 0,
    spatial: bool = False,
    matrix: str = "hessian",
) -> BlockDiagonalOperator:
    """Hutchinson's estimate of the Hessian's diagonal ``[P]``, ``mean_k z_k * (H z_k)``.

    ``z_k`` has independent +-1 entries, drawn with ``seed``; the estimate is unbiased with variance
    ``sum_{j != i} H_ij^2`` per probe. ``.stderr`` ``[P]`` of the result is the standard error of
    each entry from the spread over probes (NaN for one probe). ``matrix`` may also be ``"ggn"``,
    ``"fisher"`` or ``"empirical_fisher"``.

    ``spatial=True`` averages each probe's entries of convolution weights over the kernel positions,
    as AdaHessian does; the estimate is then biased.

    Cost: one product with the matrix per probe.

    Raises ``OptionError`` for ``probes`` below one or an unknown ``matrix``,
    ``UnsupportedLossError`` for the Fisher of a loss that is no log-likelihood,
    ``UnsupportedLayerError`` for an operation without second derivative, and
    the errors of the problem itself (``DataError``,
    ``NonFiniteError``, ``NonDeterministicError``).

    Source: Bekas, Kokiopoulou and Saad 2007, section 2; Yao et al. 2021 (AdaHessian), section 3,
    for ``spatial`` section 3.2.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op = cs.hutchinson_diagonal(problem, probes=10, seed=0)
    >>> op.diagonal().shape
    torch.Size([8])
    """
    check_option("matrix", matrix, _KINDS)
    probes = check_count("probes", probes)
    kind = Kind(_KINDS[matrix])
    start = time.perf_counter()
    whole = WholeOperator(problem, kind, "auto", prepared(problem, kind))
    generator = torch.Generator().manual_seed(check_seed(seed))
    size = whole.shape[0]
    like = torch.empty(0, dtype=whole.dtype, device=whole.device)
    mean, square, seen = like.new_zeros(size), like.new_zeros(size), 0
    for first in track(range(0, probes, 8), "Hutchinson probes"):
        z = rademacher(size, min(8, probes - first), generator, like)
        values = z * (whole @ z)
        values = spatial_average(values, problem) if spatial else values
        # Welford's update by chunks: the plain sum of squares would cancel
        for column in values.mT:
            seen += 1
            delta = column - mean
            mean = mean + delta / seen
            square = square + delta * (column - mean)
    stderr = (square / (probes - 1) / probes).sqrt() if probes > 1 else mean * math.nan
    base = provenance(problem, kind, "Hutchinson")
    drawn = f"{probes} probe{'s' * (probes > 1)}"
    info = base.with_(
        what=f"Hutchinson diagonal of the {kind.title} ({drawn}{', spatial' * spatial})",
        exact=False,
        seconds=time.perf_counter() - start,
        passes=2.0 * probes,
        settings={
            **base.settings,
            "matrix": matrix,
            "probes": probes,
            "seed": seed,
            "spatial": spatial,
        },
    )
    blocks: dict[str, Operator] = {}
    for name, members in problem.blocks.items():
        index = problem.layout.index(members).to(mean.device)
        blocks[name] = DiagonalOperator(mean[index])
        blocks[name].stderr = stderr[index]  # type: ignore[attr-defined]
    op = assemble(problem, blocks, info, {}, "raise")
    op.stderr, op.probes = stderr, probes  # type: ignore[attr-defined]
    return op


def min_max(x: Tensor) -> Tensor:
    """AdaFisher's normalisation ``(x - min x) / (max x - min x + 1e-6)``, all groups together."""
    low = x.min()
    return (x - low) / (x.max() - low + 1e-6)


@plain_mode()
def diagonal_kf(
    problem: Problem,
    *,
    fisher: str = "empirical",
    normalise: str | None = None,
    scale: str = "curvature",
    samples: int = 1,
    seed: int = 0,
    uncovered: str = "raise",
) -> BlockDiagonalOperator:
    """Diagonal Kronecker factors, ``diag(s) (x) diag(h)`` per layer (AdaFisher's form).

    ``scale="curvature"`` takes the diagonals of K-FAC's factors (expand), so that the product
    approximates the block of the objective. ``scale="adafisher"`` takes AdaFisher's own: means over
    all rows of ``a_j^2`` and of ``s_i^2`` with ``s`` the gradient of the mean loss at the observed
    labels, and its rule for normalisation layers. ``normalise="minmax"`` maps both vectors to
    [0, 1] as AdaFisher does before it uses them (its scale is then that of AdaFisher), with the
    extremes of all groups of a grouped convolution together. ``fisher``, ``samples``, ``seed`` and
    ``uncovered`` are those of :func:`~curvscope.kfac`.

    Cost: per batch one forward pass and one backward pass (``fisher="exact"``: one per output).

    Raises ``OptionError`` for unknown options and for AdaFisher's factors with other than the
    observed labels, ``UnsupportedLossError`` for a loss that is no log-likelihood (unless
    ``"empirical"``), and the errors of the problem itself (``DataError``,
    ``NonFiniteError``, ``NonDeterministicError``).

    Source: Martins Gomes et al. 2025 (AdaFisher), section 3 and appendix A.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op = cs.diagonal_kf(problem)
    >>> op.blocks["0"].factors["A"].shape
    torch.Size([4])
    """
    check_option("normalise", normalise, (None, "minmax"))
    check_option("scale", scale, ("curvature", "adafisher"))
    if normalise == "minmax" or scale == "adafisher":
        if fisher != "empirical":
            raise OptionError(
                f"AdaFisher's factors use the observed labels; fisher={fisher!r} needs "
                "scale='curvature' and normalise=None."
            )
        return _adafisher(problem, normalise, uncovered)
    kind = label_kind(problem, fisher, seed, samples)
    run = collect_factors(problem, kind, "expand", prepared(problem, kind), diagonal=True)
    info = kronecker_info(problem, kind, "diagonal K-FAC", run, fisher=fisher)
    blocks: dict[str, Operator] = {
        name: DiagonalKroneckerOperator(f.G, f.A, f.view) for name, f in run.factors.items()
    }
    return assemble(problem, blocks, info, run.reasons, uncovered)


def _adafisher(problem: Problem, normalise: str | None, uncovered: str) -> BlockDiagonalOperator:
    """AdaFisher's factors over the whole data, as if it were one batch."""
    start = time.perf_counter()
    kind = Kind(EMPIRICAL)
    at = prepared(problem, kind)
    plans = plans_for(problem, dict(problem.blocks), at)
    dtype = accumulation_dtype(problem.dtype)
    sums: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    facts = problem.check()
    with problem.session(at):
        for inputs, targets in track(problem.batches(), "AdaFisher factors", total=facts.batches):
            recording = record_batch(problem, inputs, targets)
            total = problem.batch_total(recording.outputs, targets)
            (seed,) = torch.autograd.grad(total, recording.outputs, retain_graph=True)
            gradients = recording.gradients(seed)
            if sums:  # what holds for the first batch need not hold for this one
                left = [plan for name, plan in plans.items() if name not in reasons]
                reasons.update(broken(problem, recording, left))
            for name, plan in plans.items():
                if name in reasons:
                    continue
                calls = [recording.calls[k] for k in plan.calls]
                reason = adafisher_reason(plan, calls)
                if reason is not None:
                    reasons[name] = reason
                    continue
                into = sums.setdefault(name, {"rows": 0})
                for k in plan.calls:
                    call, axis, s = recording.calls[k], recording.axes[k], gradients[k]
                    assert axis is not None
                    s = torch.zeros_like(call.outputs) if s is None else s
                    s = (s * problem.scale).to(dtype)
                    if isinstance(call.kind, Scale):
                        _add_norm(into, call, s, recording.samples)
                    else:
                        _add_rows(into, plan, call, axis, s, recording.samples, dtype)
    blocks: dict[str, Operator] = {}
    for name, into in sums.items():
        if name in reasons:
            continue
        h, s, view = _finish(into, plans[name], facts.samples)
        if normalise == "minmax":
            h, s = min_max(h), min_max(s)
        blocks[name] = DiagonalKroneckerOperator(s, h, view)
    run = FactorRun({}, reasons, time.perf_counter() - start, 1.0)
    what = "AdaFisher factors" + (" (min-max)" if normalise else "")
    info = kronecker_info(problem, kind, what, run, normalise=normalise, scale="adafisher")
    return assemble(problem, blocks, info, reasons, uncovered)


def adafisher_reason(plan: BlockPlan, calls: list[Call]) -> str | None:
    """Why AdaFisher's factors are not defined for a block; ``None`` where they are."""
    if "gram" in plan.reasons:
        return plan.reasons["gram"]
    if not calls:
        return "the block's parameters are not used"
    first = calls[0]
    if any(c.weight is not first.weight or c.kind.name != first.kind.name for c in calls):
        return "the block spans several layers"
    if isinstance(first.kind, Scale):
        if not all(any(p is q for q in (first.weight, first.bias)) for p in plan.parameters):
            return "the block spans several layers"
        return None
    if plan.view is None:
        if not first.kind.kronecker:
            return f"AdaFisher has no rule for {first.kind.name}"
        if not any(p is first.weight for p in plan.parameters):
            return (
                f"the block has not the weight of its {first.kind.name}, which is tied to another "
                "layer's, in another block or left out"
            )
        return "the block is not the weight (and bias) of one layer"
    return None


def _add_rows(
    into: dict[str, Any],
    plan: BlockPlan,
    call: Call,
    axis: Any,
    s: Tensor,
    samples: int,
    dtype: torch.dtype,
) -> None:
    a = call.kind.input_rows(call, axis, samples).to(dtype)
    if len(plan.parameters) == 2:
        a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
    g = call.kind.output_rows(call, s, axis, samples)
    into["h"] = into.get("h", 0) + a.square().sum((0, 1))
    into["s"] = into.get("s", 0) + g.square().sum((0, 1))
    into["rows"] += a.shape[0] * a.shape[1]


def _add_norm(into: dict[str, Any], call: Call, s: Tensor, samples: int) -> None:
    features = call.options["features"]
    raw = call.options["raw"].to(s.dtype)
    channels = math.prod(raw.shape[f] for f in features)
    others = [axis for axis in range(raw.ndim) if axis not in features]
    positions = raw.numel() // (channels * samples)
    into["q"] = into.get("q", 0) + raw.sum(others).reshape(-1) / positions**2
    into["s"] = into.get("s", 0) + s.sum(others).reshape(-1)
    into["both"] = call.weight is not None and call.bias is not None
    into["weight_first"] = call.weight is not None


def _finish(
    into: dict[str, Any], plan: BlockPlan, samples: int
) -> tuple[Tensor, Tensor, MatrixView]:
    if "q" not in into:
        assert plan.view is not None
        return into["h"] / into["rows"], into["s"] / into["rows"], plan.view
    q, s = into["q"], into["s"]
    channels = q.numel()
    h = torch.stack([q.square().sum(), q.new_tensor(float(channels))]) / samples**2
    s = s.square() / samples
    if len(plan.parameters) == 2:
        view = MatrixView.for_weight_and_bias(channels, 1)
    else:
        view = MatrixView(1, channels, 1)
        h = h[:1] if into["weight_first"] else h[1:]
    return h.unsqueeze(0), s.unsqueeze(0), view
