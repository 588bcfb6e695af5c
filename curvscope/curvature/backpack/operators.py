"""BackPACK's quantities as operators over the blocks of a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ...operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    FunctionOperator,
    KroneckerOperator,
    LowRankOperator,
    MatrixView,
    Operator,
    Provenance,
)
from ...problem import Problem, Snapshot
from .running import Batch, Job, run

_COLUMNS = 64  # vectors that BackPACK multiplies at once


def provenance(job: Job, what: str, *, exact: bool, notes: Sequence[str] = ()) -> Provenance:
    """Where an operator of this job comes from."""
    problem = job.problem
    facts = problem.check()
    settings: dict[str, Any] = {
        "loss": problem.loss.name,
        "reduction": problem.loss.reduction,
        "samples": facts.samples,
        "terms": facts.terms,
        "batchnorm": problem.batchnorm,
        **job.options,
    }
    if job.spec.sampled:
        settings["seed"] = job.seed
    if any(m.training for m in problem.user_model.modules()):
        notes = (*notes, "computed as under eval(), although the model is in train mode")
    return Provenance(what, f"BackPACK {job.spec.name}", exact, settings, tuple(notes))


def assemble(
    problem: Problem, make: Callable[[str], Operator], info: Provenance
) -> BlockDiagonalOperator:
    """Blocks of the problem from one operator per parameter; zero between the parameters."""
    blocks: dict[str, Operator] = {}
    for block, names in problem.blocks.items():
        parts: dict[str, Operator] = {}
        for name in names:
            part = make(name)
            part.layout, part.info = problem.layout.restrict([name]), info
            parts[name] = part
        layout = problem.layout.restrict(names)
        if len(names) == 1:
            blocks[block] = parts[names[0]]
        else:
            members = {name: (name,) for name in names}
            blocks[block] = BlockDiagonalOperator(parts, layout, members, info=info)
    return BlockDiagonalOperator(blocks, problem.layout, dict(problem.blocks), info=info)


def diagonal(job: Job, what: str, *, exact: bool) -> BlockDiagonalOperator:
    """Diagonal blocks ``[d]`` from a quantity of the parameters' shapes."""
    problem = job.problem
    totals = {name: torch.zeros_like(p).detach() for name, p in problem.params.items()}

    def visit(batch: Batch) -> None:
        for name, value in batch.fields.items():
            totals[name] += value.detach()

    seconds = run(job, visit)
    info = provenance(job, what, exact=exact).with_(seconds=seconds)
    blocks: dict[str, Operator] = {
        block: DiagonalOperator(
            problem.scale * torch.cat([totals[n].reshape(-1) for n in names]),
            layout=problem.layout.restrict(names),
            info=info,
        )
        for block, names in problem.blocks.items()
    }
    return BlockDiagonalOperator(blocks, problem.layout, dict(problem.blocks), info=info)


def low_rank(job: Job, what: str, *, exact: bool) -> BlockDiagonalOperator:
    """Blocks ``V V^T`` from the roots ``[C, N, *shape]``."""
    problem = job.problem
    parts: dict[str, list[Tensor]] = {block: [] for block in problem.blocks}
    root = problem.scale**0.5

    def visit(batch: Batch) -> None:
        for block, names in problem.blocks.items():
            columns = [batch.fields[n].detach().flatten(0, 1).flatten(1).mT for n in names]
            parts[block].append(root * torch.cat(columns))

    seconds = run(job, visit)
    info = provenance(job, what, exact=exact).with_(seconds=seconds)
    blocks: dict[str, Operator] = {}
    for block, names in problem.blocks.items():
        layout = problem.layout.restrict(names)
        blocks[block] = LowRankOperator(torch.cat(parts.pop(block), 1), layout=layout, info=info)
    return BlockDiagonalOperator(blocks, problem.layout, dict(problem.blocks), info=info)


