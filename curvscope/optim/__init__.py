"""Optimizers that use curvature, and that show it: each carries its matrix as an Operator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# class -> module; resolved on first use
_CLASSES = {
    "AdaFisher": "adafisher",
    "AdaFisherW": "adafisher",
    "AdaHessian": "adahessian",
    "CurvatureOptimizer": "base",
    "KBFGS": "kbfgs",
    "KFAC": "kfac",
    "MFAC": "mfac",
}

if TYPE_CHECKING:
    from .adafisher import AdaFisher, AdaFisherW
    from .adahessian import AdaHessian
    from .base import CurvatureOptimizer
    from .kbfgs import KBFGS
    from .kfac import KFAC
    from .mfac import MFAC

__all__ = ["KBFGS", "KFAC", "MFAC", "AdaFisher", "AdaFisherW", "AdaHessian", "CurvatureOptimizer"]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(f".{_CLASSES[name]}", __name__), name)
    raise AttributeError(f"module 'curvscope.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
