"""What :func:`eigsh` and :func:`negative_curvature` return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...display import spark
from ..result import number
from .estimate import Estimated


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Eigenpairs(Estimated):
    """Some eigenvalues of a matrix with their vectors; returned by :func:`eigsh`.

    ``values`` ``[k]``, the most wanted first, ``vectors`` ``[P, k]`` of length one, ``residuals``
    ``[k]`` the norms ``||A v - value v||``: an eigenvalue of ``A`` lies within ``residuals[i]`` of
    ``values[i]``. No residual is below the rounding of the matrix's type, its machine epsilon times
    the largest magnitude seen. ``pair_converged[i]`` says whether the residual is as
    small as was asked.
    """

    which: str
    values: Tensor
    residuals: Tensor
    pair_converged: tuple[bool, ...]
    vectors: Tensor = field(repr=False, metadata={"json": False})

    def summary(self) -> str:
        """The range of the values, the worst residual and why it stopped."""
        good = sum(self.pair_converged)
        few = ", ".join(number(x) for x in self.values[:4].tolist())
        dots = ", ..." if len(self.values) > 4 else ""
        return (
            f"{len(self.values)} eigenvalues ({self.which}) of the {self.of} ({self.size:,} rows): "
            f"{few}{dots}; {good} converged, largest residual "
            f"{number(float(self.residuals.max()), 2)} (method {self.method!r}, {self.cost}). "
            f"{self.reason}"
        ).rstrip()

    def _pictures(self) -> list[tuple[str, str]]:
        return [("eigenvalues", spark(self.values.tolist(), "eigenvalues"))]

    def records(self) -> list[dict[str, Any]]:
        """A row per pair."""
        return [
            {"rank": rank + 1, "eigenvalue": value, "residual": residual, "converged": good}
            for rank, (value, residual, good) in enumerate(
                zip(self.values.tolist(), self.residuals.tolist(), self.pair_converged, strict=True)
            )
        ]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NegativeCurvature(Eigenpairs):
    """The smallest eigenvalue and its direction; returned by :func:`negative_curvature`."""

    @property
    def value(self) -> float:
        """The smallest Rayleigh quotient found, an upper bound on the smallest eigenvalue."""
        return float(self.values[0])

    @property
    def residual(self) -> float:
        """``||A v - value v||``."""
        return float(self.residuals[0])

    @property
    def direction(self) -> Tensor:
        """The direction ``[P]`` of length one; its sign is arbitrary."""
        return self.vectors[:, 0]

    @property
    def negative(self) -> bool:
        """Whether the curvature along :attr:`direction` is negative beyond rounding."""
        return self.value < 0 and self.value < -1e-3 * self.residual - self.settings["rounding"]

    def summary(self) -> str:
        """The curvature found, its residual and what it means."""
        sign = "negative" if self.negative else "not negative"
        found = f"{number(self.value)} (residual {number(self.residual, 2)})"
        return (
            f"The smallest curvature found of the {self.of} ({self.size:,} rows) is {found}, which "
            f"is {sign} ({self.cost}). {self.reason}"
        ).rstrip()
