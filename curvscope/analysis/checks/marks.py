"""Everything of the user's that a computation could change, noted down to be compared."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...problem import Problem

_DEPTH, _ENTRIES = 4, 1000  # how far containers among the attributes are followed
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Marks:
    """What was found, by a description of the place. Tensors are kept as copies."""

    places: Mapping[str, Any]

    @classmethod
    def of(cls, problem: Problem) -> Marks:
        """Model, loss, data generators and global states behind a problem."""
        places: dict[str, Any] = {}
        mark_module(places, problem.user_model, "the model")
        if isinstance(problem.user_loss, nn.Module):
            mark_module(places, problem.user_loss, "the loss")
        for number, generator in enumerate(problem.data._generators()):
            places[f"the state of the data's random generator {number}"] = generator.get_state()
        _mark_globals(places)
        return cls(places)

    def changes(self, now: Marks) -> list[str]:
        """Places whose content differs, appeared or disappeared."""
        return changes(self.places, now.places)

    def restore_random(self) -> None:
        """Put the global random states back."""
        torch.set_rng_state(self.places["torch's random state"])
        if (state := self.places.get("CUDA's random state")) is not None:
            torch.cuda.set_rng_state(state)
        name, keys, *rest = self.places["NumPy's random state"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
        random.setstate(self.places["Python's random state"])


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Places whose content differs, appeared or disappeared."""
    found = [
        f"{place} {'changed' if place in now else 'is gone'}"
        for place, value in before.items()
        if place not in now or not _same(value, now[place])
    ]
    # a longer list is reported by its number of entries
    new = [p for p in now if p not in before and not p.startswith("entry ")]
    return found + [f"{place} is new" for place in new]


def mark_module(places: dict[str, Any], model: nn.Module, what: str) -> None:
    """Note flags, parameters, gradients, buffers, hooks and attributes of every module."""
    for name, module in model.named_modules():
        of = f"of {what}" if not name else f"of {name!r}"
        for key, value in vars(module).items():
            if key == "_parameters":
                for entry, p in value.items():
                    _mark_parameter(places, p, f"the parameter {entry!r} {of}")
            elif key == "_buffers":
                for entry, b in value.items():
                    _mark(places, b, f"the buffer {entry!r} {of}", 0)
            elif key == "_modules":
                places[f"the list of children {of}"] = [(n, id(m)) for n, m in value.items()]
            elif "hooks" in key and isinstance(value, Mapping):
                places[f"the hooks ({key}) {of}"] = [(k, id(h)) for k, h in value.items()]
            elif key == "training":
                places[f"the training flag {of}"] = value
            else:
                _mark(places, value, f"the attribute {key!r} {of}", 0)


def _mark_parameter(places: dict[str, Any], parameter: Any, where: str) -> None:
    if not isinstance(parameter, Tensor):
        places[where] = parameter
        return
    places[f"the identity of {where}"] = id(parameter)
    places[f"the values of {where}"] = parameter.detach().clone()
    places[f"requires_grad of {where}"] = parameter.requires_grad
    places[f"the list of attributes of {where}"] = sorted(vars(parameter))
    places[f"the hooks of {where}"] = [id(h) for h in (parameter._backward_hooks or {}).values()]
    grad = parameter.grad
    places[f".grad of {where}"] = None if grad is None else id(grad)
    if grad is not None:
        places[f"the values of .grad of {where}"] = grad.detach().clone()


def _mark(places: dict[str, Any], value: Any, where: str, depth: int) -> None:
    if isinstance(value, _PLAIN):
        places[where] = value
    elif isinstance(value, Tensor):
        places[f"the identity of {where}"] = id(value)
        places[f"the values of {where}"] = value.detach().clone()
    elif isinstance(value, np.ndarray):
        places[where] = value.copy()
    elif isinstance(value, list | tuple | set | frozenset | deque) and depth < _DEPTH:
        places[f"the number of entries of {where}"] = len(value)
        if not isinstance(value, set | frozenset):
            for k, entry in zip(range(_ENTRIES), value, strict=False):
                _mark(places, entry, f"entry {k} of {where}", depth + 1)
    elif isinstance(value, Mapping) and depth < _DEPTH:
        places[f"the keys of {where}"] = [str(key) for key in value]
        for key, entry in list(value.items())[:_ENTRIES]:
            _mark(places, entry, f"entry {key!r} of {where}", depth + 1)
    else:
        places[where] = id(value)


def _mark_globals(places: dict[str, Any]) -> None:
    places["torch's random state"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        places["CUDA's random state"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state()
    places["NumPy's random state"] = [name, np.asarray(keys).tolist(), *rest]
    places["Python's random state"] = random.getstate()
    places["whether gradients are enabled"] = torch.is_grad_enabled()
    places["inference mode"] = torch.is_inference_mode_enabled()
    places["the default dtype"] = torch.get_default_dtype()
    places["the number of threads"] = torch.get_num_threads()
    places["the deterministic flag"] = torch.are_deterministic_algorithms_enabled()
    places["autocast"] = torch.is_autocast_enabled()


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        return bool(torch.equal(left.nan_to_num(), right.nan_to_num()))
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (left != left and right != right)
    return type(left) is type(right) and bool(left == right)
