"""Convolutions and BatchNorm with second derivatives that cost what they need on the CPU.

Autograd writes the derivative of a convolution's backward pass in its weights as a convolution
whose kernels are as large as the images and whose channels are the samples, for which the CPU has
no good algorithm: it takes twice the time of the weight gradient that it is. The one of BatchNorm
in eval mode is written for train mode. Here both are written out; values are the same to rounding,
first derivatives come from the same kernels as ever.

With ``y = C(x, w) + b`` bilinear and ``X``, ``W`` its adjoints in x and w, the backward pass is
``g -> X(g, w), W(g, x), sum g``, and its adjoint for ``(u_x, u_w, u_b)`` is
``C(u_x, w) + C(x, u_w) + u_b`` for g, ``X(g, u_w)`` for x and ``W(g, u_x)`` for w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten
_DIMENSIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def cheap_second_derivatives(model: nn.Module) -> Iterator[None]:
    """Inside, convolutions and eval-mode BatchNorm on the CPU are prepared for two derivatives.

    Nothing happens for a model without convolutions.
    """
    if not any(isinstance(m, _CONVOLUTION) for m in model.modules()):
        yield
        return
    with _Prepared():
        yield


class _Prepared(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DIMENSIONS:
            found = _convolution(_DIMENSIONS[func], *args, **kwargs)
        elif func is F.batch_norm:  # torch.batch_norm is called behind it, unseen
            found = _batch_norm(*args, **kwargs)
        else:
            return func(*args, **kwargs)
        return func(*args, **kwargs) if found is None else found


def _plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors of one floating type on the CPU, outside transforms.

    Inside a checkpoint torch compares what was saved with what a second run saves.
    """
    if (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        return False
    there = [t for t in tensors if t is not None]
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and t.dtype == there[0].dtype
        and t.dtype in (torch.float32, torch.float64)
        for t in there
    )


def _convolution(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """The output, or ``None`` where the call is left to torch."""
    if not _plain(input, weight, bias) or input.ndim != dimensions + 2 or not weight.requires_grad:
        return None
    return convolution(input, weight, bias, stride, padding, dilation, groups)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """``torch.conv1d``, 2d or 3d of a batch, or ``None`` where the sides are padded unequally."""
    dimensions = weight.ndim - 2

    def each(value: Any) -> list[int]:
        values = [int(value)] if isinstance(value, int) else [int(v) for v in value]
        return values * dimensions if len(values) == 1 else values

    if padding == "same":
        total = [d * (k - 1) for d, k in zip(each(dilation), weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = [t // 2 for t in total]
    padding = each(0 if padding == "valid" else padding)
    options = (each(stride), padding, each(dilation), False, [0] * dimensions, int(groups))
    return _Convolution.apply(input, weight, bias, options)  # type: ignore[no-any-return]


def _backward(
    g: Tensor, x: Tensor, w: Tensor, options: Any, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    sizes = [w.shape[0]] if mask[2] else None
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = _aten.convolution_backward(
        g, x, w, sizes, *options, list(mask)
    )
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, options: Any) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.options = options
        return _aten.convolution(x, w, b, *options)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        mask = tuple(ctx.needs_input_grad[:3])
        run = _ConvolutionBackward.apply if torch.is_grad_enabled() else _backward
        return (*run(g, x, w, ctx.options, mask), None)


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, options: Any, mask: Any) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _backward(g, x, w, options, mask)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, ux: Tensor | None, uw: Tensor | None, ub: Tensor | None
    ) -> Any:
        g, x, w = ctx.saved_tensors
        for_g, for_x, for_w = ctx.needs_input_grad[:3]
        gg = gx = gw = None
        if for_g:
            if ux is not None:
                gg = _aten.convolution(ux, w, ub, *ctx.options)
            elif ub is not None:
                gg = ub.reshape(-1, *[1] * (g.ndim - 2)).expand_as(g)
            if uw is not None:
                along = _aten.convolution(x, uw, None, *ctx.options)
                gg = along if gg is None else gg + along
        if for_x and uw is not None:
            gx = _backward(g, x, uw, ctx.options, (True, False, False))[0]
        if for_w and ux is not None:
            gw = _backward(g, ux, w, ctx.options, (False, True, False))[1]
        return gg, gx, gw, None, None


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """The output in eval mode with learned scale and shift, else ``None``."""
    given = (input, weight, bias, running_mean, running_var)
    if training or any(t is None for t in given) or not _plain(*given):
        return None
    return _BatchNorm.apply(*given, eps)  # type: ignore[no-any-return]


class _BatchNorm(torch.autograd.Function):
    """``(x - mean) * r * w + b`` per channel with ``r = (var + eps)^-1/2`` and fixed statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, w, mean, var)
        ctx.eps = eps
        return torch.batch_norm(x, w, b, mean, var, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w, mean, var = ctx.saved_tensors
        mask = tuple(ctx.needs_input_grad[:3])
        run = _BatchNormBackward.apply if torch.is_grad_enabled() else _norm_backward
        return (*run(g, x, w, mean, var, ctx.eps, mask), None, None, None)


def _norm_backward(
    g: Tensor, x: Tensor, w: Tensor, mean: Tensor, var: Tensor, eps: float, mask: Sequence[bool]
) -> Any:
    found = _aten.native_batch_norm_backward(g, x, w, mean, var, None, None, False, eps, list(mask))
    return tuple(t if wanted else None for t, wanted in zip(found, mask, strict=True))


class _BatchNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, var: Tensor, eps: float, mask: Any
    ) -> Any:
        ctx.save_for_backward(g, x, w, mean, var)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return _norm_backward(g, x, w, mean, var, eps, mask)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, ux: Tensor | None, uw: Tensor | None, ub: Tensor | None
    ) -> Any:
        g, x, w, mean, var = ctx.saved_tensors
        for_g, for_x, for_w = ctx.needs_input_grad[:3]
        r = (var + ctx.eps).rsqrt()
        shape = (-1, *[1] * (g.ndim - 2))
        gg = gx = gw = None
        scale = None if uw is None else uw * r
        if for_g:
            shift = ub
            if scale is not None:
                shift = -mean * scale if ub is None else ub - mean * scale
                gg = torch.addcmul(shift.reshape(shape), x, scale.reshape(shape))
            elif ub is not None:
                gg = ub.reshape(shape).expand_as(g)
            if ux is not None:
                s = (w * r).reshape(shape)
                gg = ux * s if gg is None else torch.addcmul(gg, ux, s)
        if for_x and scale is not None:
            gx = g * scale.reshape(shape)
        if for_w and ux is not None:
            gw = (ux * g).sum([0, *range(2, g.ndim)]) * r
        return gg, gx, gw, None, None, None, None
