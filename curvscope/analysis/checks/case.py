"""What the checks work on: a bounded number of samples of the user's problem, in float64."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...errors import CurvscopeError
from ...problem import Problem, Snapshot
from ...problem.data import sample_count
from .. import truth
from ..batches import Batch, cut, merge
from .marks import Marks

_SAMPLES, _FEW = 64, 8  # samples, and samples where a check takes many backward passes
_LARGE = 100_000  # parameters from which on fewer samples, columns and blocks are looked at
_LARGE_SAMPLES, _LARGE_FEW, _LARGE_BLOCKS = 16, 4, 12


@dataclass
class Case:
    """One problem under examination.

    ``problem`` is the user's; ``own`` has the chosen samples in the user's precision, ``double``
    the same in float64 (a private copy of the model unless that is float64 already), ``few`` at
    most eight of them in two uneven batches. ``columns`` is how many random columns a block is
    compared in; ``notes`` become warnings of the result.
    """

    problem: Problem
    own: Problem
    double: Problem
    columns: int
    seed: int
    before: Marks
    notes: list[str] = field(default_factory=list)
    blamed: list[str] = field(default_factory=list)  # changes by the user's own approximations
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def exact(self) -> float:
        """Relative difference up to which two computations in ``double`` count as equal."""
        return 1e-8 if self.double.dtype == torch.float64 else 200 * self.eps**0.75

    @property
    def eps(self) -> float:
        return float(torch.finfo(self.double.dtype).eps)

    @property
    def large(self) -> bool:
        """Whether the model is so large that less of it is looked at."""
        return self.double.layout.numel > _LARGE

    @cached_property
    def few(self) -> Problem:
        total = self.double.n_samples
        chosen = self.draw(total, min(_LARGE_FEW if self.large else _FEW, total), 50)
        if self.merged is None:
            return in_two(self.double.subset(len(chosen), self.seed))
        size = len(chosen)
        # two uneven batches, so that sums over batches are part of every check
        sizes = [size] if size < 3 or self.double.batchnorm == "batch" else [2 * size // 3]
        sizes += [size - sizes[0]] if sizes[0] < size else []
        return self.double.with_data(cut(self.merged, sizes, torch.tensor(chosen)))

    @cached_property
    def merged(self) -> Batch | None:
        """All samples of ``double`` as one batch, or ``None`` if their shapes do not allow it."""
        return merge(truth.materialised(self.double))

    @cached_property
    def gradient_seconds(self) -> float:
        """How long one gradient of ``few`` takes."""
        self.few.gradient()
        start = time.perf_counter()
        self.few.gradient()
        return time.perf_counter() - start

    @cached_property
    def outputs_per_sample(self) -> int:
        """How many numbers the model returns for one sample."""
        with self.few.session():
            inputs, targets = next(self.few.batches())
            return self.few.outputs(inputs).numel() // self.few.count_samples(inputs, targets)

    def keep(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, the first time; what several checks compare with."""
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of ``few``."""
        return self.few.gradient()

    def direction(self, salt: int, size: int | None = None) -> Tensor:
        """A random unit vector over all parameters (or ``size`` entries), the same every time."""
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        count = self.double.layout.numel if size is None else size
        v = torch.randn(count, generator=generator, dtype=torch.float64)
        return (v / v.norm()).to(self.double.device, self.double.dtype)

    def draw(self, size: int, count: int, salt: int) -> list[int]:
        """``count`` different row numbers below ``size``."""
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        return sorted(torch.randperm(size, generator=generator)[:count].tolist())

    def block_columns(self) -> tuple[list[int], dict[str, list[int]]]:
        """Random rows of every block: their numbers in the whole, and block -> numbers in it.

        Of a large model, one row each of some blocks.
        """
        rows, local = [], {}
        blocks = list(self.double.blocks.items())
        if self.large:
            blocks = [blocks[k] for k in self.draw(len(blocks), _LARGE_BLOCKS, 99)]
        for salt, (name, members) in enumerate(blocks):
            index = self.double.layout.index(members)
            local[name] = self.draw(len(index), 1 if self.large else self.columns, 100 + salt)
            rows += index[local[name]].tolist()
        return rows, local


def shifted(problem: Problem, shift: Tensor) -> Snapshot:
    """The problem's parameters plus ``shift`` (flat, in layout order), for ``session(at=...)``."""
    pieces = problem.layout.split(shift)
    by_id = {id(p): pieces[name] for name, p in problem.params.items()}
    here = problem.snapshot()
    values = [
        value + by_id[id(p)] if id(p) in by_id else value
        for p, value in zip(problem.model.parameters(), here.parameters, strict=True)
    ]
    return Snapshot(values, here.buffers)


