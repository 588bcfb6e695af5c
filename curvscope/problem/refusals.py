"""Arguments of a Problem that are none, what was probably meant, and what is not defined for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import DataError, ModelError, UnsupportedLossError

if TYPE_CHECKING:
    from .problem import Problem


def check_model(model: Any, loss: Any) -> None:
    """Raise ``ModelError`` for what is no module, or is the loss in the model's place."""
    if not isinstance(model, nn.Module):
        swapped = isinstance(loss, nn.Module) and any(True for _ in loss.parameters())
        hint = " The order is cs.Problem(model, loss, data)." if swapped else ""
        raise ModelError(f"The model must be an nn.Module, not {type(model).__name__}.{hint}")
    if _is_loss(model) and isinstance(loss, nn.Module) and not _is_loss(loss):
        raise ModelError(
            f"The model is {type(model).__name__} and the loss {type(loss).__name__}: they seem to "
            "be swapped. The order is cs.Problem(model, loss, data)."
        )


def _is_loss(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.loss._Loss)


def check_data(data: Any, unpack: Callable[..., Any] | None) -> None:
    """Raise ``DataError`` for NumPy arrays, a Dataset, and tuples of three tensors."""
    if isinstance(data, Dataset):
        raise DataError(
            f"The data are a Dataset ({type(data).__name__}), which gives single samples: wrap it "
            "in a DataLoader, DataLoader(dataset, batch_size=...)."
        )
    if unpack is not None:
        return
    if _has_arrays(data):
        raise DataError(
            "The data hold NumPy arrays: convert with torch.as_tensor(x), inputs in the model's "
            "dtype (torch.as_tensor(x, dtype=torch.float32))."
        )
    if isinstance(data, tuple) and len(data) > 2 and all(isinstance(e, Tensor) for e in data):
        raise DataError(
            f"The data are a tuple of {len(data)} tensors, not a pair (inputs, targets). For "
            "several inputs give ((x1, x2), targets) with forward=lambda model, inputs: "
            "model(*inputs), or sort them with unpack=lambda batch: (inputs, targets)."
        )


def _has_arrays(data: Any) -> bool:
    """Whether an array is the data, one of a pair, or in the first of a list of pairs."""
    if isinstance(data, np.ndarray):
        return True
    if isinstance(data, Mapping):
        return any(isinstance(entry, np.ndarray) for entry in data.values())
    if not isinstance(data, tuple | list) or not data:
        return False
    if any(isinstance(entry, np.ndarray) for entry in data):
        return True
    first = data[0]
    return isinstance(first, tuple | list) and any(isinstance(e, np.ndarray) for e in first)


def require_sample_gradients(problem: Problem, what: str) -> None:
    """Raise ``UnsupportedLossError`` where a sample's gradient comes not by its outputs alone."""
    direct = problem.check().direct
    if direct:
        raise UnsupportedLossError(
            f"The loss {problem.loss.name!r} uses parameters itself, besides the outputs "
            f"({', '.join(direct[:3])}{', ...' if len(direct) > 3 else ''}), so the {what}, made "
            "of gradients of single samples by way of their outputs, is not defined here. Leave "
            "the penalty out of the loss; cs.hessian and problem.gradient() take it in."
        )
