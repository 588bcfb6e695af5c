"""Block Lanczos with thick restarts: the outer eigenpairs of a matrix known by products.

The basis and its images are kept, so that Ritz vectors and true residuals cost no product.
Sources: Wu and Simon, "Thick-restart Lanczos method" (2000); Golub and Underwood, "The block
Lanczos method" (1977).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import OptionError
from .common import Meter, length, lengths, normals

SLACK = 1e-3  # eigenvalues below this share of the largest are judged as if they were as large


@dataclass
class Ritz:
    """Wanted pairs of a subspace: values ``[k]``, combinations ``[m, k]``, residual estimates."""

    values: Tensor
    combination: Tensor
    residuals: Tensor
    scale: float


class Krylov:
    """A growing orthonormal basis ``[m, P]``, its images, and the projected matrix ``[m, m]``."""

    def __init__(self, meter: Meter, start: Tensor, capacity: int, *, seed: int) -> None:
        self.meter, self.seed = meter, seed
        op = meter.op
        self.eps = torch.finfo(op.dtype).eps
        self.capacity = min(capacity, meter.size)
        self.basis = torch.empty(0, meter.size, dtype=op.dtype, device=op.device)
        self.images = torch.empty_like(self.basis)
        self.count = 0
        self.projected = torch.zeros(self.capacity, self.capacity, dtype=torch.float64)
        self.coupling = torch.zeros(0, 0, dtype=torch.float64)
        self.draws = 0
        # the three-term recurrence of a single random start, as long as there is one
        self.chain: list[tuple[float, float]] | None = [] if start.shape[1] == 1 else None
        self.seen = torch.ones(1, dtype=torch.float64)  # the first start in the present basis
        self.merged = False  # whether eigenvalues were found beside the basis
        self.largest = 0.0
        self.pending = self._orthonormal(start.mT.to(self.basis))[0]
        if not len(self.pending):
            raise OptionError("v0 is zero; leave it out for a random start.")

    # -- growing ---------------------------------------------------------------------------------

    def expand(self) -> None:
        """Multiply the pending block, and find the next one."""
        block, start = self.pending, self.count
        stop = start + len(block)
        images = self.meter(block.mT.contiguous()).mT
        self._reserve(stop)
        self.basis[start:stop], self.images[start:stop] = block, images
        self._project(start, stop)
        self.count = stop
        rest, coupling = self._orthonormal(images, self.largest)
        self.coupling = coupling
        if self.chain is not None and len(block) == 1 and len(self.chain) == start:
            alpha = float(self.projected[start, start])
            self.chain.append((alpha, float(coupling.norm()) if len(rest) else 0.0))
        if not len(rest) and stop < self.meter.size:
            rest = self.random(1)  # an invariant subspace: what lies beside it is found from here
            self.coupling = torch.zeros(1, len(block), dtype=torch.float64)
        self.pending = rest

    def merge(self, basis: Tensor, images: Tensor, following: Tensor) -> None:
        """Take in vectors from beside the basis; the iteration goes on from both ends."""
        start, stop = self.count, self.count + len(basis)
        self._reserve(stop)
        self.basis[start:stop], self.images[start:stop] = basis, images
        self._project(start, stop)
        old = self.pending
        self.count = stop
        self.merged = True
        ends = torch.cat([old, following])
        self.pending = self._orthonormal(ends)[0]
        if not len(self.pending):
            self.pending = self.random(1)
        # the last block is now everything: what couples to the pending block is read off images
        pending = self.pending.double()
        self.coupling = (pending @ self.images[:stop].double().mT).cpu()

    def random(self, count: int) -> Tensor:
        """Random orthonormal rows beside the basis."""
        count = min(count, self.meter.size - self.count)
        if not count:
            return self.basis[:0]
        for _ in range(5):
            rows = normals(self.meter.op, self.seed, self.draws, count, stream=3).mT
            self.draws += count
            found = self._orthonormal(rows)[0]
            if len(found) == count:
                return found
        return self.basis[:0]

    def _orthonormal(self, rows: Tensor, size: float = 0.0) -> tuple[Tensor, Tensor]:
        """Orthonormal rows ``[r, P]`` spanning what is beside the basis, and ``[r, b]`` of it.

        What is left of a row counts as rounding if it is small beside the row and ``size``.
        """
        known = self.basis[: self.count]
        found: list[Tensor] = []
        coefficients = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for column, row in enumerate(rows):
            row = row.clone()
            before = left = length(row)
            kept = torch.zeros(len(rows), dtype=torch.float64)
            for _ in range(3):  # twice is enough, the third time is for rows that nearly vanish
                row -= known.mT @ (known @ row)
                for place, other in enumerate(found):
                    part = other @ row
                    row -= part * other
                    kept[place] += float(part)
                last, left = left, length(row)
                if left > 0.5 * last:
                    break
            if left > 20 * self.eps * max(before, size) and left > 0:
                kept[len(found)] = left
                found.append(row / left)
            coefficients[:, column] = kept
        block = torch.stack(found) if found else rows[:0]
        return block, coefficients[: len(found)]

    def _reserve(self, rows: int) -> None:
        if rows > len(self.basis):
            more = min(self.capacity + 64, max(rows, 2 * len(self.basis), 32)) - len(self.basis)
            space = self.basis.new_empty(max(more, rows - len(self.basis)), self.meter.size)
            self.basis = torch.cat([self.basis, space])
            self.images = torch.cat([self.images, torch.empty_like(space)])
        if rows > len(self.projected):
            larger = torch.zeros(rows + 32, rows + 32, dtype=torch.float64)
            larger[: len(self.projected), : len(self.projected)] = self.projected
            self.projected = larger

    def _project(self, start: int, stop: int) -> None:
        part = (self.basis[:stop] @ self.images[start:stop].mT).double().cpu()
        self.projected[:stop, start:stop] = part
        self.projected[start:stop, :stop] = part.mT
        own = part[start:stop]
        self.projected[start:stop, start:stop] = (own + own.mT) / 2
        self.largest = max(self.largest, float(lengths(self.images[start:stop]).max()))

    # -- reading ---------------------------------------------------------------------------------

    def ritz(self, count: int, which: str) -> Ritz:
        """The ``count`` wanted pairs of the subspace, most wanted first."""
        values, vectors = torch.linalg.eigh(self.projected[: self.count, : self.count])
        order = wanted(values, count, which)
        combination = vectors[:, order]
        last = combination[self.count - self.coupling.shape[1] :]
        residuals = (self.coupling @ last).norm(dim=0)
        scale = float(values.abs().max())
        return Ritz(values[order], combination, residuals, scale)

    def vectors(self, combination: Tensor) -> Tensor:
        """Ritz vectors as rows ``[k, P]``."""
        return combination.mT.to(self.basis) @ self.basis[: self.count]

    def residuals(self, pairs: Ritz) -> tuple[Tensor, Tensor]:
        """Unit vectors ``[k, P]`` and true residuals ``||A v - value v||`` ``[k]``."""
        rows = self.vectors(pairs.combination)
        images = pairs.combination.mT.to(self.basis) @ self.images[: self.count]
        images -= pairs.values.to(rows).unsqueeze(1) * rows
        sizes = rows.norm(dim=1)
        return rows / sizes.unsqueeze(1), (lengths(images) / sizes).double().cpu()

    def start(self) -> Tensor:
        """The first start vector ``[m]`` in the basis, but for what restarts have dropped of it."""
        return torch.nn.functional.pad(self.seen, (0, self.count - len(self.seen)))

    def restart(self, keep: int, which: str) -> None:
        """Keep the best ``keep`` Ritz vectors, and go on with the same pending block."""
        pairs = self.ritz(keep, which)
        rows = self.vectors(pairs.combination)
        images = pairs.combination.mT.to(self.basis) @ self.images[: self.count]
        # new tensors: a state that has been handed out is never changed
        seen = self.start()
        self.basis, self.images = rows, images
        self.count = len(rows)
        self.seen = pairs.combination.mT @ seen
        self.projected = torch.zeros_like(self.projected)
        self.projected[: self.count, : self.count] = torch.diag(pairs.values)
        last = pairs.combination[-self.coupling.shape[1] :]
        # every kept vector couples to the pending block, so all of them count as the last block
        self.coupling = self.coupling @ last

    # -- saving ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`resume` needs."""
        return {
            "basis": self.basis[: self.count],
            "images": self.images[: self.count],
            "projected": self.projected[: self.count, : self.count].clone(),
            "pending": self.pending,
            "coupling": self.coupling,
            "draws": self.draws,
            "seen": self.seen,
            "merged": self.merged,
            "largest": self.largest,
            "used": self.meter.used,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self.count = len(state["basis"])
        self.basis = state["basis"].to(self.meter.op.device)
        self.images = state["images"].to(self.meter.op.device)
        size = max(self.capacity, self.count)
        self.projected = torch.zeros(size, size, dtype=torch.float64)
        self.projected[: self.count, : self.count] = state["projected"]
        self.pending = state["pending"].to(self.meter.op.device)
        self.coupling = state["coupling"]
        self.draws, self.largest = state["draws"], state["largest"]
        self.seen, self.merged = state["seen"], state["merged"]
        self.meter.used = state["used"]


def wanted(values: Tensor, count: int, which: str) -> Tensor:
    """Places of the ``count`` wanted ones among ascending values, most wanted first."""
    count = min(count, len(values))
    if which == "SA":
        return torch.arange(count)
    if which == "LA":
        return torch.arange(len(values) - 1, len(values) - 1 - count, -1)
    if which == "BE":
        high = (count + 1) // 2
        top = torch.arange(len(values) - 1, len(values) - 1 - high, -1)
        return torch.cat([top, torch.arange(count - high)])
    return values.abs().argsort(descending=True, stable=True)[:count]


def thresholds(pairs: Ritz, tol: float, eps: float, slack: float = SLACK) -> Tensor:
    """The residual that each pair may have."""
    floor = max(slack * tol, 50 * eps) * pairs.scale
    return (tol * pairs.values.abs()).clamp_min(floor)
