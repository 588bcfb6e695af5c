"""The largest, smallest or outermost eigenpairs of a matrix known by products."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import NonFiniteError, OptionError, ShapeError, check_count, check_option, check_seed
from ...operators import LowRankOperator, Operator, RowGramOperator
from ...progress import track
from ..gram_form import GramForm
from ..result import Cost, as_cpu, listing, number
from .beside import look_beside
from .checkpoint import Keeper
from .common import (
    DIRECT,
    Meter,
    check_budget,
    check_tol,
    matrix_of,
    normals,
    stored,
    title,
)
from .eigenpairs import Eigenpairs, NegativeCurvature
from .krylov import SLACK, Krylov, Ritz, thresholds, wanted

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

WHICH = ("LM", "LA", "SA", "BE")
_BUDGET = 1000
_BYTES = 2**31  # for basis and images together; a constant, so that every run takes the same steps
_CAPACITY = 400


@dataclass
class Found:
    """What a solver hands back: unit vectors are columns."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    good: tuple[bool, ...]
    reason: str
    warnings: tuple[str, ...] = ()
    chain: list[tuple[float, float]] | None = None
    scale: float = 0.0  # the largest magnitude seen, if not that of the values


def eigsh(
    op: Operator | Tensor | np.ndarray | LinearOperator,
    k: int = 10,
    *,
    which: str = "LM",
    tol: float = 1e-4,
    budget: int | None = None,
    method: str = "auto",
    block: int = 1,
    v0: Tensor | None = None,
    copies: bool = True,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Eigenpairs:
    """``k`` eigenvalues and eigenvectors of a symmetric matrix that is known by its products.

    ``which`` is ``"LM"`` (largest magnitude), ``"LA"`` (largest), ``"SA"`` (smallest) or ``"BE"``
    (half from either end). A pair has converged when ``||A v - value v||`` is at most ``tol`` times
    ``|value|`` (values below a thousandth of the largest count as that large, and nothing is asked
    that is below rounding). ``budget`` is the most products to take (default: 1000 or 20 ``k``);
    pairs found until then are kept and marked.

    ``method``: ``"lanczos"`` is a block Lanczos iteration with full reorthogonalisation, thick
    restarts; ``"scipy"`` and ``"lobpcg"`` are SciPy's; ``"exact"`` decomposes the matrix;
    ``"auto"`` decomposes stored matrices of up to 2,000 rows, takes the Gram matrix of ``V`` for
    ``V V^T`` of low rank, and ``"lanczos"`` otherwise. ``block`` vectors are multiplied at once:
    more cost more products, but those of a network share its passes. ``v0`` ``[P]`` or ``[P,
    block]`` is the start (default: Gaussian from ``seed``). ``copies=True`` adds a last look beside
    the subspace, of about three products, for copies of multiple eigenvalues, which no iteration
    from one vector sees (SciPy's does not look for them): it overlooks one with a probability of at
    most 5 %, and a warning says where it could not decide (it takes two products where that is
    foreseen). ``checkpoint`` names a file from which the same call goes on after an interruption,
    with the same result; it takes one more product.

    Cost: the products it reports, and ``O(P m^2)`` for a basis of ``m`` (two ``[m, P]`` are kept).
    Raises ``OptionError`` for a ``k`` beyond the rows, a budget below ``k`` and a matrix that is
    not symmetric, ``ShapeError`` for a ``v0`` of another size, ``NonFiniteError`` for products that
    are not finite, ``DataError`` for a checkpoint of another computation.

    Source: Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems"
    (SIAM J. Matrix Anal. 22, 2000); the look beside bounds weights by the Christoffel function
    (Golub and Meurant, "Matrices, Moments and Quadrature", 2010, section 3).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    >>> found = cs.eigsh(matrix, 2)
    >>> [round(value, 6) for value in found.values.tolist()], found.converged
    ([4.0, 2.0], True)
    """
    begun = time.perf_counter()
    op = matrix_of(op)
    check_option("which", which, WHICH)
    check_option("method", method, ("auto", "lanczos", "scipy", "lobpcg", "exact"))
    k, size = check_count("k", k), op.shape[0]
    if k > size:
        raise OptionError(
            f"k={k} is more than the {size} rows of the {title(op)}; pass k <= {size}."
        )
    block = check_count("block", block)
    tol, seed = check_tol(tol), check_seed(seed)
    settings = {"k": k, "which": which, "method": method, "block": block, "seed": seed}
    settings["copies"] = copies
    if method == "auto":
        method = _automatic(op, which)
    meter = Meter(op)
    needed = {"lobpcg": 3 * k, "scipy": 2 * k + 2}.get(method, min(k + block, size))
    most = max(_BUDGET, 20 * k) if budget is None else budget
    if method != "exact":
        most = check_budget(most, min(needed, size), f"{k} eigenpairs by method={method!r}")
    start = _start(op, v0, block, seed)
    if method == "exact":
        found = _exact(op, k, which)
    elif method == "lanczos":
        stated = {**settings, "v0": v0 is not None}
        keeper = Keeper(checkpoint, meter, stated)
        most += meter.used
        with keeper.kept():
            found = solve(
                meter,
                start,
                k,
                which=which,
                tol=tol,
                most=most,
                keeper=keeper,
                seed=seed,
                copies=copies and (k > (2 if which == "BE" else 1) or v0 is not None),
                blind=v0 is not None,
            )
    else:
        if checkpoint is not None:
            raise OptionError(f"method={method!r} cannot be resumed; leave out checkpoint=.")
        from .scipy_solvers import by_lobpcg, by_scipy

        solver = by_scipy if method == "scipy" else by_lobpcg
        found = solver(meter, start, k, which, tol, most, seed)
    return Eigenpairs(
        of=title(op),
        size=size,
        method=method,
        which=which,
        values=as_cpu(found.values),
        vectors=found.vectors.detach().cpu(),
        residuals=as_cpu(found.residuals).clamp_min(_rounding(op, found)),
        pair_converged=found.good,
        converged=all(found.good),
        reason=found.reason,
        warnings=found.warnings,
        cost=Cost(meter.used, time.perf_counter() - begun),
        settings={**settings, "tol": tol, "budget": budget},
    )


def negative_curvature(
    op: Operator | Tensor | np.ndarray | LinearOperator,
    *,
    tol: float = 1e-3,
    budget: int | None = None,
    method: str = "auto",
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> NegativeCurvature:
    """The direction of most negative curvature: the smallest eigenvalue and its vector.

    ``.negative`` says whether the curvature along ``.direction`` is negative: the Rayleigh quotient
    proves it, converged or not. The smallest eigenvalue is at most ``.value``. ``tol``,
    ``budget``, ``method``, ``seed`` and ``checkpoint`` are those of :func:`eigsh`.

    Cost: the products it reports, those of ``eigsh(op, 1, which="SA")`` and one. Raises what
    :func:`eigsh` raises.

    Source: as :func:`eigsh`; its use for saddle points, Dauphin et al. 2014 (arXiv 1406.2572).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> found = cs.negative_curvature(torch.diag(torch.tensor([2.0, -1.0])))
    >>> found.negative, round(found.value, 6)
    (True, -1.0)
    """
    op = matrix_of(op)
    pairs = eigsh(
        op,
        1,
        which="SA",
        tol=tol,
        budget=budget,
        method=method,
        seed=seed,
        checkpoint=checkpoint,
    )
    # a Rayleigh quotient of a unit vector is known to about this; the smallest eigenvalue does not
    # say how large the others are, a random vector does: E |A z|^2 = |A|_F^2 for normal z
    probe = torch.randn(op.shape[0], generator=torch.Generator().manual_seed(seed))
    norm = float((op @ probe.to(op.device, op.dtype)).double().norm())
    rounding = 20 * torch.finfo(op.dtype).eps * max(norm, float(pairs.values.abs().max()))
    fields = {name: getattr(pairs, name) for name in pairs.__dataclass_fields__}
    if not stored(op):
        fields["cost"] = pairs.cost + Cost(products=1)
    fields["settings"] = {**pairs.settings, "rounding": rounding}
    return NegativeCurvature(**fields)


def _rounding(op: Operator, found: Found) -> float:
    """What no residual is below: the numbers of the matrix are not better known than that."""
    scale = max(found.scale, float(found.values.abs().max()))
    return float(torch.finfo(op.dtype).eps) * scale


def _automatic(op: Operator, which: str) -> str:
    if isinstance(op, LowRankOperator | RowGramOperator) and op.rank < op.shape[0]:
        positive = op.positive_semidefinite and which in ("LM", "LA")
        return "exact" if positive and op.rank <= 4 * DIRECT else "lanczos"
    return "exact" if stored(op) and op.shape[0] <= DIRECT else "lanczos"


def _start(op: Operator, v0: Tensor | None, block: int, seed: int) -> Tensor:
    if v0 is None:
        return normals(op, seed, 0, min(block, op.shape[0]), stream=2)
    start = torch.as_tensor(v0).detach()
    start = start.unsqueeze(1) if start.ndim == 1 else start
    if start.ndim != 2 or start.shape[0] != op.shape[0] or not 1 <= start.shape[1] <= op.shape[0]:
        raise ShapeError(
            f"v0 has shape {list(start.shape)}; it must be [{op.shape[0]}] or "
            f"[{op.shape[0]}, block]."
        )
    if not bool(torch.isfinite(start).all()):
        raise NonFiniteError("v0 has NaN or infinite entries; leave it out for a random start.")
    return start.to(dtype=op.dtype, device=op.device)


def _exact(op: Operator, k: int, which: str) -> Found:
    form = GramForm.of(op, 4 * DIRECT) if which in ("LM", "LA") else None
    if form is not None and k <= len(form.half):
        values, vectors = form.leading(k)
        lengths = vectors.norm(dim=0)
        if bool((lengths > 0.5).all()):  # beyond the rank there are zeros without vectors
            vectors = vectors / lengths
            images = op @ vectors
            residuals = (images - vectors * values.to(vectors)).norm(dim=0)
            reason = f"From the Gram matrix of its {len(form.half)} vectors."
            return Found(values, vectors, residuals, (True,) * k, reason)
    matrix = op.dense().double()
    every, basis = torch.linalg.eigh(matrix)
    places = wanted(every.cpu(), k, which).to(every.device)
    values, vectors = every[places], basis[:, places]
    residuals = (matrix @ vectors - vectors * values).norm(dim=0)
    reason, scale = "From a full decomposition.", float(every.abs().max())
    return Found(values, vectors.to(op.dtype), residuals, (True,) * k, reason, scale=scale)


def _capacity(size: int, itemsize: int, k: int, block: int) -> int:
    fitting = _BYTES // (2 * size * itemsize)
    return max(2 * k + 4 * block, 24, min(_CAPACITY, fitting))


def solve(
    meter: Meter,
    start: Tensor,
    k: int,
    *,
    which: str,
    tol: float,
    most: int,
    keeper: Keeper,
    seed: int,
    slack: float = SLACK,
    copies: bool = True,
    blind: bool = False,
    settled: Callable[[Krylov, Ritz], bool] = lambda krylov, pairs: True,
) -> Found:
    """Block Lanczos until ``k`` pairs have converged or ``most`` products are spent.

    ``copies=False`` leaves out the look for further copies of multiple eigenvalues, which change
    nothing where the outermost one alone is wanted and the start is random. ``blind`` says that
    the start may lack whole eigenspaces. ``settled`` may ask for more than small residuals.
    """
    room = _capacity(meter.size, start.element_size(), k, start.shape[1])
    krylov = Krylov(meter, start, room, seed=seed)
    state = keeper.load()
    if state is not None:
        krylov.resume(state)
    warnings: list[str] = []
    steps = iter(track(range(most), f"Eigenpairs of the {title(meter.op)}"))
    while True:
        if krylov.count >= k:
            pairs = krylov.ritz(k, which)
            if krylov.count >= meter.size:
                return _found(krylov, pairs, tol, slack, "The basis spans the whole space.")
            limits = thresholds(pairs, tol, krylov.eps, slack)
            if bool((pairs.residuals <= limits).all()) and settled(krylov, pairs):
                done = _settle(krylov, pairs, limits, which, most, warnings, copies, blind)
                if done is not None:
                    return _found(krylov, pairs, tol, slack, done, tuple(warnings))
                if krylov.count >= meter.size:
                    continue  # what was found beside the subspace completes the whole
        width = max(1, len(krylov.pending))
        if meter.used + width > most:
            return _found(
                krylov,
                krylov.ritz(min(k, krylov.count), which),
                tol,
                slack,
                f"It stopped as the budget of {most} products is spent.",
                tuple(warnings),
            )
        if krylov.count + width > room and krylov.count > k + width:
            krylov.restart(min(k + max(4, (room - k) // 3), room - 2 * width), which)
        krylov.expand()
        for _ in range(width):
            next(steps, None)
        keeper.hold(**krylov.state())


def _settle(
    krylov: Krylov,
    pairs: Ritz,
    limits: Tensor,
    which: str,
    most: int,
    warnings: list[str],
    copies: bool,
    blind: bool,
) -> str | None:
    """Why these pairs are final, or ``None`` if the iteration has to go on."""
    _, true = krylov.residuals(pairs)
    if bool((true > limits).any()) and bool((pairs.residuals > limits / 10).any()):
        return None  # a few more steps
    met = "It stopped as all residuals are small enough"
    if bool((true > limits).any()):
        return (
            "It stopped as rounding does not allow smaller residuals; use a larger tol= or float64."
        )
    if not copies:
        return f"{met}."
    margin = float(limits.max())
    left = most - krylov.meter.used
    if left < 1:
        warnings.append("The budget did not allow to look for further copies of multiple ones.")
        return f"{met}; the budget is spent."
    beside = look_beside(krylov, pairs, which, margin, left, blind=blind)
    if beside.missing is None:
        warnings.append(
            "Whether an eigenvalue that belongs to the wanted ones is missing (a copy of a "
            "multiple one) could not be decided; a larger budget= or block=2 would tell."
        )
        return f"{met}."
    if not beside.missing and not len(beside.basis):
        return f"{met}; copies of multiple ones would change nothing within the tolerance."
    if not beside.missing:
        return f"{met} and nothing larger was found beside the subspace."
    krylov.merge(beside.basis, beside.images, beside.following)
    return None


def _found(
    krylov: Krylov,
    pairs: Ritz,
    tol: float,
    slack: float,
    reason: str,
    warnings: tuple[str, ...] = (),
) -> Found:
    rows, residuals = krylov.residuals(pairs)
    good = tuple((residuals <= thresholds(pairs, tol, krylov.eps, slack)).tolist())
    bad = [str(i + 1) for i, fine in enumerate(good) if not fine]
    if bad:
        warnings = (
            *warnings,
            f"{len(bad)} of {len(good)} pairs (number {listing(bad)}) have not converged: the "
            f"largest residual is {number(float(residuals.max()), 2)}.",
        )
    vectors = rows.mT.contiguous()
    return Found(
        pairs.values, vectors, residuals, good, reason, warnings, krylov.chain, pairs.scale
    )
