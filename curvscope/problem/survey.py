"""One pass over a problem's data: its sizes, its loss, and whether it is what it is taken for."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from . import checks, state
from .checks import Facts
from .data import sample_count

if TYPE_CHECKING:
    from .problem import Problem


def survey(problem: Problem, seed: int, *, look: bool = False) -> Facts:
    """Sizes and unnormalised loss of all batches.

    ``look`` asks for the checks that need to be made once: that samples come first, that losses
    add up over samples, that nothing is drawn at random or changes from pass to pass, and which
    parameters the loss uses itself.
    """
    samples, terms, count, total = 0, 0.0, 0, 0.0
    coupled = problem.batchnorm == "batch"
    direct: set[str] = set()
    # gradients stay enabled: models may differentiate inside forward, and take other kernels
    # without them
    with problem.session() as members:
        marks = [buffer._version for buffer in members.buffers]
        for inputs, targets in problem.batches(seed):
            before = state.random_mark() if look and not count else ()
            run = problem.outputs if count else functools.partial(checks.first_outputs, problem)
            outputs = run(inputs).detach()
            if look and not count:
                checks.samples_first(inputs, targets, outputs)
                if [buffer._version for buffer in members.buffers] != marks:
                    checks.unchanging(problem, inputs, outputs)
            problem.loss.check(outputs, targets)
            value = problem.batch_total(outputs, targets)
            if value.requires_grad and problem._facts is None:
                direct |= checks.used_by_loss(problem, value)
            value = value.detach()
            if not bool(torch.isfinite(value)):
                checks.blame(problem, inputs, count, float(value))
            if before and state.random_mark() != before:
                checks.without_noise(problem, inputs, targets, outputs, value)
            size = sample_count(inputs, targets)
            if size > 1 and look:
                checks.additive(problem, inputs, targets, value)
                if count == 0 and not coupled:
                    coupled = checks.coupled(problem, inputs, targets, outputs)
            samples += size
            terms += problem.loss.count(outputs, targets)
            total += float(value)
            count += 1
    own = tuple(name for name in problem.params if name in direct)
    return Facts(samples, terms, count, total, coupled, own)
