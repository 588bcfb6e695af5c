"""curvscope: the curvature of a neural network's loss, exact and approximate, side by side."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module; resolved on first use, so that importing curvscope stays light
_PUBLIC = {
    "Problem": "problem",
    "hessian": "curvature",
    "ggn": "curvature",
    "fisher": "curvature",
    "empirical_fisher": "curvature",
    "kfac": "curvature",
    "ekfac": "curvature",
    "kflr": "curvature",
    "kfra": "curvature",
    "foof": "curvature",
    "diagonal_kf": "curvature",
    "exact_diagonal": "curvature",
    "hutchinson_diagonal": "curvature",
    "register_approximation": "curvature",
    "forget_approximation": "curvature",
    "best_diagonal": "operators",
    "best_identity": "operators",
    "best_kronecker": "operators",
    "best_diagonal_kronecker": "operators",
    "Operator": "operators",
    "compare": "analysis",
    "spectrum": "analysis",
    "concentration": "analysis",
    "coverage": "analysis",
    "batch_spectra": "analysis",
    "gradient_noise": "analysis",
    "local_model": "analysis",
    "verify": "analysis",
    "trace": "analysis",
    "diagonal": "analysis",
    "norm": "analysis",
    "cosine": "analysis",
    "logdet": "analysis",
    "effective_dimension": "analysis",
    "condition_number": "analysis",
    "eigsh": "analysis",
    "negative_curvature": "analysis",
    "density": "analysis",
    "solve": "analysis",
    "Monitor": "training",
    "Run": "training",
    "make_report": "report",
    "explore": "explorer",
    "show_progress": "progress",
}
_MODULES = (
    "analysis",
    "curvature",
    "errors",
    "operators",
    "optim",
    "plot",
    "problem",
    "report",
    "training",
    "zoo",
)

__all__ = [*_PUBLIC, *_MODULES, "__version__", "backpack"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "backpack":
        return importlib.import_module(".curvature.backpack", __name__)
    raise AttributeError(f"module 'curvscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
