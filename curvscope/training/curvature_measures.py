"""Measures of curvature: the optimizer's matrix against the exact one, and both by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..analysis.compare import compare
from ..analysis.comparison import Comparison
from ..curvature import diagonal_kf, hutchinson_diagonal, kfac
from ..curvature.registered import REGISTERED
from ..errors import (
    OptionError,
    UncoveredError,
    UnsupportedLayerError,
    UnsupportedLossError,
    check_option,
    nearest,
)
from ..operators import Operator
from .measures import Measure, Rows, register
from .moment import Moment

FRESH: dict[str, Callable[[Moment], Operator]] = {
    "K-FAC": lambda m: kfac(m.problem),
    "diagonal K-FAC": lambda m: diagonal_kf(m.problem),
    "Hutchinson diagonal": lambda m: hutchinson_diagonal(m.problem, probes=4, seed=m.seed),
}
"""Approximations that are computed afresh on the probe, by name."""

_PARTNER = {
    "K-FAC": "K-FAC",
    "K-BFGS": "K-FAC",
    "K-BFGS(L)": "K-FAC",
    "AdaFisher": "diagonal K-FAC",
    "AdaFisherW": "diagonal K-FAC",
    "AdaHessian": "Hutchinson diagonal",
}
OF_CURVATURE = ("error", "best", "staleness", "preconditioner")
"""Measures of the optimizer's matrix: nothing without one."""

DEFAULT = ("loss", "gradient", "update", "error", "preconditioner", "diagnostics", "sharpness")
"""What a monitor measures by default, as far as the optimizer has it."""

MOST_OUTPUTS = 100  # of a sample, up to which blocks are computed
PRODUCTS = 8  # from which an error is estimated
_COLUMNS = ("status", "size", "family", "damping")


def passes(moment: Moment) -> float:
    """About how many gradients the moment's blocks of the reference cost.

    One backward pass per output by the Gauss-Newton routes, two per output unit and position of a
    layer or three per parameter for the other blocks of a Hessian.
    """
    key = " ".join(["passes", moment.reference_name, *(moment.only or ())])
    if key not in moment.memo:
        op: Any = moment.reference
        outputs = moment.outputs_per_sample
        routes = {name: op.route_of(name) for name in moment.blocks}
        total = 2.0 * outputs if {"gram", "piecewise-linear"} & set(routes.values()) else 0.0
        for name, route in routes.items():
            plan = op.plans[name]
            total += 8.0
            if route == "rows":
                total += 2.0 * plan.positions * plan.outputs
            elif route == "autograd":
                total += 3.0 * plan.size
        moment.memo[key] = total
    return float(moment.memo[key])


def optimizer_row(moment: Moment, **values: Any) -> dict[str, Any]:
    """The beginning of a row about the optimizer's matrix."""
    return {"approximation": moment.method, **values}


def comparison_rows(found: Comparison, extra: Sequence[str] = ()) -> Rows:
    """Rows of a record from those of :func:`curvscope.compare`."""
    rows = []
    for row in found.rows:
        whole = row.record(found.metrics)
        columns = {key: whole[key] for key in (*_COLUMNS, *extra, *found.metrics)}
        if row.stderr.get("error"):
            columns["error_stderr"] = row.stderr["error"]
        note = {"note": row.note} if row.note else {}
        place = {"block": row.block, "approximation": row.approximation}
        rows.append({**place, "reference": found.reference, **columns, **note})
    return rows


class _Compared(Measure):
    """Base of the measures that :func:`curvscope.compare` makes."""

    metrics: tuple[str, ...] = ("error", "cosine")
    best: bool = False
    method: str = "exact"

    def approximations(self, moment: Moment) -> dict[str, Operator]:
        """What is compared, by name."""
        raise NotImplementedError

    def take(self, moment: Moment) -> Rows:
        """A row per block and approximation; none without an approximation."""
        others = self.approximations(moment)
        if not others:
            return []
        options: dict[str, Any] = {}
        if self.estimated(moment):
            options = {"method": "estimated", "budget": PRODUCTS}
        found = compare(
            moment.focused(by_products=bool(options)),
            others,
            metrics=self.metrics,
            best_in_class=self.best,
            blocks=moment.blocks,
            seed=moment.seed,
            **options,
        )
        return comparison_rows(
            found, ("best_class", "best_in_class", "excess") if self.best else ()
        )

    def estimated(self, moment: Moment) -> bool:
        """Whether the reference is known by a few products only."""
        many = self.method == "auto" and moment.outputs_per_sample > MOST_OUTPUTS
        return many or self.method == "estimated"

    def price(self, moment: Moment) -> float:
        """That of the reference's blocks, and as much again for the comparison."""
        if self.estimated(moment):
            members = [name for block in moment.blocks for name in moment.problem.blocks[block]]
            share = moment.problem.layout.restrict(members).numel / moment.problem.layout.numel
            return 8.0 + PRODUCTS * (0.75 * len(moment.blocks) + 1.5 * share)
        return 4.0 + 0.5 * passes(moment)


