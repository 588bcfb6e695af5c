"""Per layer type: its parameters' gradient as (input rows) x (output-gradient rows).

A layer enters as a :class:`Call`: one evaluation of ``torch.nn.functional`` on a parameter,
with its input and output. Every supported layer is linear in its parameters, so that the gradient
of sample n is a sum over its T positions,

    dl_n/dW = sum_t  s_nt a_nt^T        (Linear, convolutions)
    dl_n/dw = sum_t  s_nt * x_nt        (scales of normalisations)
    dl_n/db = sum_t  s_nt               (biases and shifts)

with ``a_nt`` the input row (a patch for convolutions) and ``s_nt`` the gradient in the output
row. A new layer type is one subclass of :class:`LayerType` and one entry of
``layer_calls.LAYER_TYPES``.

Shapes: N samples, T positions per sample, g groups, o outputs and i inputs per group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SampleAxis:
    """Where a tensor keeps its samples: along ``axis``, N of them in blocks of ``fold``.

    ``fold`` positions of each sample are folded into the axis, next to each other
    (``inner=True``: ``n * fold + j``) or strided (``inner=False``: ``j * N + n``).
    """

    axis: int = 0
    fold: int = 1
    inner: bool = True

    def first(self, tensor: Tensor, samples: int) -> Tensor:
        """View with the samples first and their folded positions second: ``[N, fold, ...]``."""
        moved = tensor.movedim(self.axis, 0)
        if self.inner:
            return moved.reshape(samples, self.fold, *moved.shape[1:])
        return moved.reshape(self.fold, samples, *moved.shape[1:]).transpose(0, 1)


@dataclass
class Call:
    """One use of parameters in a forward pass.

    ``inputs`` is detached; ``outputs`` is part of the graph (before any in-place activation);
    ``options`` holds the function's other arguments (stride, ...). ``weight`` or ``bias`` is
    ``None`` where it is absent or not a parameter that takes part. ``parents`` are the nodes of the
    autograd graph that the call depends on besides these two. With ``keeps_rows``, input rows that
    take time to form are kept for the next pass.
    """

    kind: LayerType
    inputs: Tensor
    outputs: Tensor
    weight: Tensor | None
    bias: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)
    parents: tuple[Any, ...] = ()
    keeps_rows: bool = False
    _rows: tuple[SampleAxis, int, Tensor] | None = None

    def candidates(self, samples: int) -> list[SampleAxis]:
        """Ways in which the outputs may be cut into samples, the most usual first."""
        last = self.outputs.ndim - self.kind.feature_axes(self)
        return sample_axes(tuple(self.outputs.shape[: max(last, 0)]), samples)


def sample_axes(shape: Sequence[int], samples: int) -> list[SampleAxis]:
    """All ways in which axes of these sizes may hold ``samples`` samples."""
    found = [SampleAxis(axis) for axis, size in enumerate(shape) if size == samples]
    for axis, size in enumerate(shape):
        if size % samples == 0 and size != samples and size > 0:
            fold = size // samples
            found += [SampleAxis(axis, fold, True), SampleAxis(axis, fold, False)]
    return found


class LayerType:
    """What curvscope needs to know of one kind of layer."""

    name: ClassVar[str]
    #: has input rows and output rows, so that Kronecker factors are defined
    kronecker: ClassVar[bool] = False

    def weight_order(self, call: Call) -> Tensor | None:
        """Positions in the flat weight of the entries of ``[g, o, i]``; ``None``: as they are."""
        return None

    def feature_axes(self, call: Call) -> int:
        """How many trailing axes of the outputs can never be the sample axis."""
        raise NotImplementedError

    def weight_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        """Per-sample gradients ``[N, *weight.shape]`` for output gradients ``s``."""
        raise NotImplementedError

    def bias_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        """Per-sample gradients ``[N, *bias.shape]``."""
        raise NotImplementedError

    def input_rows(self, call: Call, axis: SampleAxis, samples: int) -> Tensor:
        """``a [N, T, g, i]`` without the appended 1."""
        raise NotImplementedError

    def costly_rows(self, call: Call) -> int:
        """How many numbers the input rows are, where forming them takes time; 0 elsewhere."""
        return 0

    def output_rows(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        """``s [N, T, g, o]``."""
        raise NotImplementedError

    def sizes(self, call: Call) -> tuple[int, int, int]:
        """Groups, outputs per group, inputs per group (without the appended 1)."""
        raise NotImplementedError


class Linear(LayerType):
    """``z = W a + b`` on the last axis; all axes between the samples and it are positions."""

    name = "Linear"
    kronecker = True

    def feature_axes(self, call: Call) -> int:
        return 1

    def input_rows(self, call: Call, axis: SampleAxis, samples: int) -> Tensor:
        rows = axis.first(call.inputs, samples)
        return rows.reshape(samples, -1, 1, rows.shape[-1])

    def output_rows(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        rows = axis.first(s, samples)
        return rows.reshape(samples, -1, 1, rows.shape[-1])

    def weight_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        out = self.output_rows(call, s, axis, samples).squeeze(2)
        return out.mT @ self.input_rows(call, axis, samples).squeeze(2)

    def bias_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        return self.output_rows(call, s, axis, samples).sum(1).squeeze(1)

    def sizes(self, call: Call) -> tuple[int, int, int]:
        return 1, call.outputs.shape[-1], call.inputs.shape[-1]


class MatrixProduct(Linear):
    """``z = a W + b`` with the weight as ``[in, out]``: ``x @ W``, and GPT-2's ``Conv1D``."""

    def weight_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        return super().weight_gradient(call, s, axis, samples).mT

    def weight_order(self, call: Call) -> Tensor:
        _, out, inp = self.sizes(call)
        return torch.arange(inp * out).reshape(inp, out).mT.reshape(-1)


