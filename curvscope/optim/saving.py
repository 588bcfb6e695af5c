"""Saving and loading the state of an optimizer, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import OptionError, ParameterMismatchError

if TYPE_CHECKING:
    from .base import CurvatureOptimizer

KEY = "curvscope"
#: settings on which it depends what the numbers of a state are
_MEANING = ("memory", "fallback", "averaging")
_DOUBLE = ("SY", "YY")  # in float64 whatever the parameters are
_TRANSIENT = ("_tap", "_process_group", "step", "layers", "_facts", "_reasons", "_positions")


def is_transient(attribute: str) -> bool:
    """Whether an attribute is made anew in a copy (or belongs to torch's machinery)."""
    return attribute in _TRANSIENT or attribute.startswith(("_optimizer_", "_patched"))


def pack(optimizer: CurvatureOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """torch's state dict with what identifies the optimizer and its parameters."""
    return {
        **state_dict,
        KEY: {
            "method": optimizer.method,
            "parameters": _parameters(optimizer),
            "dtype": str(optimizer.factor_dtype),
            "steps": optimizer.steps,
            "fired": sorted(optimizer._fired),
            **{name: getattr(optimizer, name, None) for name in _MEANING},
            **optimizer._extra_state(),
        },
    }


def check(optimizer: CurvatureOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Refuse what is not a state of this optimizer on this model."""
    if not isinstance(state_dict, Mapping) or KEY not in state_dict:
        raise OptionError(
            f"This is not a state of {optimizer.method}: it lacks the entry {KEY!r}. Pass what "
            "state_dict() of the same kind of optimizer returned."
        )
    meta = state_dict[KEY]
    missing = {"method", "parameters", "steps", "fired"} - set(meta)
    if missing or not {"state", "param_groups"} <= set(state_dict):
        raise OptionError(
            f"This is not a whole state of {optimizer.method}: it lacks entries. Pass what "
            "state_dict() of the same kind of optimizer returned."
        )
    if meta["method"] != optimizer.method:
        raise OptionError(
            f"This is the state of {meta['method']}, which {optimizer.method} cannot continue."
        )
    for name in _MEANING:
        here = getattr(optimizer, name, None)
        if meta.get(name, here) != here:
            raise OptionError(
                f"This state was saved with {name}={meta[name]!r}, and this {optimizer.method} has "
                f"{name}={here!r}: build it with the {name} that it was saved with."
            )
    saved = [(name, list(shape)) for name, shape in meta["parameters"]]
    mine = [(name, list(shape)) for name, shape in _parameters(optimizer)]
    if saved != mine:
        pairs = [(a, b) for a, b in zip(saved, mine) if a != b]
        (theirs, ours) = pairs[0] if pairs else (len(saved), len(mine))
        raise ParameterMismatchError(
            f"This is the state of another model, or of other parameter groups: it has {theirs} "
            f"where this optimizer has {ours}. Build the optimizer as it was when it was saved."
        )
    sizes = [len(g["params"]) for g in optimizer.param_groups]
    saved_sizes = [len(g["params"]) for g in state_dict["param_groups"]]
    if sizes != saved_sizes:
        raise ParameterMismatchError(
            f"The saved parameter groups have {saved_sizes} parameters, those of this optimizer "
            f"{sizes}. Build the optimizer with the same groups as when it was saved."
        )


def unpack(optimizer: CurvatureOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Restore what torch's own loading casts to the parameters' dtype, and the rest.

    A state that was saved in another precision is cast to that of this optimizer's factors.
    """
    meta = state_dict[KEY]
    here = optimizer.factor_dtype
    cast = here if meta.get("dtype", str(here)) != str(here) else None
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for index, entry in state_dict["state"].items():
        p = parameters[index]
        optimizer.state[p] = {
            k: _copy(v, p.device, None if k in _DOUBLE else cast) for k, v in entry.items()
        }
    optimizer.steps = int(meta["steps"])
    optimizer._fired = set(meta["fired"])
    optimizer._load_extra_state(meta)


def _copy(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        dtype = dtype if value.is_floating_point() else None
        return value.detach().to(device, dtype or value.dtype, copy=True)
    if isinstance(value, dict):
        return {k: _copy(v, device, dtype) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(v, device, dtype) for v in value)
    return value


def _parameters(optimizer: CurvatureOptimizer) -> list[list[Any]]:
    """Name and shape of every parameter, in the order of the groups."""
    names = {id(p): n for n, p in optimizer.params.items()}
    return [
        [names[id(p)], list(p.shape)] for group in optimizer.param_groups for p in group["params"]
    ]
