"""The private copy of the model that BackPACK is let loose on."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BackpackError
from ...problem import Problem
from .table import Spec, library, supported_types

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
# layers that do nothing under eval(); BackPACK knows only Dropout everywhere
_NOTHING = (
    nn.Identity,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Twin:
    """A copy of the model: ``parameters`` are new objects on the storage of the problem's."""

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    plain: bool  # nothing but stock Sequentials and layers that BackPACK knows
    names: dict[nn.Module, str] = field(default_factory=dict)

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that compute something themselves, by name."""
        for module, name in self.names.items():
            if not stock_sequential(module) and not isinstance(module, torch.fx.GraphModule):
                yield name, module

    def owners(self) -> dict[nn.Module, list[str]]:
        """Modules that own included parameters -> names of those parameters."""
        label = {id(p): name for name, p in self.parameters.items()}
        found: dict[nn.Module, list[str]] = {}
        for module in self.module.modules():
            mine = [label[id(p)] for p in module._parameters.values() if id(p) in label]
            if mine:
                found[module] = mine
        return found


def stock_sequential(module: nn.Module) -> bool:
    """A ``Sequential`` that does what its name says, also under another class name."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


@contextmanager
def private_copy(problem: Problem, spec: Spec) -> Iterator[Twin]:
    """A copy of the problem's model that BackPACK has extended; thrown away at the end.

    To be used inside ``problem.session()``, so that the flags of evaluation are copied too.
    """
    backpack = library()
    from backpack.context import CTX

    handles = len(CTX.hook_handles)
    stored = backpack.disable.store_io
    twin: Twin | None = None
    try:
        backpack.disable.store_io = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = _copy(problem, spec)
            for module in [twin.module] if spec.curved else list(twin.owners()):
                backpack.extend(module)
        twin.names = {m: name or "(root)" for name, m in twin.module.named_modules()}
        yield twin
    finally:
        backpack.disable.store_io = stored
        # BackPACK keeps every handle in a global list for ever
        for handle in CTX.hook_handles[handles:]:
            handle.remove()
        del CTX.hook_handles[handles:]
        if twin is not None:
            release(twin, everything=True)


def release(twin: Twin, *, everything: bool = False) -> None:
    """Drop quantities, gradients and (``everything``) stored inputs and outputs of the copy."""
    for parameter in twin.module.parameters():
        parameter.grad = None
        vars(parameter).clear()
    if everything:
        for module in twin.module.modules():
            _forget(module)


def _forget(module: nn.Module) -> None:
    for key in [k for k in vars(module) if k == "output" or _numbered(k, "input")]:
        del vars(module)[key]


def _numbered(key: str, stem: str) -> bool:
    return key.startswith(stem) and key.removeprefix(stem).isdigit()


def _copy(problem: Problem, spec: Spec) -> Twin:
    model = problem.model
    wanted = {id(p): name for name, p in problem.params.items()}
    memo: dict[int, Any] = {}
    parameters: dict[str, nn.Parameter] = {}
    for p in model.parameters():
        twin = nn.Parameter(p.detach(), requires_grad=id(p) in wanted)
        memo[id(p)] = twin
        if id(p) in wanted:
            parameters[wanted[id(p)]] = twin
    for module in model.modules():
        for key, value in vars(module).items():
            if key in _HOOKS:
                memo[id(value)] = OrderedDict()
            elif isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()  # kept activations cannot be copied with a graph
    try:
        duplicate = copy.deepcopy(model, memo)
    except Exception as error:
        raise BackpackError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and "
            f"BackPACK is only used on a private copy. Use {spec.instead}."
        ) from error
    for module in duplicate.modules():
        _strip(module)
        _adjust(module)
    parameters = {name: parameters[name] for name in problem.params}
    if not spec.curved:
        return Twin(duplicate, parameters, plain=False)
    for module in duplicate.modules():
        for key, child in module._modules.items():
            if type(child) in _NOTHING:
                module._modules[key] = nn.Dropout(0.0).eval()
    known = supported_types(spec)
    if is_plain(duplicate, known):
        _unshare(duplicate)
        return Twin(duplicate, parameters, plain=True)
    refuse_unknown(problem.model, known, spec, parameters)
    return Twin(_converted(duplicate, known, spec), parameters, plain=False)


