"""Memory: how much there is, and refusing what would not fit before allocating it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import MemoryLimitError

_CGROUP = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be allocated on ``device`` (on the CPU within the container's limit)."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    free = psutil.virtual_memory().available
    for limit, used in _CGROUP:
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):
            continue
        free = min(free, max(left, 0))
    return int(free)


def format_bytes(count: float) -> str:
    """``1536`` -> ``'1.5 KiB'``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def require(
    needed: int, what: str, instead: str, *, device: torch.device | str = "cpu", share: float = 0.8
) -> None:
    """Refuse an allocation of ``needed`` bytes that exceeds ``share`` of what is available.

    Raises :class:`~curvscope.errors.MemoryLimitError`, naming ``what`` needs the memory and what to
    do ``instead``, before anything is allocated.
    """
    free = available_bytes(device)
    if needed > share * free:
        raise MemoryLimitError(
            f"{what} needs {format_bytes(needed)} ({needed} bytes), but only "
            f"{format_bytes(free)} ({free} bytes) are available on {device}. {instead}"
        )


_ADVICE: ContextVar[str | None] = ContextVar("advice", default=None)


@contextmanager
def advising(instead: str) -> Iterator[None]:
    """Inside, who is refused a whole matrix is told to do ``instead``: what fits the question."""
    token = _ADVICE.set(instead)
    try:
        yield
    finally:
        _ADVICE.reset(token)


def advice(usual: str) -> str:
    """What :func:`advising` says, or else ``usual``."""
    return _ADVICE.get() or usual


class PeakBytes(TorchDispatchMode):
    """``with PeakBytes() as peak: ...``; ``peak.bytes``: the most that tensors made inside held.

    Tensors that exist before do not count, nor do work spaces inside of kernels. Every operation
    gets some microseconds longer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._now = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if made:
            given = {
                t.untyped_storage()._cdata
                for t in tree_leaves((args, kwargs))
                if isinstance(t, Tensor) and t.layout == torch.strided
            }
            for tensor in made:
                if tensor.layout == torch.strided:
                    self._note(tensor.untyped_storage(), given)
        return result

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self._live:
            return
        size = storage.nbytes()
        self._live.add(key)
        self._now += size
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._now -= size