@register
class Error(_Compared):
    """The optimizer's curvature against the exact reference: ``error``, ``cosine``, block by block.

    The numbers are those of ``cs.compare(reference, {method: optimizer.curvature()}, metrics=...,
    best_in_class=False)`` on the probe. ``damped=False`` compares the raw factors of optimizers
    that have them. ``metrics`` are any of ``cs.compare``. Within a budget, each visit takes the
    blocks there is time for, those first that were taken least.

    ``method="auto"`` is ``"exact"`` for networks with at most 100 outputs per sample. Of others,
    whose blocks take a backward pass per output, errors are ``"estimated"`` from 8 products with
    ``reference(probe, route="autograd")`` and have a standard error (``error_stderr``):
    ``cs.compare(..., method="estimated", budget=8, seed=seed)``.
    """

    name = "error"
    about = "the optimizer's curvature against the exact one"
    weight = 10.0
    by_block = True

    def __init__(
        self,
        *,
        metrics: Sequence[str] = ("error", "cosine"),
        damped: bool = True,
        method: str = "auto",
    ) -> None:
        check_option("method", method, ("auto", "exact", "estimated"))
        self.method = method
        self.metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        self.damped = damped

    def approximations(self, moment: Moment) -> dict[str, Operator]:
        """The optimizer's matrix."""
        op = moment.believed(damped=self.damped)
        return {} if op is None else {moment.method: op}

    def price(self, moment: Moment) -> float:
        """And what the optimizer needs to say what it believes."""
        work = getattr(moment.optimizer, "curvature_work", None)
        known = getattr(moment.optimizer, "blocks", {})
        own = sum(work(block) for block in moment.blocks if block in known) if work else 0.0
        gradient = 6.0 * moment.problem.layout.numel * moment.problem.n_samples
        return super().price(moment) + own / gradient


@register
class Best(Error):
    """As :class:`Error`, beside the best that the class of the optimizer's matrix can do.

    Adds ``best_class``, ``best_in_class`` (the least error of any such matrix) and ``excess``.
    """

    name = "best"
    about = "the optimizer's curvature beside the best of its class"
    weight = 4.0
    best = True

    def price(self, moment: Moment) -> float:
        """The nearest members of the classes take a few iterations more."""
        return 2 * super().price(moment)


@register
class Fresh(_Compared):
    """K-FAC, diagonal Kronecker factors and Hutchinson's diagonal, computed on the probe.

    The same comparison as :class:`Error`, for approximations at the current parameters: what an
    optimizer could have. Those that the loss or the layers do not have are left out. ``names``
    chooses among the keys of ``curvature_measures.FRESH`` and what
    :func:`curvscope.register_approximation` was given; by default it is all of them.
    """

    name = "fresh"
    about = "fresh approximations against the exact curvature"
    weight = 4.0

    def __init__(self, names: Sequence[str] | None = None) -> None:
        known = [*FRESH, *REGISTERED]
        names = known if names is None else names
        self.names = (names,) if isinstance(names, str) else tuple(names)
        for name in self.names:
            if name not in known:
                raise OptionError(
                    f"There is no fresh {name!r}.{nearest(name, known)} There are {known}."
                )

    def approximations(self, moment: Moment) -> dict[str, Operator]:
        """The chosen ones, as far as they are defined here; raises if none is."""
        found, refused = {}, None
        for name in self.names:
            try:
                made = FRESH[name](moment) if name in FRESH else None
                found[name] = REGISTERED[name].make(moment.problem) if made is None else made
            except (UncoveredError, UnsupportedLossError, UnsupportedLayerError) as error:
                refused = refused or error
        if refused is not None and not found:
            raise refused
        return found

    def price(self, moment: Moment) -> float:
        """As for :class:`Error`, and the approximations themselves."""
        return super().price(moment) + 3.0 * moment.outputs_per_sample + 20


