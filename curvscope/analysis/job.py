"""Carrying a comparison from block to block, and from the blocks to the whole matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CurvscopeError, MemoryLimitError
from ..operators import Operator
from .align import Part, damping_of, part, whole
from .book import Book, relative, root, share
from .classes import CLASSES, Nearest
from .comparison import WHOLE, ReferenceBlock, Row
from .facts import Facts, Limits
from .metrics import METRICS
from .pairs import Pair
from .quantity import Value, estimate, jackknife
from .structure import family
from .whole import WholeFacts, WholeNearest, WholePair, inside_blocks

_NO_BEST = 1e-9  # a best in class below is rounding
_ROUNDING = 30  # units of rounding up to which an error is none


class Job:
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
    ) -> None:
        self.reference, self.others = reference, others
        self.gradient, self.metrics, self.limits = gradient, metrics, limits
        self.best_in_class = best_in_class
        self.damping = damping
        for name, op in others.items():
            damping_of(op, name, damping)  # refused before anything is computed
        self.rows: list[Row] = []
        self.references: list[ReferenceBlock] = []
        self.parts: list[tuple[tuple[str, ...], Facts]] = []
        self.nearest: dict[tuple[str, ...], Nearest] = {}
        self.pairs: dict[str, list[Pair | None]] = {name: [] for name in others}
        self.failed: set[str] = set()
        self.products = 0
        self.noisy: list[str] = []  # blocks whose norm is not known to the tolerance

    # -- one block -------------------------------------------------------------------------------

    def block(self, name: str, members: tuple[str, ...]) -> None:
        """The rows of one block."""
        found = self._reference_part(name, members)
        if found.op is None:
            note = f"not compared: {found.note}"
            size = self.reference.layout.restrict(members).numel if self.reference.layout else 0
            for other in self.others:
                self.rows.append(Row(name, other, "uncovered", size, note=note))
            return
        facts = Facts(found.op, self.limits, by_products=self.limits.by_products)
        nearest = Nearest(facts)
        vector = self._part_of_gradient(members)
        for other, op in self.others.items():
            self._compare_block(name, members, other, op, facts, nearest, vector)
        self.references.append(self._describe(name, facts, nearest, found.op))
        self.parts.append((members, facts))
        self.nearest[members] = nearest
        self.products += facts.products
        self._check_tolerance(name, facts)
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
        damping, inside = damping_of(op, other, self.damping, name)
        pair = Pair(
            facts,
            Facts(found.op, self.limits),
            damping=damping,
            already_damped=inside,
            gradient=vector,
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
            self._compare_whole(other, op, facts, nearest)
        if facts.size and not (facts.known or facts.complete or "probes" in vars(facts)):
            return
        self.references.append(self._describe(WHOLE, facts, nearest, found.op))
        self._shares(facts)
        self.products += facts.products
        self._check_tolerance(WHOLE, facts)

    def _compare_whole(
        self, other: str, op: Operator, facts: WholeFacts, nearest: WholeNearest
    ) -> None:
        found = whole(op)
        if found.op is None:
            self.rows.append(Row(WHOLE, other, "uncovered", facts.size, "", note=found.note))
            return
        damping, inside = damping_of(op, other, self.damping)
        pair = WholePair(
            facts,
            Facts(found.op, self.limits),
            self.pairs[other] if facts.complete else None,
            damping=damping,
            already_damped=inside,
            gradient=self.gradient,
        )
        self.rows.append(self._row(WHOLE, other, pair, nearest, found, outside=facts))
        pair.release()

    def _shares(self, facts: WholeFacts) -> None:
        """Each block's share of the whole energy."""
        total = estimate(facts.energy).value
        if total:
            self.references = [
                ref if ref.block == WHOLE else replace(ref, share=ref.norm**2 / total)
                for ref in self.references
            ]
            self.references[-1] = replace(self.references[-1], share=1.0)

    def _check_tolerance(self, name: str, facts: Facts) -> None:
        tol = self.limits.tol
        if tol is None or facts.known or "probes" not in vars(facts):
            return
        found = estimate(facts.energy)
        if found.stderr > tol * found.value:
            self.noisy.append(name)

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
        book = Book()
        for key in self.metrics:
            book.enter(key, METRICS[key].function, pair)
        assert found.op is not None, "rows are of operators"
        best_class: str | None = None
        if self.best_in_class:
            best_class = self._enter_best(book, pair, nearest, found.op)
        if outside is not None and outside.rows:
            self._enter_outside(book, outside)
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

    def _enter_best(self, book: Book, pair: Pair, nearest: Nearest, op: Operator) -> str | None:
        names: list[str] = []

        def best(_: Pair) -> Value:
            name, gap = nearest.of(op)
            names.append(name)
            return relative(gap, nearest.energy, pair.method)

        book.enter("best_in_class", best, pair)
        least = book.values["best_in_class"]
        error = book.values.get("error", math.nan)
        noisy = "estimated" in (book.method.get("error"), book.method.get("best_in_class"))
        rounding = _ROUNDING * torch.finfo(pair.reference.given.dtype).eps
        if error < least and not noisy:  # a member cannot be nearer: differences have cancelled
            least = book.values["best_in_class"] = error
        if math.isnan(least) or math.isnan(error):
            book.refuse("excess", book.reasons.get("best_in_class", "The error is not known."))
        elif least <= _NO_BEST or (not noisy and max(least, error) <= rounding):
            why = "The class contains the reference, up to rounding: the best error is 0."
            book.refuse("excess", why)
        else:
            spread = math.hypot(
                book.stderr.get("error", 0.0) / least,
                error * book.stderr.get("best_in_class", 0.0) / least**2,
            )
            how = "estimated" if spread else book.method["best_in_class"]
            book.put("excess", Value(error / least, spread, how))
        return names[0] if names else None

    def _enter_outside(self, book: Book, whole: WholeFacts) -> None:
        if whole.complete or inside_blocks(whole.given, whole.parts):
            book.enter("outside", lambda _: share(whole.outside, whole.energy, whole.method), None)
        else:
            book.refuse("outside", "Some blocks were left out: pass no blocks=.")

    def _describe(self, name: str, facts: Facts, nearest: Nearest, op: Operator) -> ReferenceBlock:
        best: dict[str, float] = {}
        stderr: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for kind in CLASSES if self.best_in_class else ():
            if name == WHOLE and "Kronecker" in kind and op.view is None:
                continue
            book = Book()

            def gap(_: object, kind: str = kind) -> Value:
                return relative(nearest.gap(kind), nearest.energy, "")

            book.enter(kind, gap, None)
            best[kind] = book.values[kind]
            stderr |= book.stderr
            reasons |= book.reasons
        numbers = Book()
        numbers.enter("norm", lambda _: root(nearest.energy), None)
        numbers.enter("trace", lambda _: jackknife(lambda t: t, facts.traces), None)
        return ReferenceBlock(
            block=name,
            size=facts.size,
            what=op.info.what,
            route=op.info.route,
            norm=numbers.values["norm"],
            trace=numbers.values["trace"],
            best=best,
            stderr=stderr | numbers.stderr,
            reasons=reasons | numbers.reasons,
        )

    def _part_of_gradient(self, members: tuple[str, ...]) -> Tensor | None:
        if self.gradient is None or self.reference.layout is None:
            return self.gradient
        return self.gradient[self.reference.layout.index(members).to(self.gradient.device)]
