"""Which training a run belongs to, and on what it was made."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..analysis.result import plain
from ..errors import OptionError
from ..problem import Problem
from ..problem.data import leaves


def versions() -> dict[str, Any]:
    """Versions and machine; no user, no paths."""
    from .. import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "curvscope": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "device": device,
        "threads": torch.get_num_threads(),
    }


def digest(tensors: Iterable[Tensor]) -> str:
    """A short name of the bytes of some tensors."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        found.update(f"{list(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def data_digest(probe: Problem) -> str:
    """A short name of the probe's data."""
    return digest(leaf for item in probe.data.items for leaf in leaves(item))


def fingerprint(problem: Problem, optimizer: Any, probe: Problem | None) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    defaults = {
        key: plain(value)
        for key, value in getattr(optimizer, "defaults", {}).items()
        if isinstance(value, bool | int | float | str | tuple | list)
    }
    return {
        "loss": problem.loss.name,
        "parameters": [f"{s.name} {list(s.shape)}" for s in problem.layout],
        "data": "current batch" if probe is None else data_digest(probe),
        "optimizer": type(optimizer).__name__,
        "options": defaults,
    }


def header(
    problem: Problem, optimizer: Any, probe: Problem | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """The content of ``run.json``."""
    method = getattr(optimizer, "method", type(optimizer).__name__)
    return {
        "format": 1,
        "id": os.urandom(8).hex(),  # not from a generator that training uses
        "name": f"{problem.name}, {method}",
        "problem": problem.name,
        "optimizer": method,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "initial": digest(p for p in problem.user_model.parameters()),
        "fingerprint": fingerprint(problem, optimizer, probe),
        "settings": settings,
        "versions": versions(),
    }


def steps_of(optimizer: Any) -> int | None:
    """Steps that an optimizer says it has taken; ``None`` where it does not say."""
    own = getattr(optimizer, "steps", None)
    if isinstance(own, int) and not isinstance(own, bool):
        return own
    counts = [s["step"] for s in optimizer.state.values() if isinstance(s, dict) and "step" in s]
    counts += [g["step"] for g in optimizer.param_groups if "step" in g]
    return max((int(c) for c in counts), default=None)


def require_its_optimizer(problem: Problem, optimizer: Any) -> None:
    """Raise ``OptionError`` unless an optimizer trains parameters of the problem's model."""
    if not hasattr(optimizer, "param_groups"):
        raise OptionError(
            f"A Monitor watches a torch optimizer, not {type(optimizer).__name__}: "
            "cs.Monitor(problem, optimizer, path)."
        )
    own = {id(p) for p in problem.user_model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise OptionError(
            f"The {type(optimizer).__name__} trains none of the parameters of the problem's "
            f"{type(problem.user_model).__name__}, which the Monitor would watch: make the "
            "Problem of the very model that is trained, not of a copy."
        )
