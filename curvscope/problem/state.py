"""Evaluating the user's model without changing anything of the user's."""

from __future__ import annotations

import hashlib
import operator
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..modes import aside, plain_mode
from .substitutes import differentiable, no_gradient_hooks

# the dictionaries of nn.Module that are views into C++ where the module is scripted
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


def random_mark() -> tuple[Any, ...]:
    """The global random states, to be compared: whoever draws from one changes it."""
    _, words, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = [torch.get_rng_state(), *cuda]
    found = [state.numpy().tobytes() for state in states]
    return *found, np.asarray(words).tobytes(), *rest, random.getstate()


class Members(NamedTuple):
    """Modules, parameters and buffers of a model, each once."""

    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    buffers: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Members:
        """Found in one walk through the model: sessions are opened for every product."""
        modules = list(model.modules())
        parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
        buffers = {id(b): b for m in modules for b in m._buffers.values() if b is not None}
        return cls(modules, list(parameters.values()), list(buffers.values()))


@contextmanager
def module_state(members: Members) -> Iterator[None]:
    """Put back flags, buffers, attributes and ``.grad`` of every module and parameter.

    Lists, dicts, sets and deques among the attributes get their old items back, tensors among
    them their old values.
    """
    modules, parameters, buffers = members
    attributes = [(module.__dict__, module.__dict__.copy()) for module in modules]
    # no plain attribute of a scripted module
    flags = [(m, m.training) for m in modules if "training" not in m.__dict__]
    owned = [
        {k: v for k, v in own.items() if k not in _TRACKED}
        if isinstance(module, torch.jit.ScriptModule)
        else own
        for module, (_, own) in zip(modules, attributes, strict=True)
    ]
    # a thousand attributes for a small network, most of them tables of hooks without any
    objects = [v for own in owned for v in own.values() if type(v) not in _ATOMS]
    containers = [v for v in objects if type(v) in _EXACT or isinstance(v, _CONTAINERS)]
    empty = [v for v in containers if not v]
    filled = [(v, _items(v)) for v in containers if v]
    tensors = [*buffers, *(v for v in objects if type(v) not in _EXACT and isinstance(v, Tensor))]
    values = [(t, t._version, t.detach().clone()) for t in tensors]
    gradients = [(p, p.grad) for p in parameters]
    try:
        yield
    finally:
        for now, before in attributes:
            if not _identical(now, before):
                for name in [key for key in now if key not in before]:
                    del now[name]
                for name, value in before.items():
                    if now.get(name, _MISSING) is not value:
                        now[name] = value
        if any(empty):
            for container in empty:
                container.clear()
        for container, items in filled:
            _refill(container, items)
        for module, flag in flags:
            if module.training != flag:
                module.training = flag
        with torch.no_grad():
            for tensor, version, value in values:
                # BatchNorm updates its statistics without a new version
                if tensor._version != version or not torch.equal(tensor, value):
                    tensor.copy_(value)
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient


def _identical(left: dict[Any, Any], right: dict[Any, Any]) -> bool:
    """The same keys in the same order with the very same values; tensors are not compared."""
    return (
        len(left) == len(right)
        and list(left) == list(right)
        and all(map(operator.is_, left.values(), right.values()))
    )


_CONTAINERS = (list, dict, set, deque)
_EXACT = frozenset((*_CONTAINERS, OrderedDict))  # by far the most frequent
_ATOMS = frozenset((bool, int, float, str, tuple, type(None)))


def _items(container: Any) -> Any:
    """The items of a container, to be given back by :func:`_refill`."""
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _refill(container: Any, items: Any) -> None:
    """Give a container its old items back, which may be tensors: compared by identity."""
    if len(container) == len(items):
        if isinstance(items, dict):
            if _identical(container, items):
                return
        elif isinstance(items, set):
            if container == items:
                return
        elif all(new is old for new, old in zip(container, items, strict=True)):
            return
    container.clear()
    if isinstance(items, dict | set):
        container.update(items)
    else:
        container.extend(items)


_MISSING: Any = object()


def fingerprint(values: Iterable[Tensor]) -> str:
    """A short name of some tensors' values: equal for equal values, in practice for them only."""
    digest = hashlib.sha1()
    for value in values:
        flat = value.detach().reshape(-1).double()
        sums = torch.stack([flat.sum(), flat.abs().sum(), flat.square().sum()])
        digest.update(repr(sums.float().tolist()).encode())
    return digest.hexdigest()[:12]


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
def evaluation(members: Members, *, batchnorm: str = "eval") -> Iterator[None]:
    """Everything that holds while curvscope evaluates a model.

    ``eval()`` flags (BatchNorm in train mode under ``batchnorm="batch"``), gradients enabled,
    autocast and gradient hooks off, only what can be differentiated twice (``substitutes``), random
    states and the model's state preserved, also when the body fails. Optimizers that watch the
    model see nothing of it.
    """
    with ExitStack() as stack:
        stack.enter_context(aside())
        stack.enter_context(random_state())
        stack.enter_context(module_state(members))
        for device in {p.device.type for p in members.parameters}:
            stack.enter_context(plain_mode(device))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(no_gradient_hooks(members.modules))
        stack.enter_context(differentiable(members.modules))
        for module in members.modules:
            # not module.train(): a user's train() override may do more than set the flag
            flag = batchnorm == "batch" and is_batch_norm(module)
            if module.training != flag:  # the setter of nn.Module takes its time
                module.training = flag
        yield


@contextmanager
def trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters that have been frozen require gradients for a while."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def values_at(
    parameters: list[nn.Parameter], values: list[Tensor] | None = None, *, copy: bool = True
) -> Iterator[None]:
    """Let parameters hold copies of ``values`` (by default of their own) for a while.

    So a forward pass that changes its parameters (``Embedding(max_norm=...)``, clipping) changes
    neither the user's nor the given values; ``copy=False`` is for those that are known to leave
    them alone. Versions are not counted up.
    """
    before = [p.data for p in parameters]
    try:
        for parameter, value in zip(parameters, values or before, strict=True):
            parameter.data = value.detach().clone() if copy else value
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data = value
