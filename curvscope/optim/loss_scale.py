"""Optimizers under ``torch.amp.GradScaler``, whose scaled loss scales every statistic too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import OptionError

LossScale = float | Callable[[], float] | None


def take_scale(optimizer: torch.optim.Optimizer, given: LossScale) -> tuple[float, bool]:
    """The factor in the statistics of this step, and whether a scaler wants the step skipped.

    ``GradScaler.step`` announces itself through two attributes, ``grad_scale`` and ``found_inf``
    (its protocol for optimizers with ``_step_supports_amp_scaling``), and leaves it to the
    optimizer to unscale the gradients, which is done here. After ``scaler.unscale_(optimizer)`` it
    no longer says what the scale was.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    scale = getattr(optimizer, "grad_scale", None)
    if found_inf is None:
        return _value(given), False
    skip = bool(found_inf.item())
    if scale is None:
        return (_value(given) if given is not None else _scale_of_caller()), skip
    if not skip:
        _unscale((p.grad for g in optimizer.param_groups for p in g["params"]), scale)
    return float(scale), skip


@torch.no_grad()
def _unscale(gradients: Iterable[Tensor | None], scale: Tensor) -> None:
    inverse = scale.double().reciprocal().float()
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(inverse.to(gradient.device))


def _value(given: LossScale) -> float:
    return 1.0 if given is None else float(given() if callable(given) else given)


def _scale_of_caller() -> float:
    """The scale of the ``GradScaler`` that called ``step``; the only trace of it is its frame."""
    frame = sys._getframe(1)
    for _ in range(12):
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.amp.GradScaler):
            return float(caller.get_scale())
        if frame.f_back is None:
            break
        frame = frame.f_back
    raise OptionError(
        "The gradients were unscaled before step(), and the scale of the loss is not known: set "
        "optimizer.loss_scale = scaler.get_scale."
    )
