"""What XTrace and XDiag share: a basis of ``A Omega``, and what leaving out a probe does to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...progress import track
from .checkpoint import Keeper
from .common import Meter, column_dots, length, lengths, signs

_PAIRS = 2**30  # entries of pairs of probes that are looked at for the diagonal's errors
_ROWS = 2**21  # numbers in one temporary of the diagonal's errors
FEW = 32
"""Rows up to which random signs may repeat; then unit vectors serve better."""
_NOISE = 50.0  # times eps: below that, a column of A Omega adds nothing


_FIRST = 16  # probes before the error is looked at


def freedom(count: int) -> int:
    """Degrees of freedom of the standard error of ``count`` probes that share their subspaces.

    The values of probes that share a subspace vary together, so their spread is known far worse
    than that of ``count`` independent ones. A quarter was measured to be right: with ``count - 1``,
    intervals at 95 % held the truth in as few as 77 % of 60 runs on the GGN of a small GRU.
    """
    return max(1, count // 4)


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

    @property
    def freedom(self) -> int:
        """Degrees of freedom of an interval."""
        return freedom(self.count)

    def add(self, count: int) -> None:
        """``count`` more probes; the columns before them keep their place in ``Q``."""
        probes = signs(self.meter.op, self.seed, self.count, count, stream=6)
        sketch = self.meter(probes)
        self.dots = torch.cat([self.dots, column_dots(probes, sketch)])
        old = self.basis.shape[1]
        before = float(self.R.norm(dim=0).max()) if old else 0.0
        scale = max(before, float(lengths(sketch.mT).max()), math.ulp(0.0))
        new, rows = self._orthonormal(sketch, _NOISE * self.eps * scale)
        added = new.shape[1]
        larger = torch.zeros(old + added, self.count + count, dtype=torch.float64)
        larger[:old, : self.count] = self.R
        larger[:, self.count :] = rows
        images = self.meter(new) if added else new
        self.R = larger
        self.full &= added == count
        self.probes = torch.cat([self.probes, probes], 1)
        self.basis = torch.cat([self.basis, new], 1)
        self.images = torch.cat([self.images, images], 1)

    def complete(self) -> None:
        """Take the rest of the space into the basis: the trace and the diagonal are then known."""
        old = self.basis.shape[1]
        new = torch.linalg.qr(self.basis, mode="complete").Q[:, old:]
        images = [self.meter(part) for part in new.split(self.meter.columns(), 1) if part.numel()]
        self.basis = torch.cat([self.basis, new], 1)
        self.images = torch.cat([self.images, *images], 1)
        self.full = False

    def _orthonormal(self, sketch: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """Orthonormal columns ``[P, r]`` for what is new in ``sketch``, its coefficients."""
        old, count = self.basis.shape[1], sketch.shape[1]
        rows = torch.zeros(old + count, count, dtype=torch.float64)
        rest = sketch.clone()
        for _ in range(2):
            part = self.basis.mT @ rest
            rest -= self.basis @ part
            rows[:old] += part.double().cpu()
        if self.full and old + count <= self.meter.size:
            new, triangle = torch.linalg.qr(rest)
            if float(triangle.diagonal().abs().min()) > noise:
                new -= self.basis @ (self.basis.mT @ new)
                rows[old:] = triangle.double().cpu()
                return new, rows
        found: list[Tensor] = []
        for column in range(count):
            left = rest[:, column].clone()
            for _ in range(2):
                for place, other in enumerate(found):
                    inside = other @ left
                    left -= inside * other
                    rows[old + place, column] += float(inside)
                left -= self.basis @ (self.basis.mT @ left)
            size = length(left)
            if size > noise:
                rows[old + len(found), column] = size
                found.append(left / size)
        new = torch.stack(found, 1) if found else self.basis[:, :0]
        return new, rows[: old + len(found)]

    def directions(self) -> Tensor:
        """``s_i`` as columns ``[n, n]``."""
        inverse = torch.linalg.solve_triangular(
            self.R, torch.eye(len(self.R), dtype=torch.float64), upper=True
        )
        directions = inverse.mT
        return directions / directions.norm(dim=0)

    def traces(self) -> tuple[Tensor, float]:
        """The trace as every probe left out gives it, ``[n]``, and the error of their mean."""
        H = (self.basis.mT @ self.images).double().cpu()
        H = (H + H.mT) / 2
        n = self.count
        if not self.full:
            return torch.full((n,), float(H.trace()), dtype=torch.float64), 0.0
        S, W = self.directions(), (self.basis.mT @ self.probes).double().cpu()
        SHS, SHW, a = S.mT @ (H @ S), S.mT @ (H @ W), S.mT @ W
        r = (S * self.R).sum(0)  # S^T R is diagonal
        outside = self.dots - 2 * (W * self.R).sum(0) + (W * (H @ W)).sum(0)
        h, own = SHS.diagonal(), a.diagonal()
        values = H.trace() - h + outside + 2 * own * r - 2 * own * SHW.diagonal() + own**2 * h
        # the same with a second probe j left out as well, [i, j]
        C, w = _pairs(S)
        alpha = w * (own[:, None] - C * a.mT)
        beta = w * (a.mT - C * own[:, None])
        inside = H.trace() - w * (h[:, None] + h - 2 * C * SHS)
        cross = alpha * SHW.diagonal()[:, None] + beta * SHW.mT
        square = alpha**2 * h[:, None] + 2 * alpha * beta * SHS + beta**2 * h
        fewer = inside + outside[:, None] + 2 * alpha * r[:, None] - 2 * cross + square
        change = values[:, None] - fewer
        change.fill_diagonal_(0.0)
        shared = (change * change.mT).sum() / (n * (n - 1))
        return values, float(_error(values.var(), shared, n))

    def diagonals(self) -> tuple[Tensor, Tensor]:
        """Mean and standard error ``[P]`` of the diagonal with every probe left out in turn."""
        if not self.full:
            known = (self.basis.double() * self.images.double()).sum(1)
            return known, torch.zeros_like(known)
        S, n, device = self.directions(), self.count, self.basis.device
        C, w = (x.to(device) for x in _pairs(S))
        r = (S * self.R).sum(0).to(device)
        S = S.to(device)
        shifts = range(1, 1 + max(1, min(n // 2, _PAIRS // (n * self.meter.size))))
        means, errors = [], []
        height = max(1, _ROWS // n)
        for start in range(0, self.meter.size, height):
            part = slice(start, start + height)
            basis, images = self.basis[part].double(), self.images[part].double()
            g, q, z = self.probes[part].double() * r, basis @ S, images @ S
            values = (basis * images).sum(1, keepdim=True) - q * z + g * q
            shared = torch.zeros_like(values[:, 0])
            for shift in shifts:  # what leaving out j too changes for i, and the other way round
                c, v = (x.diagonal(shift) for x in (torch.cat([C, C], 1), torch.cat([w, w], 1)))
                gj, qj, zj = (x.roll(-shift, 1) for x in (g, q, z))
                joint = v * (q * z + qj * zj - c * (q * zj + qj * z))
                one = joint - q * z + g * (q - v * (q - c * qj))
                two = joint - qj * zj + gj * (qj - v * (qj - c * q))
                shared += (one * two).mean(1) / len(shifts)
            means.append(values.mean(1))
            errors.append(_error(values.var(1), shared, n))
        return torch.cat(means), torch.cat(errors)

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


def _pairs(S: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of the directions ``[n, n]``, and ``1 / (1 - cosine^2)`` with zeros for ``i = j``."""
    C = S.mT @ S
    w = 1 / (1 - C.square()).clamp_min(1e-12)
    w.fill_diagonal_(0.0)
    return C, w


