"""What BackPACK gets silently wrong or cannot do, refused before anything is computed.

Every rule here was found by comparing BackPACK 1.7.1 with autograd; the tests repeat it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from ...errors import BackpackError
from ...problem import Problem
from ...problem.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from ...problem.state import is_batch_norm
from ..recording import graph_uses
from .copying import Twin
from .table import Spec, supported_types

_MISSING = {("KFRA", "BCEWithLogitsLoss")}  # registered, but not implemented
_AVERAGE = (nn.AvgPool2d, nn.AvgPool3d)


def refuse_problem(problem: Problem, spec: Spec) -> None:
    """Refuse what can be seen without a forward pass."""
    if problem.dtype not in (torch.float32, torch.float64):
        raise BackpackError(
            f"BackPACK is used in float32 or float64, not {problem.dtype}: "
            "Problem(..., dtype=torch.float32)."
        )
    if problem._forward is not None:
        raise BackpackError(
            "The problem calls its model through forward=, of which BackPACK sees nothing: it "
            "differentiates the model's own layers from its inputs to its outputs. Make what "
            f"forward= does a part of the model, or use {spec.instead}."
        )
    if problem.batchnorm == "batch":
        for name, module in problem.model.named_modules():
            if is_batch_norm(module):
                raise BackpackError(
                    f'batchnorm="batch" couples samples in layer {name!r}, which BackPACK does '
                    f'not support. Use batchnorm="eval", or {spec.instead}.'
                )
    _refuse_parameters(problem, spec)
    if spec.curved:
        _refuse_loss(problem, spec)


def _refuse_parameters(problem: Problem, spec: Spec) -> None:
    owners: dict[int, list[str]] = {}
    for module_name, module in problem.model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{module_name}.{key}".lstrip("."))
        mine = any(n.startswith(f"{module_name}.") for n in problem.params)
        if (mine or spec.curved) and (
            is_parametrized(module) or isinstance(vars(module).get("weight"), Tensor)
        ):
            raise BackpackError(
                f"The weight of layer {module_name!r} is computed from other parameters "
                f"(weight_norm, spectral_norm, ...), which BackPACK cannot see. "
                f"Use {spec.instead}."
            )
    for name, parameter in problem.params.items():
        if len(owners[id(parameter)]) > 1:
            raise _tied(name, " and ".join(map(repr, owners[id(parameter)])), spec)


def _tied(name: str, where: str, spec: Spec) -> BackpackError:
    return BackpackError(
        f"Parameter {name!r} is used more than once ({where}). BackPACK keeps only one of the "
        f"uses and is silently wrong for tied weights. Use {spec.instead}."
    )


def _refuse_loss(problem: Problem, spec: Spec) -> None:
    loss = problem.loss
    if isinstance(loss, CrossEntropy):
        if loss.log_probabilities:
            raise BackpackError(
                "BackPACK does not know NLLLoss. Use CrossEntropyLoss on the logits, or "
                f"{spec.instead}."
            )
        if loss.weight is not None:
            raise BackpackError(
                f"BackPACK's {spec.name} does not support class weights "
                f"(CrossEntropyLoss(weight=...)). Use {spec.instead}."
            )
    elif isinstance(loss, BinaryCrossEntropy):
        if loss.weight is not None or loss.pos_weight is not None:
            raise BackpackError(
                f"BackPACK's {spec.name} does not support weight= and pos_weight= of "
                f"BCEWithLogitsLoss. Use {spec.instead}."
            )
    elif not isinstance(loss, SquaredError):
        raise BackpackError(
            f"BackPACK's {spec.name} knows MSELoss, CrossEntropyLoss and BCEWithLogitsLoss, not "
            f"the loss {loss.name!r}; a factor or regulariser in a callable loss would be "
            f"invisible to it. Use {spec.instead}."
        )
    known = {kind.__name__ for kind in supported_types(spec)}
    if loss.name not in known or (spec.name, loss.name) in _MISSING:
        raise BackpackError(
            f"BackPACK's {spec.name} does not support {loss.name}. Use {spec.instead}."
        )


def refuse_batch(problem: Problem, spec: Spec, inputs: Any, targets: Any) -> None:
    """Refuse data that BackPACK takes but treats wrongly."""
    if not isinstance(inputs, Tensor):
        raise BackpackError(
            f"The inputs are a {type(inputs).__name__}, but BackPACK follows a single input "
            f"tensor through the layers. Use {spec.instead}."
        )
    loss = problem.loss
    if not spec.curved or not isinstance(loss, CrossEntropy):
        return
    if targets.is_floating_point():
        raise BackpackError(
            "The targets are class probabilities, whose sums BackPACK ignores in the curvature. "
            f"Use class indices, or {spec.instead}."
        )
    ignored = int((targets == loss.ignore_index).sum())
    if ignored:
        raise BackpackError(
            f"{ignored} targets equal ignore_index={loss.ignore_index}. BackPACK counts them "
            f"like all others and is silently wrong. Drop them from the data, or use "
            f"{spec.instead}."
        )


@dataclass
class Monitor:
    """What a forward pass shows of a layer: number of calls, axes and first axis of both ends."""

    calls: int = 0
    ndim: int = 0
    leading: tuple[int, ...] = ()


def monitored(twin: Twin, inputs: Tensor) -> tuple[Tensor, dict[nn.Module, Monitor]]:
    """The copy's outputs, and what its layers did on the way."""
    seen: dict[nn.Module, Monitor] = {}
    handles = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        monitor = seen.setdefault(module, Monitor())
        monitor.calls += 1
        tensors = [t for t in (*args, output) if isinstance(t, Tensor) and t.ndim]
        monitor.ndim = tensors[0].ndim if tensors else 0
        monitor.leading = tuple(t.shape[0] for t in tensors)

    try:
        for _, module in twin.layers():
            handles.append(module.register_forward_hook(hook))
        return twin.module(inputs), seen
    finally:
        for handle in handles:
            handle.remove()


