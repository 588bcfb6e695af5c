"""Gathering ``sum v v^T`` over batches and passes, in the form that takes the least memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import memory
from ..layers import Call, SampleAxis
from ..operators import DenseOperator, DiagonalOperator, LowRankOperator, Operator, RowGramOperator
from .plan import BlockPlan, is_matrix
from .recording import Recording

_DENSE_SIZE = 4096  # up to this size the dense form is the most convenient one
_TOGETHER = 256  # so many vectors enter the dense form in one matrix product


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 at least: sums in half precision lose what they add up."""
    return torch.promote_types(dtype, torch.float32)


def input_rows(plan: BlockPlan, call: Call, axis: SampleAxis, samples: int) -> Tensor:
    """``a [N, T, g, i(+1)]``, with the 1 appended where the block has the bias."""
    rows = call.kind.input_rows(call, axis, samples)
    if call.bias is not None and any(p is call.bias for p in plan.parameters):
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1)
    return rows


def sample_gradients(plan: BlockPlan, recording: Recording, s: list[Tensor | None]) -> Tensor:
    """``[N, d]``: the block's gradient of every sample, in the block's vector order."""
    n = recording.samples
    parts = []
    for p in plan.parameters:
        total = None
        for k in plan.calls:
            call, axis, grad = recording.calls[k], recording.axes[k], s[k]
            if grad is None:
                continue
            assert axis is not None
            for target, rule in (
                (call.weight, call.kind.weight_gradient),
                (call.bias, call.kind.bias_gradient),
            ):
                if target is p:
                    value = rule(call, grad, axis, n)
                    total = value if total is None else total + value
        parts.append(p.new_zeros(n, p.numel()) if total is None else total.reshape(n, -1))
    return torch.cat(parts, 1)