class Convolution(LayerType):
    """1-, 2- and 3-d convolution; positions are output pixels, input rows are patches."""

    name = "Conv"
    kronecker = True

    def feature_axes(self, call: Call) -> int:
        return call.outputs.ndim - 1

    def _geometry(self, call: Call) -> tuple[int, list[int], list[int]]:
        o = call.options
        dims = len(o["kernel"])  # the outputs may be those of one sample, without its axis
        return int(o["groups"]), _tuple(o["stride"], dims), _tuple(o["dilation"], dims)

    def costly_rows(self, call: Call) -> int:
        positions = call.outputs.numel() // call.outputs.shape[1]
        return positions * call.inputs.shape[1] * math.prod(call.options["kernel"])

    def input_rows(self, call: Call, axis: SampleAxis, samples: int) -> Tensor:
        if call._rows is not None and call._rows[:2] == (axis, samples):
            return call._rows[2]
        groups, stride, dilation = self._geometry(call)
        kernel = call.options["kernel"]
        x = pad_input(call.inputs, call.options["padding"], kernel, dilation)
        windows = patches(x, kernel, stride, dilation)  # [B, C, positions..., kernel...]
        dims = len(kernel)
        batch, channels = windows.shape[:2]
        positions = math.prod(windows.shape[2 : 2 + dims])
        rows = windows.reshape(batch, groups, channels // groups, positions, -1)
        rows = rows.permute(0, 3, 1, 2, 4).reshape(batch, positions, groups, -1)
        rows = _fold_positions(axis.first(rows, samples))
        if call.keeps_rows:
            call._rows = axis, samples, rows
        return rows

    def output_rows(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        groups = self._geometry(call)[0]
        batch, channels = s.shape[:2]
        rows = s.reshape(batch, groups, channels // groups, -1).permute(0, 3, 1, 2)
        return _fold_positions(axis.first(rows, samples))

    def weight_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        a = self.input_rows(call, axis, samples)
        rows = self.output_rows(call, s, axis, samples)
        return torch.einsum("ntgo,ntgi->ngoi", rows, a).reshape(samples, *call.options["shape"])

    def bias_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        return _fold_positions(axis.first(s.flatten(2).mT, samples)).sum(1)

    def sizes(self, call: Call) -> tuple[int, int, int]:
        groups = int(call.options["groups"])
        shape = call.options["shape"]
        return groups, shape[0] // groups, math.prod(shape[1:])


class TransposedConvolution(LayerType):
    """1-, 2- and 3-d transposed convolution: input pixels times patches of the output gradient."""

    name = "ConvTranspose"

    def feature_axes(self, call: Call) -> int:
        return call.outputs.ndim - 1

    def weight_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        o = call.options
        dims = s.ndim - 2
        groups, kernel = int(o["groups"]), o["kernel"]
        padding, dilation = _tuple(o["padding"], dims), _tuple(o["dilation"], dims)
        padded = F.pad(s, [p for size in reversed(padding) for p in (size, size)])
        windows = patches(padded, kernel, _tuple(o["stride"], dims), dilation)
        batch, channels = s.shape[:2]
        # output_padding can leave further windows behind those that the input reaches
        inner = [slice(0, size) for size in call.inputs.shape[2:]]
        windows = windows[(slice(None), slice(None), *inner)]
        out = windows.reshape(
            batch, groups, channels // groups, math.prod(call.inputs.shape[2:]), -1
        )
        x = call.inputs.reshape(batch, groups, call.inputs.shape[1] // groups, -1)
        gradient = torch.einsum("bgip,bgopk->bgiok", x, out)
        return axis.first(gradient, samples).sum(1).reshape(samples, *o["shape"])

    def bias_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        return axis.first(s.flatten(2).sum(-1), samples).sum(1)


class Scale(LayerType):
    """Normalisations: ``z = w * x + b`` with ``x`` the normalised input, stored as ``inputs``.

    ``options["features"]`` names the axes of the outputs that the parameters run over,
    ``options["raw"]`` is the input before normalisation.
    """

    name = "Norm"

    def feature_axes(self, call: Call) -> int:
        features = call.options["features"]
        # parameters over channels (axis 1): only the batch axis can hold samples
        return call.outputs.ndim - 1 if features == (1,) else len(features)

    def _reduce(self, call: Call, value: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        features = call.options["features"]
        shape = [call.outputs.shape[f] for f in features]
        # samples first, features last, all else summed
        moved = value.movedim(features, tuple(range(-len(features), 0)))
        flat = axis.first(moved, samples)
        return flat.reshape(samples, -1, *shape).sum(1)

    def weight_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        return self._reduce(call, s * call.inputs, axis, samples)

    def bias_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        return self._reduce(call, s, axis, samples)


class Embedding(LayerType):
    """Row lookup: ``inputs`` are the indices, the gradient is scattered to the rows used."""

    name = "Embedding"

    def feature_axes(self, call: Call) -> int:
        return 1

    def weight_gradient(self, call: Call, s: Tensor, axis: SampleAxis, samples: int) -> Tensor:
        rows = axis.first(s, samples)
        rows = rows.reshape(samples, -1, rows.shape[-1])
        index = axis.first(call.inputs, samples).reshape(samples, -1)
        padding = call.options.get("padding_idx")
        if padding is not None:
            rows = rows * (index != padding).unsqueeze(-1)
        shape = call.options["shape"]
        gradient = rows.new_zeros(samples, *shape)
        return gradient.scatter_add_(1, index.unsqueeze(-1).expand_as(rows), rows)


def _fold_positions(rows: Tensor) -> Tensor:
    """``[N, fold, T, ...] -> [N, fold * T, ...]``."""
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])


def _tuple(value: Any, dims: int) -> list[int]:
    if isinstance(value, int):
        return [value] * dims
    values = [int(v) for v in value]
    return values * dims if len(values) == 1 else values


def pad_input(x: Tensor, padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Pad the trailing axes of ``x`` with zeros as a convolution with ``padding`` does."""
    dims = len(kernel)
    if padding == "valid":
        return x
    if padding == "same":
        pairs = []
        for k, d in zip(kernel, dilation, strict=True):
            total = d * (k - 1)
            pairs.append((total // 2, total - total // 2))
    else:
        pairs = [(p, p) for p in _tuple(padding, dims)]
    if not any(p for pair in pairs for p in pair):
        return x
    return F.pad(x, [p for pair in reversed(pairs) for p in pair])


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Sliding windows ``[B, C, positions..., kernel...]`` of ``[B, C, ...]``, without a copy."""
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    return x