def kronecker(job: Job, what: str) -> BlockDiagonalOperator:
    """``G (x) A`` per weight and ``G`` per bias.

    ``G`` is summed over batches and ``A``, which BackPACK averages over the samples of a batch, is
    averaged over all samples, so that the result does not depend on the split.
    """
    problem = job.problem
    sums: dict[str, list[Tensor]] = {}

    def visit(batch: Batch) -> None:
        for name, factors in batch.fields.items():
            weights = [1.0, float(batch.samples)]
            found = [w * f.detach() for w, f in zip(weights, factors, strict=False)]
            old = sums.get(name)
            sums[name] = found if old is None else [a + b for a, b in zip(old, found, strict=True)]

    seconds = run(job, visit)
    samples = problem.n_samples
    notes = ["weight and bias of a layer are treated as independent"]
    if convolution_weights(problem):
        notes.append("factors of convolution weights are too large by about the output positions")
    info = provenance(job, what, exact=False, notes=notes).with_(seconds=seconds)

    def make(name: str) -> Operator:
        G, *rest = sums[name]
        G = (problem.scale / 2 * (G + G.mT)).contiguous()
        if not rest:
            return _definite(DenseOperator(G))
        A = ((rest[0] + rest[0].mT) / (2 * samples)).contiguous()
        view = _view(problem, name, len(G), len(A))
        return KroneckerOperator(G, A, view, positive_semidefinite=True)

    return assemble(problem, make, info)


def convolution_weights(problem: Problem) -> list[str]:
    """Included weights of convolutions."""
    owners = {n: problem.model.get_submodule(n.rpartition(".")[0]) for n in problem.params}
    return [
        n
        for n, owner in owners.items()
        if isinstance(owner, _ConvNd) and owner.weight is problem.params[n]
    ]


def _definite(operator: Operator) -> Operator:
    operator.positive_semidefinite = True
    return operator


def _view(problem: Problem, name: str, out: int, inp: int) -> MatrixView:
    owner = problem.model.get_submodule(name.rpartition(".")[0])
    perm = None
    if isinstance(owner, _ConvTransposeNd):  # weights [in, out, ...], factors for [out, in, ...]
        shape = tuple(problem.params[name].shape)
        perm = torch.arange(out * inp).reshape(shape).transpose(0, 1).reshape(-1)
    return MatrixView(1, out, inp, perm)


class _Product:
    """``block @ vectors``, by one forward and backward pass of a fresh copy per call."""

    def __init__(self, job: Job, names: Sequence[str], at: Snapshot) -> None:
        self.job, self.names, self.at = job, tuple(names), at
        self.layout = job.problem.layout.restrict(names)

    def __call__(self, vectors: Tensor) -> Tensor:
        result = torch.zeros_like(vectors, memory_format=torch.contiguous_format)

        def visit(batch: Batch) -> None:
            for start in range(0, vectors.shape[1], _COLUMNS):
                columns = slice(start, start + _COLUMNS)
                parts = self.layout.split(vectors[:, columns])
                for name, rows in self.layout.slices().items():
                    image = batch.fields[name](parts[name].movedim(-1, 0).contiguous())
                    result[rows, columns] += image.flatten(1).mT

        run(self.job, visit, at=self.at, checked=True)
        return self.job.problem.scale * result


def matrix_free(job: Job, what: str, *, definite: bool) -> BlockDiagonalOperator:
    """Blocks known by their products; within a block, zero between the parameters."""
    problem = job.problem
    at = problem.snapshot()
    seconds = run(job, lambda batch: None, at=at, batches=1)
    alone = all(len(names) == 1 for names in problem.blocks.values())
    notes = () if alone else ("zero between the parameters of a block: BackPACK takes them apart",)
    what = what if alone else f"{what} (parameter by parameter)"
    info = provenance(job, what, exact=alone and job.spec.name != "PCHMP", notes=notes)
    blocks: dict[str, Operator] = {}
    for block, names in problem.blocks.items():
        layout = problem.layout.restrict(names)
        blocks[block] = FunctionOperator(
            _Product(job, names, at),
            layout.numel,
            dtype=problem.dtype,
            device=problem.device,
            layout=layout,
            info=info.with_(seconds=seconds),
            positive_semidefinite=True if definite else None,
            check=False,
        )
    return BlockDiagonalOperator(blocks, problem.layout, dict(problem.blocks), info=info)


def sample_rows(job: Job) -> Tensor:
    """``[N, P]`` from quantities ``[N, *shape]``."""
    rows: list[Tensor] = []

    def visit(batch: Batch) -> None:
        fields: Mapping[str, Tensor] = batch.fields
        parts = [fields[n].detach().reshape(batch.samples, -1) for n in job.problem.params]
        rows.append(torch.cat(parts, 1))

    run(job, visit)
    return torch.cat(rows)
