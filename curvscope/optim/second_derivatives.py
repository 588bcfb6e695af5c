"""Convolutions, BatchNorm and ReLU with second derivatives that cost what counting says.

torch differentiates them twice by general formulas: a batch normalisation by some thirty
elementwise operations, the weight gradient of a convolution by a convolution whose kernel is as
large as the image, a ReLU with zeros that are then added. Together they took half of an AdaHessian
step of a ResNet on CPU. Here they are made of the kernels that the first derivatives use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from ..curvature.secondorder import convolution


class FastSecondDerivatives(TorchFunctionMode):
    """While active, convolutions, train-mode BatchNorm and ReLU are differentiated as below."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        fast = _FAST.get(func) if getattr(func, "__hash__", None) else None
        if fast is not None and torch.is_grad_enabled() and not _special():
            found = fast(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _special() -> bool:
    """Whether this is no plain forward pass, and torch's own functions have to do.

    Functions of our own know no transforms of ``torch.func`` and no forward mode; and a checkpoint
    that is computed again on the way back, where no mode is active, must save what it saved first.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or (hooks is not None and hooks(False) is not None)
    )


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all are of one dtype, and autocast would not change that."""
    same = all(t is None or t.dtype == x.dtype for t in others)
    return same and not torch.is_autocast_enabled(x.device.type)


# -- ReLU -----------------------------------------------------------------------------------------


def _relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    if inplace:
        return None
    result: Tensor = _ReLU.apply(input)
    return result


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp_min(0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        result: Tensor = _ReLUBackward.apply(g, *ctx.saved_tensors)
        return result


class _ReLUBackward(torch.autograd.Function):
    """``g`` where ``y > 0``: linear in g, and with no derivative in y."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return torch.ops.aten.threshold_backward(g, y, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.ops.aten.threshold_backward(u, *ctx.saved_tensors, 0), None


# -- convolution ----------------------------------------------------------------------------------


def _convolution(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """The convolution, or ``None`` where this is a case for torch's own."""
    bias = kwargs.get("bias", args[0] if args else None)
    if input.ndim != weight.ndim or not _alike(input, weight, bias):
        return None
    return convolution(input, weight, *args, **kwargs)


# -- batch normalisation --------------------------------------------------------------------------


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
    """The normalised input, or ``None`` where this is a case for torch's own kernel."""
    if not training or weight is None or bias is None or not _alike(input, weight, bias):
        return None
    if input.numel() <= input.shape[1]:  # one value per channel or none: torch knows what to say
        return None
    result: Tensor = _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)
    return result


class _BatchNorm(torch.autograd.Function):
    """``y = w x^ + b``, ``x^ = (x - mean) r`` with ``r`` the inverse standard deviation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, r = torch.native_batch_norm(
            x, w, b, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, w, mean, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w, mean, r = ctx.saved_tensors
        return *_BatchNormBackward.apply(g, x, w, mean, r, ctx.eps), None, None, None, None


class _BatchNormBackward(torch.autograd.Function):
    """``g_b = sum g``, ``g_w = sum g x^``, ``g_x = w r P g`` per channel.

    ``P v = v - mean(v) - x^ mean(x^ v)``. The derivatives of ``<u, g_x> + p g_w + q g_b`` are

        in g:  w r P u + p x^ + q
        in w:  n r k,                    k = mean(u g) - mean(u) mean(g) - mean(x^ u) mean(x^ g)
        in x:  r P h - w r^2 k x^,       h = (p - w r mean(x^ u)) g - w r mean(x^ g) u

    all of them sums of u, g and x with coefficients per channel.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, r: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        g_x, g_w, g_b = torch.ops.aten.native_batch_norm_backward(
            g, x, w, None, None, mean, r, True, eps, [True, True, True]
        )
        ctx.save_for_backward(g, x, w, mean, r, g_w, g_b)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return g_x, g_w, g_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, p: Tensor | None, q: Tensor | None) -> Any:  # type: ignore[override]
        g, x, w, mean, r, g_w, g_b = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        slope, zero = w * r, torch.zeros_like(w)
        xg, mean_g = g_w / n, g_b / n
        p, q = (zero if v is None else v for v in (p, q))
        mean_u = xu = k = zero
        if u is not None:
            u = u.contiguous()
            _, sum_xu, sum_u = torch.ops.aten.native_batch_norm_backward(
                u, x, w, None, None, mean, r, True, ctx.eps, [False, True, True]
            )
            mean_u, xu = sum_u / n, sum_xu / n
            k = _channel_dots(u, g) / n - mean_u * mean_g - xu * xg
        in_h = p - slope * xu  # the coefficient of g in h; that of u is -slope * xg
        in_g = _sum_of(x, r * in_h, q - slope * mean_u - mean * r * in_h, (u, slope))
        c = -r * (in_h * xg - slope * xg * xu) - slope * r * k
        d = -r * (in_h * mean_g - slope * xg * mean_u)
        in_x = _sum_of(x, c * r, d - c * r * mean, (g, r * in_h), (u, -r * slope * xg))
        return in_g, in_x, r * n * k, None, None, None


def _channel_dots(u: Tensor, v: Tensor) -> Tensor:
    """``sum u v`` per channel, in one pass: the gradient of a scale, with ``v`` as ``x^``."""
    zero = u.new_zeros(u.shape[1])
    one = torch.ones_like(zero)
    result: Tensor = torch.ops.aten.native_batch_norm_backward(
        u, v, one, None, None, zero, one, True, 0.0, [False, True, False]
    )[1]
    return result


def _sum_of(
    x: Tensor, scale: Tensor, shift: Tensor, *terms: tuple[Tensor | None, Tensor]
) -> Tensor:
    """``scale x + shift + sum_k c_k v_k`` with coefficients ``[C]`` per channel, one pass each."""
    result: Tensor = torch.native_batch_norm(
        x, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0
    )[0]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    for v, coefficient in terms:
        if v is not None:
            result.addcmul_(v, coefficient.reshape(shape))
    return result


_FAST: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    F.batch_norm: _batch_norm,
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
}
