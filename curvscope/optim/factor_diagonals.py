"""Diagonals of a layer's Kronecker factors, summed over calls without ever forming a patch.

With input rows ``a_r`` (patches of a convolution) and output-gradient rows ``s_r``, AdaFisher needs
``sum_r a_r^2`` and ``sum_r s_r^2``. The sum over all patches is that of one image, the squared
input summed over the samples, under one shifted window per kernel position: a convolution costs
one pass over its input instead of one per kernel position.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import pad_input, patches
from .layer import CONVOLUTIONS, Layer
from .tap import LayerCall, accumulates, measuring, watch_gradient

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm),
)


@dataclass
class DiagonalSums:
    """What the two diagonals of a layer are made of, added up over calls.

    Layers with rows (``norm=False``): ``h`` ``[g, i]`` and ``s`` ``[g, o]`` are sums of squares
    over rows and ``count`` is the number of rows. Normalisations: ``h`` ``[c]`` is ``sum a / T^2``
    and ``s`` ``[C]`` is ``sum s``, both over samples and their T positions, and ``count`` the
    number of samples.
    """

    h: Tensor
    s: Tensor
    count: float
    norm: bool

    def __add__(self, other: DiagonalSums) -> DiagonalSums:
        return DiagonalSums(self.h + other.h, self.s + other.s, self.count + other.count, self.norm)

    def unscaled(self, scale: float) -> DiagonalSums:
        """The sums for the loss itself, if these are for ``scale`` times the loss."""
        s = self.s / (scale if self.norm else scale**2)
        return DiagonalSums(self.h, s, self.count, self.norm)

    def over_ranks(self, h: Tensor, s: Tensor, ranks: int) -> DiagonalSums:
        """The sums of the joint batch from the means ``h``, ``s`` over ranks with equal shares.

        Each rank's ``s`` belongs to the mean over its own share, ``ranks`` times what it is in the
        mean over the joint batch.
        """
        s = s if self.norm else s / ranks
        return DiagonalSums(h * ranks, s, self.count * ranks, self.norm)

    def diagonals(self, bias: bool) -> tuple[Tensor, Tensor]:
        """``H_D`` ``[g, i (+1)]``, ``S_D`` ``[g, o]``; of normalisations ``[1, 2]``, ``[1, C]``.

        Rows: means of squares; where there is a bias the appended 1 has a column too.
        Normalisations: ``((sum_c q_c^2), C) / B^2`` with ``q`` = ``h``, and ``(sum s)_c^2 / B``.
        """
        if self.norm:
            channels = self.h.new_tensor(float(self.h.numel()))
            h = torch.stack([self.h.square().sum(), channels]) / self.count**2
            return h.unsqueeze(0), (self.s.square() / self.count).unsqueeze(0)
        h = self.h / self.count
        if bias:
            h = torch.cat([h, h.new_ones(h.shape[0], 1)], 1)
        return h, self.s / self.count


class DiagonalCollector:
    """Adds up :class:`DiagonalSums` block by block while a model runs forward and backward.

    ``use`` is to be called with every use of a layer. What is never differentiated is not counted,
    nor are passes whose gradients are gone when the layer is used again (``model.zero_grad()``).
    """

    def __init__(self, *, second_axis: bool = False) -> None:
        self.second_axis = second_axis
        self.sums: dict[str, DiagonalSums] = {}
        self._kept: dict[str, bool] = {}  # whether the gradient went to the weight's .grad

    def use(self, call: LayerCall) -> None:
        """A layer has run: sum over its input now, over its output gradient when that is there."""
        block, weight = call.layer.block, call.layer.weight
        if block in self.sums and self._kept[block] and weight.grad is None:
            del self.sums[block]
        h, count = input_sums(call, second_axis=self.second_axis)
        hook = _gradient_hook(weakref.ref(self), call.layer, h, count)
        watch_gradient(call.outputs, hook, call.layer.weight)

    def add(self, layer: Layer, sums: DiagonalSums) -> None:
        """Count one use of a layer."""
        block = layer.block
        known, self._kept[block] = self.sums.get(block), accumulates(layer.weight)
        self.sums[block] = sums if known is None else known + sums

    def overflow(self, blocks: Iterable[str]) -> str | None:
        """The first of the blocks whose layer had an input that is not finite."""
        for block in blocks:
            sums = self.sums.get(block)
            if sums is not None and not bool(torch.isfinite(sums.h).all()):
                return f"the input of layer {block!r}"
        return None


def _gradient_hook(
    owner: weakref.ref[DiagonalCollector], layer: Layer, h: Tensor, count: int
) -> Callable[[Tensor], None]:
    """A hook for a layer's output that adds its gradient's sums to those of its input.

    It must not hold the output, or both would live in a reference cycle.
    """

    def hook(gradient: Tensor) -> None:
        collector = owner()
        if collector is not None:
            with measuring(gradient.device):
                s = output_sums(layer, gradient.detach())
                norm = isinstance(layer.module, NORMS)
                collector.add(layer, DiagonalSums(h, s, count, norm))

    return hook


def input_sums(call: LayerCall, *, second_axis: bool = False) -> tuple[Tensor, int]:
    """``h`` and ``count`` of :class:`DiagonalSums` for one use of a layer.

    ``second_axis=True`` takes axis 1 of a LayerNorm's input for its features whatever the shape,
    as the released AdaFisher does.
    """
    module, x = call.layer.module, call.inputs
    if isinstance(module, CONVOLUTIONS):
        o = call.call.options
        dims = len(o["kernel"])
        stride, dilation = (_tuple(o[name], dims) for name in ("stride", "dilation"))
        h = patch_squares(call.call.inputs, o["kernel"], stride, o["padding"], dilation)
        shape = call.outputs.shape
        return h.reshape(call.layer.groups, -1), x.shape[0] * math.prod(shape[-dims:])
    if isinstance(module, nn.Linear):
        rows = _precise(x).reshape(-1, x.shape[-1])
        return rows.square().sum(0, keepdim=True), rows.shape[0]
    axes = norm_features(module, x)
    if second_axis and isinstance(module, nn.LayerNorm):
        axes = (1,)
    positions = x.numel() // (x.shape[0] * math.prod(x.shape[axis] for axis in axes))
    return _sum_but(_precise(x), axes) / positions**2, x.shape[0]


def output_sums(layer: Layer, s: Tensor) -> Tensor:
    """``s`` of :class:`DiagonalSums` from the gradient ``s`` in the layer's output."""
    s = _precise(s)
    if isinstance(layer.module, CONVOLUTIONS):
        if s.ndim < layer.weight.ndim:  # called without a sample axis
            s = s.unsqueeze(0)
        return s.flatten(2).square().sum((0, 2)).reshape(layer.groups, -1)
    if isinstance(layer.module, nn.Linear):
        return s.reshape(-1, s.shape[-1]).square().sum(0, keepdim=True)
    return _sum_but(s, norm_features(layer.module, s))


