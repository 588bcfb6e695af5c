"""The exact matrices: Hessian, generalised Gauss-Newton, Fisher, empirical Fisher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, OptionError, UnsupportedLossError, check_option
from ..modes import plain_mode
from ..problem import Problem, Snapshot, require_problem
from ..problem.data import select
from .engine import check_engine
from .gram import record_batch
from .products import EMPIRICAL, FISHER, GGN, HESSIAN, Kind
from .whole import WholeOperator

_ROUTES = ("auto", "gram", "rows", "autograd", "backpack")


@plain_mode()
def _make(
    problem: Problem, kind: Kind, route: str, engine: str, memory: int | None
) -> WholeOperator:
    check_option("route", route, _ROUTES)
    check_engine(engine, memory)
    require_problem(problem)
    if route == "backpack" and (kind.matrix == EMPIRICAL or kind.samples is not None):
        raise OptionError(
            f"route='backpack' gives the exact matrix only, not the {kind.title}; use "
            "route='auto', or cs.backpack.batch_grad and cs.backpack.sqrt_ggn(mc=...)."
        )
    problem.check()
    at = problem.snapshot()
    if kind.needs_samples:
        check_sample_axis(problem, kind, at)
    return WholeOperator(problem, kind, route, at, engine=engine, memory=memory)


def check_sample_axis(problem: Problem, kind: Kind, at: Snapshot) -> None:
    """Gradients of single samples need outputs that say which sample they belong to."""
    with problem.session(at):
        inputs, targets = next(problem.batches())
        recording = record_batch(problem, inputs, targets)
        alone = _last_samples(problem, inputs, recording.samples)
    n, outputs = recording.samples, recording.outputs
    known = outputs.ndim > 0 and outputs.shape[0] == n
    folded = recording.separable_outputs and any(a is not None for a in recording.axes)
    if not (known or folded):
        raise DataError(
            f"Outputs of shape {list(outputs.shape)} do not say which of the {n} samples (first "
            f"axis of the inputs) they belong to, so the {kind.title} is not defined. Return "
            "outputs with the samples first from forward=, for instance [N, C, T] for tokens."
        )
    if alone is None or outputs.shape[0] % n:
        return
    expected = outputs.detach()[-alone[1] * (outputs.shape[0] // n) :].reshape(-1)
    tolerance = 10 * torch.finfo(problem.dtype).eps ** 0.5
    if len(alone[0]) != len(expected) or not torch.allclose(
        alone[0], expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    ):
        raise DataError(
            f"Outputs of shape {list(outputs.shape)} do not hold the {n} samples one after the "
            f"other: the last {alone[1]} alone give other values than in the batch. So the "
            f"{kind.title} is not defined. Return the samples first from forward= "
            "(time-first models: transpose), and samples that do not depend on each other."
        )


def _last_samples(problem: Problem, inputs: Any, samples: int) -> tuple[Tensor, int] | None:
    """Flat outputs of the last one or two samples by themselves, and how many these are."""
    count = 2 if samples > 2 else 1
    if samples < 2 or problem.batchnorm == "batch":
        return None
    try:
        part = select(inputs, torch.arange(samples - count, samples), samples)
        return problem.outputs(part).detach().reshape(-1), count
    except (RuntimeError, ValueError, TypeError, IndexError):  # a model for fixed batches
        return None


def hessian(
    problem: Problem, *, route: str = "auto", engine: str = "auto", memory: int | None = None
) -> WholeOperator:
    """The Hessian ``d^2 f / d theta^2`` ``[P, P]``, whole and by block.

    Blocks of layers that only piecewise linear operations follow equal the Gauss-Newton block and
    are computed as such; Linear layers in other nets by ``sum_n H_n (x) a_n a_n^T``; everything
    else by double backward, column by column. ``route`` forces ``"gram"``, ``"rows"`` or
    ``"autograd"`` (``UnsupportedLayerError`` where that is not valid).

    ``engine`` says how products ``op @ V`` are computed and ``memory`` bounds, in bytes, what
    their graphs hold: see :class:`~curvscope.curvature.engine.Engine`. Both are the same for the
    other matrices.
    """
    if route == "backpack":
        raise OptionError("BackPACK has no full Hessian block; use cs.backpack.diag_hessian.")
    return _make(problem, Kind(HESSIAN), route, engine, memory)


def ggn(
    problem: Problem, *, route: str = "auto", engine: str = "auto", memory: int | None = None
) -> WholeOperator:
    """Generalised Gauss-Newton ``(1/M) sum_m J_m^T (d^2 l_m/dz^2) J_m`` (Schraudolph 2002).

    Positive semi-definite for convex losses. Blocks come as ``V V^T`` in one backward pass per
    output (factored for Linear layers), else by double backward. ``route="backpack"`` takes
    BackPACK's ``SqrtGGNExact``.
    """
    return _make(problem, Kind(GGN), route, engine, memory)


def fisher(
    problem: Problem,
    samples: int | None = None,
    *,
    seed: int = 0,
    route: str = "auto",
    engine: str = "auto",
    memory: int | None = None,
) -> WholeOperator:
    """The Fisher information ``(1/M) sum_m c_m E_{y~p}[grad log p(y) grad log p(y)^T]``.

    ``samples=None`` takes the expectation exactly (it then equals the GGN); ``samples=n`` draws n
    labels per term from the model (Martens 2020, section 5). Raises ``UnsupportedLossError`` for a
    loss that is no log-likelihood.
    """
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise OptionError(f"samples={samples!r} must be None (exact) or a positive integer.")
    if problem.loss.likelihood is None:
        raise UnsupportedLossError(problem.loss.no_likelihood("Its Fisher"))
    return _make(problem, Kind(FISHER, samples=samples, seed=seed), route, engine, memory)


def empirical_fisher(
    problem: Problem,
    *,
    per: str = "sample",
    route: str = "auto",
    engine: str = "auto",
    memory: int | None = None,
) -> WholeOperator:
    """``(1/M) sum_n g_n g_n^T`` with the gradients at the observed labels. Not the Fisher.

    ``g_n`` is the gradient of sample n's summed terms, each scaled by ``1/sqrt(c_m)`` so that a
    class weight of 2 is the same as duplication; ``per="term"`` takes tokens or pixels one by one
    (Kunstner, Balles and Hennig 2019).
    """
    check_option("per", per, ("sample", "term"))
    return _make(problem, Kind(EMPIRICAL, per=per), route, engine, memory)
