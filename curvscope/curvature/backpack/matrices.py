"""BackPACK's matrices: diagonals, square roots, Kronecker factors, products."""

from __future__ import annotations

import torch

from ... import memory
from ...errors import check_count, check_option
from ...operators import BlockDiagonalOperator
from ...problem import Problem
from . import operators as build
from .running import Job
from .table import spec_of


def diag_hessian(problem: Problem) -> BlockDiagonalOperator:
    """The diagonal of the Hessian (``DiagHessian``), as diagonal blocks.

    Exact. Cost: one backward pass per output, and for every activation that is not piecewise
    linear as many more as it has outputs per sample.
    """
    return build.diagonal(Job(problem, spec_of("DiagHessian"), {}), "Hessian diagonal", exact=True)


def diag_ggn(problem: Problem, *, mc: int | None = None, seed: int = 0) -> BlockDiagonalOperator:
    """The diagonal of the GGN, as diagonal blocks (``DiagGGNExact``; ``DiagGGNMC`` with ``mc``).

    ``mc=n`` draws n labels per term from the model's distribution instead of the exact Hessian of
    the loss in the outputs. Cost: one backward pass per output, or per drawn label.
    """
    job, exact, suffix = sampled_job(problem, "DiagGGNExact", "DiagGGNMC", mc, seed)
    return build.diagonal(job, f"GGN diagonal{suffix}", exact=exact)


def sqrt_ggn(problem: Problem, *, mc: int | None = None, seed: int = 0) -> BlockDiagonalOperator:
    """The GGN's blocks as ``V V^T`` (``SqrtGGNExact``; ``SqrtGGNMC`` with ``mc``).

    ``V`` has a column per sample and output (or drawn label). A problem with ``blocks="all"`` has
    one block, the whole GGN. Raises ``MemoryLimitError`` where V would not fit.
    """
    job, exact, suffix = sampled_job(problem, "SqrtGGNExact", "SqrtGGNMC", mc, seed)
    per_sample = _outputs_per_sample(problem) if mc is None else mc
    require(problem, problem.n_samples * per_sample, "The square root of the GGN")
    return build.low_rank(job, f"GGN{suffix}", exact=exact)


def kfac(
    problem: Problem, *, samples: int = 1, seed: int = 0, unscaled: bool = False
) -> BlockDiagonalOperator:
    """BackPACK's ``KFAC``: ``G (x) A`` per weight, ``G`` per bias, from sampled labels.

    Weight and bias of a layer are treated as independent, unlike in :func:`curvscope.kfac`.
    BackPACK's factors of convolution weights are too large by about the number of output
    positions, and are not KFC's: they are refused unless ``unscaled=True``, which returns them as
    they are under the name "KFAC (BackPACK, unscaled)".
    """
    return _kronecker(problem, "KFAC", unscaled, seed, mc_samples=check_count("samples", samples))


def kflr(problem: Problem, *, unscaled: bool = False) -> BlockDiagonalOperator:
    """BackPACK's ``KFLR``: like :func:`kfac` with the exact Hessian of the loss in the outputs."""
    return _kronecker(problem, "KFLR", unscaled)


def kfra(problem: Problem, *, unscaled: bool = False) -> BlockDiagonalOperator:
    """BackPACK's ``KFRA``: like :func:`kflr`, averaged over all samples at every layer.

    The averages run over all samples, so all data pass through the model as one batch.
    """
    return _kronecker(problem, "KFRA", unscaled, joined=True)


def hmp(problem: Problem) -> BlockDiagonalOperator:
    """Products with the Hessian's block of every single parameter (``HMP``), matrix-free.

    Within a block of several parameters the entries between them are left out; a problem with
    ``blocks="parameter"`` has none. Each product takes one forward and backward pass of a fresh
    copy, at the parameter values of the time when the operator was made.
    """
    return build.matrix_free(Job(problem, spec_of("HMP"), {}), "Hessian", definite=False)


def ggnmp(problem: Problem) -> BlockDiagonalOperator:
    """Products with the GGN's block of every single parameter (``GGNMP``); see :func:`hmp`."""
    return build.matrix_free(Job(problem, spec_of("GGNMP"), {}), "GGN", definite=True)


def pchmp(problem: Problem, *, modify: str = "clip") -> BlockDiagonalOperator:
    """Products with the positive-curvature Hessian (``PCHMP``; Chen et al. 2018); see :func:`hmp`.

    In the backward recursion of the Hessian the diagonal second-order term ``f''(x) g`` of every
    activation is clipped at zero (``modify="clip"``) or replaced by its size (``"abs"``).
    BackPACK 1.7.1 uses ``f''(x) g^2``; here it is put right.
    """
    check_option("modify", modify, ("clip", "abs"))
    job = Job(problem, spec_of("PCHMP"), {"modify": modify})
    return build.matrix_free(job, f"positive-curvature Hessian ({modify})", definite=True)


def sampled_job(
    problem: Problem, exact: str, sampled: str, mc: int | None, seed: int
) -> tuple[Job, bool, str]:
    """The job, whether it is exact, and what to append to the name."""
    if mc is None:
        return Job(problem, spec_of(exact), {}), True, ""
    options = {"mc_samples": check_count("mc", mc)}
    return Job(problem, spec_of(sampled), options, seed=seed), False, f" (sampled, {mc} per term)"


def _kronecker(
    problem: Problem,
    name: str,
    unscaled: bool,
    seed: int = 0,
    joined: bool = False,
    **options: int,
) -> BlockDiagonalOperator:
    job = Job(problem, spec_of(name), options, seed=seed, unscaled=unscaled, joined=joined)
    mark = ", unscaled" if unscaled and build.convolution_weights(problem) else ""
    return build.kronecker(job, f"{name} (BackPACK{mark})")


def _outputs_per_sample(problem: Problem) -> int:
    with problem.session(), torch.no_grad():
        inputs, targets = next(problem.batches())
        count = problem.count_samples(inputs, targets)
        return max(1, problem.outputs(inputs).numel() // count)


def require(problem: Problem, rows: int, what: str) -> None:
    """Refuse ``rows`` vectors of all parameters where they would not fit into memory."""
    memory.require(
        2 * rows * problem.layout.numel * problem.dtype.itemsize,
        f"{what} ({rows} x {problem.layout.numel})",
        "Take fewer parameters with Problem(..., params=...), or fewer samples with "
        "problem.subset(n).",
        device=problem.device,
    )
