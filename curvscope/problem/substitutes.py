"""What of torch is replaced while curvscope evaluates a model, because it cannot be differentiated.

Every replacement computes the same values. Without it, second derivatives (or all derivatives
taken by ``torch.autograd.grad``) would be refused by torch, or silently be wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode


@contextmanager
def differentiable(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Kernels and wrappers of torch that can be differentiated twice, instead of faster twins.

    Attributes of modules are changed as well; ``state.module_state`` puts them back.
    """
    with ExitStack() as stack:
        # the other attention kernels have no double backward
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_no_fast_path())
        stack.enter_context(_no_reentrant_checkpoints())
        if "torch._dynamo" in sys.modules:
            # compiled code has no double backward
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if has_weight_norm(modules):
            stack.enter_context(_WeightNorm())
        for module in modules:
            if isinstance(module, nn.RNNBase):
                # the cuDNN kernels have neither a double backward nor a backward in eval mode
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
                module.sparse = False  # sparse gradients cannot be reshaped
        yield


@contextmanager
def no_gradient_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Switch off hooks on gradients: they belong to training and may change what they see.

    Clipping or masking in a hook would otherwise end up in the curvature; hooks that count or log
    would be called many times.
    """
    tables = [p._backward_hooks for m in modules for p in m._parameters.values() if p is not None]
    for module in modules:
        tables += [module._backward_hooks, module._backward_pre_hooks]
    filled = [(table, dict(table)) for table in tables if table]
    try:
        for table, _ in filled:
            table.clear()
        yield
    finally:
        for table, hooks in filled:
            table.clear()
            table.update(hooks)


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """``nn.Transformer``'s inference kernels: no gradient, other values at padded positions."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _Direct:
    """Stands for ``CheckpointFunction``: runs the function at once, within the graph."""

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def _no_reentrant_checkpoints() -> Iterator[None]:
    """Run reentrant checkpoints directly: ``torch.autograd.grad`` sees no parameter inside them."""
    module: Any = torch.utils.checkpoint
    before = module.CheckpointFunction
    module.CheckpointFunction = _Direct
    try:
        yield
    finally:
        module.CheckpointFunction = before


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


def has_weight_norm(modules: Sequence[nn.Module]) -> bool:
    """Whether ``weight_norm`` (as parametrization or as hook) is on one of the layers."""
    return any(
        isinstance(module, parametrizations._WeightNorm)
        or (
            module._forward_pre_hooks
            and any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values())
        )
        for module in modules
    )
