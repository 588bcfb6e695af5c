"""How far approximations are from a matrix, block by block, beside the best their class can do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvscopeError, MemoryLimitError, OptionError, ShapeError, check_option
from ..operators import Operator
from ..progress import track
from .align import Part, align, damping_of, part, partition, whole
from .classes import CLASSES, Nearest
from .comparison import WHOLE, Comparison, ReferenceBlock, Row
from .facts import Facts, Limits, affordable_rows
from .metrics import METRICS
from .pairs import Moments, Pair, Probes, Quantity, Value
from .result import Cost, listing, number
from .structure import family, is_structured
from .whole import WholeFacts, WholeNearest, WholePair

_BUDGET = 100
_LEAST = 8  # products below which an estimate has no standard error worth the name
_NO_BEST = 1e-9  # a best in class below is rounding


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
) -> Comparison:
    """Compare approximations with a reference: a row per block and approximation.

    Every metric of :data:`curvscope.analysis.metrics.METRICS` is computed for each diagonal block,
    and for the whole matrix (block ``"(all)"``). Beside the error stands that of the nearest
    member of the approximation's class, and for the whole matrix the share of the reference's
    energy outside its diagonal blocks. What is not defined is NaN, with the reason.

    Numbers are exact where matrices fit the memory budget or have a structure that gives them
    (Kronecker products, low rank, the factored forms of a layer); the whole of a large matrix that
    is known by its products only is estimated with random probes and standard errors.

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
        with more rows than a budget that is given is not formed from its products.
    seed
        Seed of the probes.
    blocks
        Names of the blocks to compare (``"(all)"`` for the whole matrix), or a mapping from names
        to parameters that defines them. Default: the reference's blocks, and the whole.
    memory
        Bytes that may be used for forming matrices. By default a quarter of what is available, and
        no matrix of more than 3,000 rows.
    metrics
        Names of the metrics to compute. By default all, but of structured matrices with more than
        200,000 rows none that iterates.
    best_in_class
        Whether to find the nearest member of each class.

    Raises
    ------
    ParameterMismatchError
        Operators of different parameters; says what differs.
    ShapeError, OptionError, UnknownBlockError
        A gradient, option or block name that does not fit.
    """
    start = time.perf_counter()
    reference, others = align(reference, approximations)
    chosen = _chosen(metrics)
    _check(tol, budget)
    limits = Limits(
        rows=affordable_rows(memory, reference.device),
        products=_BUDGET if budget is None else budget,
        tol=tol,
        seed=seed,
    )
    vector = _gradient(gradient, reference)
    members, with_whole = partition(reference, others, blocks)
    thorough = metrics is not None
    job = _Job(reference, others, vector, damping, chosen, limits, best_in_class, thorough)
    for name, names in track(list(members.items()), "Comparing blocks"):
        job.block(name, names)
    if with_whole:
        form = budget is None or budget >= reference.shape[0] or is_structured(reference)
        job.whole(form)
    return Comparison(
        reference=reference.info.what,
        approximations=tuple(others),
        blocks=tuple(members),
        rows=tuple(job.rows),
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
            "reference": dict(reference.info.settings),
            "approximations": {name: dict(op.info.settings) for name, op in others.items()},
        },
        converged=job.converged,
        warnings=tuple(dict.fromkeys(job.warnings())),
    )


class _Job:
    """What a comparison carries from block to block."""

    def __init__(
        self,
        reference: Operator,
        others: dict[str, Operator],
        gradient: Tensor | None,
        damping: float | Mapping[str, float] | None,
        metrics: tuple[str, ...],
        limits: Limits,
        best_in_class: bool,
        thorough: bool,
    ) -> None:
        self.reference, self.others = reference, others
        self.gradient, self.metrics, self.limits = gradient, metrics, limits
        self.best_in_class, self.thorough = best_in_class, thorough
        self.dampings = {name: damping_of(op, name, damping) for name, op in others.items()}
        self.rows: list[Row] = []
        self.references: list[ReferenceBlock] = []
        self.parts: list[tuple[tuple[str, ...], Facts]] = []
        self.nearest: dict[tuple[str, ...], Nearest] = {}
        self.pairs: dict[str, list[Pair | None]] = {name: [] for name in others}
        self.failed: set[str] = set()
        self.products = 0
        self.converged = True

    # -- one block -------------------------------------------------------------------------------

    def block(self, name: str, members: tuple[str, ...]) -> None:
        """The rows of one block."""
        found = self._reference_part(name, members)
        if found.op is None:
            note = f"the reference has no such block: {found.note}"
            for other, op in self.others.items():
                self.rows.append(Row(name, other, "failed", 0, family(op), note=note))
                self.failed.add(other)
            return
        facts = Facts(found.op, self.limits)
        nearest = Nearest(facts)
        probes = _once(lambda: Probes(facts))
        vector = self._part_of_gradient(members)
        for other, op in self.others.items():
            self._compare_block(name, members, other, op, facts, nearest, probes, vector)
        self.references.append(self._describe(name, facts, nearest, found.op))
        self.parts.append((members, facts))
        self.nearest[members] = nearest
        self.products += facts.products
        for pairs in self.pairs.values():
            if pairs and pairs[-1] is not None:
                pairs[-1].release()
        facts.release()

    def _reference_part(self, name: str, members: tuple[str, ...]) -> Part:
        try:
            return part(self.reference, name, members)
        except MemoryLimitError:  # its own route does not fit; products with it may
            return Part(self.reference.restrict(members))

    def _compare_block(
        self,
        name: str,
        members: tuple[str, ...],
        other: str,
        op: Operator,
        facts: Facts,
        nearest: Nearest,
        probes: Callable[[], Probes],
        vector: Tensor | None,
    ) -> None:
        try:
            found = part(op, name, members)
        except CurvscopeError as error:
            self.failed.add(other)
            self.pairs[other].append(None)
            self.rows.append(Row(name, other, "failed", facts.size, family(op), note=str(error)))
            return
        if found.op is None:
            self.pairs[other].append(None)
            row = Row(name, other, found.status, facts.size, "", note=found.note)
            self.rows.append(row)
            return
        damping, inside = self.dampings[other]
        pair = Pair(
            facts,
            Facts(found.op, self.limits),
            damping=damping,
            already_damped=inside,
            gradient=vector,
            probes=probes,
            thorough=self.thorough,
        )
        self.pairs[other].append(pair)
        self.rows.append(self._row(name, other, pair, nearest, found))

    # -- the whole matrix ------------------------------------------------------------------------

    def whole(self, form: bool) -> None:
        """The rows of the whole matrix."""
        found = whole(self.reference)
        if found.op is None:
            return
        facts = WholeFacts(found.op, self.limits, self.parts, form=form)
        nearest = WholeNearest(facts, self.nearest)
        for other, op in self.others.items():
            if other in self.failed:
                note = "one of its blocks, or of the reference's, could not be had"
                self.rows.append(Row(WHOLE, other, "failed", facts.size, family(op), note=note))
                continue
            self._compare_whole(other, whole(op), facts, nearest)
        if facts.size and not (facts.known or facts.complete or "probes" in vars(facts)):
            return
        self.references.append(self._describe(WHOLE, facts, nearest, found.op))
        self._shares(facts)
        self.products += facts.products
        self._check_tolerance(facts)

    def _compare_whole(
        self, other: str, found: Part, facts: WholeFacts, nearest: WholeNearest
    ) -> None:
        if found.op is None:
            self.rows.append(Row(WHOLE, other, "uncovered", facts.size, "", note=found.note))
            return
        damping, inside = self.dampings[other]
        pair = WholePair(
            facts,
            Facts(found.op, self.limits),
            self.pairs[other] if facts.complete else None,
            damping=damping,
            already_damped=inside,
            gradient=self.gradient,
            thorough=self.thorough,
        )
        self.rows.append(self._row(WHOLE, other, pair, nearest, found, outside=facts))
        pair.release()

    def _shares(self, facts: WholeFacts) -> None:
        """Each block's share of the whole energy."""
        from dataclasses import replace

        energy = facts.energy
        total = float(energy.mean()) if isinstance(energy, Tensor) else energy
        if total:
            self.references = [
                ref if ref.block == WHOLE else replace(ref, share=ref.norm**2 / total)
                for ref in self.references
            ]
            self.references[-1] = replace(self.references[-1], share=1.0)

    def _check_tolerance(self, facts: WholeFacts) -> None:
        tol = self.limits.tol
        if tol is None or not isinstance(facts.energy, Tensor):
            return
        found = Moments(facts.energy, 0.0, 0.0, 0.0, "").apply(lambda rr, *_: rr)
        self.converged = found.stderr <= tol * found.value

    # -- rows ------------------------------------------------------------------------------------

    def _row(
        self,
        name: str,
        other: str,
        pair: Pair,
        nearest: Nearest,
        found: Part,
        outside: WholeFacts | None = None,
    ) -> Row:
        book = _Book()
        for key in self.metrics:
            book.enter(key, METRICS[key].function, pair)
        assert found.op is not None, "rows are of operators"
        best_class: str | None = None
        if self.best_in_class:
            best_class = self._enter_best(book, pair, nearest, found.op)
        if outside is not None and outside.rows:
            book.enter("outside", lambda _: _share(outside), pair)
        self.products += pair.approximation.products
        return Row(
            block=name,
            approximation=other,
            status=found.status,
            size=pair.size,
            family=family(found.op),
            best_class=best_class,
            damping=pair.given_damping,
            values=book.values,
            stderr=book.stderr,
            method=book.method,
            reasons=book.reasons,
            note=found.note,
        )

    def _enter_best(self, book: _Book, pair: Pair, nearest: Nearest, op: Operator) -> str | None:
        names: list[str] = []

        def best(_: Pair) -> Value:
            name, gap = nearest.of(op)
            names.append(name)
            return _relative(gap, nearest.energy, pair.method)

        book.enter("best_in_class", best, pair)
        least = book.values["best_in_class"]
        error = book.values.get("error", math.nan)
        if math.isnan(least) or math.isnan(error):
            book.refuse("excess", book.reasons.get("best_in_class", "The error is not known."))
        elif least <= _NO_BEST:
            book.refuse("excess", "The class contains the reference: the best error is 0.")
        else:
            spread = book.stderr.get("error", 0.0) / least
            book.put("excess", Value(error / least, spread, book.method["best_in_class"]))
        return names[0] if names else None

    def _describe(self, name: str, facts: Facts, nearest: Nearest, op: Operator) -> ReferenceBlock:
        best: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for kind in CLASSES if self.best_in_class else ():
            if name == WHOLE and "Kronecker" in kind and op.view is None:
                continue
            book = _Book()

            def gap(_: object, kind: str = kind) -> Value:
                return _relative(nearest.gap(kind), nearest.energy, "")

            book.enter(kind, gap, None)
            best[kind] = book.values[kind]
            reasons |= book.reasons
        numbers = _Book()
        numbers.enter("norm", lambda _: _root(nearest.energy), None)
        numbers.enter("trace", lambda _: facts.trace, None)
        return ReferenceBlock(
            block=name,
            size=facts.size,
            what=op.info.what,
            route=op.info.route,
            norm=numbers.values["norm"],
            trace=numbers.values["trace"],
            best=best,
            reasons=reasons | numbers.reasons,
        )

    def _part_of_gradient(self, members: tuple[str, ...]) -> Tensor | None:
        if self.gradient is None or self.reference.layout is None:
            return self.gradient
        return self.gradient[self.reference.layout.index(members).to(self.gradient.device)]

    # -- words -----------------------------------------------------------------------------------

    def warnings(self) -> list[str]:
        """What a reader of the numbers must know."""
        found = []
        if not self.reference.info.exact:
            found.append(f"The reference ({self.reference.info.what}) is itself an approximation.")
        if self.reference.uncovered:
            found.append(
                f"The reference does not define {listing(self.reference.uncovered)}: not compared."
            )
        for op in (self.reference, *self.others.values()):
            found += [f"{op.info.what}: {note}." for note in op.info.notes]
        for name, op in self.others.items():
            if op.uncovered:
                found.append(
                    f"{name} does not cover {listing(op.uncovered)}, which count as zero in the "
                    "whole matrix."
                )
        for row in self.rows:
            found += _row_warnings(row)
        if not self.converged:
            found.append(
                f"The norm of the whole matrix is not known to tol={self.limits.tol}; raise "
                f"budget above {self.limits.products} products."
            )
        return found


