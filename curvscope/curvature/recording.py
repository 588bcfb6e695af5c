"""Recording how a forward pass uses its parameters.

Layers are recognised by the *function call* in which a parameter appears, not by module type: a
``TorchFunctionMode`` sees ``F.linear(x, W, b)`` wherever it is written. So subclasses, functional
code, the projections inside ``MultiheadAttention`` and weights shared by several layers are all
seen, no hook is ever registered, and in-place activations do no harm.

What was recorded is only believed where it can be proven complete: every use of the parameter in
the autograd graph must be one of the recorded calls, and the outputs of a call must fall apart
into samples that do not influence each other.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from .. import memory
from ..layer_calls import LAYER_TYPES
from ..layers import Call, SampleAxis, sample_axes

_ROWS_SHARE = 0.05  # of the available memory, for patches that are kept
_KEYS = ("kind", "input", "weight", "bias")


def _descending(function: Callable[..., Any]) -> Callable[..., Any]:
    """A twin of a Python function of ``torch.nn.functional`` that runs its body at once.

    The original would hand itself over to the active mode again, without end.
    """

    def no(*_: Any) -> bool:
        return False

    overridden = {"has_torch_function": no, "has_torch_function_variadic": no}
    twin = types.FunctionType(
        function.__code__,
        {**function.__globals__, **overridden},
        function.__name__,
        function.__defaults__,  # type: ignore[attr-defined]
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__  # type: ignore[attr-defined]
    return twin


_COMPOSITE = {F.multi_head_attention_forward: _descending(F.multi_head_attention_forward)}


class Recorder(TorchFunctionMode):
    """Collects a :class:`~curvscope.layers.Call` per use of one of the watched parameters."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.watched = {id(p) for p in parameters}
        self.calls: list[Call] = []

    def __torch_function__(
        self,
        func: Any,
        types_: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        if func in _COMPOSITE:
            with self:
                return _COMPOSITE[func](*args, **keywords)
        bind = LAYER_TYPES.get(func) if getattr(func, "__hash__", None) else None
        if bind is None:
            return func(*args, **keywords)
        out = func(*args, **keywords)
        uses = any(id(a) in self.watched for a in (*args, *keywords.values()))
        if not uses or not isinstance(out, Tensor) or not out.requires_grad:
            return out
        bound = bind(args, keywords)
        if not bound:
            return out
        weight, bias = (
            p if id(p) in self.watched else None for p in (bound["weight"], bound["bias"])
        )
        source = bound["source"] if "source" in bound else args[0] if args else keywords["input"]
        given = (source, bound["weight"], bound["bias"])
        others = (given[0], *(p for p in given[1:] if id(p) not in self.watched))
        call = Call(
            kind=bound["kind"],
            inputs=bound["input"].detach(),
            outputs=out,
            weight=weight,
            bias=bias,
            options={k: v for k, v in bound.items() if k not in _KEYS},
            parents=tuple(
                get_gradient_edge(t).node
                for t in others
                if isinstance(t, Tensor) and t.requires_grad
            ),
        )
        self.calls.append(call)
        # the clone keeps `out` intact when the model goes on to change it in place
        return out.clone()


@dataclass(frozen=True)
class KnownAxis:
    """Where the output of a call, of this shape, has been found to keep its samples."""

    axis: SampleAxis | None
    shape: tuple[int, ...]


@dataclass
class Recording:
    """One batch's forward pass: outputs in the graph, the calls, and what is known of them."""

    outputs: Tensor
    targets: Any
    samples: int
    calls: list[Call]
    axes: list[SampleAxis | None] = field(default_factory=list)
    separable_outputs: bool = True

    def gradients(
        self, cotangent: Tensor, wanted: Sequence[int] | None = None
    ) -> list[Tensor | None]:
        """``d <outputs, cotangent> / d z`` for the wanted calls; ``None`` without influence."""
        chosen = range(len(self.calls)) if wanted is None else wanted
        result: list[Tensor | None] = [None] * len(self.calls)
        if not chosen or not self.outputs.requires_grad:
            return result
        found = torch.autograd.grad(
            self.outputs,
            [self.calls[k].outputs for k in chosen],
            cotangent,
            retain_graph=True,
            allow_unused=True,
        )
        for k, gradient in zip(chosen, found, strict=True):
            result[k] = gradient
        return result

    def keep_rows(self, wanted: Iterable[int]) -> None:
        """Let calls keep patches between backward passes, as far as some of the memory goes."""
        left = _ROWS_SHARE * memory.available_bytes(self.outputs.device)
        for k in wanted:
            call = self.calls[k]
            size = call.kind.costly_rows(call) * call.inputs.element_size()
            call.keeps_rows = size <= left  # a layer that is too large leaves room for others
            left -= size if call.keeps_rows else 0


def record(
    forward: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    targets: Any,
    samples: int,
    *,
    only: Iterable[Tensor] | None = None,
    known: Mapping[int, KnownAxis] | None = None,
) -> Recording:
    """Run ``forward`` and record every use of ``parameters``, cut into samples where possible.

    Where ``only`` the uses of some parameters matter, the others are not cut; ``known`` says how
    this very batch has been cut before, by the position of the call.
    """
    recorder = Recorder(parameters)
    with recorder:
        outputs = forward()
    recording = Recording(outputs, targets, samples, recorder.calls)
    if only is None:
        wanted = list(range(len(recording.calls)))
    else:
        ids = {id(p) for p in only}
        wanted = [
            k for k, c in enumerate(recording.calls) if id(c.weight) in ids or id(c.bias) in ids
        ]
    _find_samples(recording, wanted, known or {})
    return recording


_CODES = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))