def _strip(module: nn.Module) -> None:
    """Remove the user's hooks, and what an earlier ``extend`` of the user's has left."""
    state = vars(module)
    for key in _HOOKS:
        if key in state:
            state[key] = OrderedDict()
    if state.pop("_backpack_extend", None) is not None:
        _forget(module)


def _adjust(module: nn.Module) -> None:
    """Equivalent settings that BackPACK can handle."""
    if isinstance(getattr(module, "inplace", None), bool):
        module.inplace = False  # type: ignore[assignment]
    if type(module) in _CONV and isinstance(module.padding, str):  # type: ignore[attr-defined]
        # BackPACK takes "same" for no padding at all
        sides = same_padding(module)
        if sides is not None:
            module.padding = sides  # type: ignore[assignment]


def same_padding(module: Any) -> tuple[int, ...] | None:
    """``padding="same"`` or ``"valid"`` in numbers; ``None`` if it differs from side to side."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    total = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)


def is_plain(module: nn.Module, known: frozenset[type]) -> bool:
    """Nothing but stock Sequentials around layers of ``known`` types."""
    if type(module) in known:
        return True
    return stock_sequential(module) and all(is_plain(child, known) for child in module.children())


def _unshare(module: nn.Module) -> None:
    """Layers without parameters that appear twice become two, each with its own input."""
    seen: set[int] = set()

    def walk(parent: nn.Module) -> None:
        for key, child in parent._modules.items():
            if child is None:
                continue
            if id(child) in seen and not any(True for _ in child.parameters()):
                parent._modules[key] = child = copy.deepcopy(child)
            seen.add(id(child))
            walk(child)

    walk(module)


def refuse_unknown(
    model: nn.Module, known: frozenset[type], spec: Spec, parameters: dict[str, nn.Parameter]
) -> None:
    """Name the first layer that BackPACK cannot know, whatever surrounds it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) or type(module) in known or type(module) in _NOTHING:
            continue
        kind, where = type(module).__name__, name or "(root)"
        base = next((c.__name__ for c in known if isinstance(module, c)), None)
        if base is not None:
            raise BackpackError(
                f"Layer {where!r} is a {kind}, a subclass of {base}: BackPACK goes by the exact "
                f"type and cannot know what it changes. Use {spec.instead}, or a plain {base}."
            )
        own = type(module).__module__.startswith("torch.nn.")
        if (own and type(module) not in _CONTAINERS) or module._parameters:
            raise BackpackError(
                f"BackPACK's {spec.name} does not support layer {where!r} ({kind}). "
                f"Use {spec.instead}."
            )


def _converted(module: nn.Module, known: frozenset[type], spec: Spec) -> nn.Module:
    """The model as BackPACK's converter rewrites it, every operation a layer."""
    from backpack.custom_module.branching import SumModule
    from backpack.custom_module.graph_utils import convert_module_to_backpack

    advice = f"Write it with nn.Sequential and layers of torch.nn, or use {spec.instead}."
    try:
        graph_module = convert_module_to_backpack(module, False)
    except Exception as error:
        raise BackpackError(
            f"BackPACK's converter cannot rewrite {type(module).__name__} as a chain of layers "
            f"({type(error).__name__}: {error}). {advice}"
        ) from error
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op != "call_module":
            operation = getattr(node.target, "__name__", str(node.target))
            raise BackpackError(
                f"The forward pass of {type(module).__name__} uses {operation!r} "
                f"({node.name}), which is no layer that BackPACK could differentiate. {advice}"
            )
        layer = graph_module.get_submodule(node.target)
        if isinstance(layer, SumModule) and spec.name in ("KFLR", "KFRA"):
            raise BackpackError(
                f"BackPACK's {spec.name} does not support residual connections ({node.target!r} "
                f"adds the outputs of several layers). Use {spec.instead}."
            )
        if type(layer) not in known and not _transparent(layer):
            raise BackpackError(
                f"BackPACK's {spec.name} does not support layer {node.target!r} "
                f"({type(layer).__name__}). {advice}"
            )
    return graph_module


def _transparent(layer: nn.Module) -> bool:
    """Layers that BackPACK passes through without an extension."""
    from backpack.utils.module_classification import is_no_op

    return bool(is_no_op(layer))
