"""Checks of what an optimizer is given, and of what has become of it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError, OptionError
from ..problem.blocks import layer_of, select_parameters


def check_model(model: Any, method: str) -> None:
    """Refuse what is not a module."""
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"{method} needs the model itself, an nn.Module, because it watches the layers; got "
            f"{type(model).__name__}. Choose parameters with params=."
        )


def parameter_groups(model: nn.Module, params: Any, method: str) -> list[dict[str, Any]]:
    """``params`` as torch's list of parameter groups."""
    if params is None or isinstance(params, str):
        return [{"params": list(select_parameters(model, params).values())}]
    if isinstance(params, Tensor):
        params = [params]
    if not isinstance(params, Iterable):
        raise OptionError(
            f"params={params!r} must be parameters of the model, names or patterns of them, or "
            "parameter groups."
        )
    entries = list(params)
    if not entries:
        raise OptionError(f"{method} got an empty list of parameters; leave params= out for all.")
    if all(isinstance(e, str) for e in entries):
        return [{"params": list(select_parameters(model, entries).values())}]
    if all(isinstance(e, dict) for e in entries):
        groups = [dict(e) for e in entries]
        for group in groups:
            if "params" not in group:
                raise OptionError("A parameter group is a dictionary with the entry 'params'.")
            group["params"] = _tensors(group["params"], method)
        return groups
    return [{"params": _tensors(entries, method)}]


def _tensors(values: Any, method: str) -> list[Tensor]:
    """Trainable parameters from parameters or (name, parameter) pairs."""
    entries = [values] if isinstance(values, Tensor) else list(values)
    entries = [e[1] if isinstance(e, tuple) else e for e in entries]
    for entry in entries:
        if not isinstance(entry, Tensor):
            raise OptionError(
                f"{method} optimizes parameters of the model, not {type(entry).__name__}."
            )
    chosen = [p for p in entries if p.requires_grad]
    if not chosen:
        raise ModelError(
            f"No parameter given to {method} requires a gradient: call requires_grad_(True) first."
        )
    return chosen


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's: ``weights_only`` does not load a state that holds others."""
    if type(value) in (tuple, list):
        return type(value)(plain(entry) for entry in value)
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return value


def non_negative(name: str, value: Any, *, positive: bool = False, below: float = math.inf) -> Any:
    """``value`` as a plain number; refused unless it is finite and of the right sign and size."""
    value = plain(value)
    good = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
    good = good and math.isfinite(float(value)) and 0 <= float(value) < below
    if not good or (positive and float(value) == 0):
        kind = "positive" if positive else "not negative"
        limit = f" and below {below:g}" if math.isfinite(below) else ""
        raise OptionError(f"{name}={value!r} must be a finite number that is {kind}{limit}.")
    return value


def flag(name: str, value: Any) -> None:
    """Refuse a switch that is neither on nor off."""
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r} must be True or False.")


def batches(loader: Any) -> Iterator[Any]:
    """Refuse what has no batches."""
    try:
        return iter(loader)
    except TypeError as error:
        raise DataError(f"Batches come from a loader or a list of batches: {error}.") from error


def check_group(group: Mapping[str, Any]) -> None:
    """Check the options that all methods have."""
    non_negative("lr", group["lr"])
    non_negative("weight_decay", group.get("weight_decay", 0.0))
    flag("maximize", group.get("maximize", False))
    if group.get("fallback_lr") is not None:
        non_negative("fallback_lr", group["fallback_lr"])


def one_kind(params: Mapping[str, nn.Parameter], method: str) -> tuple[torch.device, torch.dtype]:
    """The one device and dtype of all parameters."""
    for what, kinds in (
        ("devices", {n: str(p.device) for n, p in params.items()}),
        ("dtypes", {n: str(p.dtype) for n, p in params.items()}),
    ):
        if len(set(kinds.values())) > 1:
            examples = {kind: name for name, kind in reversed(kinds.items())}
            listing = ", ".join(
                f"{name} is on {kind}" if what == "devices" else f"{name} is {kind}"
                for kind, name in examples.items()
            )
            raise ModelError(
                f"{method} needs all parameters to agree in their {what}, but {listing}. "
                "Use one optimizer per kind, with params=."
            )
    first = next(iter(params.values()))
    if not first.dtype.is_floating_point:
        raise ModelError(f"{method} optimizes real floating-point parameters, not {first.dtype}.")
    return first.device, first.dtype


class Facts:
    """What was true of a model when the optimizer was built."""

    def __init__(self, params: Mapping[str, nn.Parameter], explicit: bool) -> None:
        self._kinds = {n: (p.device, p.dtype, tuple(p.shape)) for n, p in params.items()}
        self._explicit = explicit

    def check(self, model: nn.Module, params: Mapping[str, nn.Parameter], method: str) -> None:
        """Refuse a model that has changed since."""
        named = dict(model.named_parameters())
        for name, p in params.items():
            now = named.get(name)
            before, after = self._kinds[name], (p.device, p.dtype, tuple(p.shape))
            advice = "Build a new optimizer after changing the model"
            if now is None:
                problem = "is gone from the model"
            elif now is not p:
                problem = "was replaced in the model"
                if now.requires_grad and tuple(now.shape) == before[2]:
                    advice += " (load_state_dict can carry the state over)"
            elif not p.requires_grad:
                problem = "was frozen"
                advice = (
                    "Thaw it; to keep it as it is give it lr=0, in a parameter group of its own, "
                    "or build a new optimizer without it"
                )
            elif after != before:
                problem = f"changed from {before} to {after}"
                if after[2] == before[2]:
                    advice += " (load_state_dict can carry the state over)"
            else:
                continue
            raise ModelError(
                f"The model has changed since {method} was built: the parameter {name!r} {problem}."
                f" {advice}."
            )
        new = [n for n, p in named.items() if p.requires_grad and n not in params]
        if new and not self._explicit:
            raise ModelError(
                f"The model has changed since {method} was built: {new} are new or no longer "
                "frozen. Add them with add_param_group, or build a new optimizer."
            )


def outside() -> int:
    """The ``stacklevel`` of a warning that points to the user's line, past torch and this package.

    How many frames of torch lie between differs between versions, and between methods.
    """
    inside = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def finite(value: Tensor) -> bool:
    """Whether all entries are finite."""
    value = value.detach()
    # the norm is the faster test; one that overflows calls for the slow one
    if value.is_floating_point() and math.isfinite(float(torch.linalg.vector_norm(value))):
        return True
    return bool(torch.isfinite(value).all())


def not_finite(loss: Tensor | None, params: Mapping[str, nn.Parameter]) -> str | None:
    """Where NaN or infinity is: a layer's gradient or parameters, or the loss; else ``None``."""
    loss_is_fine = loss is None or finite(loss)
    gradients = {n: p.grad for n, p in params.items() if p.grad is not None}
    bad = None
    if loss_is_fine:
        dense = [g.coalesce().values() if g.is_sparse else g for g in gradients.values()]
        # all norms at once first, as in finite()
        if not dense or all(math.isfinite(n) for n in torch.stack(_norms(dense)).tolist()):
            return None
        bad = next((n for n, g in zip(gradients, dense) if not finite(g)), None)
        if bad is None:
            return None
    for name, p in params.items():
        if not finite(p):
            return f"the parameters of layer {layer_of(name)!r} ({name})"
    if bad is None:
        return "the loss"
    return f"the gradient of layer {layer_of(bad)!r} ({bad})"


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    return [norm.float() for norm in torch._foreach_norm(tensors)]
