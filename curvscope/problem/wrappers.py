"""Models without what training wraps around them, so that their parameters have one name each."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``.

    Their ``_orig_mod.`` and ``module.`` would else stand before the names of all parameters, and
    matrices of the wrapped model could not be compared with those of the model.
    """
    while True:
        inner = uncompiled(model)
        if isinstance(inner, DistributedDataParallel | DataParallel):
            inner = inner.module
        if inner is model:
            return model
        model = inner


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given; other modules as they are."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not imported: nothing is compiled
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod
    return model


def distributed(model: nn.Module) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` that a model is, or that was compiled; else ``None``."""
    inner = uncompiled(model)
    return inner if isinstance(inner, DistributedDataParallel) else None