@register
class Staleness(Measure):
    """The optimizer's old factors against fresh ones: ``error`` and ``cosine`` block by block.

    ``age`` is the number of steps since the factors were refreshed, where the optimizer says it;
    ``fresh`` what it is compared with, of the optimizer's own kind: K-FAC for Kronecker factors
    (K-FAC, K-BFGS), diagonal Kronecker factors for AdaFisher, a Hutchinson diagonal otherwise. Both
    come without damping where the optimizer has raw factors. The reference is the fresh one.
    """

    name = "staleness"
    about = "the optimizer's factors against fresh ones"
    weight = 2.0

    def take(self, moment: Moment) -> Rows:
        """A row per block."""
        op = moment.curvature
        if op is None:
            return []
        if hasattr(moment.optimizer, "curvature"):
            op = moment.optimizer.curvature(damped=False)
        name = _PARTNER.get(moment.method, "Hutchinson diagonal")
        fresh = FRESH[name](moment)
        blocks = [block for block in op.blocks if block in fresh.blocks or not fresh.blocks]
        if not blocks:
            return []
        found = compare(
            fresh,
            {moment.method: op},
            metrics=("error", "cosine"),
            best_in_class=False,
            blocks=blocks,
        )
        ages = _ages(moment)
        rows = comparison_rows(found)
        return [{**row, "fresh": name, "age": ages.get(row["block"], math.nan)} for row in rows]

    def price(self, moment: Moment) -> float:
        """Fresh factors and the comparison of structured matrices."""
        return 3.0 * moment.outputs_per_sample + 20


def _ages(moment: Moment) -> dict[str, float]:
    own = getattr(moment.optimizer, "coverage", None)
    if not callable(own):
        return {}
    rows = _diagnostics(moment)
    return {str(row["block"]): float(row["age"]) for row in rows if row.get("age") is not None}


def _diagnostics(moment: Moment) -> Rows:
    """The rows of the measure ``"diagnostics"``."""
    from .measures import Diagnostics

    return Diagnostics().take(moment)


@register
class Preconditioner(Measure):
    """Facts about the matrix that multiplies the gradient, block by block.

    ``finite``; ``trace``; ``norm`` (Frobenius); ``from_identity``, its relative Frobenius distance
    ``sqrt(1 - tr^2 / (n ||P||^2))`` to the nearest multiple of the identity (NaN for one row).
    """

    name = "preconditioner"
    about = "what multiplies the gradient"

    def take(self, moment: Moment) -> Rows:
        """A row per block; none for an optimizer without one."""
        op = moment.preconditioner
        if op is None:
            return []
        rows: Rows = []
        for name, block in op.blocks.items():
            norm, trace = block.frobenius_norm(), block.trace()
            size = block.shape[0]  # a single number says nothing of a shape
            share = trace * trace / (size * norm * norm) if norm and size > 1 else math.nan
            rows.append(
                optimizer_row(
                    moment,
                    block=name,
                    finite=math.isfinite(norm) and math.isfinite(trace),
                    trace=trace,
                    norm=norm,
                    from_identity=math.sqrt(max(0.0, 1 - share)) if share == share else math.nan,
                )
            )
        return rows


@register
class Concentration(Measure):
    """How much of each matrix's energy lies on its diagonal: ``share``, against ``null_share``.

    For the optimizer's curvature, its Kronecker factors (``factor``) and the exact reference.
    ``null_share = (tr^2 + 2 ||M||^2) / ((d + 2) ||M||^2)`` is the expectation for random
    eigenvectors with the same spectrum.
    """

    name = "concentration"
    about = "how much of each matrix lies on its diagonal"

    def take(self, moment: Moment) -> Rows:
        """A row per block and matrix, and one per factor."""
        rows: Rows = []
        named = {moment.method: moment.curvature, moment.reference.info.what: moment.reference}
        for title, op in named.items():
            for name, block in ({} if op is None else op.blocks).items():
                rows.append(
                    {
                        "block": name,
                        "approximation": title,
                        "factor": "",
                        **_share(block.diagonal(), block.frobenius_norm()),
                    }
                )
                factors: Mapping[str, Tensor] = getattr(block, "factors", {}) or {}
                for letter, matrix in factors.items():
                    if matrix.ndim == 2:
                        found = _share(matrix.diagonal(), float(matrix.double().norm()))
                        place = {"block": name, "approximation": title, "factor": letter}
                        rows.append({**place, **found})
        return rows

    def price(self, moment: Moment) -> float:
        """That of the reference's blocks."""
        return 8.0 + 0.75 * passes(moment)


def _share(diagonal: Tensor, norm: float) -> dict[str, float]:
    d, energy = diagonal.numel(), norm * norm
    if not energy:
        return {"size": d, "share": math.nan, "null_share": math.nan}
    on = float(diagonal.double().square().sum())
    trace = float(diagonal.double().sum())
    return {
        "size": d,
        "share": on / energy,
        "null_share": (trace * trace + 2 * energy) / ((d + 2) * energy),
    }


def defaults(optimizer: Any, known: bool) -> tuple[str, ...]:
    """The default measures; ``known`` says whether the optimizer's curvature can be read."""
    names = DEFAULT if known else tuple(n for n in DEFAULT if n not in OF_CURVATURE)
    if not callable(getattr(optimizer, "diagnostics", None)):
        names = tuple(n for n in names if n != "diagnostics")
    return names
