"""What XTrace and XDiag share: a basis of ``A Omega``, and what leaving out a probe does to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...progress import track
from .checkpoint import Keeper
from .common import Meter, column_dots, signs

_NOISE = 50.0  # times eps: below that, a column of A Omega adds nothing


class LeaveOneOut:
    """``A Omega = Q R`` for random signs ``Omega`` ``[P, n]``, and ``A Q``; two products a probe.

    ``Q_i`` spans ``A Omega`` without column ``i``: ``Q_i Q_i^T = Q (I - s_i s_i^T) Q^T`` with
    ``s_i`` the unit vector along row ``i`` of ``R^-1`` (Epperly, Tropp and Webber, section 2.1).
    Columns that add nothing beyond rounding are left out of ``Q``; the rest of ``A`` then vanishes.
    """

    def __init__(self, meter: Meter, seed: int) -> None:
        self.meter, self.seed = meter, seed
        op = meter.op
        self.eps = torch.finfo(op.dtype).eps
        empty = torch.empty(meter.size, 0, dtype=op.dtype, device=op.device)
        self.probes, self.basis, self.images = empty, empty, empty
        self.R = torch.zeros(0, 0, dtype=torch.float64)
        self.dots = torch.zeros(0, dtype=torch.float64)
        self.full = True  # whether every probe has added a column

    @property
    def count(self) -> int:
        """Probes so far."""
        return self.probes.shape[1]

    def add(self, count: int) -> None:
        """``count`` more probes; the columns before them keep their place in ``Q``."""
        probes = signs(self.meter.op, self.seed, self.count, count, stream=6)
        sketch = self.meter(probes)
        self.dots = torch.cat([self.dots, column_dots(probes, sketch)])
        old = self.basis.shape[1]
        before = float(self.R.norm(dim=0).max()) if old else 0.0
        scale = max(before, float(sketch.norm(dim=0).max()), math.ulp(0.0))
        found: list[Tensor] = []
        rows = torch.zeros(old + count, count, dtype=torch.float64)
        for column in range(count):
            rest = sketch[:, column].clone()
            basis = torch.cat([self.basis, *[f.unsqueeze(1) for f in found]], 1)
            for _ in range(2):
                part = basis.mT @ rest
                rest -= basis @ part
                rows[: len(part), column] += part.double().cpu()
            length = float(rest.norm())
            if length > _NOISE * self.eps * scale:
                rows[old + len(found), column] = length
                found.append(rest / length)
        larger = torch.zeros(old + len(found), self.count + count, dtype=torch.float64)
        larger[:old, : self.count] = self.R
        larger[:, self.count :] = rows[: old + len(found)]
        new = torch.stack(found, 1) if found else self.basis[:, :0]
        images = self.meter(new) if found else new
        self.R = larger
        self.full &= len(found) == count
        self.probes = torch.cat([self.probes, probes], 1)
        self.basis = torch.cat([self.basis, new], 1)
        self.images = torch.cat([self.images, images], 1)

    def directions(self) -> Tensor:
        """``s_i`` as columns ``[n, n]``."""
        inverse = torch.linalg.solve_triangular(
            self.R, torch.eye(len(self.R), dtype=torch.float64), upper=True
        )
        directions = inverse.mT
        return directions / directions.norm(dim=0)

    def traces(self) -> Tensor:
        """The trace as every probe left out gives it: ``[n]``."""
        H = (self.basis.mT @ self.images).double().cpu()
        H = (H + H.mT) / 2
        if not self.full:
            return torch.full((self.count,), float(H.trace()), dtype=torch.float64)
        S, W = self.directions(), (self.basis.mT @ self.probes).double().cpu()
        inside = H.trace() - (S * (H @ S)).sum(0)
        X = W - S * (S * W).sum(0)
        return inside + self.dots - 2 * (X * self.R).sum(0) + (X * (H @ X)).sum(0)

    def diagonals(self) -> tuple[Tensor, Tensor]:
        """Mean and standard error ``[P]`` of the diagonal with every probe left out in turn."""
        known = (self.basis.double() * self.images.double()).sum(1)
        if not self.full:
            return known, torch.zeros_like(known)
        S = self.directions()
        weights = (S * self.R).sum(0)
        total = torch.zeros_like(known)
        squares = torch.zeros_like(known)
        S = S.to(self.basis.device)
        for k in range(self.count):
            left = self.basis.double() @ S[:, k]
            image = self.images.double() @ S[:, k]
            value = left * (float(weights[k]) * self.probes[:, k].double() - image)
            total += value
            squares += value.square()
        n = self.count
        mean = total / n
        spread = (squares / n - mean.square()).clamp_min(0.0) * n / (n - 1)
        return known + mean, (spread / n).sqrt()

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`resume` needs; the probes are drawn again."""
        return {
            "count": self.count,
            "basis": self.basis,
            "images": self.images,
            "R": self.R,
            "dots": self.dots,
            "full": self.full,
            "used": self.meter.used,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        device = self.meter.op.device
        self.probes = signs(self.meter.op, self.seed, 0, state["count"], stream=6)
        self.basis, self.images = state["basis"].to(device), state["images"].to(device)
        self.R, self.dots, self.full = state["R"], state["dots"], state["full"]
        self.meter.used = state["used"]


def leave_one_out(
    meter: Meter,
    size_and_error: Callable[[LeaveOneOut], tuple[float, float]],
    *,
    most: int,
    tol: float,
    seed: int,
    keeper: Keeper,
    label: str,
) -> LeaveOneOut:
    """Doubles the probes until the error is ``tol`` of the size, or there are ``most`` of them."""
    parts = LeaveOneOut(meter, seed)
    state = keeper.load()
    if state is not None:
        parts.resume(state)
    target = min(4, most)
    while True:
        target = min(most, 2 * target)
        if parts.count > target:  # resumed
            continue
        block = meter.columns(8)
        for start in track(range(parts.count, target, block), label):
            parts.add(min(block, target - start))
            keeper.hold(**parts.state())
        size, error = size_and_error(parts)
        if error <= tol * abs(size) or target >= most:
            return parts
