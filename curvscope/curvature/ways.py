"""Trials of the ways to a product: forward against reverse mode, one by one against vectorised."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import UnsupportedLayerError
from .along import DISAGREES, agree, gap
from .graphs import BatchGraph, LinearisedGraph, split


class Jvp(Protocol):
    """``J v`` by forward mode: the outputs, with their graph on request, and ``J v``."""

    def __call__(self, parts: list[Tensor], *, graph: bool = False) -> tuple[Tensor, Tensor]: ...


class Times(NamedTuple):
    """Seconds, on some samples: of the ways to ``J v``."""

    graph: float  # of the linearised model, for reverse mode
    reverse: float  # a product through it
    forward: float  # a pass in forward mode
    joint: float  # by how much a pass with the outputs' graph gets longer if it gives J v, too

    def forward_pays(self, count: int, *, kept: bool, joined: bool) -> bool:
        """Whether ``count`` vectors take less time in forward mode.

        ``kept``: the linearised model is there already; ``joined``: the first vector goes through
        together with the outputs.
        """
        if kept:
            return self.forward < self.reverse
        first = self.joint if joined else self.forward
        return first + (count - 1) * self.forward < self.graph + count * self.reverse


def try_forward(
    run: Callable[[], Tensor], jvp: Jvp, parameters: Sequence[Tensor], *, required: bool
) -> tuple[bool | None, Times | None]:
    """Whether ``J v`` by forward mode agrees with two backward passes, and the time of both.

    ``(None, None)`` where ``run``, the outputs, do not depend on the parameters. If forward mode is
    ``required``, no times are taken, and what speaks against it is raised.
    """
    versions = [p._version for p in parameters]
    outputs = run()
    if not outputs.requires_grad:
        return None, None
    if [p._version for p in parameters] != versions:  # every pass would spoil the graph of others
        if required:
            raise UnsupportedLayerError(
                "The model changes its parameters in place when it is evaluated, so forward mode "
                "cannot be compared with reverse mode. Use engine='auto'."
            )
        return False, None
    size = sum(p.numel() for p in parameters)
    v = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(outputs)
    parts = split(v, parameters)
    try:
        (_, found), (together, joint) = (jvp(parts, graph=graph) for graph in (False, True))
        # checkpoints run again in the backward pass, then without what moves the parameters
        torch.autograd.grad(together, parameters, torch.ones_like(together), allow_unused=True)
    except Exception as error:  # operations without a forward derivative: many error types
        if required:
            raise UnsupportedLayerError(
                f"The model has no forward-mode derivative ({error}). Use engine='auto'."
            ) from error
        return False, None
    graph = LinearisedGraph(outputs, parameters, unchanged, check=True)
    if graph.by_rows:
        return False, None
    reverse = graph.times_jacobian(parts)
    agrees = agree(reverse, found) and agree(reverse, joint)
    if required and not agrees:
        raise UnsupportedLayerError(
            DISAGREES.format("J v", max(gap(reverse, found), gap(reverse, joint)))
        )
    if not agrees or required:
        return agrees, None
    # each twice in turn: the first run of all may be a slow one
    runs: list[Callable[[], object]] = [
        lambda: LinearisedGraph(outputs, parameters, unchanged),
        lambda: graph.times_jacobian(parts),
        lambda: jvp(parts),
        lambda: jvp(parts, graph=True),
        run,
    ]
    rounds = [[_seconds(way, outputs.is_cuda) for way in runs] for _ in range(2)]
    linear, back, forward, both, primal = map(min, *rounds)
    return agrees, Times(linear, back, forward, both - primal)


def vectorising_pays(graph: BatchGraph, rows: Tensor) -> bool:
    """Whether products of ``rows`` in one pass agree with single ones and take less time."""
    single, batched = torch.zeros_like(rows), torch.zeros_like(rows)

    def add(total: Tensor, vectorised: bool) -> float:
        return _seconds(
            lambda: graph.add(rows, total, 1.0, vectorised=vectorised, retain=True), rows.is_cuda
        )

    slow = add(single, False)
    try:
        fast = add(batched, True)
    except Exception:  # operations without a batching rule: many error types
        return False
    if not (agree(single, batched) and fast < 0.9 * slow):
        return False
    # the first may have been slow as it was the first, or by chance
    return fast < 0.9 * add(single, False)


def unchanged(jv: Tensor) -> Tensor:
    """The middle matrix of ``J^T M J`` where only ``J`` matters."""
    return jv


def _seconds(run: Callable[[], object], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
