"""Progress: off in the library unless asked for; bars on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

_T = TypeVar("_T")
_shown: ContextVar[bool] = ContextVar("curvscope_progress", default=False)
_lines_since: ContextVar[float | None] = ContextVar("curvscope_lines", default=None)


@contextlib.contextmanager
def show_progress(shown: bool = True) -> Iterator[None]:
    """Show (or hide) progress bars with the time left for everything computed inside.

    Widgets in a notebook, text on a terminal, and text with a note in a notebook without the
    package ``ipywidgets``.

    Examples
    --------
    >>> import torch
    >>> matrix = torch.eye(3)
    >>> import curvscope as cs
    >>> with cs.show_progress():
    ...     found = cs.trace(matrix)
    """
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


@contextlib.contextmanager
def show_stages() -> Iterator[None]:
    """Print a line per :func:`stage` of what is computed inside, for output that is no terminal."""
    token = _lines_since.set(time.perf_counter())
    try:
        yield
    finally:
        _lines_since.reset(token)


def stage(text: str) -> None:
    """Say what begins now, with the seconds since the start, inside :func:`show_stages`."""
    since = _lines_since.get()
    if since is not None:
        print(f"[{time.perf_counter() - since:6.1f} s] {text}", file=sys.stderr, flush=True)


def track(items: Iterable[_T], label: str, *, total: int | None = None) -> Iterable[_T]:
    """Iterate with a bar (``tqdm``) if progress is shown; short loops stay silent."""
    if not _shown.get():
        return items
    return _bars()(items, desc=label, total=total, leave=False, delay=1.0, dynamic_ncols=True)


@functools.cache
def _bars() -> Any:
    """The kind of bar that fits the place; says once what a notebook without widgets lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm's words for the same
        from tqdm.auto import tqdm
    if _in_notebook() and not _installed("ipywidgets"):
        print(
            "Progress is shown as text: for bars in the notebook, pip install ipywidgets and "
            "restart the kernel.",
            file=sys.stderr,
        )
    return tqdm


def _in_notebook() -> bool:
    """Whether an IPython kernel runs this, which notebooks have and terminals do not."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", {})


def _installed(package: str) -> bool:
    if package in sys.modules:  # None where somebody has blocked it
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None