def patch_squares(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: str | int | Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``[C, *kernel]``: squares of ``x`` ``[N, C, ...]`` summed over patches, entry by entry."""
    image = sum_of_squares(x).unsqueeze(0)
    windows = patches(pad_input(image, padding, kernel, dilation), kernel, stride, dilation)
    return windows.sum(tuple(range(2, 2 + len(kernel)))).squeeze(0)


def sum_of_squares(x: Tensor) -> Tensor:
    """``sum_n x_n^2`` over the first axis."""
    x = _precise(x)
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.movedim(1, -1).square().sum(0).movedim(-1, 0)  # several times faster
    return x.square().sum(0)


def norm_features(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The axes of ``x`` that the parameters of a normalisation run over."""
    if isinstance(module, nn.LayerNorm):
        return tuple(range(x.ndim - len(module.normalized_shape), x.ndim))
    return (1,)


def min_max(x: Tensor) -> Tensor:
    """``(x - min x) / (max x - min x + 1e-6)`` over a whole vector, all groups together."""
    low = x.min()
    return (x - low) / (x.max() - low + 1e-6)


def _sum_but(x: Tensor, kept: Sequence[int]) -> Tensor:
    """Sum over all axes but ``kept``, flattened."""
    others = [axis for axis in range(x.ndim) if axis not in kept]
    return (x.sum(others) if others else x).reshape(-1)


def _precise(x: Tensor) -> Tensor:
    """Half precision is summed in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _tuple(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else [int(v) for v in value]
    return values * dims if len(values) == 1 else values
