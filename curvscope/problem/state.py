"""Evaluating the user's model without changing anything of the user's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

# the dictionaries of nn.Module that hold other things than plain attributes
_TRACKED = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


@contextmanager
def random_state() -> Iterator[None]:
    """Put back the global random states of torch, CUDA, NumPy and ``random`` afterwards."""
    torch_state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def module_state(model: nn.Module) -> Iterator[None]:
    """Put back flags, buffers, attributes and ``.grad`` of every module and parameter."""
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    tracked = [
        {name: dict(module.__dict__[name]) for name in _TRACKED if name in module.__dict__}
        for module in modules
    ]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, before, inner in zip(modules, attributes, tracked, strict=True):
            now = module.__dict__
            for name in [key for key in now if key not in before]:
                del now[name]
            for name, value in before.items():
                if now.get(name, _MISSING) is not value:
                    now[name] = value
            for name, entries in inner.items():
                current = now[name]
                # by identity: comparing tensors would compare their entries
                same = all(current.get(key, _MISSING) is value for key, value in entries.items())
                if not same or list(current) != list(entries):
                    current.clear()
                    current.update(entries)
        with torch.no_grad():
            for buffer, version, value in buffers:
                # BatchNorm updates its statistics without a new version
                if buffer._version != version or not torch.equal(buffer, value):
                    buffer.copy_(value)
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient


_MISSING: Any = object()


class _WeightNorm(TorchFunctionMode):
    """Weight normalisation written out.

    The second derivative of ``torch._weight_norm`` takes the norm for a constant where it is over
    the first or the last axis (torch 2.13 and 2.15: 0.6 to 0.9 off against finite differences on a
    tiny net), so the Hessian of a model with ``weight_norm`` would silently be wrong.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        return _written_out(*args, **(kwargs or {}))


def _written_out(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def has_weight_norm(model: nn.Module) -> bool:
    """Whether ``weight_norm`` (as parametrization or as hook) is on one of the layers."""
    return any(
        isinstance(module, parametrizations._WeightNorm)
        or any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values())
        for module in model.modules()
    )


def trains_differently(model: nn.Module) -> bool:
    """Whether a layer of torch in train mode would give other outputs than under ``eval()``."""
    dropping = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)
    return any(
        module.training
        and (
            is_batch_norm(module)
            or (
                isinstance(module, dropping)
                and bool(getattr(module, "p", 0) or getattr(module, "dropout", 0))
            )
        )
        for module in model.modules()
    )


def is_batch_norm(module: nn.Module) -> bool:
    """Any BatchNorm: 1-d, 2-d, 3-d, synchronised."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


@contextmanager
def evaluation(model: nn.Module, *, batchnorm: str = "eval") -> Iterator[None]:
    """Everything that holds while curvscope evaluates a model.

    ``eval()`` flags (BatchNorm in train mode under ``batchnorm="batch"``), gradients enabled,
    autocast off, attention by the kernel that has a double backward, random states and the
    model's state preserved, also when the body fails.
    """
    with ExitStack() as stack:
        stack.enter_context(random_state())
        stack.enter_context(module_state(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in {p.device.type for p in model.parameters()} | {"cpu"}:
            if device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if has_weight_norm(model):
            stack.enter_context(_WeightNorm())
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            # the cuDNN kernels have neither a double backward nor a backward in eval mode
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        for module in model.modules():
            # not module.train(): a user's train() override may do more than set the flag
            module.training = batchnorm == "batch" and is_batch_norm(module)
        yield


@contextmanager
def values_at(parameters: list[nn.Parameter], values: list[Tensor] | None) -> Iterator[None]:
    """Let parameters have other values for a while, without copies and without version bumps."""
    if values is None:
        yield
        return
    before = [p.data for p in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data = value
