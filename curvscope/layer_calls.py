"""From a call of ``torch.nn.functional`` to a :class:`~curvscope.layers.Call`.

``LAYER_TYPES`` maps functions that use parameters to readers of their arguments. A reader returns
the fields of the call (``kind``, ``input``, ``weight``, ``bias`` and the kind's options), or ``{}``
where the function is used in a way that its layer type does not describe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .layers import (
    Convolution,
    Embedding,
    LayerType,
    Linear,
    MatrixProduct,
    Scale,
    TransposedConvolution,
)

_CONV_ARGS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGS = (
    *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
)
_EMBEDDING_ARGS = (
    *("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
)
_STATISTICS_ARGS = ("input", "running_mean", "running_var", "weight", "bias")
_LAST_ARGS = ("momentum", "eps")
_CONV_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _bind(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = {"bias": None, **_bind(("input", "weight", "bias"), args, kwargs)}
    return {"kind": Linear(), **bound}


def _addmm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """``b + x W``, for a bias of one axis; anything else is not the layer that is meant."""
    bound = {"beta": 1, "alpha": 1, **_bind(("input", "mat1", "mat2"), args, kwargs)}
    bias, x, weight = bound["input"], bound["mat1"], bound["mat2"]
    if bias.ndim != 1 or len(bias) != weight.shape[1] or (bound["beta"], bound["alpha"]) != (1, 1):
        return {}
    return {"kind": MatrixProduct(), "input": x, "weight": weight, "bias": bias, "source": x}


def _matmul(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """``x W`` for a matrix on the right; one on the left has its samples in columns."""
    x, weight = (*args, *kwargs.values())[:2]
    if weight.ndim != 2:
        return {}
    return {"kind": MatrixProduct(), "input": x, "weight": weight, "bias": None}


def _convolution(kind: LayerType, names: Sequence[str]) -> Callable[..., dict[str, Any]]:
    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = {**_CONV_DEFAULTS, **_bind(names, args, kwargs)}
        shape = tuple(bound["weight"].shape)
        if bound["input"].ndim != len(shape):  # an unbatched input has no sample axis
            return {}
        return {"kind": kind, **bound, "shape": shape, "kernel": list(shape[2:])}

    return bind


def _embedding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _bind(_EMBEDDING_ARGS, args, kwargs)
    if bound.get("max_norm") is not None or bound.get("scale_grad_by_freq"):
        return {}
    padding = bound.get("padding_idx")
    rows = bound["weight"].shape[0]
    return {
        "kind": Embedding(),
        "input": bound["input"],
        "weight": bound["weight"],
        "bias": None,
        "shape": tuple(bound["weight"].shape),
        "padding_idx": None if padding is None else padding % rows,
    }


def _layer_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    bound = {"weight": None, "bias": None, "eps": 1e-5, **_bind(names, args, kwargs)}
    shape = tuple(bound["normalized_shape"])
    x = bound["input"].detach()
    bound["input"] = F.layer_norm(x, shape, None, None, bound["eps"])
    features = tuple(range(x.ndim - len(shape), x.ndim))
    return {"kind": Scale(), **bound, "raw": x, "features": features}


def _rms_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _bind(("input", "normalized_shape", "weight", "eps"), args, kwargs)
    shape = tuple(bound["normalized_shape"])
    x = bound["input"].detach()
    bound["input"] = F.rms_norm(x, shape, None, bound.get("eps"))
    features = tuple(range(x.ndim - len(shape), x.ndim))
    none = {"weight": None, "bias": None}
    return {"kind": Scale(), **none, **bound, "raw": x, "features": features}


def _group_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("input", "num_groups", "weight", "bias", "eps")
    bound = {"weight": None, "bias": None, "eps": 1e-5, **_bind(names, args, kwargs)}
    x = bound["input"].detach()
    bound["input"] = F.group_norm(x, bound["num_groups"], None, None, bound["eps"])
    return {"kind": Scale(), **bound, "raw": x, "features": (1,)}


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"weight": None, "bias": None, "training": False, "eps": 1e-5}
    bound = {**defaults, **_bind((*_STATISTICS_ARGS, "training", *_LAST_ARGS), args, kwargs)}
    x, training = bound["input"].detach(), bound["training"]
    mean, var = (None, None) if training else (bound["running_mean"], bound["running_var"])
    bound["input"] = F.batch_norm(x, mean, var, None, None, training, 0.0, bound["eps"])
    return {"kind": Scale(), **bound, "raw": x, "features": (1,)}


def _instance_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = (*_STATISTICS_ARGS, "use_input_stats", *_LAST_ARGS)
    defaults: dict[str, Any] = {"running_mean": None, "running_var": None, "weight": None}
    defaults |= {"bias": None, "use_input_stats": True, "eps": 1e-5}
    bound = {**defaults, **_bind(names, args, kwargs)}
    x, own = bound["input"].detach(), bound["use_input_stats"]
    mean, var = (None, None) if own else (bound["running_mean"], bound["running_var"])
    bound["input"] = F.instance_norm(x, mean, var, None, None, own, 0.0, bound["eps"])
    return {"kind": Scale(), **bound, "raw": x, "features": (1,)}


_conv = _convolution(Convolution(), _CONV_ARGS)
_transposed = _convolution(TransposedConvolution(), _TRANSPOSED_ARGS)

#: functions that use parameters -> how to read their arguments (``{}``: not supported like this)
LAYER_TYPES: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), _addmm),
    **dict.fromkeys((torch.mm, torch.Tensor.mm, torch.matmul), _matmul),
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _conv),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed
    ),
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
