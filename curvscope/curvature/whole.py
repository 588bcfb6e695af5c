"""A matrix over all parameters, whole and by block, each block by its cheapest route."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedLayerError, counted
from ..modes import plain_mode
from ..operators import Blocks, LowRankOperator, Operator
from ..problem import Problem, Snapshot
from .autograd import AutogradOperator, is_convex
from .gram import RouteFailed, gram_blocks, plans_for, row_blocks
from .plan import BlockPlan
from .products import GGN, HESSIAN, Kind


class WholeOperator(AutogradOperator):
    """A matrix over all parameters of a problem, whole (``@``, ``dense()``) and by block.

    Nothing is computed until it is asked for. ``blocks[name]`` is the exact diagonal block, by the
    cheapest valid route (named in its ``info.route``); ``op @ v`` is matrix-free.
    """

    def __init__(
        self,
        problem: Problem,
        kind: Kind,
        route: str,
        at: Snapshot,
        *,
        engine: str = "auto",
        memory: int | None = None,
    ) -> None:
        super().__init__(problem, kind, list(problem.params), at, engine=engine, memory=memory)
        self.route = route
        self.members: dict[str, tuple[str, ...]] = dict(problem.blocks)
        self._plans: dict[str, BlockPlan] | None = None
        self._blocks: dict[str, Operator] = {}

    @property
    def blocks(self) -> Mapping[str, Operator]:
        return _LazyBlocks(self)

    def __repr__(self) -> str:
        if self._plans is None or self.route != "auto":  # plans take a pass to make
            routes = f"{self.route!r} routes" if self.route == "auto" else f"route {self.route!r}"
        else:
            routes = ", ".join(dict.fromkeys(repr(self.route_of(name)) for name in self.members))
        exact = "exact" if self.info.exact else "approximate"
        return (
            f"{type(self).__name__}({self.info.what}, {exact}, {self.shape[0]} x {self.shape[1]}, "
            f"{counted(len(self.members), 'block')} by {routes}, products by autograd, "
            f"{str(self.dtype)[6:]})"
        )

    def focused(self, names: Iterable[str]) -> WholeOperator:
        """The same matrix with some of its blocks only, so that no other one is computed with them.

        Plans and computed blocks are shared.
        """
        other = copy.copy(self)
        other.members = {name: self.members[name] for name in names}
        other._plans = self.plans
        return other

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

    @plain_mode()
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
                block = AutogradOperator(
                    self.problem,
                    self.kind,
                    self.members[name],
                    self.at,
                    engine=self.engine,
                    memory=self.memory,
                )
                block.view = self.plans[name].view
                self._blocks[name] = block
        return self._blocks[name]

    @plain_mode()
    def compute_rows(self, names: Iterable[str]) -> None:
        """Compute those of the blocks whose route is ``"rows"`` at once, and keep them.

        Cheaper than one after the other: they share graphs, and Hessians behind them.
        """
        rows = [n for n in names if self.route == "auto" and "rows" in self._valid(n)[:1]]
        rows = [n for n in rows if n not in self._blocks]
        if len(rows) > 1:
            self._together(row_blocks, rows, "rows")

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
            plan = self.plans[name]
            own = 2.0 * plan.positions * plan.outputs if route == "rows" else passes / len(found)
            block.info = self.info.with_(route=route, seconds=seconds / len(found), passes=own)
            if self.kind.matrix != HESSIAN or route == "piecewise-linear":
                block.positive_semidefinite = is_convex(self.problem, kind)
            self._blocks[name] = block

    @plain_mode()
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

    @plain_mode()
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
        """Exact diagonal: of the matrix, if that has been formed, else of its blocks."""
        if self._kept is not None:
            return self._kept.diagonal().clone()
        result = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        self.compute_rows(self.members)
        for name, members in self.members.items():
            index = self.problem.layout.index(members).to(self.device)
            result[index] = self.blocks[name].diagonal().to(self.dtype)
        return result

    def trace(self) -> float:
        if self._kept is not None:
            return super().trace()
        self.compute_rows(self.members)
        return float(sum(block.trace() for block in self.blocks.values()))

    @property
    def diagonal_is_known(self) -> bool:
        """Whether :meth:`diagonal` and :meth:`trace` need nothing but what has been computed."""
        found = [self._blocks.get(name) for name in self.members]
        return self._kept is not None or all(
            block is not None and getattr(block, "_kept", block) is not None for block in found
        )


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

    def _known(self) -> Mapping[str, Operator]:
        return self._owner._blocks

    def __repr__(self) -> str:
        there = f", computed are {list(self._known())}" if self._known() else ""
        return f"Blocks({list(self)}, each computed when it is looked up{there})"


def whole_plan(op: WholeOperator) -> BlockPlan | None:
    """One block of all parameters, if the gram route is valid for every block."""
    if any("gram" not in plan.routes for plan in op.plans.values()):
        return None
    names = tuple(op.problem.params)
    parameters = tuple(op.problem.params[n] for n in names)
    calls = tuple(sorted({k for plan in op.plans.values() for k in plan.calls}))
    axes = {k: axis for plan in op.plans.values() for k, axis in plan.axes.items()}
    return BlockPlan("all parameters", names, parameters, calls, ("gram",), axes=axes)
