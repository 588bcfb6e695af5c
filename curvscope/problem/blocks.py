"""Which parameters take part, and the blocks they fall into."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn

from ..errors import ModelError, OptionError, check_option, nearest

ROOT = "(root)"


def layer_of(parameter: str) -> str:
    """The qualified name of the module that owns a parameter; ``"(root)"`` for the root's."""
    owner = parameter.rpartition(".")[0]
    # weight_norm and the like keep the originals in a child module of the layer
    owner = owner.split(".parametrizations.")[0].removesuffix(".parametrizations")
    if owner == "parametrizations" or owner.startswith("parametrizations."):
        owner = ""
    return owner or ROOT


def match(pattern: str, names: Sequence[str]) -> list[str]:
    """Parameters that a name, a module name or a shell pattern stands for, in model order."""
    if pattern == ROOT:
        return [n for n in names if layer_of(n) == ROOT]
    return [
        n
        for n in names
        if n == pattern or n.startswith(pattern + ".") or fnmatch.fnmatchcase(n, pattern)
    ]


def select_parameters(
    model: nn.Module, params: str | Sequence[str] | None
) -> dict[str, nn.Parameter]:
    """Trainable parameters (tied ones once, under their first name), restricted by ``params``."""
    named = dict(model.named_parameters())
    trainable = {n: p for n, p in named.items() if p.requires_grad}
    if not trainable:
        raise ModelError(
            f"{type(model).__name__} has no trainable parameters ({len(named)} frozen): set "
            "requires_grad_(True) on those whose curvature is wanted."
        )
    lazy = [n for n, p in trainable.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ModelError(
            f"Parameters {lazy} of lazy layers have no shape yet: run the model once on a batch."
        )
    fixed = [n for n, p in named.items() if p.is_inference()]
    if fixed:
        raise ModelError(
            f"Parameters {fixed[:3]} were made under torch.inference_mode() and cannot be "
            "differentiated: make or load the model outside of it."
        )
    odd = [n for n, p in trainable.items() if not p.is_floating_point()]
    if odd:
        raise ModelError(
            f"Parameters {odd} are not real: curvature is defined for real parameters. Keep real "
            "and imaginary parts as two parameters and join them with torch.complex, or freeze "
            "them."
        )
    if params is None:
        return trainable
    entries = [params] if isinstance(params, str) else list(params)
    if not all(isinstance(entry, str) for entry in entries):
        raise OptionError(
            "params= takes names of parameters or modules, or patterns; get names from "
            "model.named_parameters()."
        )
    keep: set[str] = set() if any(not e.startswith("!") for e in entries) else set(trainable)
    for entry in entries:
        leave_out = entry.startswith("!")
        found = match(entry.removeprefix("!"), list(named))
        if not found:
            raise ModelError(
                f"params={entry!r} matches no parameter.{nearest(entry, named)} "
                f"Parameters: {', '.join(named)}."
            )
        keep = keep - set(found) if leave_out else keep | (set(found) & set(trainable))
    chosen = {n: p for n, p in trainable.items() if n in keep}
    if not chosen:
        raise ModelError(f"params={entries} leaves no trainable parameter.")
    return chosen


def make_blocks(
    names: Sequence[str], blocks: str | Mapping[str, str | Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Block name -> parameter names, in model order."""
    result: dict[str, list[str]] = {}
    if isinstance(blocks, str):
        check_option("blocks", blocks, ("layer", "parameter", "all"))
        for name in names:
            key = {"layer": layer_of(name), "parameter": name, "all": "all"}[blocks]
            result.setdefault(key, []).append(name)
        return {key: tuple(members) for key, members in result.items()}
    if not isinstance(blocks, Mapping):
        raise OptionError(
            "blocks= is 'layer', 'parameter', 'all', or a mapping from block names to parameters."
        )
    owner: dict[str, str] = {}
    for key, entries in blocks.items():
        members: set[str] = set()
        for entry in [entries] if isinstance(entries, str) else entries:
            found = match(entry, names)
            if not found:
                raise OptionError(
                    f"blocks[{key!r}]: {entry!r} matches no trainable parameter."
                    f"{nearest(entry, names)}"
                )
            members.update(found)
        if not members:
            raise OptionError(
                f"blocks[{key!r}] names no parameter: give names of parameters or modules, or "
                "leave it out."
            )
        for name in members:
            if name in owner:
                raise OptionError(
                    f"Parameter {name!r} is in the blocks {owner[name]!r} and {key!r}; "
                    "blocks must not overlap."
                )
            owner[name] = key
        result[key] = [n for n in names if n in members]
    missing = [n for n in names if n not in owner]
    if missing:
        raise OptionError(
            f"The parameters {missing} belong to no block: add them, or leave them out by params=."
        )
    return {key: tuple(members) for key, members in result.items()}
