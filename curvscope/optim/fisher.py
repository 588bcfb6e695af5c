"""The factors of K-FAC on one minibatch, for sampled, exact and observed labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..errors import OptionError
from ..modes import apart
from ..problem.losses import Loss
from . import checks
from .labels import Head, head_of_outputs, named_loss, read_loss, with_samples
from .statistics import InputMoments, OutputMoments
from .tap import LayerCall, accumulates, gradient_edge, measuring, reaches


@dataclass
class Moments:
    """What the passes of one step have seen of a layer."""

    inputs: InputMoments = field(default_factory=InputMoments)
    outputs: OutputMoments = field(default_factory=OutputMoments)

    @property
    def complete(self) -> bool:
        """Whether both factors are there."""
        return self.inputs.second is not None and self.outputs.second is not None


class FisherStatistics:
    """Collects ``A`` and ``G`` of every layer through the hooks of a :class:`~.tap.LayerTap`.

    ``"empirical"`` takes the gradients of the backward pass itself. ``"mc"`` and ``"exact"`` add
    backward passes of their own, which give no weight gradients: just before the loss's own one,
    when :meth:`read` is handed the loss, or (``loss`` given) when that one has reached the outputs
    of the model. Statistics that no step collects live as long as their graph.
    """

    def __init__(self, fisher: str, loss: Any, seed: int) -> None:
        self.fisher = fisher
        self.loss = named_loss(loss)
        self.generator = torch.Generator().manual_seed(seed)
        self.seen: dict[str, Moments] = {}
        self._terms = 0  # what a named loss averages over, in all passes of the step together
        self._pending: list[tuple[LayerCall, GradientEdge]] = []
        self._kept: list[Tensor] = []  # weights to whose .grad the gradients seen went

    @property
    def without_closure(self) -> bool:
        """Whether a backward pass alone is enough."""
        return self.fisher == "empirical" or self.loss is not None

    def reset(self) -> None:
        """Forget everything seen so far."""
        self._pending = []
        self.forget_seen()

    def forget_seen(self) -> None:
        """Forget backward passes; forward passes may still be waiting for theirs."""
        self.seen, self._terms, self._kept = {}, 0, []

    # -- what hooks call -------------------------------------------------------------------------

    def receive(self, call: LayerCall) -> None:
        """A layer has been used."""
        if self._kept and all(weight.grad is None for weight in self._kept):
            self.forget_seen()  # model.zero_grad(): no step will have those gradients
        if self.fisher == "empirical":
            call.on_gradient(self._add_observed)
            return
        waiting = self._pending if self.loss is not None else []
        if waiting and waiting[0][0].pass_index != call.pass_index:
            self._pending = []  # of a pass whose outputs were never seen
        self._pending.append((call, gradient_edge(call.outputs)))

    def outputs(self, outputs: Tensor) -> Tensor | None:
        """The model has returned: measure this pass once its backward pass begins."""
        calls, self._pending = self._pending, []
        if self.loss is None or not outputs.requires_grad or not checks.finite(outputs):
            return None
        # The hook goes to a node behind all that it holds; otherwise the graph would hold itself
        # and stay for ever.
        later = outputs.clone()
        if self.fisher == "empirical":
            seen = outputs.detach()
            later.register_hook(lambda gradient: self.count_terms(seen))
        elif calls:
            head = head_of_outputs(outputs, self.loss)

            def begin(gradient: Tensor) -> None:
                if not any(reaches(call.layer.weight) for call, _ in calls):
                    return  # the derivative in the inputs, for an adversarial example
                self._keep(call for call, _ in calls if accumulates(call.layer.weight))
                self._measure_named(head, calls)

            later.register_hook(begin)
        return later

    def count_terms(self, outputs: Tensor) -> None:
        """Count the terms of the loss that was named, for these outputs."""
        if isinstance(self.loss, Loss):
            self._count(self.loss.terms(with_samples(self.loss, outputs), 1).shape[1], 0)

    def _count(self, terms: int, samples: int) -> None:
        """Add to what a named loss averages over: terms, for a string samples, nothing for sums."""
        if isinstance(self.loss, Loss):
            self._terms += 0 if self.loss.reduction == "sum" else terms
        else:
            self._terms += samples

    def _measure_named(self, head: Head, calls: Sequence[tuple[LayerCall, GradientEdge]]) -> None:
        self._count(len(head.z), calls[0][0].samples)
        self._measure([head], calls)

    def read(self, loss: Tensor, again: bool = False) -> None:
        """``loss.backward()`` is about to be called; ``again``: maybe not for the last time."""
        if self._pending and checks.finite(loss):
            self._keep(call for call, _ in self._pending)
            left = self._measure(read_loss(loss), self._pending)
            self._pending = self._pending if again else left

    def read_outputs(self, outputs: Any) -> None:
        """Measure now, by the loss that was named."""
        calls, self._pending = self._pending, []
        if not isinstance(outputs, Tensor):
            raise OptionError(
                f"With loss= the model must return one tensor, not {type(outputs).__name__}; "
                "leave loss= out, so that it is read from the loss that the closure returns."
            )
        if calls:
            assert self.loss is not None
            self._measure_named(head_of_outputs(outputs, self.loss), calls)

    # -- measuring -------------------------------------------------------------------------------

    def _keep(self, calls: Iterable[LayerCall]) -> None:
        """The weights of these layers are about to get a ``.grad``."""
        self._kept += [call.layer.weight for call in calls]

    def _add_observed(self, call: LayerCall, gradient: Tensor) -> None:
        if accumulates(call.layer.weight):
            self._keep([call])
        moments = self.seen.setdefault(call.layer.block, Moments())
        moments.inputs.add(call, call.dtype)
        moments.outputs.add(call, gradient, call.dtype)

    def _measure(
        self, heads: Sequence[Head], calls: Sequence[tuple[LayerCall, GradientEdge]]
    ) -> list[tuple[LayerCall, GradientEdge]]:
        """Factors of some passes; returns the calls on which the outputs do not depend."""
        starts = [edge for _, edge in calls]
        reached: set[int] = set()
        for chosen, cotangents in self._cotangents(heads, calls[0][0].samples):
            ends = [head.edge for head in chosen]
            with apart():
                gradients = torch.autograd.grad(
                    ends, starts, cotangents, retain_graph=True, allow_unused=True
                )
            with measuring(cotangents[0].device):
                for k, gradient in enumerate(gradients):
                    if gradient is not None:
                        call = calls[k][0]
                        moments = self.seen.setdefault(call.layer.block, Moments())
                        moments.outputs.add(call, gradient.detach(), call.dtype)
                        reached.add(k)
                        if not call.counted:
                            moments.inputs.add(call, call.dtype)
                            call.counted = True
        return [call for k, call in enumerate(calls) if k not in reached]

    def _cotangents(
        self, heads: Sequence[Head], samples: int
    ) -> Iterator[tuple[Sequence[Head], list[Tensor]]]:
        if self.fisher == "mc":
            yield heads, [head.sampled(self.generator) for head in heads]
            return
        for head in heads:
            for cotangent in head.exact(samples):
                yield [head], [cotangent]

    def moments(self, blocks: Sequence[str], scale: float) -> list[Tensor]:
        """``A``, ``G`` of every block in turn; ``scale`` is a GradScaler's factor in the loss.

        ``A = (1/(N T)) sum a a^T``; ``G = sum w g g^T``, for observed labels with the loss regarded
        as a mean over N samples, or over the terms of the loss that was named: of all passes
        together, which are one larger batch.
        """
        found: list[Tensor] = []
        for block in blocks:
            inputs, outputs = self.seen[block].inputs, self.seen[block].outputs
            assert inputs.second is not None and outputs.second is not None
            factor = 1.0 / scale
            if self.fisher == "empirical":
                named = isinstance(self.loss, Loss)
                factor = (max(self._terms, 1) if named else inputs.samples) / scale**2
            elif self.loss is not None:  # the loss that was scaled plays no role
                factor = 1.0 / max(self._terms, 1)
            found += [inputs.second / inputs.rows, outputs.second * factor]
        return found

    # -- copies ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "seen": {}, "_pending": [], "_terms": 0, "_kept": []}
        return {**state, "generator": self.generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.generator = torch.Generator()
        self.generator.set_state(state["generator"])
