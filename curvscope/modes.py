"""Computing the same whatever torch modes the caller is in, and unseen by what he trains."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_passes: list[tuple[int, object]] = []  # under way and not the training's: thread, owner
_apart: list[object] = []  # an entry for everything under way in :func:`apart`


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
    Other threads are not concerned.
    """
    entry = (threading.get_ident(), owner)
    _passes.append(entry)
    try:
        yield
    finally:
        _take_out(_passes, entry)


def looks_away(owner: object) -> bool:
    """Whether a pass is under way in this thread that is none of this owner's business."""
    if not _passes:
        return False
    if torch.compiler.is_compiling():  # which knows no threads
        return _passes[-1][1] is not owner
    here = threading.get_ident()
    owners = [each for thread, each in _passes if thread == here]
    return bool(owners) and owners[-1] is not owner


@contextmanager
def apart() -> Iterator[None]:
    """Derivatives in the graph of a minibatch that are not the gradient of its loss.

    Such as those at sampled labels: hooks on the graph's tensors leave them out.
    """
    entry = object()
    _apart.append(entry)
    try:
        yield
    finally:
        _take_out(_apart, entry)


def is_apart() -> bool:
    """Whether autograd computes such derivatives now; backward passes have threads of their own."""
    return bool(_apart)


def _take_out(entries: list[Any], entry: object) -> None:
    """Remove an entry, the last that is the same one."""
    for k in range(len(entries) - 1, -1, -1):
        if entries[k] is entry:
            del entries[k]
            return
