"""Computing the same whatever torch modes the caller is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_mode(device: str = "cpu") -> Iterator[None]:
    """Neither autocast nor inference mode (also usable as a decorator).

    Under the caller's autocast, matrices would be multiplied in half precision; tensors made in
    inference mode could not be used afterwards.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", device}:
            if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
