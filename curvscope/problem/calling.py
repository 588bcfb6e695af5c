"""Calling a model on one batch, with words for what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import BatchNormError, ModelError

Forward = Callable[[nn.Module, Any], Tensor]


def call(model: nn.Module, forward: Forward | None, inputs: Any, *, batchnorm: str) -> Tensor:
    """The outputs of ``forward(model, inputs)``, or of ``model(inputs)`` without ``forward``.

    Raises ``ModelError`` where that gives no tensor or cannot be called so, ``BatchNormError``
    where a batch is too small for its own statistics.
    """
    try:
        outputs = _outputs(model, forward, inputs)
    except ValueError as error:
        if batchnorm != "batch" or "more than 1 value per channel" not in str(error):
            raise
        raise BatchNormError(
            'batchnorm="batch" is not defined for a batch with one value per channel '
            f"({error}). Make every batch larger, leave the last one out, or use "
            'batchnorm="eval".'
        ) from error
    if not isinstance(outputs, Tensor):
        if forward is None:
            advice = "say what the outputs are with forward=lambda model, inputs: ..."
        else:
            advice = "let it return what the loss needs, joined by torch.cat if it is several."
        raise ModelError(
            f"{'The model' if forward is None else 'forward='} returned "
            f"{type(outputs).__name__}, not a tensor: {advice}"
        )
    return outputs


def _outputs(model: nn.Module, forward: Forward | None, inputs: Any) -> Any:
    if forward is not None:
        return forward(model, inputs)
    if not (isinstance(inputs, Mapping) or type(inputs) in (tuple, list)):
        return model(inputs)
    try:
        return model(inputs)
    except (TypeError, AttributeError) as error:
        raise ModelError(
            f"The model cannot be called with inputs of type {type(inputs).__name__} "
            f"({error}). Say how with forward=lambda model, inputs: model(*inputs) or "
            "model(**inputs)."
        ) from error
