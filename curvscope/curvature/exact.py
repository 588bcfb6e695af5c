"""The exact matrices: Hessian, generalised Gauss-Newton, Fisher, empirical Fisher."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    DataError,
    OptionError,
    UnsupportedLayerError,
    UnsupportedLossError,
    check_option,
)
from ..operators import Blocks, LowRankOperator, Operator, Provenance
from ..problem import Problem, Snapshot
from ..progress import track
from .gram import RouteFailed, gram_blocks, plans_for, record_batch, row_blocks
from .plan import BlockPlan
from .products import EMPIRICAL, FISHER, GGN, HESSIAN, Kind, VectorJacobian, batch_product

_AUTO = ("auto", "gram", "rows", "autograd", "backpack")
_CACHED = 4096


class AutogradOperator(Operator):
    """A matrix over some parameters, known through products by double backward.

    Exact for every model that autograd can differentiate twice. :meth:`dense` takes one product
    per column and is kept for up to 4,096 rows. The parameters' values are those at the time the
    operator was made, even if the model is trained on meanwhile.
    """

    def __init__(self, problem: Problem, kind: Kind, names: Sequence[str], at: Snapshot) -> None:
        self.problem, self.kind, self.at = problem, kind, at
        self.layout = problem.layout.restrict(names)
        self.parameters = [problem.params[n] for n in self.layout.names]
        size = self.layout.numel
        self.shape = (size, size)
        self.dtype = torch.promote_types(problem.dtype, torch.float32)
        self.device = problem.device
        self.positive_semidefinite = None if kind.matrix == HESSIAN else _convex(problem, kind)
        self.info = provenance(problem, kind, "autograd")
        self._kept: Tensor | None = None

    def _matmat(self, vectors: Tensor) -> Tensor:
        if self._kept is not None:
            return self._kept @ vectors
        generator = self.kind.generator()

        def one(inputs: Any, targets: Any) -> Tensor:
            return batch_product(
                self.problem, self.kind, self.parameters, inputs, targets, vectors, generator
            )

        return self.problem.scale * self.problem.sum_over_batches(one, at=self.at)

    def _dense(self) -> Tensor:
        if self._kept is None:
            matrix = self._columns()
            matrix = (matrix + matrix.mT) / 2
            if self.shape[0] > _CACHED:
                return matrix
            self._kept = matrix
        return self._kept.clone()

    def _columns(self) -> Tensor:
        size = self.shape[0]
        if self.kind.matrix != HESSIAN:
            eye = torch.eye(size, dtype=self.dtype, device=self.device)
            parts = [self._matmat(part.mT) for part in track(eye.split(64), self._label())]
            return torch.cat(parts, 1)
        result = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        with self.problem.session(self.at):
            for inputs, targets in self.problem.batches():
                total = self.problem.batch_total(self.problem.outputs(inputs), targets)
                if not total.requires_grad:
                    continue
                gradients = torch.autograd.grad(
                    total, self.parameters, create_graph=True, allow_unused=True
                )
                flat = torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).reshape(-1)
                        for p, g in zip(self.parameters, gradients, strict=True)
                    ]
                )
                second = VectorJacobian(flat, self.parameters)
                for start in track(range(0, size, 64), self._label()):
                    stop = min(start + 64, size)
                    units = torch.zeros(stop - start, size, dtype=flat.dtype, device=self.device)
                    units[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
                    result[start:stop] += second(units).to(self.dtype)
        return result * self.problem.scale

    def _label(self) -> str:
        return f"{self.kind.title} of {self.shape[0]} parameters"

    def diagonal(self) -> Tensor:
        return self.dense().diagonal().clone()


class WholeOperator(AutogradOperator):
    """A matrix over all parameters of a problem, whole (``@``, ``dense()``) and by block.

    Nothing is computed until it is asked for. ``blocks[name]`` is the exact diagonal block, by the
    cheapest valid route (named in its ``info.route``); ``op @ v`` is matrix-free.
    """

    def __init__(self, problem: Problem, kind: Kind, route: str, at: Snapshot) -> None:
        super().__init__(problem, kind, list(problem.params), at)
        self.route = route
        self.members: dict[str, tuple[str, ...]] = dict(problem.blocks)
        self._plans: dict[str, BlockPlan] | None = None
        self._blocks: dict[str, Operator] = {}

    @property
    def blocks(self) -> Mapping[str, Operator]:
        return _LazyBlocks(self)

    @property
    def plans(self) -> dict[str, BlockPlan]:
        """The routes that are valid for each block, and why others are not."""
        if self._plans is None:
            self._plans = plans_for(self.problem, dict(self.members), self.at)
        return self._plans

    def route_of(self, name: str) -> str:
        """The route that will compute a block. Raises ``UnsupportedLayerError`` if it cannot."""
        if self.route == "backpack":
            return "backpack"
        valid = self._valid(name)
        if not valid:
            reasons = self.plans[name].reasons
            reason = reasons.get(
                self._wanted, reasons.get("gram", f"it is none for a {self.kind.title}")
            )
            raise UnsupportedLayerError(
                f"Route {self.route!r} is not valid for block {name!r}: {reason}. Use route='auto'."
            )
        return valid[0]

    @property
    def _wanted(self) -> str:
        """The forced route under the name that it has in the plans."""
        if self.kind.matrix == HESSIAN and self.route == "gram":
            return "piecewise-linear"
        return self.route

    def _valid(self, name: str) -> list[str]:
        """Routes that may compute a block, the cheapest first; empty if the forced one may not."""
        plan = self.plans[name]
        hessian = self.kind.matrix == HESSIAN
        allowed = ("piecewise-linear", "rows", "autograd") if hessian else ("gram", "autograd")
        valid = [r for r in plan.routes if r in allowed]
        if self.route != "auto":
            return [r for r in valid if r == self._wanted]
        if "rows" in valid[:1] and plan.positions * plan.outputs >= plan.size:
            return valid[1:]
        return valid

    def _compute(self, name: str) -> Operator:
        while name not in self._blocks:  # a route that fails on a later batch gives way to the next
            route = self.route_of(name)
            if route == "backpack":
                from .backpack import sqrt_ggn

                self._blocks.update(sqrt_ggn(self.problem).blocks)
            elif route in ("gram", "piecewise-linear"):
                same = [n for n in self.members if route in self._valid(n)[:1]]
                self._together(functools.partial(gram_blocks, route=route), same, route)
            elif route == "rows":
                self._together(row_blocks, [name], route)
            else:
                block = AutogradOperator(self.problem, self.kind, self.members[name], self.at)
                block.view = self.plans[name].view
                self._blocks[name] = block
        return self._blocks[name]

    def _together(self, compute: Any, names: list[str], route: str) -> None:
        """Compute blocks that share passes; one whose route fails on a later batch loses it."""
        names = [n for n in names if n not in self._blocks]
        kind = Kind(GGN) if route == "piecewise-linear" else self.kind
        start = time.perf_counter()
        try:
            found, passes = compute(self.problem, kind, [self.plans[n] for n in names], self.at)
        except RouteFailed as failed:
            plan = self.plans[failed.block]
            self.plans[failed.block] = dataclasses.replace(
                plan,
                routes=tuple(r for r in plan.routes if r != route),
                reasons={**plan.reasons, route: failed.reason},
            )
            rest = [n for n in names if n != failed.block]
            if rest:
                self._together(compute, rest, route)
            return
        seconds = time.perf_counter() - start
        for name, block in found.items():
            block.layout = self.problem.layout.restrict(self.members[name])
            block.info = provenance(self.problem, self.kind, route).with_(
                seconds=seconds / len(found), passes=passes / len(found)
            )
            if self.kind.matrix != HESSIAN or route == "piecewise-linear":
                block.positive_semidefinite = _convex(self.problem, kind)
            self._blocks[name] = block

    def vectors(self) -> LowRankOperator | None:
        """``V V^T`` over all parameters where every block allows it and it fits, else ``None``."""
        if self.kind.matrix == HESSIAN or self.route not in ("auto", "gram"):
            return None
        plan = whole_plan(self)
        if plan is None:
            return None
        try:
            found, _ = gram_blocks(self.problem, self.kind, [plan], self.at, form="vectors")
        except RouteFailed:
            return None
        block = found[plan.name]
        assert isinstance(block, LowRankOperator)
        block.layout, block.info = self.layout, self.info.with_(route="gram")
        return block

    def _columns(self) -> Tensor:
        plan = whole_plan(self) if self.route in ("auto", "gram") else None
        if plan is not None and self.kind.matrix != HESSIAN:
            try:
                found, _ = gram_blocks(self.problem, self.kind, [plan], self.at, form="dense")
                return found[plan.name].dense().to(self.dtype)
            except RouteFailed:
                pass
        return super()._columns()

    def diagonal(self) -> Tensor:
        """Exact diagonal, put together from the blocks."""
        result = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for name, members in self.members.items():
            index = self.problem.layout.index(members).to(self.device)
            result[index] = self.blocks[name].diagonal().to(self.dtype)
        return result

    def trace(self) -> float:
        return float(sum(block.trace() for block in self.blocks.values()))


class _LazyBlocks(Blocks):
    """Blocks that are computed when they are looked up."""

    def __init__(self, owner: WholeOperator) -> None:
        super().__init__(dict.fromkeys(owner.members))  # type: ignore[arg-type]
        self._owner = owner

    def __getitem__(self, name: str) -> Operator:
        super().__getitem__(name)
        return self._owner._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner.members)


def whole_plan(op: WholeOperator) -> BlockPlan | None:
    """One block of all parameters, if the gram route is valid for every block."""
    if any("gram" not in plan.routes for plan in op.plans.values()):
        return None
    names = tuple(op.problem.params)
    parameters = tuple(op.problem.params[n] for n in names)
    calls = tuple(sorted({k for plan in op.plans.values() for k in plan.calls}))
    return BlockPlan("all parameters", names, parameters, calls, ("gram",))


def _convex(problem: Problem, kind: Kind) -> bool | None:
    return True if problem.loss.likelihood is not None or kind.needs_samples else None


def provenance(problem: Problem, kind: Kind, route: str) -> Provenance:
    """What is known of a matrix of this problem before it is computed."""
    facts = problem.check()
    settings: dict[str, Any] = {
        "loss": problem.loss.name,
        "reduction": problem.loss.reduction,
        "samples": facts.samples,
        "terms": facts.terms,
        "batchnorm": problem.batchnorm,
    }
    if kind.samples is not None:
        settings |= {"sampled_labels": kind.samples, "seed": kind.seed}
    if kind.matrix == EMPIRICAL:
        settings["per"] = kind.per
    notes = []
    if any(m.training for m in problem.user_model.modules()) and problem.batchnorm == "eval":
        notes.append("computed as under eval(), although the model is in train mode")
    if problem.batchnorm == "batch":
        notes.append("BatchNorm by batch statistics: a quantity of the batches as given")
    return Provenance(kind.title, route, kind.exact, settings, tuple(notes))


def _make(problem: Problem, kind: Kind, route: str) -> WholeOperator:
    check_option("route", route, _AUTO)
    if not isinstance(problem, Problem):
        raise OptionError(f"A Problem is needed, not {type(problem).__name__}.")
    problem.check()
    at = problem.snapshot()
    if kind.needs_samples:
        check_sample_axis(problem, kind, at)
    return WholeOperator(problem, kind, route, at)


def check_sample_axis(problem: Problem, kind: Kind, at: Snapshot) -> None:
    """Gradients of single samples need outputs that say which sample they belong to."""
    with problem.session(at):
        inputs, targets = next(problem.batches())
        recording = record_batch(problem, inputs, targets)
    n, outputs = recording.samples, recording.outputs
    known = outputs.ndim > 0 and outputs.shape[0] == n
    folded = recording.separable_outputs and any(a is not None for a in recording.axes)
    if not (known or folded):
        raise DataError(
            f"Outputs of shape {list(outputs.shape)} do not say which of the {n} samples (first "
            f"axis of the inputs) they belong to, so the {kind.title} is not defined. Return "
            "outputs with the samples first from forward=, for instance [N, C, T] for tokens."
        )


def hessian(problem: Problem, *, route: str = "auto") -> WholeOperator:
    """The Hessian ``d^2 f / d theta^2`` ``[P, P]``, whole and by block.

    Blocks of layers that only piecewise linear operations follow equal the Gauss-Newton block and
    are computed as such; Linear layers in other nets by ``sum_n H_n (x) a_n a_n^T``; everything
    else by double backward, column by column. ``route`` forces ``"gram"``, ``"rows"`` or
    ``"autograd"`` (``UnsupportedLayerError`` where that is not valid).
    """
    if route == "backpack":
        raise OptionError("BackPACK has no full Hessian block; use cs.backpack.diag_hessian.")
    return _make(problem, Kind(HESSIAN), route)


def ggn(problem: Problem, *, route: str = "auto") -> WholeOperator:
    """Generalised Gauss-Newton ``(1/M) sum_m J_m^T (d^2 l_m/dz^2) J_m`` (Schraudolph 2002).

    Positive semi-definite for convex losses. Blocks come as ``V V^T`` in one backward pass per
    output (factored for Linear layers), else by double backward. ``route="backpack"`` takes
    BackPACK's ``SqrtGGNExact``.
    """
    return _make(problem, Kind(GGN), route)


def fisher(
    problem: Problem, samples: int | None = None, *, seed: int = 0, route: str = "auto"
) -> WholeOperator:
    """The Fisher information ``(1/M) sum_m c_m E_{y~p}[grad log p(y) grad log p(y)^T]``.

    ``samples=None`` takes the expectation exactly (it then equals the GGN); ``samples=n`` draws n
    labels per term from the model (Martens 2020, section 5). Raises ``UnsupportedLossError`` for a
    loss that is no log-likelihood.
    """
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise OptionError(f"samples={samples!r} must be None (exact) or a positive integer.")
    if problem.loss.likelihood is None:
        raise UnsupportedLossError(problem.loss.no_likelihood("Its Fisher"))
    return _make(problem, Kind(FISHER, samples=samples, seed=seed), route)


def empirical_fisher(
    problem: Problem, *, per: str = "sample", route: str = "auto"
) -> WholeOperator:
    """``(1/M) sum_n g_n g_n^T`` with the gradients at the observed labels. Not the Fisher.

    ``g_n`` is the gradient of sample n's summed terms, each scaled by ``1/sqrt(c_m)`` so that a
    class weight of 2 is the same as duplication; ``per="term"`` takes tokens or pixels one by one
    (Kunstner, Balles and Hennig 2019).
    """
    check_option("per", per, ("sample", "term"))
    return _make(problem, Kind(EMPIRICAL, per=per), route)
