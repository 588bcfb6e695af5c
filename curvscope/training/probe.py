"""The data on which a monitor measures: a few samples, fixed for the whole run."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import DataError, OptionError
from ..problem import Problem, state
from ..problem.data import sample_count, select
from .subjects import joined

SAMPLES = 64


class AtMost(int):
    """A number of samples for a probe, or all where there are fewer."""


def make_probe(problem: Problem, probe: Any, seed: int) -> Problem | None:
    """The probe as a Problem; ``None`` for the batch of each step.

    ``probe`` is a number of samples, ``"all"`` (the problem as given), ``"current"``, a
    :class:`Problem`, :class:`AtMost`, or ``None`` for 64 samples at most. Samples are those of
    ``problem.subset(n, seed)`` where the data are a list, the first ones of a loader otherwise:
    nothing is evaluated, and no more of a loader is read than needed. They are put into one batch,
    which is cheaper than several, unless that is larger than any of the problem's.
    """
    if probe == "current":
        return None
    if probe == "all":
        return problem
    if isinstance(probe, Problem):
        return probe
    wanted = AtMost(SAMPLES) if probe is None else probe
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise OptionError(
            f"probe={probe!r}: give a number of samples, 'all', 'current' or a Problem."
        )
    if problem.data.loader is not None:
        return _first(problem, wanted, seed)
    sizes = [sample_count(*item) for item in problem.data]
    if wanted >= sum(sizes):
        if wanted > sum(sizes) and not isinstance(wanted, AtMost):
            raise OptionError(
                f"probe={wanted}: the problem has {sum(sizes)} samples; take at most as many, or "
                "'all'."
            )
        return problem
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(sum(sizes), generator=generator)[:wanted].sort().values
    parts, start = [], 0
    for (inputs, targets), size in zip(problem.data, sizes):
        mine = chosen[(chosen >= start) & (chosen < start + size)] - start
        if len(mine):
            parts.append((select(inputs, mine, size), select(targets, mine, size)))
        start += size
    return _together(problem, parts, max(sizes))


def _first(problem: Problem, wanted: int, seed: int) -> Problem:
    parts, left, largest = [], wanted, 0
    with state.random_state(), problem.data.preserved():
        problem.data.seed(seed)
        for inputs, targets in problem.data:
            size = sample_count(inputs, targets)
            index, largest = torch.arange(min(size, left)), max(largest, size)
            parts.append((select(inputs, index, size), select(targets, index, size)))
            left -= len(index)
            if left <= 0:
                break
    return _together(problem, parts, largest)


def _together(problem: Problem, parts: list[tuple[Any, Any]], largest: int) -> Problem:
    """A Problem of these samples, in one batch if that may be."""
    size = sum(sample_count(*part) for part in parts)
    if len(parts) > 1 and size <= max(largest, SAMPLES) and problem.batchnorm != "batch":
        try:
            inputs, targets, _ = joined(parts)
        except DataError:  # sequences of several lengths
            return problem.with_data(parts)
        parts = [(inputs, targets)]
    return problem.with_data(parts)
