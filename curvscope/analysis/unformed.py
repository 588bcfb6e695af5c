"""What a comparison estimates of a matrix that is too large to form, by the estimators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import NotDefinedError
from ..operators import FunctionOperator
from .estimators import condition_number, eigsh, norm
from .estimators.common import Meter
from .estimators.functions import _require_positive
from .estimators.slq import Quadrature, quadrature
from .probes import random_rows
from .quantity import Quantity, Value, estimate, spread_of

if TYPE_CHECKING:
    from .facts import Facts

_LEADING_TOL = 1e-3  # relative residual of leading eigenpairs
_NORM_TOL = 1e-2
_SURE = 0.999  # of the upper bounds, which stand in place of standard errors
_CONDITION_TOL = 0.1
_ROWS = 64  # of the diagonal that are looked at one by one
_OUTER = 11  # eigenvalues that are found one by one, so that chance does not weigh them
_GOOD = 1e-2  # relative residual of those that are
_STEPS = 16  # of Lanczos quadrature per probe at least
_SHORT = 0.7  # of the steps; what the rest has changed counts as error


def outer_pairs(facts: Facts, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` eigenpairs of largest magnitude, and residuals, within the budget."""
    found = eigsh(
        facts.op,
        count,
        tol=_LEADING_TOL,
        budget=facts.limits.products,
        method="lanczos",
        seed=facts.limits.seed,
    )
    facts.count(found.products)
    vectors = found.vectors.to(dtype=torch.float64, device=facts.op.device)
    return found.values.to(facts.op.device), vectors, found.residuals.to(facts.op.device)


def bounded_norm(facts: Facts, product: Callable[[Tensor], Tensor] | None = None) -> Value:
    """Largest magnitude of an eigenvalue of the matrix, or of another one by its products.

    A lower bound, with the distance of the upper one in place of a standard error.
    """
    op = facts.op
    if product is not None:  # of a matrix with the same parameters, which counts by itself
        op = FunctionOperator(product, facts.size, dtype=op.dtype, device=op.device, check=False)
    found = norm(
        op,
        "spectral",
        method="products",
        tol=_NORM_TOL,
        confidence=_SURE,
        budget=facts.limits.products,
        seed=facts.limits.seed,
    )
    if product is None:
        facts.count(found.products)
    return Value(found.value, found.high - found.value, "estimated")


def bounded_condition(facts: Facts, damping: float) -> Value:
    """Condition number under damping: a lower bound, and the distance of the upper one."""
    found = condition_number(
        facts.op,
        damping=damping,
        method="lanczos",
        tol=_CONDITION_TOL,
        confidence=_SURE,
        budget=facts.limits.products,
        seed=facts.limits.seed,
    )
    facts.count(found.products)
    if math.isinf(found.high):
        raise NotDefinedError(
            f"The condition number of the {facts.name} is at least {found.value:.3g}; "
            f"{found.products} products give no upper bound. Raise budget= or the damping."
        )
    return Value(found.value, found.high - found.value, "estimated")


def rows_of_diagonal(facts: Facts) -> tuple[Tensor, Tensor]:
    """Places and entries of the diagonal in rows drawn at random, by unit vectors."""
    places = random_rows(facts.size, facts.limits.seed, min(_ROWS, facts.limits.products))
    entries = []
    for part in places.split(8):
        units = torch.zeros(facts.size, len(part), dtype=torch.float64)
        units[part, torch.arange(len(part))] = 1.0
        images = facts.matmat(units.to(facts.op.device)).cpu()
        entries.append(images[part, torch.arange(len(part))])
    return places, torch.cat(entries)


