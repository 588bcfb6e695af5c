"""Optimizers that use curvature, and that show it: each carries its matrix as an Operator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# class -> module; resolved on first use
_CLASSES = {
    "CurvatureOptimizer": "base",
    "KBFGS": "kbfgs",
    "KFAC": "kfac",
}

if TYPE_CHECKING:
    from .base import CurvatureOptimizer
    from .kbfgs import KBFGS
    from .kfac import KFAC

__all__ = ["KBFGS", "KFAC", "CurvatureOptimizer"]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(f".{_CLASSES[name]}", __name__), name)
    raise AttributeError(f"module 'curvscope.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
