"""The data on which a monitor measures: a few samples, fixed for the whole run."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import OptionError
from ..problem import Problem, state
from ..problem.data import sample_count, select

SAMPLES = 256


def make_probe(problem: Problem, probe: Any, seed: int) -> Problem | None:
    """The probe as a Problem; ``None`` for the batch of each step.

    ``probe`` is a number of samples, ``"all"`` (the problem as given), ``"current"``, a
    :class:`Problem`, or ``None`` for 256 samples at most. Samples are those of
    ``problem.subset(n, seed)`` where the data are a list, the first ones of a loader otherwise:
    nothing is evaluated, and no more of a loader is read than needed.
    """
    if probe == "current":
        return None
    if probe == "all":
        return problem
    if isinstance(probe, Problem):
        return probe
    wanted = SAMPLES if probe is None else probe
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise OptionError(
            f"probe={probe!r}: give a number of samples, 'all', 'current' or a Problem."
        )
    if problem.data.loader is not None:
        return _first(problem, wanted, seed)
    sizes = [sample_count(*item) for item in problem.data]
    if wanted >= sum(sizes):
        if probe is not None and wanted > sum(sizes):
            raise OptionError(f"probe={wanted}: the problem has {sum(sizes)} samples.")
        return problem
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(sum(sizes), generator=generator)[:wanted].sort().values
    parts, start = [], 0
    for (inputs, targets), size in zip(problem.data, sizes):
        mine = chosen[(chosen >= start) & (chosen < start + size)] - start
        if len(mine):
            parts.append((select(inputs, mine, size), select(targets, mine, size)))
        start += size
    return problem.with_data(parts)


def _first(problem: Problem, wanted: int, seed: int) -> Problem:
    parts, left = [], wanted
    with state.random_state(), problem.data.preserved():
        problem.data.seed(seed)
        for inputs, targets in problem.data:
            size = sample_count(inputs, targets)
            index = torch.arange(min(size, left))
            parts.append((select(inputs, index, size), select(targets, index, size)))
            left -= len(index)
            if left <= 0:
                break
    return problem.with_data(parts)
