"""Lanczos from many random starts at once: the quadrature behind densities and ``tr f(A)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...progress import track
from .common import Meter, lengths, signs, title

_BYTES = 2**30  # for the bases of the starts that go together
_TOGETHER = 16
MOMENTS = 4
"""Powers whose means a density has."""
REORTHOGONALISE = ("full", "selective", "none")


@dataclass
class Quadrature:
    """Nodes and weights ``[probes, steps]``; unused places have weight zero. Weights sum to one."""

    nodes: Tensor
    weights: Tensor
    reorthogonalised: int = 0
    ended: bool = False  # whether every start has spanned an invariant subspace
    moments: Tensor | None = None  # [probes, 4] where the weights do not give them
    # diagonals, entries beside them (the last one couples to what comes next), and sizes
    recurrence: tuple[Tensor, Tensor, Tensor] | None = None


def together(meter: Meter, steps: int) -> int:
    """How many starts fit into memory at once with their bases."""
    fitting = _BYTES // (meter.size * steps * meter.op.dtype.itemsize)
    return max(1, min(_TOGETHER, fitting))


def quadrature(
    meter: Meter,
    seed: int,
    start: int,
    count: int,
    steps: int,
    *,
    reorthogonalise: str = "full",
    enough: Callable[[Quadrature], bool] | None = None,
    every: int = 5,
    beside: Tensor | None = None,
    label: str = "",
    hold: Callable[..., None] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Quadrature:
    """Gauss quadratures of the spectral measures of random signs ``start`` to ``start + count``.

    ``reorthogonalise="full"`` keeps every basis orthogonal to rounding; ``"selective"`` does so
    only when the estimated loss (Simon's recurrence, Math. Comp. 42, 1984) exceeds the root of the
    machine epsilon, which keeps the nodes right to rounding; ``"none"`` lets copies of converged
    nodes appear. ``enough`` is asked after every few steps whether to stop. The starts are made
    orthogonal to the columns of ``beside``, which the matrix must map to zero. ``hold`` is given
    the state after every step, from which the iteration goes on as ``state``.
    """
    op = meter.op
    steps = min(steps, meter.size)
    keeps = reorthogonalise != "none"
    vectors = signs(op, seed, start, count, stream=7).mT / math.sqrt(meter.size)  # [n, P]
    if beside is not None:
        beside = beside.to(vectors)
        vectors = vectors - (vectors @ beside) @ beside.mT
        vectors /= vectors.norm(dim=1, keepdim=True)
    bases = torch.empty(count, steps if keeps else 0, meter.size, dtype=op.dtype, device=op.device)
    before = torch.zeros_like(vectors)
    alphas = torch.zeros(count, steps, dtype=torch.float64)
    betas = torch.zeros(count, steps, dtype=torch.float64)
    ends = torch.full((count,), steps)
    loss = _Loss(count, steps, torch.finfo(op.dtype).eps, meter.size)
    eps = torch.finfo(op.dtype).eps
    done, repairs, again = 0, 0, False
    if state is not None and "vectors" in state:
        done, repairs, again = state["done"], state["repairs"], state["again"]
        if keeps:
            bases[:, :done] = state["bases"].to(op.device)
        vectors, before = state["vectors"].to(op.device), state["before"].to(op.device)
        alphas, betas, ends = state["alphas"].clone(), state["betas"].clone(), state["ends"].clone()
        loss.now, loss.last = state["loss"].clone(), state["last_loss"].clone()
    for step in track(range(done, steps), label or f"Density of the {title(op)}"):
        if keeps:
            bases[:, step] = vectors
        images = meter(vectors.mT.contiguous()).mT.contiguous()
        alphas[:, step] = (vectors.double() * images.double()).sum(1).cpu()
        images -= alphas[:, step].to(images).unsqueeze(1) * vectors
        if step:
            images -= betas[:, step - 1].to(images).unsqueeze(1) * before
        sizes = lengths(images).cpu()
        repair = reorthogonalise == "full"
        if reorthogonalise == "selective":
            lost = loss.step(step, alphas, betas, sizes)
            repair = lost or again
            again = lost  # two neighbours have to be repaired
        if repair:
            known = bases[:, : step + 1]
            for _ in range(2):
                part = known @ images.unsqueeze(2)
                images -= (known.mT @ part).squeeze(2)
            sizes = lengths(images).cpu()
            loss.repaired(step)
            repairs += 1
        done = step + 1
        scale = torch.maximum(alphas[:, :done].abs().amax(1), betas[:, :done].abs().amax(1))
        ended = (sizes <= 20 * eps * scale) & (ends == steps)
        ends[ended] = done
        over = ended | (ends < done)
        sizes = torch.where(over, 0.0, sizes) if bool(over.any()) else sizes
        betas[:, step] = sizes
        if bool((ends <= done).all()) and done < steps:
            break
        before = vectors
        divisors = torch.where(sizes > 0, sizes, torch.inf)
        vectors = images / divisors.to(images).unsqueeze(1)
        if hold is not None:
            hold(
                done=done,
                repairs=repairs,
                again=again,
                bases=bases[:, :done] if keeps else bases,
                vectors=vectors,
                before=before,
                alphas=alphas.clone(),
                betas=betas.clone(),
                ends=ends.clone(),
                loss=loss.now.clone(),
                last_loss=loss.last.clone(),
            )
        due = enough is not None and done % every == 0 and done < steps
        if due and enough is not None and enough(_nodes(alphas, betas, ends, done)):
            break
    found = _nodes(alphas, betas, ends, done)
    found.reorthogonalised = repairs
    found.ended = bool((ends < steps).all())
    return found


def _nodes(alphas: Tensor, betas: Tensor, ends: Tensor, steps: int) -> Quadrature:
    """Eigenvalues of the tridiagonals, and squared first components of their vectors.

    A recurrence that has ended is padded with its last diagonal entry, which nothing couples to
    the start.
    """
    sizes = ends.clamp(max=steps).unsqueeze(1)
    places = torch.arange(steps)
    diagonal = alphas[:, :steps]
    diagonal = torch.where(places < sizes, diagonal, diagonal.gather(1, sizes - 1))
    beside = torch.where(places[1:] < sizes, betas[:, : steps - 1], 0.0)
    matrix = torch.diag_embed(diagonal)
    matrix += torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    values, vectors = torch.linalg.eigh(matrix)
    recurrence = diagonal, betas[:, :steps], sizes
    return Quadrature(values, vectors[:, 0].square(), recurrence=recurrence)


def with_node(found: Quadrature, node: float) -> Quadrature:
    """The Gauss-Radau quadratures that ``node``, below all eigenvalues, is a node of.

    Where all odd derivatives of a function are positive on the spectrum, they bound its integral
    from below and the Gauss quadratures from above, if those of even order are negative. Source:
    Golub and Meurant, "Matrices, Moments and Quadrature", 2010, section 6.2.
    """
    assert found.recurrence is not None
    diagonal, beside, sizes = found.recurrence
    steps = diagonal.shape[1]
    places = torch.arange(steps)
    beside = torch.where(places < sizes, beside, 0.0)
    pivots = diagonal[:, 0] - node  # of the Cholesky decomposition of T - node I
    for k in range(1, steps):
        following = diagonal[:, k] - node - beside[:, k - 1].square() / pivots
        pivots = torch.where(k < sizes[:, 0], following, pivots)
    last = node + beside.gather(1, sizes - 1).square() / pivots.unsqueeze(1)
    diagonal = torch.cat([diagonal, diagonal[:, -1:]], 1).scatter(1, sizes, last)
    matrix = torch.diag_embed(diagonal)
    matrix += torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return Quadrature(values, vectors[:, 0].square())


class _Loss:
    """Estimates of ``|v_j . v_k|`` by Simon's recurrence, the worst over the starts."""

    def __init__(self, count: int, steps: int, eps: float, size: int) -> None:
        self.eps, self.limit = eps * math.sqrt(size), math.sqrt(eps)
        self.now = torch.zeros(count, steps + 1, dtype=torch.float64)
        self.last = torch.zeros_like(self.now)
        self.now[:, 0] = 1.0

    def step(self, j: int, alphas: Tensor, betas: Tensor, lengths: Tensor) -> bool:
        """From ``v_j . v_k`` to ``v_(j+1) . v_k``; whether any is too large."""
        new = torch.zeros_like(self.now)
        if j:
            gap = (alphas[:, :j] - alphas[:, j : j + 1]) * self.now[:, :j]
            gap += betas[:, :j] * self.now[:, 1 : j + 1]
            gap[:, 1:] += betas[:, : j - 1] * self.now[:, : j - 1]
            gap -= betas[:, j - 1 : j] * self.last[:, :j]
            safe = lengths.clamp_min(1e-300).unsqueeze(1)
            new[:, :j] = (gap + gap.sign() * 2 * self.eps * safe) / safe
        new[:, j] = self.eps
        new[:, j + 1] = 1.0
        self.last, self.now = self.now, new
        return bool((new[:, : j + 1].abs() > self.limit).any())

    def repaired(self, j: int) -> None:
        """The new vectors have been made orthogonal to all before them."""
        self.now[:, : j + 1] = self.eps