def _error(spread: Tensor, shared: Tensor, count: int) -> Tensor:
    """Standard error of a mean of ``count`` values of variance ``spread`` that share subspaces.

    With ``Y_ij`` the value of probe ``i`` where ``j`` is left out too, ``Y_ij`` and ``Y_ji`` are
    independent given the other probes, and ``X_i`` has the right mean whatever ``j`` is. So the
    covariance of ``X_i`` and ``X_j`` is the mean of ``(X_i - Y_ij) (X_j - Y_ji)``: ``shared``.
    The plain ``spread / n`` is too small by a half and more, the jackknife too large.
    """
    plain = spread / count
    return torch.maximum(plain + shared, plain / 4).sqrt()


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
    """Doubles the probes until the error is ``tol`` of the size, or there are ``most`` of them.

    Where the rest of the space takes no more products than that, it is taken whole: probes as many
    as rows would leave out next to nothing, and say nothing of their spread.
    """
    parts = LeaveOneOut(meter, seed)
    state = keeper.load()
    if state is not None:
        parts.resume(state)
    target = min(_FIRST // 2, most)
    while True:
        target = min(most, 2 * target)
        if parts.count > target:  # resumed
            continue
        # two products for every further probe, or one for every direction that is left
        if parts.full and meter.size - parts.basis.shape[1] <= 2 * (target - parts.count):
            parts.complete()
            return parts
        block = meter.columns(8)
        for start in track(range(parts.count, target, block), label):
            parts.add(min(block, target - start))
            keeper.hold(**parts.state())
        size, error = size_and_error(parts)
        if error <= tol * abs(size) or target >= most:
            return parts
