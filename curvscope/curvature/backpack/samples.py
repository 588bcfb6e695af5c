"""BackPACK's quantities of single samples, and their moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...problem import Problem
from . import operators as build
from .matrices import require, sampled_job
from .results import ParameterValues, SampleNorms, SampleValues
from .running import Batch, Job, run
from .table import spec_of


def batch_grad(problem: Problem) -> SampleValues:
    """Gradient of every sample's own terms ``[N, P]`` (``BatchGrad``), for any loss.

    The terms are summed, not divided by M: ``result.total()`` is the objective's gradient.
    """
    require(problem, problem.n_samples, "The gradients of all samples")
    return _rows(Job(problem, spec_of("BatchGrad"), {}), "individual gradients", exact=True)


def batch_l2(problem: Problem) -> SampleNorms:
    """Squared norm of every sample's gradient (``BatchL2Grad``), per parameter ``[N, K]``."""
    job = Job(problem, spec_of("BatchL2Grad"), {})
    rows: list[Tensor] = []

    def visit(batch: Batch) -> None:
        rows.append(torch.stack([batch.fields[n].detach() for n in problem.params], 1))

    seconds = run(job, visit)
    info = build.provenance(job, "squared norms of individual gradients", exact=True)
    return SampleNorms(
        values=torch.cat(rows),
        layout=problem.layout,
        scale=problem.scale,
        info=info.with_(seconds=seconds),
    )


def sum_grad_squared(problem: Problem) -> ParameterValues:
    """``sum_n g_n^2`` ``[P]``, entry by entry (``SumGradSquared``).

    With ``g_n`` as in :func:`batch_grad`; times ``scale`` it is the diagonal of the empirical
    Fisher for a loss without class weights.
    """
    job = Job(problem, spec_of("SumGradSquared"), {})
    total = torch.zeros(problem.layout.numel, dtype=problem.dtype, device=problem.device)

    def visit(batch: Batch) -> None:
        total.add_(_flat(problem, batch.fields))

    return _values(job, "sum of squared gradients", total, run(job, visit))


def variance(problem: Problem) -> ParameterValues:
    """Variance over samples of ``g_n`` ``[P]``, entry by entry (``Variance``).

    ``(1/N) sum_n (g_n - mean)^2`` with ``g_n`` as in :func:`batch_grad`. BackPACK's variances of
    batches are combined with those of their means (Chan, Golub and LeVeque 1983).
    """
    job = Job(problem, spec_of("Variance"), {})
    mean = torch.zeros(problem.layout.numel, dtype=problem.dtype, device=problem.device)
    spread = torch.zeros_like(mean)
    seen = 0

    def visit(batch: Batch) -> None:
        nonlocal seen
        both = seen + batch.samples
        shift = _flat(problem, batch.gradients) / batch.samples - mean
        spread.add_(batch.samples * _flat(problem, batch.fields))
        spread.add_(shift**2 * (seen * batch.samples / both))
        mean.add_(shift * (batch.samples / both))
        seen = both

    seconds = run(job, visit)
    return _values(job, "variance of individual gradients", spread / seen, seconds)


def batch_diag_ggn(problem: Problem, *, mc: int | None = None, seed: int = 0) -> SampleValues:
    """Diagonal of every sample's own GGN ``[N, P]`` (``BatchDiagGGNExact``/``BatchDiagGGNMC``).

    Not divided by M: ``result.total()`` is :func:`diag_ggn`.
    """
    job, exact, suffix = sampled_job(problem, "BatchDiagGGNExact", "BatchDiagGGNMC", mc, seed)
    require(problem, problem.n_samples, "The GGN diagonals of all samples")
    return _rows(job, f"individual GGN diagonals{suffix}", exact=exact)


def batch_diag_hessian(problem: Problem) -> SampleValues:
    """Diagonal of every sample's own Hessian ``[N, P]`` (``BatchDiagHessian``); see above."""
    require(problem, problem.n_samples, "The Hessian diagonals of all samples")
    job = Job(problem, spec_of("BatchDiagHessian"), {})
    return _rows(job, "individual Hessian diagonals", exact=True)


def _rows(job: Job, what: str, *, exact: bool) -> SampleValues:
    values = build.sample_rows(job)
    info = build.provenance(job, what, exact=exact)
    return SampleValues(
        values=values, layout=job.problem.layout, scale=job.problem.scale, info=info
    )


def _values(job: Job, what: str, values: Tensor, seconds: float) -> ParameterValues:
    info = build.provenance(job, what, exact=True).with_(seconds=seconds)
    problem = job.problem
    return ParameterValues(values=values, layout=problem.layout, scale=problem.scale, info=info)


def _flat(problem: Problem, parts: Any) -> Tensor:
    return torch.cat([parts[name].detach().reshape(-1) for name in problem.params])
