"""Whether a Krylov space has missed an eigenvalue: copies of multiple ones, or a blind start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .common import length
from .krylov import Krylov, Ritz

DOUBT = 0.05
"""Probability with which the check may miss the least visible copy; others it misses less."""
_LEAST = 8
_SHARE = 0.15  # of the products so far, which the check may take
_MOST = 40
_PATIENCE = 4  # products after which it gives up what would take too many
_GLANCE = 2  # products for a look that is expected not to decide


@dataclass
class Beside:
    """What a random start beside the basis has shown: ``missing`` is ``None`` if undecided."""

    missing: bool | None
    basis: Tensor
    images: Tensor
    following: Tensor


def look_beside(
    krylov: Krylov, pairs: Ritz, which: str, margin: float, most: int, *, blind: bool = False
) -> Beside:
    """Whether the complement of the basis holds an eigenvalue that is wanted more.

    A Krylov space holds one vector of every eigenspace, so a multiple eigenvalue leaves its other
    vectors in the complement, where they stand out. From a random unit vector ``r`` there, ``j``
    steps of Lanczos give polynomials ``p_i`` that are orthonormal for its spectral measure; an
    eigenvalue ``x`` outside the Ritz values has a weight ``(u . r)^2`` of at most
    ``1 / sum_i p_i(x)^2`` (the Christoffel function), and a random vector has so little of any
    ``u`` with a probability that is known. There is nothing where that is below 5 % (for a matrix
    that has a missing copy at all), or where a complement of few dimensions has been spanned.

    ``blind`` says that the start may have been without whole eigenspaces, which then count too.

    What the iteration has seen of the unwanted eigenvalues predicts how many products a decision
    takes. Where that is more than the look may take, and no copies have turned up so far, not even
    by rounding, two are all that it does take: they show copies that stand out far.
    """
    known = krylov.basis[: krylov.count]
    left = krylov.meter.size - krylov.count
    below, above = _limits(pairs, which)
    edges = _edges(pairs, below - margin, above + margin, blind)
    vector = krylov.random(1) if edges else known[:0]
    if not len(vector):
        return Beside(False, vector, vector, vector)
    growth = [_Growth(edge) for edge in edges]
    goal = math.log(DOUBT**2 * math.pi / (2 * left * len(edges) ** 2))
    most = min(most, left, max(_LEAST, min(_MOST, int(_SHARE * krylov.meter.used))))
    likely = blind or krylov.merged or _equal(pairs, krylov.eps)
    if left > _LEAST and not likely and _foreseen(krylov, below, above, edges, goal, most) > most:
        most = min(most, _GLANCE)
    rows: list[Tensor] = []
    images: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    row = vector[0]
    while True:
        image = krylov.meter(row.unsqueeze(1))[:, 0]
        rows.append(row)
        images.append(image)
        rest = image.clone()
        alphas.append(float(row.double() @ image.double()))
        basis = torch.stack(rows)
        for _ in range(2):
            rest -= known.mT @ (known @ rest)
            rest -= basis.mT @ (basis @ rest)
        beta = length(rest)
        low, high = _range(alphas, betas)
        over = len(rows) == left or beta <= 20 * krylov.eps * max(krylov.largest, -low, high)
        missing: bool | None = None
        if high > above + margin or low < below - margin:
            missing = True
        elif over:
            missing = False
        else:
            weights = [g.step(alphas[-1], beta) for g in growth]
            if max(weights) <= goal and left > _LEAST:  # a few directions are all looked at
                missing = False
        following = rest.new_empty(0, len(rest)) if over else (rest / beta).unsqueeze(0)
        hopeless = False
        if missing is None and len(rows) >= _PATIENCE and left > _LEAST:
            slope = max(g.slope for g in growth)
            expected = len(rows) + (max(weights) - goal) / -slope if slope < 0 else math.inf
            hopeless = expected > most
        if missing is not None or len(rows) >= most or hopeless:
            return Beside(missing, basis, torch.stack(images), following)
        betas.append(beta)
        row = following[0]


def _foreseen(
    krylov: Krylov, below: float, above: float, edges: list[float], goal: float, most: int
) -> int:
    """Products until the look decides, if its start sees the bulk as the first start saw it.

    Both are random, so their spectral measures are alike but for the wanted eigenvalues. Lanczos on
    what the basis knows of that measure gives the polynomials; ``most + 1`` stands for more.
    """
    values, vectors = torch.linalg.eigh(krylov.projected[: krylov.count, : krylov.count])
    seen = (vectors.mT @ krylov.start())[(values >= below) & (values <= above)]
    values = values[(values >= below) & (values <= above)]
    if not len(values) or not float(seen.norm()) > 0:
        return 0
    rows = [seen / seen.norm()]
    growth = [_Growth(edge) for edge in edges]
    for count in range(1, most + 1):
        rest = values * rows[-1]
        alpha = float(rows[-1] @ rest)
        basis = torch.stack(rows)
        for _ in range(2):
            rest = rest - basis.mT @ (basis @ rest)
        beta = float(rest.norm())
        if beta <= 1e-12 * krylov.largest:
            return count
        if max(g.step(alpha, beta) for g in growth) <= goal:
            return count
        rows.append(rest / beta)
    return most + 1


class _Growth:
    """Logarithm of ``1 / sum_i p_i(x)^2`` by the three-term recurrence, scaled against overflow."""

    def __init__(self, x: float) -> None:
        self.x = x
        self.last, self.now, self.total = 0.0, 1.0, 1.0
        self.shift = 0.0  # logarithm of what all three have been divided by, squared
        self.beta = 0.0
        self.value, self.slope = 0.0, 0.0

    def step(self, alpha: float, beta: float) -> float:
        following = ((self.x - alpha) * self.now - self.beta * self.last) / beta
        self.last, self.now, self.beta = self.now, following, beta
        self.total += following**2
        scale = math.sqrt(self.total)
        self.last, self.now, self.total = self.last / scale, self.now / scale, 1.0
        self.shift += 2 * math.log(scale)
        self.slope = -self.shift - self.value
        self.value = -self.shift
        return self.value


def bounds(chain: list[tuple[float, float]], size: int, confidence: float) -> tuple[float, float]:
    """Where all eigenvalues lie with probability ``confidence``, after Lanczos from a random start.

    The ends are where the Christoffel function of the start's spectral measure says that an
    eigenvector beyond would have less weight in the start than random vectors have.
    """
    low, high = _range([a for a, _ in chain], [b for _, b in chain[:-1]])
    if chain[-1][1] == 0 or len(chain) >= size:  # an invariant subspace: nothing lies outside
        return low, high
    goal = math.log((1 - confidence) ** 2 * math.pi / (8 * size))
    span = max(high - low, chain[-1][1])

    def beyond(distance: float, sign: int) -> bool:
        growth = _Growth((high if sign > 0 else low) + sign * distance)
        value = 0.0
        for alpha, beta in chain:
            value = growth.step(alpha, beta)
        return value <= goal

    ends = []
    for sign in (-1, 1):
        far = span
        while not beyond(far, sign):
            far *= 4
        near = 0.0
        for _ in range(40):
            middle = (near + far) / 2
            near, far = (near, middle) if beyond(middle, sign) else (middle, far)
        ends.append(far)
    return low - ends[0], high + ends[1]


def _edges(pairs: Ritz, below: float, above: float, blind: bool) -> list[float]:
    """From where on outwards something may be missing.

    What a random start sees of an eigenspace has been found, so that only copies of the found
    ones can be missing, and those of the last one change nothing.
    """
    if blind:
        return [x for x in (below, above) if math.isfinite(x)]
    low, high = pairs.values + pairs.residuals, pairs.values - pairs.residuals
    low, high = low[pairs.values < below], high[pairs.values > above]
    edges = [min(below, float(low.max()))] if len(low) else []
    return edges + ([max(above, float(high.min()))] if len(high) else [])


def _equal(pairs: Ritz, eps: float) -> bool:
    """Whether two of the values may be the same as far as residuals and rounding tell."""
    order = pairs.values.argsort()
    values, residuals = (
        pairs.values[order],
        pairs.residuals[order].clamp_min(50 * eps * pairs.scale),
    )
    return bool((values.diff() <= residuals[1:] + residuals[:-1]).any())


def _limits(pairs: Ritz, which: str) -> tuple[float, float]:
    """An eigenvalue below the first or above the second would be wanted more than the last."""
    values = pairs.values
    if which == "BE":
        ends = (len(values) + 1) // 2
        low = float(values[ends:].max()) if len(values) > ends else -math.inf
        return low, float(values[:ends].min())
    if which == "LM":
        least = float(values.abs().min())
        return -least, least
    last = float(values[-1])
    return (-math.inf, last) if which == "LA" else (last, math.inf)


def _range(alphas: list[float], betas: list[float]) -> tuple[float, float]:
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if betas:
        beside = torch.tensor(betas, dtype=torch.float64)
        matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
    values = torch.linalg.eigvalsh(matrix)
    return float(values[0]), float(values[-1])
