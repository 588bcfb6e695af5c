"""What the refusal tests share: tiny data, a net, and how a refusal is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope import errors
from tests.curvature.nets import mlp, seeded

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 2, 1, 1, 0, 2])
Z = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss

Refusal = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]


def net() -> nn.Module:
    return seeded(lambda: mlp(nn.Tanh, 3, 4, 3))


def batchnorm(*after: nn.Module) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), *after, nn.Linear(4, 3))
    )


def problem(
    loss: Any = None, data: Any = None, model: nn.Module | None = None, **more: Any
) -> cs.Problem:
    loss, data = CE() if loss is None else loss, (X, Y) if data is None else data
    return cs.Problem(net() if model is None else model, loss, data, **more)


def checked(*arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: problem(*arguments, **options).check()


def refused(call: Callable[[], Any], error: type[Exception], *fragments: str) -> None:
    """The call raises ``error``, a CurvscopeError, whose message has all the fragments."""
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, errors.CurvscopeError)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    assert len(message) > 35  # what is wrong and what to do