class _Book:
    """Values of one row, and why others are missing."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.stderr: dict[str, float] = {}
        self.method: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def enter(self, name: str, function: Callable[[Any], float | Value], pair: Any) -> None:
        try:
            found = function(pair)
        except (CurvscopeError, torch.linalg.LinAlgError) as error:
            self.refuse(name, str(error))
            return
        self.put(name, found if isinstance(found, Value) else Value(found))

    def put(self, name: str, found: Value) -> None:
        self.values[name] = found.value
        self.method[name] = found.method
        if found.stderr:
            self.stderr[name] = found.stderr
        if math.isnan(found.value):
            self.reasons[name] = "The reference or the approximation is zero here."
        elif math.isinf(found.value):
            self.reasons[name] = "Infinite: the matrix is singular. Pass damping=."

    def refuse(self, name: str, reason: str) -> None:
        self.values[name] = math.nan
        self.reasons[name] = reason


def _relative(gap: Quantity, energy: Quantity, method: str) -> Value:
    moments = Moments(energy, 0.0, 0.0, gap, method)
    return moments.apply(lambda rr, rb, bb, gap: math.sqrt(max(gap, 0.0) / rr) if rr else math.nan)


def _share(whole: WholeFacts) -> Value:
    moments = Moments(whole.energy, 0.0, 0.0, whole.outside, whole.method)
    return moments.apply(lambda rr, rb, bb, gap: gap / rr if rr else math.nan)


def _root(energy: Quantity) -> Value:
    return Moments(energy, 0.0, 0.0, 0.0, "").apply(lambda rr, *_: math.sqrt(rr))


def _once(make: Callable[[], Probes]) -> Callable[[], Probes]:
    kept: list[Probes] = []

    def get() -> Probes:
        if not kept:
            kept.append(make())
        return kept[0]

    return get


def _row_warnings(row: Row) -> list[str]:
    if row.status == "failed" and row.block != WHOLE:
        return [f"{row.approximation} on {row.block} failed: {row.note}"]
    ratio, error, scaled = row["trace_ratio"], row.error, row["error_rescaled"]
    if not (ratio > 2 or ratio < 0.5) or not scaled < 0.7 * error:
        return []
    where = "the whole matrix" if row.block == WHOLE else row.block
    return [
        f"{row.approximation} is off in scale on {where}: its trace is {number(ratio)} times that "
        f"of the reference; at the best scale its error is {number(scaled)} instead of "
        f"{number(error)}."
    ]


def _chosen(metrics: Sequence[str] | None) -> tuple[str, ...]:
    if metrics is None:
        return tuple(METRICS)
    wanted = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in wanted:
        check_option("metrics", name, METRICS)
    return tuple(name for name in METRICS if name in wanted)


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
