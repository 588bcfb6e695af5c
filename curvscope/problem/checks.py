"""What is checked of a problem before anything is computed: finite, additive, repeatable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import (
    BatchNormError,
    CurvscopeError,
    DataError,
    ModelError,
    NonDeterministicError,
    NonFiniteError,
    UnsupportedLossError,
)
from .data import leaves, sample_count, select

if TYPE_CHECKING:
    from .problem import Problem


@dataclass(frozen=True)
class Facts:
    """What one pass over the data says: sizes and the objective."""

    samples: int
    terms: float
    batches: int
    total: float
    coupled: bool = False  # outputs of a sample depend on the other samples of its batch
    direct: tuple[str, ...] = ()  # parameters that the loss uses itself, besides the outputs


def finite_parameters(model: nn.Module) -> None:
    """Raise ``NonFiniteError`` naming the first parameter with NaN or infinity."""
    for name, trained in model.named_parameters():
        parameter = trained.detach()
        if bool(torch.isfinite(parameter.sum())):  # then all are, and a sum costs far less
            continue
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise NonFiniteError(
                f"Parameter {name!r} has {bad} entries that are NaN or infinite. Restore a "
                "checkpoint from before they appeared."
            )


def own_parameters(chosen: Mapping[str, Tensor], found: Iterable[Tensor]) -> None:
    """Raise ``ModelError`` where the problem's parameters are not those of the model any more."""
    there = {id(p) for p in found}
    if lost := [name for name, p in chosen.items() if id(p) not in there]:
        raise replaced(lost)


def replaced(names: Sequence[str]) -> ModelError:
    """The model has other parameters than those that the problem was made with."""
    return ModelError(
        f"The model no longer has the problem's own {', '.join(map(repr, names[:3]))}"
        f"{', ...' if len(names) > 3 else ''}: a new layer, a parametrization or "
        "load_state_dict(assign=True) has put other parameters in their place. Make a new Problem."
    )


def parts_of(inputs: Any, targets: Any) -> list[tuple[Any, Any]]:
    """A batch cut into two parts along the sample axis."""
    samples = sample_count(inputs, targets)
    cut = samples // 3 or 1
    index = torch.arange(samples)
    return [
        (select(inputs, part, samples), select(targets, part, samples))
        for part in (index[:cut], index[cut:])
    ]


def samples_first(inputs: Any, targets: Any, outputs: Tensor) -> None:
    """Raise ``DataError`` where the samples seem to lie on the inputs' second axis."""
    samples = sample_count(inputs, targets)
    first = next((leaf for leaf in leaves(inputs) if leaf.ndim), None)
    if first is None or first.ndim < 2 or not outputs.ndim or samples == 1:
        return
    rows = len(outputs)
    if rows == samples or rows != first.shape[1]:
        return
    if any(leaf.ndim and len(leaf) == rows for leaf in leaves(targets)):
        raise _time_first(first, outputs)


def _time_first(first: Tensor, outputs: Tensor) -> DataError:
    return DataError(
        f"The inputs are {list(first.shape)} and the outputs {list(outputs.shape)}: the samples "
        "seem to lie on the second axis of the inputs (time first), but curvscope counts and cuts "
        "along the first. Give data with the samples first, and use batch_first=True, or transpose "
        "in forward=lambda model, x: model(x.transpose(0, 1))."
    )


def coupled(problem: Problem, inputs: Any, targets: Any, outputs: Tensor) -> bool:
    """Whether the outputs of a sample change with the other samples of its batch."""
    parts = parts_of(inputs, targets)
    try:
        found = [problem.outputs(part).detach() for part, _ in parts]
        joint = torch.cat(found)
    except (CurvscopeError, RuntimeError, ValueError, IndexError):
        return False  # the first axis is not the samples' alone; nothing can be said
    if joint.shape != outputs.shape:
        first = next((leaf for leaf in leaves(inputs) if leaf.ndim), None)
        square = first is not None and first.ndim > 1 and first.shape[0] == first.shape[1]
        if square and all(part.shape == outputs.shape for part in found):
            assert first is not None
            raise _time_first(first, outputs)  # fewer steps, still all samples
        return False
    scale = float(outputs.abs().max()) or 1.0
    tolerance = 1e3 * torch.finfo(outputs.dtype).eps ** 0.75
    return not float((joint - outputs).abs().max()) <= tolerance * scale


