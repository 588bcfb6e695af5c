"""What a step needs to know of a layer: moments of its inputs, means of outputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bfgs import matmul
from .tap import LayerCall

_LARGE = 700  # columns from which half of a symmetric product is saved, at the price of copies


def moments(a: Tensor, *, appended: bool) -> tuple[Tensor, Tensor]:
    """``sum a`` ``[g, i]`` and ``sum a a^T`` ``[g, i, i]`` of rows ``[g, R, i]``.

    ``appended``: as if every row had a 1 at its end.
    """
    groups, rows, n = a.shape
    first, size = a.sum(1), n + appended
    second = a.new_empty(groups, size, size)
    parts = 4 if n >= _LARGE and groups == 1 else 1
    for k in range(parts):
        low, high = n * k // parts, n * (k + 1) // parts
        second[:, low:high, low:n] = matmul(a[..., low:high].mT, a[..., low:])
        second[:, high:n, low:high] = second[:, low:high, high:n].mT
    if appended:
        first = torch.cat([first, first.new_full((groups, 1), rows)], -1)
        second[:, -1, :] = first
        second[:, :, -1] = first
    return first, second


@dataclass
class InputMoments:
    """Sums over the input rows ``a`` (a 1 appended where there is a bias) of some passes.

    ``second`` ``[g, i, i]`` is ``sum a a^T``, ``first`` ``[g, i]`` is ``sum a``.
    """

    second: Tensor | None = None
    first: Tensor | None = None
    rows: int = 0
    samples: int = 0
    _passes: set[int] = field(default_factory=set)

    def add(self, call: LayerCall, dtype: torch.dtype) -> None:
        """Count one use of the layer; uses in the same pass see the same samples."""
        a = call.input_rows(dtype)
        first, second = moments(a, appended=call.layer.bias is not None)
        self.second = second if self.second is None else self.second + second
        self.first = first if self.first is None else self.first + first
        self.rows += a.shape[1]
        if call.pass_index not in self._passes:
            self._passes.add(call.pass_index)
            self.samples += call.samples

    def moment(self) -> Tensor:
        """``E_n[sum_t a a^T]``: mean over samples, sum over positions. To be called once."""
        assert self.second is not None
        self.second.div_(self.samples)
        return self.second

    def mean(self) -> Tensor:
        """The mean over samples and positions."""
        assert self.first is not None
        return self.first / self.rows


@dataclass
class OutputMeans:
    """Sums over the output rows ``z`` and over the gradients in them."""

    outputs: Tensor | None = None
    gradients: Tensor | None = None
    rows: int = 0

    def add_outputs(self, call: LayerCall, dtype: torch.dtype) -> None:
        """Count the outputs of one use; to be called before anything changes them in place."""
        total, rows = call.output_sum(call.outputs, dtype)
        self.outputs = total if self.outputs is None else self.outputs + total
        self.rows += rows

    def add_gradients(self, call: LayerCall, gradient: Tensor, dtype: torch.dtype) -> None:
        """Count the gradient of the returned loss in one use's outputs."""
        total, _ = call.output_sum(gradient, dtype)
        self.gradients = total if self.gradients is None else self.gradients + total

    def means(self, samples: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """``mean z`` and ``mean g``, with ``g`` the gradient of a sample's own loss.

        The returned loss is regarded as the mean over the samples of their own losses, so ``g`` is
        ``samples`` times its gradient; ``scale`` is by how much a GradScaler enlarged it.
        """
        assert self.outputs is not None
        gradients = torch.zeros_like(self.outputs) if self.gradients is None else self.gradients
        return self.outputs / self.rows, gradients * (samples / (self.rows * scale))


@dataclass
class OutputMoments:
    """``second`` ``[g, o, o]``: sum of ``g g^T`` over the rows of gradients in a layer's output."""

    second: Tensor | None = None

    def add(self, call: LayerCall, gradient: Tensor, dtype: torch.dtype) -> None:
        """Count one gradient, in one use's outputs."""
        rows = call.output_rows(gradient.reshape(call.outputs.shape), dtype)
        second = matmul(rows.mT, rows)
        self.second = second if self.second is None else self.second + second