def value_at(problem: Problem, shift: Tensor) -> Tensor:
    """The objective at shifted parameters, a tensor of one entry."""

    def one(inputs: Any, targets: Any) -> Tensor:
        # not under no_grad: models may differentiate inside, or take other kernels there
        return problem.batch_total(problem.outputs(inputs).detach(), targets)

    total = problem.sum_over_batches(one, at=shifted(problem, shift))
    return (problem.scale * total).detach().reshape(1)


def gradient_at(problem: Problem, shift: Tensor) -> Tensor:
    """The gradient of the objective at shifted parameters."""
    from ...problem import flat_gradient

    parameters = list(problem.params.values())

    def one(inputs: Any, targets: Any) -> Tensor:
        return flat_gradient(problem.batch_total(problem.outputs(inputs), targets), parameters)

    return problem.scale * problem.sum_over_batches(one, at=shifted(problem, shift))


def relative(found: Tensor, truth_: Tensor, floor: float = 0.0) -> float:
    """``|found - truth| / max(|truth|, floor)``; 0 for two zeros."""
    found, truth_ = found.detach().cpu().double(), truth_.detach().cpu().double()
    difference = float((found - truth_).norm())
    scale = max(float(truth_.norm()), floor)
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def in_two(problem: Problem) -> Problem:
    """The same samples in two uneven batches, so that sums over batches are part of the check."""
    batch = merge(truth.materialised(problem))
    total = problem.n_samples
    if batch is None or total < 3 or problem.batchnorm == "batch":
        return problem
    first = (2 * total) // 3
    return problem.with_data(cut(batch, [first, total - first]))


def prepare(problem: Problem, samples: int | None, columns: int, seed: int, before: Marks) -> Case:
    """Choose the samples and copy the model to float64 where it is in lower precision."""
    notes: list[str] = []
    usual = _LARGE_SAMPLES if problem.layout.numel > _LARGE else _SAMPLES
    count = min(problem.n_samples, samples or usual)
    own = _chosen(problem, count, seed, notes)
    own.check()
    double = own
    if own.dtype != torch.float64:
        try:
            double = own.with_data(truth.materialised(own), dtype=torch.float64)
            double.gradient()
        except (CurvscopeError, RuntimeError, TypeError, ValueError) as error:
            double = own
            notes.append(
                f"The model does not run in float64 ({_first_line(error)}), so everything was "
                f"checked in {str(own.dtype)[6:]} with wider tolerances. Let the forward pass take "
                "the dtype of its inputs and parameters to have it checked exactly."
            )
    return Case(problem, own, double, columns, seed, before, notes)


def _chosen(problem: Problem, count: int, seed: int, notes: list[str]) -> Problem:
    """``count`` samples in at most four batches (one under ``batchnorm="batch"``)."""
    if problem.batchnorm == "batch":
        with problem.session():
            first = next(problem.batches())
        size = sample_count(*first)
        notes.append(
            'batchnorm="batch": the checks use samples of the first batch only, as one batch.'
        )
        return problem.with_data(cut(first, [min(size, count), size - min(size, count)])[:1])
    try:
        chosen = problem.subset(count, seed)
        chosen.check()
    except CurvscopeError as error:
        notes.append(
            f"Taking {count} samples out of the data failed ({_first_line(error)}), so the first "
            "batch was used whole. Put the samples along the first axis of inputs and targets "
            "(transpose in forward=) to make subsets possible."
        )
        with problem.session():
            return problem.with_data([next(problem.batches())])
    batch = merge(truth.materialised(chosen))
    if batch is None:
        return chosen
    parts = 4 if count >= 8 else 1
    small = count // (parts + 1)
    # uneven batches: equal ones would hide a wrong normalisation
    sizes = [small] * (parts - 1) + [count - small * (parts - 1)]
    return problem.with_data(cut(batch, sizes))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
