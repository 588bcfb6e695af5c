"""From the user's loss (module, ``torch.nn.functional`` function or callable) to a ``Loss``."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError, TargetError, UnsupportedLossError, check_option
from .losses import BinaryCrossEntropy, CrossEntropy, Generic, Loss, SquaredError

Reduction = str | Callable[[Any, Any], float] | None


def _elements(outputs: Tensor, targets: Any) -> float:
    return float(outputs.numel())


def _samples(outputs: Any, targets: Any) -> float:
    first = outputs if isinstance(outputs, Tensor) else targets
    return float(first.shape[0])


def _same_shape(outputs: Tensor, targets: Any) -> None:
    if isinstance(targets, Tensor) and targets.shape != outputs.shape:
        raise TargetError(
            f"Targets of shape {list(targets.shape)} do not fit outputs {list(outputs.shape)}: "
            "torch would broadcast them silently. Reshape them in unpack=."
        )


# losses of torch.nn that have no special treatment: what their mean divides by
_BY_ELEMENT = (
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.PoissonNLLLoss,
    nn.BCELoss,
    nn.SoftMarginLoss,
)
_BY_SAMPLE = (nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss)
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.kl_div: nn.KLDivLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.soft_margin_loss: nn.SoftMarginLoss,
}
_KNOWN = (
    nn.CrossEntropyLoss,
    nn.NLLLoss,
    nn.MSELoss,
    nn.BCEWithLogitsLoss,
    nn.KLDivLoss,
    *_BY_ELEMENT,
    *_BY_SAMPLE,
)


def recognise(loss: Any, reduction: Reduction = None) -> Loss:
    """Return the :class:`Loss` behind the user's loss.

    Modules of ``torch.nn`` and functions of ``torch.nn.functional`` say themselves what they
    average over; any other callable ``loss(outputs, targets)`` needs ``reduction=``: ``"sum"``,
    ``"mean"`` (over samples, the first axis), or a callable ``(outputs, targets) -> count`` giving
    the number that the loss's own mean divides by.

    Raises ``UnsupportedLossError`` for what cannot be normalised exactly and ``OptionError`` where
    ``reduction=`` contradicts the loss.
    """
    if isinstance(reduction, str) or not (reduction is None or callable(reduction)):
        check_option("reduction", reduction, ("mean", "sum"))
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise UnsupportedLossError(
            f"The loss {type(loss).__name__} has trainable parameters, which no block would "
            "contain. Make them part of the model, or freeze them with requires_grad_(False)."
        )
    module = _as_module(loss, reduction)
    if module is None:
        return _callable_loss(loss, reduction)
    own = getattr(module, "reduction", "mean")
    if reduction is not None and reduction != own:
        raise OptionError(
            f"reduction={reduction!r} contradicts {type(module).__name__}(reduction={own!r}); "
            "leave reduction= out, or change it in the loss."
        )
    if own not in ("mean", "sum") and not (own == "batchmean" and isinstance(module, nn.KLDivLoss)):
        raise UnsupportedLossError(
            f"{type(module).__name__}(reduction={own!r}) does not give one number; "
            "use reduction='mean' or 'sum'."
        )
    return _module_loss(module, own)


def _as_module(loss: Any, reduction: Reduction) -> nn.Module | None:
    """The ``torch.nn`` loss that ``loss`` is or stands for, else ``None``."""
    if isinstance(loss, nn.Module):
        for known in _KNOWN:
            if isinstance(loss, known) and type(loss).forward is known.forward:
                return loss
        if type(loss).__module__.startswith("torch.nn"):
            raise UnsupportedLossError(
                f"{type(loss).__name__} is not supported: what its mean divides by, or how its "
                "inputs pair up, does not follow from (outputs, targets). Wrap it: "
                "loss=lambda outputs, targets: ..., reduction='sum' or 'mean'."
            )
        return None
    if isinstance(loss, Loss):
        raise UnsupportedLossError(
            "The loss is the .loss of a Problem, as it is computed with; pass the one that the "
            "Problem was given, problem.user_loss, and reduction= if that was given too."
        )
    if not callable(loss):
        raise UnsupportedLossError(
            f"The loss must be a torch.nn loss or a callable loss(outputs, targets), "
            f"not {type(loss).__name__}."
        )
    keywords: dict[str, Any] = {}
    function = loss
    if isinstance(loss, functools.partial) and not loss.args:
        function, keywords = loss.func, dict(loss.keywords)
    known_class = _FUNCTIONS.get(function) if getattr(function, "__hash__", None) else None
    if known_class is None or callable(reduction):
        return None
    if reduction is not None:
        keywords.setdefault("reduction", reduction)
    accepted = inspect.signature(known_class.__init__).parameters
    if not set(keywords) <= set(accepted):
        return None
    return known_class(**keywords)


def _module_loss(module: nn.Module, reduction: str) -> Loss:
    weight = getattr(module, "weight", None)
    pos_weight = getattr(module, "pos_weight", None)
    for name, tensor in (("weight", weight), ("pos_weight", pos_weight)):
        if isinstance(tensor, Tensor) and bool((tensor < 0).any()):
            raise UnsupportedLossError(
                f"{type(module).__name__} has a negative {name}, so it is not bounded below and "
                "its terms cannot be weighted; use weights of at least zero."
            )
    if isinstance(module, nn.CrossEntropyLoss):
        return CrossEntropy(
            weight=module.weight,
            ignore_index=module.ignore_index,
            label_smoothing=module.label_smoothing,
            reduction=reduction,
        )
    if isinstance(module, nn.NLLLoss):
        return CrossEntropy(
            weight=module.weight,
            ignore_index=module.ignore_index,
            reduction=reduction,
            log_probabilities=True,
        )
    if isinstance(module, nn.MSELoss):
        return SquaredError(reduction)
    if isinstance(module, nn.BCEWithLogitsLoss):
        return BinaryCrossEntropy(
            weight=module.weight, pos_weight=module.pos_weight, reduction=reduction
        )
    if isinstance(module, nn.BCELoss) and module.weight is not None:
        raise UnsupportedLossError(
            "BCELoss with weight= is not supported; use BCEWithLogitsLoss(weight=...) on logits."
        )
    if isinstance(module, nn.SmoothL1Loss) and module.beta == 0:
        module = nn.L1Loss(reduction=reduction)
    summed: Any = copy.copy(module)
    summed.reduction = "sum"
    by_sample = isinstance(module, _BY_SAMPLE) or reduction == "batchmean"
    if isinstance(module, nn.MultiLabelSoftMarginLoss) and module.weight is not None:
        raise UnsupportedLossError("MultiLabelSoftMarginLoss with weight= is not supported.")
    return Generic(
        type(module).__name__,
        lambda outputs, targets: summed(outputs, targets),
        _samples if by_sample else _elements,
        "sum" if reduction == "sum" else "mean",
        check=None if by_sample and not isinstance(module, nn.KLDivLoss) else _same_shape,
        term="row" if by_sample else "element",
    )


def _callable_loss(loss: Any, reduction: Reduction) -> Loss:
    name = getattr(loss, "__name__", type(loss).__name__)
    if reduction is None:
        raise OptionError(
            f"The loss {name!r} is a plain callable: say what its value is with reduction='mean' "
            "(over the samples, first axis), reduction='sum', or a callable "
            "(outputs, targets) -> number of terms that its mean divides by."
        )
    if reduction == "sum":
        return Generic(name, loss, _samples, "sum")
    count = reduction if callable(reduction) else _samples
    term = None if callable(reduction) else "row"

    def total(outputs: Any, targets: Any) -> Tensor:
        terms = count(outputs, targets)
        # a batch without any term (all targets ignored) has a mean of 0/0 and contributes nothing
        return loss(outputs, targets) * terms if terms else outputs.sum() * 0.0

    return Generic(name, total, lambda o, t: float(count(o, t)), "mean", term=term)
