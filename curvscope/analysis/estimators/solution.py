"""What :func:`solve` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...display import spark
from ...errors import counted
from ..result import number
from .estimate import Estimated


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Solution(Estimated):
    """Solutions of ``(A + damping I) x = b``; returned by :func:`solve`.

    ``value`` has the shape of ``b``: ``[P]``, or ``[P, k]`` with a solution per column.
    ``residuals`` ``[k]`` are ``||b - (A + damping I) x|| / ||b||``, computed by a product at the
    end; ``error_bounds`` ``[k]`` bound ``||x - x*|| / ||x*||`` where the matrix is positive
    semi-definite by construction (infinite elsewhere); ``history`` ``[steps, k]`` are the relative
    residuals as the iteration knew them.
    """

    value: Tensor = field(repr=False, metadata={"json": False})
    damping: float
    residuals: Tensor
    error_bounds: Tensor
    column_converged: tuple[bool, ...]
    history: Tensor = field(repr=False)

    @property
    def residual(self) -> float:
        """The largest relative residual."""
        return float(self.residuals.max())

    def summary(self) -> str:
        """How well the systems are solved, at what cost, and why it stopped."""
        shift = f" + {self.damping:g} I" if self.damping else ""
        many = counted(len(self.residuals), "right-hand side")
        bound = float(self.error_bounds.max())
        error = f", relative error at most {number(bound, 2)}" if math.isfinite(bound) else ""
        return (
            f"({self.of}{shift}) x = b ({self.size:,} rows, {many}): relative residual "
            f"{number(self.residual, 2)}{error} (method {self.method!r}, {self.cost}). "
            f"{self.reason}"
        ).rstrip()

    def _pictures(self) -> list[tuple[str, str]]:
        worst = self.history.amax(1) if self.history.numel() else self.history
        logs = [math.log10(max(float(x), 1e-300)) for x in worst]
        return [("log10 of the residual", spark(logs, "residual"))] if len(logs) > 1 else []

    def records(self) -> list[dict[str, Any]]:
        """A row per right-hand side."""
        lengths = self.value.reshape(self.size, -1).double().norm(dim=0)
        return [
            {
                "column": column + 1,
                "residual": float(self.residuals[column]),
                "error_bound": float(self.error_bounds[column]),
                "length": float(lengths[column]),
                "converged": good,
            }
            for column, good in enumerate(self.column_converged)
        ]
