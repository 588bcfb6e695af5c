"""Optimizers that treat every parameter alike, whatever layer it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import OptionError
from .base import CurvatureOptimizer
from .rows import Rows


class ParameterList(nn.Module):
    """Parameters in place of a model; unnamed ones are called ``parameter0``, ``parameter1``..."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__()
        self._named: list[tuple[str, Tensor]] = []
        for group in groups:
            for entry in group["params"]:
                named = isinstance(entry, tuple)
                name, p = entry if named else (f"parameter{len(self._named)}", entry)
                if not isinstance(p, Tensor):
                    raise OptionError(
                        "Pass a model, model.named_parameters(), parameters, or parameter groups; "
                        f"got {type(p).__name__} among the parameters."
                    )
                self._named.append((str(name), p))

    def named_parameters(  # type: ignore[override]
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The names and parameters given."""
        return iter(self._named)


class EveryParameter(CurvatureOptimizer):
    """Base of optimizers whose method covers all parameters.

    ``target`` is a model (``params`` then chooses among its parameters), or what any optimizer of
    torch takes: parameters, (name, parameter) pairs or group dictionaries. With names, or the
    model, operators carry them and can be compared with those of a ``cs.Problem``.
    """

    def __init__(
        self, target: Any, params: Any, defaults: dict[str, Any], *, process_group: Any = None
    ) -> None:
        if not isinstance(target, nn.Module):
            if params is not None:
                raise OptionError("params= chooses among a model's parameters: pass the model.")
            params = _groups(target, self.method)
            target = ParameterList(params)
        super().__init__(target, params, defaults, process_group=process_group)

    def _why_not(self, block: str) -> str:
        return "no step has been taken" if self.steps == 0 else "it has had no gradient so far"

    def _reason(self, name: str) -> str:
        """What ``coverage()`` says of a parameter."""
        return "every parameter"

    def coverage(self) -> Rows:
        """Parameter by parameter: ``parameter``, ``block``, ``shape``, ``rule``, ``reason``."""
        return Rows(
            {
                "parameter": name,
                "block": block,
                "shape": tuple(self.params[name].shape),
                "rule": self.method,
                "reason": self._reason(name),
            }
            for block, names in self.blocks.items()
            for name in names
        )

    def diagnostics(self) -> Rows:
        """One row per block about the last step: ``block``, ``step``, ``rule``, then numbers."""
        return Rows(
            {"block": block, "step": self.steps, "rule": self.method, **self._diagnose(block)}
            for block in self.blocks
        )


def _groups(target: Any, method: str) -> list[dict[str, Any]]:
    if isinstance(target, Tensor) or not isinstance(target, Iterable):
        raise OptionError(
            f"{method} takes a model, model.named_parameters(), a list of parameters, or parameter "
            f"groups, not {type(target).__name__}."
        )
    entries = list(target)
    if not entries:
        raise OptionError(f"{method} got an empty list of parameters.")
    if not all(isinstance(entry, dict) for entry in entries):
        return [{"params": entries}]
    groups = [dict(entry) for entry in entries]
    for group in groups:
        given = group.get("params")
        if given is None:
            raise OptionError("A parameter group is a dictionary with the entry 'params'.")
        group["params"] = [given] if isinstance(given, Tensor) else list(given)
    return groups
