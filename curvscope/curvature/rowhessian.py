"""Hessian block of a layer that acts on rows: ``(1/M) sum_n sum_tu H_n[t, u] (x) a_nt a_nu^T``.

``H_n = d^2 l_n / dz_n^2`` is the Hessian of one sample's loss in the layer's output. Since samples
do not influence each other, one double backward pass gives one row of ``H_n`` for all samples:
``T * out`` passes instead of one per parameter (cf. Botev, Ritter and Barber 2017, eq. 9; Dangel,
Harmeling and Hennig 2020, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import memory
from ..operators import DenseOperator, Operator, RowHessianOperator
from ..problem import Problem
from ..progress import track
from .accumulate import accumulation_dtype, input_rows
from .cuts import Cuts, units
from .plan import BlockPlan
from .products import symmetrised
from .recording import Recording

_CHUNK = 8


class RowHessianAccumulator:
    """Collects ``H_n`` and ``a_n`` of one block (T = 1), or adds up the dense block (T > 1).

    The number of positions may differ from batch to batch.
    """

    def __init__(self, plan: BlockPlan, dtype: torch.dtype) -> None:
        self.plan = plan
        self.dtype, self.model_dtype = accumulation_dtype(dtype), dtype
        self.h: list[Tensor] = []
        self.a: list[Tensor] = []
        self.matrix: Tensor | None = None
        self.view = plan.view

    def add(self, problem: Problem, recording: Recording, cuts: Cuts) -> None:
        """Take in one batch (recorded with its graph)."""
        k = self.plan.calls[0]
        call, axis, n = recording.calls[k], recording.axes[k], recording.samples
        assert axis is not None
        a = input_rows(self.plan, call, axis, n).squeeze(2).to(self.dtype)
        t, out = a.shape[1], self.plan.outputs
        factored = self._factored(problem, t)
        second = cuts.second(call.outputs, t * out)
        chunks = [range(o, min(o + _CHUNK, out)) for o in range(0, out, _CHUNK)]
        template = torch.zeros_like(call.outputs)
        position = torch.arange(template.numel(), device=template.device)
        where = call.kind.output_rows(call, position.reshape(template.shape), axis, n).squeeze(2)
        parts = []
        for u, features in track([(u, o) for u in range(t) for o in chunks], self._label(t, out)):
            vectors = units(where[:, u], features, template.shape, template)
            h = second(vectors).reshape(len(features), -1)
            h = h[:, where.reshape(-1)].reshape(-1, n, t, out).to(self.dtype)
            if factored:
                parts.append(h.squeeze(2))  # [o', N, o]
            else:
                self._add_dense(h, a, u, features)
        if factored:
            full = torch.cat(parts).movedim(0, 1)
            full = symmetrised(
                full, f"The Hessian in the output of {self.plan.name!r}", self.model_dtype
            )
            self.h.append(full[:, None, :, None, :])
            self.a.append(a)

    def _factored(self, problem: Problem, positions: int) -> bool:
        """Whether to keep ``H_n`` and ``a_n``; makes sure that what is kept fits."""
        d, n, out = self.plan.size, problem.n_samples, self.plan.outputs
        factored = positions == 1 and n * out * out <= 4 * d * d
        if not self.h and self.matrix is None:
            numbers = n * out * out if factored else 2 * d * d
            memory.require(
                numbers * self.dtype.itemsize,
                f"The Hessian block {self.plan.name!r} with {d} parameters",
                "Use op @ v, which forms no block, split the block with blocks=, or take "
                "problem.subset(n, seed).",
                device=problem.device,
            )
        return factored

    def _label(self, t: int, out: int) -> str:
        return f"Hessian of {self.plan.name}: {t * out} passes"

    def _add_dense(self, h: Tensor, a: Tensor, u: int, features: range) -> None:
        """Add the part of position ``u``: ``h [p, N, T, o]`` holds ``H_n[t o, u p]``."""
        out, inp = h.shape[-1], a.shape[-1]
        if self.matrix is None:
            self.matrix = a.new_zeros(out, inp, out, inp)
        left = torch.einsum("pnto,nti->poin", h, a)
        part = torch.einsum("poin,nj->oipj", left, a[:, u])
        self.matrix[:, :, features.start : features.stop] += part

    def result(self, scale: float) -> Operator:
        assert self.view is not None
        kept: Operator | None = None
        if self.h:
            kept = RowHessianOperator(torch.cat(self.h), torch.cat(self.a), scale, view=self.view)
        if self.matrix is None:
            assert kept is not None
            return kept
        d = self.plan.size
        dense = self.view.dense_from_matrix(self.matrix.reshape(d, d)) * scale
        dense = symmetrised(dense, f"The Hessian of {self.plan.name!r}", self.model_dtype)
        if kept is not None:
            dense = dense + kept.dense()
        return DenseOperator(dense, view=self.view)
