"""Progress bars: off in the library unless asked for, on in the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

_T = TypeVar("_T")
_shown: ContextVar[bool] = ContextVar("curvscope_progress", default=False)


@contextlib.contextmanager
def show_progress(shown: bool = True) -> Iterator[None]:
    """Show (or hide) progress bars with the time left for everything computed inside."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def track(items: Iterable[_T], label: str, *, total: int | None = None) -> Iterable[_T]:
    """Iterate with a bar (``tqdm``) if progress is shown; short loops stay silent."""
    if not _shown.get():
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=label, total=total, leave=False, delay=1.0, dynamic_ncols=True)
