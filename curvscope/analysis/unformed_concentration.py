"""Diagonal concentration of a matrix that is too large to form, from its structure or products."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvscopeError
from ..operators import Operator
from .facts import Facts, Limits
from .null_model import NullModel
from .probes import random_rows, sampling_error
from .quantity import Value, estimate, jackknife, spread_of
from .unformed import SpectralSamples

_ROWS = 64  # drawn at random and looked at in full
_BATCH = 8


@dataclass
class Estimates:
    """Fields of a Concentration, their standard errors, and why others are missing."""

    values: dict[str, Any] = field(default_factory=dict)
    stderr: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    products: int = 0

    def put(self, name: str, found: Value) -> None:
        self.values[name] = found.value
        if found.stderr:
            self.stderr[name] = found.stderr


def estimates(
    op: Operator, *, budget: int, seed: int, noise: float, by_products: bool
) -> Estimates:
    """Everything about a matrix that is not formed; at most ``budget`` products for each number."""
    limits = Limits(rows=0, products=budget, seed=seed, thorough=by_products)
    facts = Facts(op, limits, by_products=by_products)
    found, rows = Estimates(), facts.size
    energy, on_diagonal, traces = facts.energy, facts.diagonal_energy, facts.traces
    if not estimate(energy).value:
        found.values = {"diagonal_share": math.nan, "null": NullModel(math.nan), "energy": 0.0}
        return found
    squared = facts.squared_trace
    found.put("energy", estimate(energy))
    found.put("diagonal_share", jackknife(share, energy, on_diagonal))
    expected = jackknife(lambda e, t: (t / e + 2) / (rows + 2), energy, squared)
    found.values["null"] = NullModel(expected.value)
    apart = jackknife(
        lambda e, d, t: d / e - (t / e + 2) / (rows + 2), energy, on_diagonal, squared
    )
    found.stderr["excess"] = apart.stderr
    found.put("snr", jackknife(decibel, energy, on_diagonal))
    scale = estimate(traces)
    found.put("scale", Value(scale.value / rows, scale.stderr / rows))
    if scale.value <= 3 * scale.stderr or scale.value <= 0:
        reason = "The mean diagonal is not positive beyond its error, and the rule depends on it."
        found.reasons |= dict.fromkeys(("kaiser", "noisy_snr"), reason)
    else:
        pairs = noise**2 * rows * (rows - 1)
        found.put(
            "noisy_snr",
            jackknife(
                lambda e, d, t: decibel(e + pairs * (t / rows) ** 2, d),
                energy,
                on_diagonal,
                traces,
            ),
        )
        try:
            found.put("kaiser", _kaiser(facts, scale.value / rows, scale.stderr / rows))
        except CurvscopeError as error:
            found.reasons["kaiser"] = str(error)
    _rows(facts, found)
    formed = "needs the whole matrix; raise limit= to form it."
    found.reasons["kaiser_noisy"] = f"The spectrum with noise on every entry {formed}"
    found.reasons["fourier"] = f"The Fourier transform {formed}"
    found.products = facts.products
    return found


def share(energy: float, on_diagonal: float) -> float:
    """Of the energy on the diagonal."""
    return on_diagonal / energy if energy else math.nan


def decibel(energy: float, on_diagonal: float) -> float:
    """As ``signal_to_noise``: each pair off the diagonal counts once."""
    beside = (energy - on_diagonal) / 2
    if on_diagonal <= 0:
        return math.nan
    if beside <= 1e-14 * energy:
        return math.inf
    return 10 * math.log10(on_diagonal / beside)


def _kaiser(facts: Facts, scale: float, error: float) -> Value:
    """Eigenvalues above the mean diagonal, which has an error itself."""
    known = facts.eigenvalues_or_samples
    sampled = isinstance(known, SpectralSamples) and known.rest

    def above(limit: float, **options: Any) -> float:
        values = known.eigenvalues(**options) if isinstance(known, SpectralSamples) else known
        return float((values > limit * (1 + 1e-12)).sum())

    whole = above(scale)
    parts = [abs(above(scale - error) - above(scale + error)) / 2] if error else []
    if sampled:
        assert isinstance(known, SpectralSamples)
        probes = range(len(known.found.nodes))
        pooled = spread_of([above(scale, without=i) for i in probes])
        alone = torch.tensor([above(scale, only=i) for i in probes], dtype=torch.float64)
        # counts jump, which leaving one out may not see
        parts.append(max(pooled, float(alone.std()) / math.sqrt(len(alone))))
        # the quadrature is sure up to the weight of the node beside (Chebyshev, Markov, Stieltjes)
        nearest = (known.found.nodes - scale).abs().argmin(1, keepdim=True)
        weight = float(known.found.weights.gather(1, nearest).mean())
        parts.append(known.rest * weight / math.sqrt(12))
    return Value(whole, math.hypot(*parts) if parts else 0.0)


def _rows(facts: Facts, found: Estimates) -> None:
    """Discs, dominance and bands from rows drawn at random."""
    count = min(_ROWS, facts.limits.products, facts.size)
    places = random_rows(facts.size, facts.limits.seed, count)
    width = facts.size
    centres, radii = [], []
    near = torch.zeros(count, width, dtype=torch.float64) if width * count <= 2**25 else None
    for start in range(0, count, _BATCH):
        part = places[start : start + _BATCH]
        units = torch.zeros(width, len(part), dtype=torch.float64)
        units[part, torch.arange(len(part))] = 1.0
        images = facts.matmat(units.to(facts.op.device)).cpu()
        own = images[part, torch.arange(len(part))]
        centres.append(own)
        radii.append(images.abs().sum(0) - own.abs())
        for column, place in enumerate(part.tolist()):
            if near is not None:
                distance = (torch.arange(width) - place).abs()
                near[start + column].index_add_(0, distance, images[:, column].square())
    middle, reach = torch.cat(centres), torch.cat(radii)
    found.values |= {"centres": middle, "radii": reach, "rows": places}
    dominated = (middle.abs() > reach).to(torch.float64)
    share = float(dominated.mean())
    left_out = ((dominated.sum() - dominated) / max(1, count - 1)).tolist()
    # where all rows agree, "none of n" still leaves about 1 / n
    spread = max(sampling_error(left_out, count / width), (1 - count / width) / count)
    found.put("dominant", Value(share, spread if count < width else 0.0))
    touching = (middle[:, None] - middle).abs() <= reach[:, None] + reach
    lone = int((touching.sum(1) == 1).sum())
    found.reasons["disjoint"] = (
        f"Whether a disc touches no other takes all discs; of {count} drawn at random, "
        f"{count - lone} touch another one of them."
    )
    if near is not None:
        _bands(near, found)


def _bands(near: Tensor, found: Estimates) -> None:
    """Shares of bands: what the probes say of the diagonal, and the rows of the rest."""
    on = found.values["diagonal_share"]
    beside = near[:, 1:]
    total = float(beside.sum())
    if not total or math.isnan(on):
        return
    inside = beside.sum(0).cumsum(0) / total
    shares = torch.cat([torch.tensor([0.0], dtype=torch.float64), inside])
    found.values["band_shares"] = on + (1 - on) * shares
    rows, sums = beside.cumsum(1), beside.sum(1, keepdim=True)
    spread = (rows - inside * sums).square().sum(0).sqrt() / total  # linearised ratio
    error = found.stderr.get("diagonal_share", 0.0)
    first = torch.tensor([0.0], dtype=torch.float64)
    found.values["band_stderr"] = (
        ((1 - on) * torch.cat([first, spread])).square().add((error * (1 - shares)).square()).sqrt()
    )