def refuse_layers(
    spec: Spec, twin: Twin, seen: dict[nn.Module, Monitor], samples: int, unscaled: bool
) -> None:
    """Refuse layers whose settings BackPACK ignores, or that it cannot follow."""
    owners = twin.owners()
    for name, module in twin.layers():
        if is_batch_norm(module) and module.running_mean is None:
            raise BackpackError(
                f"Layer {name!r} has no running statistics and couples the samples of a batch, "
                f"which BackPACK does not support. Use {spec.instead}."
            )
        if not spec.curved and module not in owners:
            continue
        monitor = seen.get(module, Monitor())
        reason = _layer_fault(module, monitor, samples, spec)
        if reason is None and spec.kronecker and not unscaled and module in owners:
            weight = any(p is module._parameters["weight"] for p in _included(twin, module))
            if weight and isinstance(module, _ConvNd):
                reason = (
                    "BackPACK's Kronecker factors of convolution weights are too large by about "
                    "the number of output positions and are not KFC's. unscaled=True returns them "
                    f"as they are, under the name '{spec.name} (BackPACK, unscaled)'"
                )
        if reason is not None:
            raise BackpackError(
                f"BackPACK's {spec.name} cannot be used with layer {name!r} "
                f"({type(module).__name__}): {reason}. Use {spec.instead}."
            )


def _included(twin: Twin, module: nn.Module) -> list[nn.Parameter]:
    return [twin.parameters[name] for name in twin.owners()[module]]


def _layer_fault(module: Any, monitor: Monitor, samples: int, spec: Spec) -> str | None:
    if isinstance(module, _ConvNd):
        if module.padding_mode != "zeros":
            return f"BackPACK pads with zeros whatever padding_mode={module.padding_mode!r} says"
        if isinstance(module.padding, str):
            return (
                f"padding={module.padding!r} with an even kernel pads one side more, which "
                "BackPACK cannot express"
            )
    if isinstance(module, _ConvTransposeNd) and any(module.output_padding):
        return f"BackPACK loses output_padding={module.output_padding}"
    if isinstance(module, _AVERAGE) and module.divisor_override is not None:
        return f"BackPACK ignores divisor_override={module.divisor_override}"
    if monitor.calls > 1:
        return (
            f"it is used {monitor.calls} times in a forward pass, of which BackPACK remembers "
            "only the last"
        )
    if isinstance(module, _ConvNd) and monitor.calls:
        wanted = len(module.kernel_size) + 2
        if monitor.ndim != wanted:
            return f"its input has {monitor.ndim} axes instead of {wanted}: no axis for samples"
    if any(size != samples for size in monitor.leading):
        return (
            f"the first axes of its input and output are {list(monitor.leading)} for {samples} "
            "samples; BackPACK takes the first axis everywhere for the samples and is silently "
            "wrong where others are folded into it"
        )
    return None


def refuse_uses(spec: Spec, twin: Twin, outputs: Tensor) -> None:
    """Every parameter must enter the graph exactly once (those of recurrent layers at all)."""
    recurrent = [m for m in twin.owners() if isinstance(m, nn.RNNBase)]
    repeated = {name for m in recurrent for name in twin.owners()[m]}
    label = {id(p): name for name, p in twin.parameters.items()}
    for key, count in graph_uses(outputs, twin.parameters.values()).items():
        if count > 1 and label[key] not in repeated:
            raise _tied(label[key], f"{count} times in a forward pass", spec)
        if count == 0:
            raise BackpackError(
                f"The outputs do not depend on parameter {label[key]!r}, so BackPACK leaves "
                f"nothing on it. Leave it out with params=['!{label[key]}'], or use "
                f"{spec.instead}."
            )


def refuse_outputs(
    problem: Problem, spec: Spec, outputs: Any, wanted: Tensor, samples: int
) -> None:
    """The copy must do what the model does, one row of outputs per sample."""
    if not isinstance(outputs, Tensor) or not outputs.ndim or outputs.shape[0] != samples:
        shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise BackpackError(
            f"The model's outputs {shape} do not have the {samples} samples along their first "
            "axis, as BackPACK takes for granted. Return [N, C] or [N, C, ...], or use "
            f"{spec.instead}."
        )
    same = outputs.shape == wanted.shape
    gap = float((outputs.detach() - wanted).norm()) if same else float("inf")
    if gap > torch.finfo(problem.dtype).eps ** 0.6 * float(wanted.norm()):
        hooked = [n or "(root)" for n, m in problem.model.named_modules() if m._forward_hooks]
        cause = (
            f"Forward hooks on {', '.join(map(repr, hooked))} change what the layers give, which "
            "BackPACK cannot see"
            if hooked
            else "Its forward pass depends on something that a copy does not share, or BackPACK's "
            "converter changed its meaning"
        )
        raise BackpackError(
            f"The private copy of {type(problem.model).__name__} gives other outputs than the "
            f"model (they differ by {gap:.3g} in norm). {cause}. Use {spec.instead}."
        )
    scalar = outputs.shape == (samples, 1)
    if spec.curved and isinstance(problem.loss, BinaryCrossEntropy) and not scalar:
        raise BackpackError(
            f"BackPACK supports BCEWithLogitsLoss only for outputs [N, 1], not "
            f"{list(outputs.shape)}. Use {spec.instead}."
        )