def first_outputs(problem: Problem, inputs: Any) -> Tensor:
    """The outputs of the first batch; what the model raises becomes a ``ModelError``."""
    try:
        return problem.outputs(inputs)
    except CurvscopeError:
        raise
    except Exception as error:
        given = ", ".join(f"{list(x.shape)} {str(x.dtype)[6:]}" for x in leaves(inputs))
        raise ModelError(
            f"The model failed on the inputs of the first batch ({given or type(inputs).__name__})"
            f": {type(error).__name__}: {error}. Check that they fit the model, or say how it is "
            "called with forward=lambda model, inputs: ..."
        ) from error


def without_noise(
    problem: Problem, inputs: Any, targets: Any, outputs: Tensor, value: Tensor
) -> None:
    """Raise ``NonDeterministicError`` where what the model or the loss draws changes its values.

    Called where random numbers have been drawn; the second evaluation draws others. A loss over a
    data set would hide small noise in its sum.
    """
    again = problem.outputs(inputs).detach()
    other = problem.batch_total(again, targets).detach()
    named = [("outputs", outputs, again)] if outputs.shape == again.shape else []
    for what, old, new in [*named, ("loss", value, other)]:
        scale, eps = float(old.detach().abs().max()), torch.finfo(problem.dtype).eps
        difference = float((new - old.detach()).abs().max())
        if not difference <= 10 * eps * scale:
            raise NonDeterministicError(
                f"The model draws random numbers under eval(): two evaluations of the {what} of "
                f"the first batch differ by {difference:.3g} (largest value: {scale:.3g}). Switch "
                "that off: functional dropout without training=self.training, noise layers, "
                "sampling; or draw the noise once and keep it."
            )


def unchanging(problem: Problem, inputs: Any, outputs: Tensor) -> None:
    """Raise ``NonDeterministicError`` where buffers that a pass changes change the outputs."""
    if not outputs.numel() or not bool(torch.isfinite(outputs).all()):
        return  # which the loss finds
    again = problem.outputs(inputs).detach()
    scale, eps = float(outputs.abs().max()), torch.finfo(problem.dtype).eps
    same = again.shape == outputs.shape
    difference = float((again - outputs).abs().max()) if same else float("inf")
    if not difference <= 10 * eps * scale:
        raise NonDeterministicError(
            "The model changes its buffers when it is evaluated, under eval() too, and its outputs "
            f"with them: two evaluations of the first batch differ by {difference:.3g} (largest "
            f"value: {scale:.3g}). Update counters and running means under self.training only."
        )


def additive(problem: Problem, inputs: Any, targets: Any, whole: Tensor) -> None:
    """A plain callable must be a sum, or a mean over its count, of terms."""
    samples = sample_count(inputs, targets)
    if problem.loss.likelihood is not None or samples < 2:
        return
    if problem.batchnorm == "batch":
        return
    value = torch.zeros((), dtype=torch.float64)
    for chosen in parts_of(inputs, targets):
        outputs = problem.outputs(chosen[0]).detach()
        part = problem.batch_total(outputs, chosen[1]).detach()
        value = value + part.double().cpu()
    scale = max(abs(float(whole)), abs(float(value)), 1e-30)
    tolerance = min(1e3 * torch.finfo(problem.dtype).eps ** 0.75, 0.05)
    # a part without any target has a mean of 0/0: NaN must not pass either
    if not abs(float(value) - float(whole)) <= tolerance * scale:
        raise UnsupportedLossError(
            f"The loss {problem.loss.name!r} with reduction={problem.loss.reduction!r} is not "
            "additive over samples: two parts of a batch give "
            f"{float(value):.8g} in sum, the whole {float(whole):.8g}. If its mean runs over "
            "something else than samples (tokens, pixels, targets not ignored), give "
            "reduction=lambda outputs, targets: <that number>; a loss that couples samples "
            "cannot be normalised over batches."
        )