class SpectralSamples:
    """All eigenvalues of a matrix as its products show them.

    Outer eigenvalues that Lanczos iteration has found count once each; the others come from
    stochastic Lanczos quadrature beside their vectors, a distribution per probe.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.slack = torch.zeros(0, dtype=torch.float64)  # how much larger the outer ones may be
        self.outer, basis = self._outer()
        self.rest = facts.size - len(self.outer)
        self.found = self.short = Quadrature(torch.zeros(1, 0), torch.zeros(1, 0))
        if not self.rest:
            return
        products = facts.limits.products
        self.probes = min(16, max(4, products // _STEPS))
        steps = min(max(2, products // self.probes), self.rest)
        meter = Meter(self._beside(basis))

        def watch(found: Quadrature) -> bool:
            if found.nodes.shape[1] <= max(2, _SHORT * steps):
                self.short = found
            return False

        self.found = quadrature(
            meter,
            facts.limits.seed,
            0,
            self.probes,
            steps,
            enough=watch,
            every=1,
            beside=basis if len(self.outer) else None,
            label=f"Spectrum of the {facts.name}",
        )
        facts.count(meter.used)
        if not self.short.nodes.shape[1]:
            self.short = self.found

    def _outer(self) -> tuple[Tensor, Tensor]:
        facts = self.facts
        none = torch.zeros(0, dtype=torch.float64)
        count = min(_OUTER, facts.size)
        if facts.limits.products < 2 * count:
            return none, torch.zeros(facts.size, 0, dtype=torch.float64)
        values, vectors, residuals = facts.leading(count)
        good = residuals <= _GOOD * values.abs()
        self.slack = _short_of(values, residuals)[good].cpu() * values[good].cpu().sign()
        return values[good].cpu(), vectors[:, good]

    def _beside(self, basis: Tensor) -> FunctionOperator:
        op = self.facts.op
        basis = basis.to(dtype=op.dtype, device=op.device)

        def product(vectors: Tensor) -> Tensor:
            images = op @ (vectors - basis @ (basis.mT @ vectors))
            return images - basis @ (basis.mT @ images)

        return FunctionOperator(
            product,
            self.facts.size,
            dtype=op.dtype,
            device=op.device,
            info=self.facts.given.info,
            positive_semidefinite=op.positive_semidefinite,
            check=False,
        )

    def logdet(self, damping: float) -> tuple[Quantity, float]:
        """Samples of ``log det (M + damping I)``, and what the last Lanczos steps have changed."""

        def samples(found: Quadrature) -> Tensor:
            used = found.weights > 0
            nodes = torch.cat([found.nodes[used], self.outer])
            _require_positive(self.facts.given, nodes, damping)
            inside = torch.where(used, found.nodes, 1.0)
            if self.facts.given.positive_semidefinite:
                inside = inside.clamp_min(0.0)
            logs = torch.where(used, (inside + damping).log(), 0.0)
            return self.rest * (logs * found.weights).sum(1)

        outer = float((self.outer + damping).log().sum())
        if not self.rest:
            return outer, 0.0
        last = samples(self.found)
        change = 0.0 if self.found.ended else float((last - samples(self.short)).mean().abs())
        return last + outer, change

    def eigenvalues(
        self,
        without: int | None = None,
        *,
        only: int | None = None,
        smooth: bool = True,
        moved: bool = False,
    ) -> Tensor:
        """All ``P``, ascending, from all probes, all but one or one.

        ``smooth`` interpolates between the nodes of the quadratures, which stand for all that lies
        around them; otherwise every node is a multiple eigenvalue. ``moved``: the outer ones where
        their residuals would allow them to be.
        """
        outer = self.outer + self.slack if moved else self.outer
        if not self.rest:
            return outer.sort().values
        keep = [i for i in range(len(self.found.nodes)) if i != without and only in (None, i)]
        nodes, order = self.found.nodes[keep].flatten().sort()
        weights = self.found.weights[keep].flatten()[order] / len(keep)
        nodes, weights = nodes[weights > 0], weights[weights > 0]
        ends = weights.cumsum(0)
        ranks = (torch.arange(self.rest, dtype=torch.float64) + 0.5) / self.rest
        if smooth:
            rest = interpolated(ranks, ends - weights / 2, nodes)
        else:
            rest = nodes[torch.searchsorted(ends, ranks).clamp(max=len(nodes) - 1)]
        return torch.cat([rest, outer]).sort().values


def _short_of(values: Tensor, residuals: Tensor) -> Tensor:
    """By how much Rayleigh quotients fall short: the residual, or its square over the gap."""
    if len(values) < 2:
        return residuals
    apart = (values.unsqueeze(1) - values).abs()
    apart.fill_diagonal_(math.inf)
    gaps = torch.minimum(apart.min(1).values, values.abs())
    return torch.minimum(residuals, residuals.square() / gaps.clamp_min(1e-300))


def interpolated(points: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through ``(places, values)``, constant beyond; ``places`` ascend."""
    right = torch.searchsorted(places, points).clamp(1, max(1, len(places) - 1))
    if len(places) == 1:
        return values.expand(len(points)).clone()
    left = right - 1
    share = ((points - places[left]) / (places[right] - places[left])).clamp(0, 1)
    share = torch.where(places[right] > places[left], share, 0.0)
    return values[left] + share * (values[right] - values[left])


def of_spectra(ours: Facts, theirs: Facts, function: Callable[[Tensor, Tensor], float]) -> Value:
    """``function`` of all eigenvalues of two matrices, those of large ones from samples.

    The standard error is that of the jackknife over probes, with the bias that it sees and what the
    shape of the distribution between the nodes could change.
    """
    known = [facts.eigenvalues_or_samples for facts in (ours, theirs)]
    sampled = [one for one in known if isinstance(one, SpectralSamples)]

    def value(without: int | None = None, **options: bool) -> float:
        both = [
            one.eigenvalues(without, **options) if isinstance(one, SpectralSamples) else one
            for one in known
        ]
        return function(both[0].cpu(), both[1].cpu())

    whole = value()
    if not sampled:
        return Value(whole)
    moved = value(moved=True) - whole
    if not any(one.rest for one in sampled):
        return Value(whole, abs(moved), "estimated")
    left_out = [value(i) for i in range(min(len(one.found.nodes) for one in sampled if one.rest))]
    bias = (len(left_out) - 1) * (math.fsum(left_out) / len(left_out) - whole)
    shape = value(smooth=False) - whole
    return Value(whole, math.hypot(spread_of(left_out), bias, shape, moved), "estimated")


def total(*parts: tuple[Quantity, float]) -> Value:
    """The sum of independent quantities and biases."""
    found = [estimate(part) for part, _ in parts]
    slack = [bias for _, bias in parts]
    spread = math.sqrt(math.fsum(v.stderr**2 for v in found) + math.fsum(b**2 for b in slack))
    return Value(math.fsum(v.value for v in found), spread, "estimated")