def _masks(samples: int) -> list[Tensor]:
    """Four parts of the samples that tell influences between them apart.

    Every sample is in two of the four parts. Two samples in different pairs of parts are each in
    a part without the other: so are any two of up to six samples, and of more five out of six
    pairs. No sample is in all parts, so that an axis of other things, of which the outputs use one
    entry only, is not taken for that of the samples.
    """
    generator = torch.Generator().manual_seed(samples)
    code = torch.randperm(samples, generator=generator) % len(_CODES)
    member = torch.zeros(len(_CODES), 4, dtype=torch.bool)
    member[torch.arange(len(_CODES)).unsqueeze(1), torch.tensor(_CODES)] = True
    return [part for part in member[code].mT if bool(part.any())]


def masked_cotangents(recording: Recording) -> Iterator[tuple[Tensor, Tensor]]:
    """Random cotangents of the outputs of some samples, and which samples are not among them."""
    n, outputs = recording.samples, recording.outputs
    generator = torch.Generator().manual_seed(0)
    fold = outputs.shape[0] // n
    for mask in _masks(n) if n > 1 else ():  # a single sample owns every position
        kept = mask.repeat_interleave(fold).to(outputs.device)
        noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        cotangent = noise.to(outputs) * kept.reshape(-1, *[1] * (outputs.ndim - 1))
        yield (~mask).nonzero().squeeze(1).to(outputs.device), cotangent


def _find_samples(
    recording: Recording, wanted: Sequence[int], known: Mapping[int, KnownAxis]
) -> None:
    """Decide, call by call, along which axis the samples lie, by what influences what.

    Outputs of some of the samples get random cotangents; a cut into samples is right if the
    gradients of the other samples are exactly zero.
    """
    n, outputs, calls = recording.samples, recording.outputs, recording.calls
    recording.axes = [None] * len(calls)
    if outputs.ndim == 0 or outputs.shape[0] % n:
        recording.separable_outputs = False
        return
    shapes = {k: tuple(calls[k].outputs.shape) for k in wanted}
    if all(k in known and known[k].shape == shapes[k] for k in wanted):
        for k in wanted:
            recording.axes[k] = known[k].axis
        return
    candidates = {k: calls[k].candidates(n) for k in wanted}
    for outside, cotangent in masked_cotangents(recording):
        gradients = recording.gradients(cotangent, wanted)
        for k in wanted:
            gradient = gradients[k]
            if gradient is None:
                continue
            candidates[k] = [
                axis for axis in candidates[k] if not bool(axis.first(gradient, n)[outside].any())
            ]
    for k, found in candidates.items():
        recording.axes[k] = found[0] if found else None


def used_elsewhere(recording: Recording, parameters: Iterable[Tensor]) -> set[int]:
    """``id`` of the parameters that influence the outputs on a way around the recorded calls.

    The walk down the graph steps from the output of a call to its input, not to its weight and
    bias: whichever parameter it still meets is used in some other way as well.
    """
    if not recording.outputs.requires_grad:
        return set()
    leaves = {get_gradient_edge(p).node: id(p) for p in parameters}
    behind = {c.outputs.grad_fn: c.parents for c in recording.calls}
    found: set[int] = set()
    seen: set[Any] = set()
    stack: list[Any] = [get_gradient_edge(recording.outputs).node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in leaves:
            found.add(leaves[node])
        elif node in behind:
            stack.extend(behind[node])
        else:
            stack.extend(follower for follower, _ in node.next_functions)
    return found


def graph_uses(outputs: Tensor, parameters: Iterable[Tensor]) -> dict[int, int]:
    """How often each parameter (by ``id``) enters the autograd graph of ``outputs``."""
    accumulators: dict[Any, int] = {}
    for p in parameters:
        view = p.view_as(p)
        accumulators[view.grad_fn.next_functions[0][0]] = id(p)  # type: ignore[union-attr]
    uses = dict.fromkeys(accumulators.values(), 0)
    seen: set[Any] = set()
    stack = [outputs.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for follower, _ in node.next_functions:
            if follower in accumulators:
                uses[accumulators[follower]] += 1
            elif follower is not None:
                stack.append(follower)
    return uses


__all__ = ["Recorder", "Recording", "graph_uses", "record", "sample_axes", "used_elsewhere"]
