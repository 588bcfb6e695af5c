"""Is what follows a layer piecewise linear in the layer's output?

Then the Hessian block of the layer's parameters is its generalised Gauss-Newton block (Botev,
Ritter and Barber 2017, section 3). The answer is read off the autograd graph, so it holds for what
the model computed on this batch, whatever modules it is written with.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

_LINEAR = {
    "Add",
    "Sub",
    "RSub",
    "Neg",
    "View",
    "UnsafeView",
    "Reshape",
    "ReshapeAlias",
    "T",
    "Transpose",
    "Permute",
    "Expand",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Select",
    "Index",
    "IndexSelect",
    "Gather",
    "Cat",
    "Stack",
    "Split",
    "SplitWithSizes",
    "Unbind",
    "Chunk",
    "Clone",
    "Alias",
    "ToCopy",
    "Sum",
    "Mean",
    "AvgPool2D",
    "AvgPool3D",
    "AdaptiveAvgPool2D",
    "AdaptiveAvgPool3D",
    "MkldnnAdaptiveAvgPool2D",
    "UpsampleNearest1D",
    "UpsampleNearest2D",
    "UpsampleNearest3D",
    "UpsampleBilinear2D",
    "UpsampleLinear1D",
    "UpsampleTrilinear3D",
    "UpsampleBicubic2D",
    "ConstantPadNd",
    "ReflectionPad1D",
    "ReflectionPad2D",
    "ReflectionPad3D",
    "ReplicationPad1D",
    "ReplicationPad2D",
    "Flip",
    "Roll",
    "Repeat",
    "PixelShuffle",
    "PixelUnshuffle",
    "Unfold",
    "Im2Col",
    "Col2Im",
    "Movedim",
    "Diagonal",
    "AsStrided",
    "Contiguous",
    "Narrow",
    "Swapaxes",
    "Tril",
    "Triu",
    "Trace",
    "Cumsum",
}
_PIECEWISE = {
    "Relu",
    "LeakyRelu",
    "RreluWithNoise",
    "Hardtanh",
    "Threshold",
    "MaxPool2DWithIndices",
    "MaxPool3DWithIndices",
    "MaxPool2D",
    "AdaptiveMaxPool2D",
    "AdaptiveMaxPool3D",
    "Abs",
    "Max",
    "Min",
    "Amax",
    "Amin",
    "Clamp",
    "ClampMin",
    "ClampMax",
    "Maximum",
    "Minimum",
    "Hardshrink",
    "Softshrink",
    "Where",
    "MkldnnMaxPool2D",
    "Sort",
    "Topk",
    "Median",
    "Mode",
    "MaskedFill",
    "SqueezeDim",
}
# linear in each argument, so linear as long as only one of them depends on the layer
_BILINEAR = {
    "Mul",
    "Addmm",
    "Mm",
    "Bmm",
    "Baddbmm",
    "Addbmm",
    "Mv",
    "Addmv",
    "Dot",
    "Convolution",
    "MkldnnConvolution",
    "CudnnConvolution",
    "Linear",
    "MkldnnLinear",
    "PreluKernel",
    "Addcmul",
    "Lerp",
}


def _operation(node: Any) -> str:
    return re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])


def downstream(root: Any, target: Any) -> set[Any]:
    """Nodes of the graph below ``root`` that depend on ``target``, itself excluded."""
    reaches: dict[Any, bool] = {target: True}
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if node is None or (node in reaches and not expanded):
            continue
        followers = [f for f, _ in node.next_functions if f is not None]
        if expanded:
            reaches[node] = any(reaches.get(f, False) for f in followers)
            continue
        reaches[node] = False
        stack.append((node, True))
        stack.extend((f, False) for f in followers if f not in reaches)
    return {node for node, hit in reaches.items() if hit and node is not target}


def is_piecewise_linear(outputs: Tensor, z: Tensor, *, log_softmax: bool = False) -> bool:
    """Whether ``outputs`` is piecewise linear in ``z``, by the operations between them.

    With ``log_softmax`` a ``log_softmax`` at the end is left out of account: the loss on its result
    equals the cross-entropy of its input.
    """
    root = outputs.grad_fn
    if log_softmax and root is not None and _operation(root) == "LogSoftmax":
        root = root.next_functions[0][0]
    if root is z.grad_fn:
        return True
    nodes = downstream(root, z.grad_fn)
    for node in nodes:
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return False  # a user's Function, which may have any name
        operation = _operation(node)
        inputs = [f in nodes or f is z.grad_fn for f, _ in node.next_functions]
        if operation in _LINEAR or operation in _PIECEWISE:
            continue
        if operation == "Div":
            if any(inputs[1:]):
                return False
        elif operation in _BILINEAR:
            if sum(inputs) != 1:
                return False
        elif operation in ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"):
            if getattr(node, "_saved_training", True) or any(inputs[1:]):
                return False
        else:
            return False
    return True
