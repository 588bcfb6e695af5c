"""Linear systems with a damped matrix that is known by its products."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import (
    NonFiniteError,
    NotDefinedError,
    OptionError,
    ShapeError,
    check_option,
    counted,
)
from ...operators import BlockDiagonalOperator, Operator
from ...progress import track
from ..align import align
from ..iterations import ConjugateGradients, Iteration, MinimalResiduals, Multiply, dots
from ..result import Cost, as_cpu, number
from ..structure import has_inverse_form
from .checkpoint import Keeper
from .common import Meter, check_budget, check_tol, decomposable, lengths, matrix_of, title
from .functions import _damping
from .solution import Solution

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

_BUDGET = 500  # products per right-hand side
_AIM = 0.9  # part of the tolerance at which the true residual is computed
_GAIN = 0.5  # a round that leaves more than this part of the residual is the last
_MET = "It stopped as all residuals are small enough."
_SINGULAR = (
    "It stopped as the right-hand side has parts that the matrix does not reach: with this damping "
    "it is singular, or nearly."
)
_ROUNDING = (
    "It stopped as rounding does not allow smaller residuals; use a larger tol= or damping=, or "
    "float64."
)

_STUCK = (
    "It stopped as the residuals no longer get smaller: rounding, products that differ from call "
    "to call, or a preconditioner that is not positive definite."
)


def solve(
    op: Operator | Tensor | np.ndarray | LinearOperator,
    vectors: Tensor | np.ndarray,
    *,
    damping: float = 0.0,
    preconditioner: Operator | Tensor | np.ndarray | LinearOperator | None = None,
    method: str = "auto",
    tol: float = 1e-5,
    budget: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Solution:
    """``x`` with ``(A + damping I) x = b``, for one vector ``b`` ``[P]`` or columns ``[P, k]``.

    From products alone, so that no matrix is formed: natural-gradient and Newton steps, influence
    functions, Laplace approximations of networks of any size. A column has converged when
    ``||b - (A + damping I) x|| <= tol ||b||``, which is checked by a product of its own; the
    iteration goes on from there if rounding has made it believe more than is true.

    ``method``: ``"cg"`` is the method of conjugate gradients, for matrices that are positive
    definite with the damping; ``"minres"`` minimises the residual and takes symmetric matrices of
    any sign; ``"direct"`` inverts; ``"auto"`` is direct where the structure gives the inverse,
    ``"cg"`` where the matrix is positive semi-definite by construction (GGN, Fisher), and
    ``"minres"`` otherwise (Hessians). ``preconditioner`` is an approximate inverse of
    ``A + damping I``, positive definite: ``cs.kfac(problem).inverse(damping)`` or an optimizer's
    ``preconditioner()``; parameters that it does not define are multiplied by its mean diagonal
    entry. ``budget`` is the most products to take (default: 500 per column); what is
    found until then is kept and marked. ``checkpoint`` names a file from which the same call goes
    on after an interruption; it takes one more product.

    Cost: the products it reports, those of all columns that have not converged at once; about the
    root of the condition number per digit and column. At its peak it holds 13 (``"cg"``) or 18
    vectors per column.
    Raises ``NotDefinedError`` where conjugate gradients meet curvature that is not positive, or the
    preconditioner is not positive definite, ``SingularError`` by ``"direct"``, ``ShapeError`` for
    vectors of another size, ``NonFiniteError`` for vectors, products or solutions that are not
    finite in the type of the matrix, ``OptionError`` for complex vectors, a matrix that is not
    symmetric and a budget too small, ``ParameterMismatchError`` for a preconditioner of other
    parameters, ``DataError`` for a checkpoint of another computation.

    Source: Hestenes and Stiefel 1952; Paige and Saunders 1975 (SIAM J. Numer. Anal. 12); in
    training, Martens 2010 (ICML), section 4; preconditioned, Elman, Silvester and Wathen 2014,
    algorithms 2.2 and 4.1.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    >>> found = cs.solve(matrix, torch.ones(3), damping=1.0)
    >>> [round(x, 4) for x in found.value.tolist()], found.converged
    ([0.2, 0.3333, 0.5], True)
    """
    begun = time.perf_counter()
    op = matrix_of(op)
    shift, tol = _damping(damping), check_tol(tol)
    check_option("method", method, ("auto", "cg", "minres", "direct"))
    b, one = _columns(op, vectors)
    if method == "auto":
        method = "cg" if op.positive_semidefinite else "minres"
        if decomposable(op) or has_inverse_form(op):
            method = "direct"
    settings: dict[str, Any] = {"damping": shift, "method": method, "tol": tol, "budget": budget}
    settings["preconditioner"] = None
    meter, sizes = Meter(op), lengths(b.mT)
    scale = torch.where(sizes > 0, sizes, 1.0).to(b.dtype)
    unit = b / scale
    if method == "direct":
        x = op.inverse(shift) @ unit
        found = _Found(
            x, as_cpu(lengths((unit - (op @ x) - shift * x).mT)), "The inverse is known."
        )
    else:
        apply: Multiply | None = None
        if preconditioner is not None:
            inverse = align(op, {"preconditioner": matrix_of(preconditioner, "preconditioner")})[1]
            apply = _applied(inverse["preconditioner"])
            settings["preconditioner"] = title(inverse["preconditioner"])
        most = _BUDGET * b.shape[1] if budget is None else budget
        most = check_budget(
            most, 2 * b.shape[1], f"a solution for {counted(b.shape[1], 'right-hand side')}"
        )
        prints = [f"{float(v):.5g}" for v in (*sizes, *b.double().sum(0))]
        same = {"damping": shift, "method": method, "b": prints}
        if checkpoint is not None and apply is not None:
            same["preconditioner"] = [f"{float(v):.5g}" for v in lengths(apply(unit).mT)]
        keeper = Keeper(checkpoint, meter, same)
        with keeper.kept():
            found = _iterate(_System(meter, shift, apply, method), unit, sizes, tol, most, keeper)
    value = _scaled(found.x, scale, op)
    good = tuple((found.residuals <= max(tol, _rounding(op, method))).tolist())
    known = shift if op.positive_semidefinite else 0.0
    errors = found.residuals / (known * as_cpu(lengths(found.x.mT))).clamp_min(1e-300)
    errors = torch.where(errors < 1, errors / (1 - errors), math.inf)  # of x*, not of x
    errors = torch.where(as_cpu(sizes) == 0, 0.0, errors)
    return Solution(
        of=title(op),
        size=op.shape[0],
        method=method,
        value=(value[:, 0] if one else value).detach().cpu(),
        damping=shift,
        residuals=found.residuals,
        error_bounds=errors,
        column_converged=good,
        history=found.history,
        converged=all(good),
        reason=found.reason,
        warnings=() if all(good) else (_unsolved(found, good, settings),),
        cost=Cost(meter.used, time.perf_counter() - begun),
        settings=settings,
    )


@dataclass
class _Found:
    x: Tensor
    residuals: Tensor  # relative, float64 on the CPU
    reason: str
    history: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.float64))


@dataclass
class _System:
    """``A + damping I`` by counted products, and what to iterate with."""

    meter: Meter
    damping: float
    precondition: Multiply | None
    method: str

    def times(self, vectors: Tensor) -> Tensor:
        return self.meter(vectors) + self.damping * vectors

    def iteration(self, b: Tensor) -> Iteration:
        kind = ConjugateGradients if self.method == "cg" else MinimalResiduals
        return kind(self.times, b, self.precondition)


def _iterate(
    system: _System, unit: Tensor, sizes: Tensor, tol: float, most: int, keeper: Keeper
) -> _Found:
    """Rounds of an iteration on what is left of ``unit``, each closed by true residuals."""
    meter = system.meter
    x, rest, left = torch.zeros_like(unit), unit, (sizes > 0).double()
    history: list[Tensor] = []
    state = keeper.load()
    if state is not None:
        x, rest, left = (
            state[name].to(like) for name, like in (("x0", x), ("b0", rest), ("e0", left))
        )
        history, meter.used = list(state["past"]), state["used"]
    reason = "" if bool((left > tol).any()) else _MET
    running = system.iteration(rest)
    if state is not None:
        running.resume(state)

    def hold() -> None:
        if keeper.path is None:  # the state is a copy of all vectors
            return
        past = torch.stack(history) if history else left.new_zeros(0, len(left), device="cpu")
        keeper.hold(**running.state, x0=x, b0=rest, e0=left, past=past, used=meter.used)

    steps = iter(track(range(most), f"Solution with the {title(meter.op)}"))
    while not reason:
        open_ = left > tol
        aim = _AIM * max(tol, torch.finfo(unit.dtype).eps)
        while True:
            active = (open_ & (running.norms > aim) & ~running.ended).nonzero().squeeze(1)
            if not len(active) or meter.used + len(active) + int(open_.sum()) > most:
                break
            running.step(active)
            history.append(torch.where(open_, running.norms, left).cpu())
            for _ in range(len(active)):
                next(steps, None)
            hold()
        if system.method == "cg" and bool(running.ended.any()):
            raise NotDefinedError(
                f"The {title(meter.op)} with damping {system.damping:g} has a direction of "
                "negative or no curvature, so conjugate gradients cannot go on. Pass "
                "method='minres', or a larger damping (cs.eigsh(op, 1, which='SA') says how "
                "large)."
            )
        new = x + running.x * open_.to(x.dtype)
        remaining = rest.clone()
        remaining[:, open_] = unit[:, open_] - system.times(new[:, open_])
        found = torch.where(open_, lengths(remaining.mT), left)
        better = found < left  # rounding may spoil what was there
        if system.method == "cg":  # it lowers x.A x / 2 - b.x, not the residual
            better |= dots(new, unit + remaining) > dots(x, unit + rest)
        x, before = torch.where(better, new, x), left
        left = torch.where(better, found, left)
        rest = torch.where(better, remaining, rest)
        bad = left > tol
        if not bool(bad.any()):
            reason = _MET
        elif bool((open_ & (running.norms > aim) & ~running.ended).any()):
            reason = f"It stopped as the budget of {most} products is spent."
        elif not bool((left < _GAIN * before)[bad].any()):
            far = left > torch.finfo(unit.dtype).eps ** 0.5  # from what rounding leaves
            reason = _STUCK if bool((bad & far).any()) else _ROUNDING
            if bool((running.ended & bad & far).any()):
                reason = _SINGULAR
        if not reason:  # the state before the last residuals: a larger budget goes on from there
            running = system.iteration(rest)
            hold()
    past = torch.stack(history) if history else torch.zeros(0, len(left), dtype=torch.float64)
    return _Found(x, as_cpu(left), reason, past)


def _columns(op: Operator, vectors: Any) -> tuple[Tensor, bool]:
    """``b`` ``[P, k]`` in the type of the matrix, and whether it was one vector."""
    b = torch.as_tensor(vectors).detach()
    if b.is_complex():
        raise OptionError("The right-hand side is complex; pass its real and imaginary parts.")
    if b.ndim not in (1, 2) or b.shape[0] != op.shape[0] or not b.numel():
        raise ShapeError(
            f"The right-hand side has shape {list(b.shape)}; the {title(op)} takes "
            f"[{op.shape[0]}] or [{op.shape[0]}, k]."
        )
    one = b.ndim == 1
    b = (b.unsqueeze(1) if one else b).to(dtype=op.dtype, device=op.device)
    if not bool(torch.isfinite(b).all()):
        raise NonFiniteError(f"The right-hand side has NaN or infinite entries in {op.dtype}.")
    return b, one


def _applied(inverse: Operator) -> Multiply:
    """Products with a preconditioner; it has to be positive in rows that it does not define too."""
    rest: Tensor | None = None
    if isinstance(inverse, BlockDiagonalOperator) and inverse.blocks and inverse.uncovered:
        inverse = inverse.with_uncovered("zero")
        assert inverse.layout is not None
        free = torch.ones(inverse.shape[0], 1, dtype=inverse.dtype, device=inverse.device)
        for name in inverse.blocks:
            free[inverse.layout.index(inverse.members[name]).to(inverse.device)] = 0
        if not bool((inverse.diagonal()[free[:, 0] > 0] > 0).any()):  # else damping is there
            rest = free * float(inverse.trace()) / float((1 - free).sum())

    def apply(vectors: Tensor) -> Tensor:
        product = (inverse @ vectors).to(vectors)
        return product if rest is None else product + rest.to(vectors) * vectors

    return apply


def _scaled(x: Tensor, scale: Tensor, op: Operator) -> Tensor:
    """``x * scale``, refused where the type of the matrix does not hold it."""
    value = x * scale
    if bool((lengths((value / scale - x).mT) <= 1e-3 * lengths(x.mT)).all()):
        return value
    raise NonFiniteError(
        f"The solution is too large or too small for {str(op.dtype).removeprefix('torch.')}. Pass "
        "float64, or multiply the right-hand side by a number: the solution grows with it."
    )


def _rounding(op: Operator, method: str) -> float:
    """What a direct solution is accepted with: its residual is not asked for, but told."""
    return 1e3 * torch.finfo(op.dtype).eps if method == "direct" else 0.0


def _unsolved(found: _Found, good: tuple[bool, ...], settings: dict[str, Any]) -> str:
    ways = "damping="
    if "budget" in found.reason:
        ways = "budget= or damping="
        if settings["preconditioner"] is None:
            ways += ", or a preconditioner= such as cs.kfac(problem).inverse(damping)"
    elif found.reason in (_ROUNDING, _STUCK):
        ways = "tol= or damping=, or float64"
    return (
        f"{good.count(False)} of {counted(len(good), 'right-hand side')} "
        f"{'has' if good.count(False) == 1 else 'have'} not converged: the largest relative "
        f"residual is {number(float(found.residuals.max()), 2)}. Pass a larger {ways}."
    )
