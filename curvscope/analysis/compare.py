"""How far approximations are from a matrix, block by block, beside the best their class can do."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError, ParameterMismatchError, ShapeError, check_option
from ..operators import Operator
from ..progress import track
from .align import align, partition
from .comparison import SAME, Comparison, Row, place
from .facts import Limits, affordable_rows
from .job import Job
from .metrics import METRICS
from .remarks import remarks
from .result import Cost, listing
from .structure import is_structured

_BUDGET = 100
STEPS = ("step_angle", "predicted_decrease", "actual_decrease", "decrease_ratio", "step_efficiency")
_NEEDED = re.compile(r"indefinite .*; a damping above (\S+) ")
_UNITS = 25.0  # of rounding, up to which a relative error is none
_LEAST = 8  # products below which an estimate has no standard error worth the name


def compare(
    reference: Operator,
    approximations: Mapping[str, Operator] | Operator,
    *,
    gradient: Any = None,
    damping: float | Mapping[str, float] | None = None,
    tol: float | None = None,
    budget: int | None = None,
    seed: int = 0,
    blocks: str | Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    memory: int | None = None,
    metrics: Sequence[str] | None = None,
    best_in_class: bool = True,
    method: str = "auto",
) -> Comparison:
    """Compare approximations with a reference: a row per block and approximation.

    Every metric of :data:`curvscope.analysis.metrics.METRICS` is computed for each diagonal block,
    and for the whole matrix (block ``"(all)"``). Beside the error stands that of the nearest
    member of the approximation's class, and for the whole matrix the share of the reference's
    energy outside its diagonal blocks. What is not defined is NaN, with the reason.

    Numbers are exact where matrices fit the memory budget or have a structure that gives them
    (Kronecker products, low rank, the factored forms of a layer). Of a block or a whole that is too
    large and known by its products only, every metric is estimated: sums with random probes and
    standard errors, leading eigenvectors, norms and condition numbers by Lanczos iteration with
    bounds on how far they may be off, all eigenvalues by Lanczos quadrature, ranks of the diagonal
    on rows drawn at random. What products do not give is NaN, with the reason.

    Parameters
    ----------
    reference, approximations
        Operators over the same parameters; ``{"name": operator, ...}`` or a single operator. Those
        without blocks are restricted to the blocks of the others.
    gradient
        A flat tensor ``[P]`` in the order of the layout, or a Problem, for the metrics of steps.
    damping
        What is added to the diagonal for steps, condition numbers and determinants: one number, or
        one per approximation. ``None`` takes ``info.settings["damping"]`` of each approximation,
        else nothing is added. A matrix whose ``info.settings["damped"]`` is true contains it
        already.
    tol
        Relative standard error at which probing for the norm of a large matrix stops.
    budget
        Most products with such a matrix for one estimate (default 100; at least 8). A whole matrix
        with more rows than a budget that is given is not formed from its products. All estimates
        together take about five times as many.
    seed
        Seed of the probes.
    blocks
        Names of the blocks to compare (``"(all)"`` for the whole matrix), or a mapping from names
        to parameters that defines them. Default: the reference's blocks, and the whole.
    memory
        Bytes that may be used for forming matrices. By default a quarter of what is available, and
        no matrix of more than 3,000 rows.
    metrics
        Names of the metrics to compute. By default all, but of matrices with more than 200,000
        rows none that iterates (eigenvectors, norms, spectra, ranks).
    best_in_class
        Whether to find the nearest member of each class.
    method
        ``"auto"`` decides by size and structure; ``"estimated"`` forms nothing, takes the reference
        as known by its products only and computes every metric, of any size; ``"exact"`` forms
        whatever fits the memory of the machine.

    Raises
    ------
    ParameterMismatchError
        Operators of different parameters; says what differs.
    ShapeError, OptionError, UnknownBlockError
        A gradient, option or block name that does not fit.

    Cost: that of the reference's blocks, once each, and what the metrics need beyond them: products
    of factors for structured matrices, ``O(d^3)`` for a block of ``d`` rows that is formed, at most
    ``budget`` products for each estimate. ``.cost`` of the result has the products and seconds.

    Source: Van Loan and Pitsianis 1993 for the nearest Kronecker product beside each error; the
    other metrics are defined in :data:`~curvscope.analysis.metrics.METRICS`.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> found = cs.compare(cs.ggn(problem), {"K-FAC": cs.kfac(problem)})
    >>> frame = found.to_frame()
    >>> list(frame["block"])
    ['0', '2', '(all)']
    >>> row = found.row("2", "K-FAC")
    >>> row.best_in_class <= row.error
    True
    """
    start = time.perf_counter()
    reference, others = align(reference, approximations)
    chosen = _chosen(metrics)
    _check(tol, budget)
    check_option("method", method, ("auto", "estimated", "exact"))
    rows = {"estimated": 0, "exact": reference.shape[0]}
    limits = Limits(
        rows=rows.get(method, affordable_rows(memory, reference.device)),
        products=_BUDGET if budget is None else budget,
        tol=tol,
        seed=seed,
        thorough=metrics is not None or method == "estimated",
        by_products=method == "estimated",
    )
    vector = _gradient(gradient, reference)
    members, with_whole = partition(reference, others, blocks)
    job = Job(reference, others, vector, damping, chosen, limits, best_in_class)
    for name, names in track(list(members.items()), "Comparing blocks"):
        job.block(name, names)
    if with_whole:
        form = budget is None or budget >= reference.shape[0] or is_structured(reference)
        job.whole(form or method == "exact")
    same = {name: _rounding(reference, op) for name, op in others.items()}
    warnings = remarks(reference, others, job.rows)
    if damping is not None and vector is None and set(chosen) & set(STEPS):
        warnings.append(
            "damping= was given without gradient=: the metrics of steps are NaN; pass "
            "gradient=problem as well."
        )
    if vector is not None:
        warnings += _without_steps(job.rows)
    if job.noisy:
        where = listing([place(name) for name in job.noisy])
        warnings.append(
            f"The norm of {where} is not known to tol={tol}; raise budget above {limits.products} "
            "products."
        )
    return Comparison(
        reference=reference.info.what,
        approximations=tuple(others),
        blocks=tuple(members),
        rows=tuple(replace(row, rounding=same[row.approximation]) for row in job.rows),
        references=tuple(job.references),
        metrics=chosen,
        cost=Cost(job.products, time.perf_counter() - start),
        settings={
            "damping": dict(damping) if isinstance(damping, Mapping) else damping,
            "gradient": vector is not None,
            "tol": tol,
            "budget": budget,
            "seed": seed,
            "blocks": list(members),
            "memory": memory,
            "rows_formed": limits.rows,
            "best_in_class": best_in_class,
            "method": method,
            "reference": dict(reference.info.settings),
            "approximations": {name: dict(op.info.settings) for name, op in others.items()},
        },
        converged=not job.noisy,
        warnings=tuple(warnings),
    )


def _chosen(metrics: Sequence[str] | None) -> tuple[str, ...]:
    if metrics is None:
        return tuple(METRICS)
    wanted = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in wanted:
        check_option("metrics", name, METRICS)
    return tuple(name for name in METRICS if name in wanted)


def _rounding(*ops: Operator) -> float:
    """Relative errors between these matrices that mean nothing."""
    return max(SAME, *(_UNITS * float(torch.finfo(op.dtype).eps) for op in ops))


def _without_steps(rows: Sequence[Row]) -> list[str]:
    """Whose steps, or what is measured by them, damping would make defined, and why."""
    singular: dict[str, None] = {}
    indefinite: dict[str, None] = {}
    needed = 0.0
    for row in rows:
        for reason in (row.reasons.get(name, "") for name in STEPS):
            if found := _NEEDED.search(reason):
                indefinite[row.approximation] = None
                needed = max(needed, float(found[1]))
            elif "damping" in reason:
                singular[row.approximation] = None
    warnings = []
    if singular:
        warnings.append(
            f"The steps of {listing(list(singular))} are not defined everywhere, because a matrix "
            "is singular: pass a larger damping=. The column note says where."
        )
    if indefinite:
        warnings.append(
            f"How good the steps of {listing(list(indefinite))} are is not defined everywhere, "
            "because the reference is indefinite there and its model has no minimum: pass a "
            f"damping= above {needed:.3g}. The column note says where."
        )
    return warnings


def _check(tol: float | None, budget: int | None) -> None:
    if tol is not None and not (math.isfinite(tol) and tol > 0):
        raise OptionError(f"tol={tol!r} must be a positive number.")
    if budget is not None and budget < _LEAST:
        raise OptionError(f"budget={budget!r} is too small: an estimate takes {_LEAST} products.")


def _gradient(gradient: Any, reference: Operator) -> Tensor | None:
    """The flat gradient ``[P]`` in float64 on the reference's device."""
    if gradient is None:
        return None
    if not isinstance(gradient, Tensor):
        if not callable(getattr(gradient, "gradient", None)):
            raise OptionError(
                "gradient= takes a flat tensor in the order of the layout, or a Problem, not "
                f"{type(gradient).__name__}."
            )
        layout = getattr(gradient, "layout", None)
        if layout is not None and reference.layout is not None and layout != reference.layout:
            raise ParameterMismatchError(
                "The Problem given as gradient= has other parameters than the operators: "
                f"{list(layout.names)} instead of {list(reference.layout.names)}."
            )
        gradient = gradient.gradient()
    vector = gradient.detach().to(dtype=torch.float64, device=reference.device)
    if vector.shape != (reference.shape[0],):
        raise ShapeError(
            f"The gradient has shape {list(vector.shape)}, not [{reference.shape[0]}]: flatten the "
            "gradients of all parameters in the order of the layout, or pass the Problem."
        )
    if not bool(torch.isfinite(vector).all()):
        raise OptionError("The gradient has NaN or infinite entries.")
    return vector
