"""Computing the same whatever torch modes the caller is in, and unseen by what he trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_owners: list[object] = []  # of the passes under way that are not the training's


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


@contextmanager
def aside(owner: object = None) -> Iterator[None]:
    """Passes through a user's model that are not the training's own.

    They run through the hooks that optimizers have put there: all but those of ``owner`` look away,
    or a Hessian computed between ``zero_grad()`` and ``step()`` would be taken for a minibatch.
    """
    _owners.append(owner)
    try:
        yield
    finally:
        _owners.pop()


def looks_away(owner: object) -> bool:
    """Whether a pass is under way that is none of this owner's business."""
    return bool(_owners) and _owners[-1] is not owner


def between_passes() -> bool:
    """Whether what autograd computes now belongs to no minibatch, for hooks on its tensors."""
    return bool(_owners) and _owners[-1] is None