def used_by_loss(problem: Problem, value: Tensor) -> set[str]:
    """Parameters that a loss of detached outputs still depends on: penalties in a callable.

    Raises ``UnsupportedLossError`` where these are not those of the copy that is evaluated.
    """
    names = {id(p): name for name, p in problem.params.items()}
    originals: dict[int, str] = {}
    if problem.model is not problem.user_model:
        originals = {id(p): name for name, p in problem.user_model.named_parameters()}
    found: set[str] = set()
    seen: set[Any] = set()
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = id(getattr(node, "variable", None))
        if leaf in names:
            found.add(names[leaf])
        elif leaf in originals:
            raise UnsupportedLossError(
                f"The loss {problem.loss.name!r} uses the parameter {originals[leaf]!r} itself, "
                "but device= or dtype= make the problem compute with a copy of the model, whose "
                "parameters it does not see. Convert the model yourself with model.to(...) and "
                "leave these arguments out."
            )
        stack.extend(follower for follower, _ in node.next_functions)
    return found


def repeatable(first: Facts, second: Facts, dtype: torch.dtype, batchnorm: str) -> None:
    """Raise ``NonDeterministicError`` where two passes over the data differ."""
    if (second.samples, second.terms) != (first.samples, first.terms):
        raise NonDeterministicError(
            f"Two passes over the data gave {first.samples} and {second.samples} samples "
            f"({first.terms:g} and {second.terms:g} terms). Use a DataLoader that gives every "
            "sample in every pass (no random sampler, no drop_last with shuffling), or "
            "list(loader)."
        )
    scale = max(abs(first.total), abs(second.total), 1e-30)
    tolerance = min(50 * torch.finfo(dtype).eps * max(1.0, first.samples**0.5), 0.02)
    if abs(first.total - second.total) > tolerance * scale:
        raise NonDeterministicError(
            f"Two evaluations of the loss gave {first.total:.9g} and {second.total:.9g}. "
            "Either the data change from pass to pass (random augmentation: use list(loader)), "
            "or the model draws random numbers under eval() (functional dropout without "
            "training=self.training, noise layers: switch it off), or it changes itself when it is "
            "evaluated (counters, running means kept by hand: only under self.training)"
            + (
                ', or, under batchnorm="batch", the loader shuffles samples between batches.'
                if batchnorm == "batch"
                else "."
            )
        )


def blame(problem: Problem, inputs: Any, batch: int, value: float) -> None:
    """Raise ``NonFiniteError`` naming the first module whose output is not finite."""
    if any(not bool(torch.isfinite(x).all()) for x in leaves(inputs) if x.is_floating_point()):
        raise NonFiniteError(f"The inputs of batch {batch} contain NaN or infinity.")
    found: list[str] = []
    handles = []
    # containers as well, which may compute on their own; their hooks run after their children's
    for name, module in problem.model.named_modules():

        def hook(_m: Any, _i: Any, out: Any, name: str = name) -> None:
            bad = any(
                not bool(torch.isfinite(x).all()) for x in leaves(out) if x.is_floating_point()
            )
            if bad and not found:
                found.append(name or "(root)")

        handles.append(module.register_forward_hook(hook))
    try:
        problem.outputs(inputs)
    finally:
        for handle in handles:
            handle.remove()
    where = (
        f"The first layer with a NaN or infinite output is {found[0]!r}."
        if found
        else "All layers are finite, so the loss itself overflows or gets invalid targets."
    )
    raise NonFiniteError(f"The loss of batch {batch} is {value}. {where}")


def no_active_dropout(model: nn.Module) -> None:
    """Raise ``BatchNormError`` where a layer would drop units in train mode."""
    for name, module in model.named_modules():
        rate = getattr(module, "p", 0.0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0
        if not rate and isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            rate = module.dropout
        if rate and module.training:
            raise BatchNormError(
                f'batchnorm="batch" with active dropout is not defined: layer {name!r} drops with '
                f'p={rate}. Switch it off (module.eval() or p=0), or use batchnorm="eval".'
            )
