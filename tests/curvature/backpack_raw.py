"""BackPACK itself, as its documentation says, for comparison."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import backpack
import backpack.context
import torch
from torch import nn

from tests.curvature.backpack_models import Setting


def raw(extension: Any, field: str, setting: Setting, loss: nn.Module | None = None) -> list[Any]:
    """BackPACK as its documentation says, on a copy, with a loss that sums."""
    model = backpack.extend(copy.deepcopy(setting.model))
    loss = backpack.extend(loss or nn.CrossEntropyLoss(reduction="sum"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with backpack.backpack(extension):
                loss(model(setting.x), setting.y).backward()
            found = [getattr(p, field) for p in model.parameters()]
            if callable(found[0]):
                eyes = [torch.eye(p.numel()).reshape(-1, *p.shape) for p in model.parameters()]
                found = [f(e).flatten(1).T.detach() for f, e in zip(found, eyes, strict=True)]
    finally:
        torch.set_default_dtype(before)
        backpack.context.CTX.remove_hooks()
    return found
