"""Which modules of a model a method covers, and their weights as matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..operators import MatrixView
from ..problem.blocks import ROOT

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, eq=False)
class Layer:
    """A module that runs, its parameters that the optimizer owns, and their block."""

    block: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def groups(self) -> int:
        return int(getattr(self.module, "groups", 1))

    @cached_property
    def view(self) -> MatrixView:
        """``[W b]`` of a Linear or convolution: ``groups`` matrices ``[out, in (+1)]``."""
        out = self.weight.shape[0]
        inp = math.prod(self.weight.shape[1:])
        return MatrixView.for_weight_and_bias(out, inp, self.bias is not None, groups=self.groups)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[groups, out, in (+1)]`` from tensors of the parameters' shapes."""
        groups = self.groups
        rows = weight.reshape(groups, weight.shape[0] // groups, -1)
        if bias is None:
            return rows
        return torch.cat([rows, bias.reshape(groups, -1, 1).to(rows.dtype)], -1)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inverse of :meth:`matrix`; the parts are views of a contiguous matrix."""
        if self.bias is None:
            return matrix.reshape(self.weight.shape), None
        return matrix[..., :-1].reshape(self.weight.shape), matrix[..., -1].reshape(-1)


def find_layers(
    model: nn.Module,
    blocks: Mapping[str, Sequence[str]],
    params: Mapping[str, nn.Parameter],
    types: tuple[type[nn.Module], ...],
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers of ``types`` by block name; for every other block the reason why there is none."""
    modules = {name or ROOT: module for name, module in model.named_modules()}
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    layers: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    for block, names in blocks.items():
        reason = _refusal(block, [params[n] for n in names], modules, owners, types)
        if reason is not None:
            reasons[block] = reason
            continue
        module = modules[block]
        mine = {id(params[n]) for n in names}
        bias = getattr(module, "bias", None)
        bias = bias if bias is not None and id(bias) in mine else None
        layers[block] = Layer(block, module, module.weight, bias)  # type: ignore[arg-type]
    return layers, reasons


def _refusal(
    block: str,
    parameters: Sequence[nn.Parameter],
    modules: Mapping[str, nn.Module],
    owners: Mapping[int, list[str]],
    types: tuple[type[nn.Module], ...],
) -> str | None:
    module = modules.get(block)
    if module is None:
        return "its parameters belong to no module of that name"
    kind = type(module).__name__
    for parameter in parameters:
        sharing = owners.get(id(parameter), [])
        if len(sharing) > 1:
            return f"a parameter of this {kind} is shared by {' and '.join(sharing)}"
    base = next((t for t in types if isinstance(module, t)), None)
    if base is None:
        return f"not defined for {kind}"
    if type(module).forward is not base.forward:
        return f"{kind} has a forward of its own"
    if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq):
        return "an Embedding with max_norm or scale_grad_by_freq is not linear in its weight"
    known = {id(p) for p in (module.weight, getattr(module, "bias", None)) if p is not None}
    mine = {id(p) for p in parameters}
    if "parametrizations" in module._modules:
        return "its weight is computed by a parametrization"
    if not mine <= known:
        return f"{kind} has parameters besides weight and bias"
    if id(module.weight) not in mine:
        others = [name for name in owners.get(id(module.weight), []) if name != block]
        if others:
            return f"its weight is shared with {' and '.join(others)}"
        return "its weight is frozen or belongs to another optimizer"
    return None
