"""Calling the user's closure: the first pass with its checks, and a second pass that replays it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import OptionError, UnsupportedLossError
from ..modes import apart
from ..problem.wrappers import distributed
from .checks import outside

Closure = Callable[[], Any]
_NORMS = (nn.modules.batchnorm._NormBase,)


class RandomState:
    """The global random states of torch, CUDA, NumPy and ``random`` at one moment."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._states = (
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if self._cuda is not None else None,
            np.random.get_state(),
            random.getstate(),
        )

    def restore(self) -> None:
        """Make it the present state again."""
        cpu, cuda, numpy_state, python_state = self._states
        torch.set_rng_state(cpu)
        if cuda is not None and self._cuda is not None:
            torch.cuda.set_rng_state(cuda, self._cuda)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


class Buffers:
    """The buffers of a model at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            # the kernels of BatchNorm change running statistics without raising their version
            (b, None if isinstance(module, _NORMS) else b._version, b.detach().clone())
            for module in model.modules()
            for b in module._buffers.values()
            if b is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put back those that have changed."""
        for buffer, version, value in self._kept:
            if version is None or buffer._version != version:
                buffer.copy_(value)


def call_closure(closure: Closure, method: str) -> Tensor:
    """Run the closure with gradients enabled and return its loss, one number without a graph."""
    check_closure(closure, method)
    with torch.enable_grad():
        loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise OptionError(
            f"The closure must return the loss, a tensor of one number, but {method} got {found}. "
            "Write: def closure(): optimizer.zero_grad(); loss = ...; loss.backward(); return loss."
        )
    if not loss.is_floating_point():
        raise UnsupportedLossError(
            f"The loss is {loss.dtype}; {method} needs a floating-point loss."
        )
    return loss.detach()


class Leftovers:
    """Gradients from before a closure, to which it adds unless it clears them.

    Cleared ones are gone, or were changed twice: set to zero, and then added to.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        grads = [(p, p.grad) for p in parameters]
        self._before = [(p, g, g._version) for p, g in grads if g is not None]

    def warn_if_added_to(self, method: str) -> None:
        """Warn where the step takes a sum of which the method saw the last part only."""
        if any(p.grad is g and g._version == version + 1 for p, g, version in self._before):
            warnings.warn(
                f"The closure added to gradients from before it: {method} steps along the sum, but "
                "its factors are of the closure's passes alone, whose loss may be scaled for the "
                "sum. Accumulate within the closure, and begin it with optimizer.zero_grad().",
                stacklevel=outside(),
            )


def check_closure(closure: Any, method: str) -> Closure:
    """Refuse a missing closure."""
    if not callable(closure):
        raise OptionError(
            f"{method}.step needs a closure that evaluates the model again: "
            "def closure(): optimizer.zero_grad(); loss = ...; loss.backward(); return loss; "
            f"then optimizer.step(closure). Got {type(closure).__name__}."
        )
    return closure


@contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient, and no closure can touch ``.grad``.

    A backward pass then computes the gradients of activations only, two thirds of the work.
    """
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in kept:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, gradient in kept:
            parameter.requires_grad_(required)
            parameter.grad = gradient


class NoOtherGradients(TorchFunctionMode):
    """While a closure is called again, tensors outside the model keep their ``.grad`` too.

    Such as the parameters of an encoder that another optimizer trains. And what
    ``torch.autograd.grad`` computes in the closure is not taken for gradients of the loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[Tensor, Tensor | None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.backward:
            for leaf in leaves_of(args[0]):
                if leaf not in self._kept:
                    self._kept[leaf], leaf.grad = leaf.grad, None
        elif func is torch.autograd.grad:
            with apart():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for leaf, gradient in self._kept.items():
            leaf.grad = gradient


def leaves_of(value: Tensor) -> Iterator[Tensor]:
    """The tensors that ``value.backward()`` would give a gradient."""
    stack, seen = [value.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        stack += [below for below, _ in node.next_functions]


@contextmanager
def replaying(
    model: nn.Module, wrapper: nn.Module, at: RandomState, device: torch.device
) -> Iterator[None]:
    """For a second pass over the same minibatch: same random numbers, buffers put back.

    ``wrapper`` is the ``DistributedDataParallel`` around the model, where there is one.
    """
    now, buffers = RandomState(device), Buffers(model)
    at.restore()
    try:
        with without_weight_gradients(model), NoOtherGradients():
            parallel = distributed(wrapper)
            with parallel.no_sync() if parallel is not None else nullcontext():
                yield
    finally:
        now.restore()
        buffers.restore()


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Random states and buffers are put back afterwards."""
    now, buffers = RandomState(device), Buffers(model)
    try:
        yield
    finally:
        now.restore()
        buffers.restore()


def run_batch(
    model: nn.Module,
    batch: Any,
    device: torch.device,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> Any:
    """The model's outputs for a batch: ``forward(model, batch)``, or of the batch's first entry."""
    batch = to_device(batch, device)
    if forward is not None:
        return forward(model, batch)
    inputs = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(inputs, Tensor):
        raise OptionError(
            f"Do not know how to call the model on a batch of {type(batch).__name__}: pass "
            "forward=lambda model, batch: ..."
        )
    return model(inputs)


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        moved = [to_device(v, device) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value