class GramAccumulator:
    """Collects the vectors of one block; :meth:`result` gives the operator ``scale * V V^T``."""

    def __init__(
        self, plan: BlockPlan, dtype: torch.dtype, columns: float, form: str | None = None
    ) -> None:
        self.plan = plan
        self.dtype = accumulation_dtype(dtype)
        self.columns = columns  # expected number of vectors, all batches together
        self.form = form
        self.matrix: Tensor | None = None
        self.pending: list[Tensor] = []  # vectors on their way into the dense form
        self.vectors: list[Tensor] = []
        self.signs: list[Tensor] = []
        self.a: list[Tensor] = []
        self.s: list[Tensor] = []
        self.batch_s: list[Tensor] = []
        self.view = plan.view

    def _choose(self, recording: Recording) -> str:
        d = self.plan.size
        if is_matrix(self.plan, recording):
            k = self.plan.calls[0]
            call, axis = recording.calls[k], recording.axes[k]
            assert axis is not None
            if call.kind.kronecker:
                assert self.view is not None
                rows = call.kind.output_rows(call, call.outputs.detach(), axis, recording.samples)
                t, g, o = rows.shape[1:]
                inp = self.view.inp
                factored = self.columns * t * o + self.columns / 10 * t * inp
                if g == 1 and t == 1:
                    return "rows"
                if g == 1 and d > _DENSE_SIZE and factored < min(d * d, self.columns * d):
                    return "rows"
        if d <= _DENSE_SIZE or d <= self.columns:
            memory.require(
                2 * d * d * self.dtype.itemsize,
                f"The block {self.plan.name!r} with {d} parameters",
                "Use op @ v, which forms no block, split the block with blocks=, or take "
                "problem.subset(n, seed).",
            )
            return "dense"
        memory.require(
            int(self.columns * d * self.dtype.itemsize),
            f"The factor V [{d}, {self.columns:.0f}] of block {self.plan.name!r}",
            "Use op @ v, which forms no block, or take problem.subset(n, seed).",
        )
        return "vectors"

    def add(self, recording: Recording, s: list[Tensor | None], sign: Tensor | None) -> None:
        """Take in one backward pass of one batch."""
        if self.form is None:
            self.form = self._choose(recording)
        n = recording.samples
        if self.form == "rows":
            k = self.plan.calls[0]
            call, axis, grad = recording.calls[k], recording.axes[k], s[k]
            assert axis is not None
            grad = torch.zeros_like(call.outputs) if grad is None else grad
            self.batch_s.append(
                call.kind.output_rows(call, grad, axis, n).squeeze(2).to(self.dtype)
            )
            if sign is not None:
                self.signs.append(sign.to(self.dtype))
            return
        v = sample_gradients(self.plan, recording, s).to(self.dtype)
        if self.form == "diagonal":
            square = v.square() if sign is None else v.square() * sign.to(v).unsqueeze(1)
            total = square.sum(0)
            self.matrix = total if self.matrix is None else self.matrix + total
            return
        if self.form == "dense":
            self.pending.append(v)
            if sign is not None:
                self.signs.append(sign.to(self.dtype))
            if sum(len(p) for p in self.pending) >= _TOGETHER:
                self._flush()
            return
        self.vectors.append(v)
        if sign is not None:
            self.signs.append(sign.to(self.dtype))

    def _flush(self) -> None:
        """Add the pending vectors to the dense form."""
        left = right = torch.cat(self.pending)
        if self.signs:
            left = right * torch.cat(self.signs).unsqueeze(1)
        self.pending, self.signs = [], []
        if self.matrix is None:
            self.matrix = left.mT @ right
        else:
            self.matrix.addmm_(left.mT, right)

    def end_batch(self, recording: Recording) -> None:
        """Called after the last pass of a batch."""
        if self.form == "rows" and self.batch_s:
            k = self.plan.calls[0]
            axis = recording.axes[k]
            assert axis is not None
            a = input_rows(self.plan, recording.calls[k], axis, recording.samples)
            self.a.append(a.squeeze(2).to(self.dtype))
            self.s.append(torch.stack(self.batch_s))
            self.batch_s = []

    def result(self, scale: float) -> Operator:
        """The finished operator. Sequences of different lengths are padded with zero rows."""
        if self.pending:
            self._flush()
        if self.matrix is None and not self.vectors and not self.s:
            return self._zero()
        if self.form == "diagonal":
            assert self.matrix is not None
            return DiagonalOperator(self.matrix * scale)
        if self.form == "dense":
            assert self.matrix is not None
            return DenseOperator((self.matrix + self.matrix.mT) * (scale / 2), view=self.view)
        if self.form == "vectors":
            weights = torch.full((sum(len(v) for v in self.vectors),), scale, dtype=self.dtype)
            if self.signs:
                weights = weights * torch.cat(self.signs).to(weights)
            vectors = torch.cat(self.vectors).mT
            return LowRankOperator(vectors, weights.to(vectors.device), view=self.view)
        assert self.view is not None
        passes = max(x.shape[0] for x in self.s)
        length = max(x.shape[2] for x in self.s)
        s = torch.cat([_pad(x, passes, length) for x in self.s], 1)
        a = torch.cat([_pad(x.unsqueeze(0), 1, length)[0] for x in self.a], 0)
        signs = None
        if self.signs:
            signs = self._stack_signs(passes)
        return RowGramOperator(s, a, scale, signs=signs, view=self.view)

    def _zero(self) -> Operator:
        """Nothing was added: the loss has no curvature in the outputs."""
        d, device = self.plan.size, self.plan.parameters[0].device
        if self.form == "vectors":
            return LowRankOperator(torch.zeros(d, 1, dtype=self.dtype, device=device))
        return DiagonalOperator(torch.zeros(d, dtype=self.dtype, device=device), view=self.view)

    def _stack_signs(self, passes: int) -> Tensor:
        rows, start = [], 0
        for x in self.s:
            mine = torch.stack(self.signs[start : start + x.shape[0]])
            start += x.shape[0]
            rows.append(torch.cat([mine, mine.new_ones(passes - len(mine), mine.shape[1])]))
        return torch.cat(rows, 1)


def _pad(x: Tensor, passes: int, length: int) -> Tensor:
    """Zero-pad ``[C, N, T, k]`` to ``[passes, N, length, k]``."""
    missing = (0, 0, 0, length - x.shape[2], 0, 0, 0, passes - x.shape[0])
    return torch.nn.functional.pad(x, missing)
