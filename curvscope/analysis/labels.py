"""The label distribution behind a loss, read off the user's own loss rather than from curvscope's.

Every label of a softmax or Bernoulli likelihood with its probability, the closed form for the
normal, and the weight of each term: what the truth needs to enumerate labels.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedLossError
from ..problem import Problem


def enumerated(problem: Problem, outputs: Tensor, targets: Any) -> Iterator[tuple[float, Tensor]]:
    """``(weight, value)``: the Fisher of a batch is the sum of ``weight * grad grad^T``."""
    for logs, weights in label_distributions(problem, outputs, targets):
        for value, weight in zip(logs.reshape(-1), weights.reshape(-1), strict=True):
            if float(weight):
                yield float(weight), value


def label_distributions(
    problem: Problem, outputs: Tensor, targets: Any
) -> list[tuple[Tensor, Tensor]]:
    """``[(log p(y), c_m p(y)), ...]``, tensors of one shape, one entry per term and label.

    For the normal likelihood of a squared error, with variance 1/2, the expectation over labels of
    the squared derivative ``(2 (z - y))^2`` is 2, so that ``(z, 2 c_m)`` stands for all labels.
    """
    kind = problem.loss.likelihood
    if kind is None:
        raise UnsupportedLossError(problem.loss.no_likelihood("Its Fisher"))
    c = term_weights(problem, outputs, targets)
    if kind == "softmax":
        logs = F.log_softmax(outputs, 1)
        return [(logs, (logs.exp() * c.unsqueeze(1)).detach())]
    if kind == "Bernoulli":
        found = []
        for logs in (F.logsigmoid(outputs), F.logsigmoid(-outputs)):
            found.append((logs, (logs.exp() * c).detach()))
        return found
    return [(outputs, 2.0 * c)]


def term_weights(problem: Problem, outputs: Tensor, targets: Any) -> Tensor:
    """``c_m``, read off the user's own loss: at equal logits a term is ``c_m log C``.

    Shape of the targets of a softmax ``[N, ...]`` (without the class axis), else of the outputs.
    """
    kind = problem.loss.likelihood
    if kind == "softmax":
        classes = outputs.shape[1]
        # log-probabilities enter an NLLLoss as they are, logits through log_softmax
        equal = torch.full_like(outputs.detach(), -math.log(classes))
        return own_terms(problem.user_loss, equal, targets) / math.log(classes)
    if kind == "Bernoulli":
        equal = torch.zeros_like(outputs.detach())
        return own_terms(problem.user_loss, equal, targets) / math.log(2.0)
    # squared error: the second derivative of a term is 2 c_m
    return own_terms(
        problem.user_loss, targets.to(outputs) + torch.ones_like(outputs.detach()), targets
    )


def own_terms(loss: Callable[..., Tensor], outputs: Tensor, targets: Any) -> Tensor:
    """The user's loss without reduction, computed by torch itself."""
    if isinstance(loss, nn.Module):
        twin = copy.deepcopy(loss).to(outputs.device, outputs.dtype)
        twin.reduction = "none"  # type: ignore[assignment]
        values = twin(outputs, _like(outputs, targets))
    else:
        values = as_dtype(loss, outputs)(outputs, _like(outputs, targets), reduction="none")
    return values


def own_loss(loss: Any, outputs: Tensor, targets: Any) -> Tensor:
    """The user's loss with its own reduction, in the precision of the outputs."""
    return as_dtype(loss, outputs)(outputs, _like(outputs, targets))


def as_dtype(loss: Any, outputs: Tensor) -> Any:
    """The user's loss with its tensors in the dtype and on the device of the outputs."""
    if isinstance(loss, nn.Module):
        return copy.deepcopy(loss).to(outputs.device, outputs.dtype)
    if isinstance(loss, functools.partial):
        moved = {k: v.to(outputs) if isinstance(v, Tensor) else v for k, v in loss.keywords.items()}
        return functools.partial(loss.func, *loss.args, **moved)
    return loss


def _like(outputs: Tensor, targets: Any) -> Any:
    """Integer targets of a loss that compares them with outputs become floats, as in Problem."""
    same = isinstance(targets, Tensor) and targets.shape == outputs.shape
    return targets.to(outputs.dtype) if same else targets
