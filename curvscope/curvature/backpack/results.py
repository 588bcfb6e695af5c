"""What BackPACK's quantities come back as where they are no matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ...errors import ParameterMismatchError, nearest
from ...operators import Layout, Provenance

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleValues:
    """Something per sample and parameter entry.

    ``values`` ``[N, P]`` holds one row per sample, in the order of the data, columns in the
    problem's parameter order. A row belongs to the sum of that sample's own terms, not divided by
    anything: ``scale * values.sum(0)`` (:meth:`total`) is the quantity of the objective.
    """

    values: Tensor
    layout: Layout
    scale: float
    info: Provenance

    def total(self) -> Tensor:
        """The same quantity of the whole objective ``[P]``."""
        return self.scale * self.values.sum(0)

    def of(self, name: str) -> Tensor:
        """One parameter's values ``[N, *shape]``."""
        index = _spec(self.layout, name)
        return self.values[:, self.layout.slices()[name]].reshape(-1, *index)

    def summary(self) -> str:
        """One sentence."""
        return f"{self.info.what} of {len(self.values)} samples, {self.layout.numel} parameters."

    def to_frame(self) -> pd.DataFrame:
        """A row per parameter: mean, standard deviation over samples, and extremes."""
        return _frame({name: self.of(name) for name in self.layout.names})

    __str__ = summary


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleNorms:
    """Squared gradient norms: ``values`` ``[N, K]``, a row per sample, a column per parameter.

    Of the gradient of each sample's own terms, not divided by anything; ``scale**2 * values``
    belongs to the sample's share of the objective.
    """

    values: Tensor
    layout: Layout
    scale: float
    info: Provenance

    def total(self) -> Tensor:
        """Squared norm of each sample's whole gradient ``[N]``."""
        return self.values.sum(1)

    def of(self, name: str) -> Tensor:
        """One parameter's squared norms ``[N]``."""
        _spec(self.layout, name)
        return self.values[:, self.layout.names.index(name)]

    def summary(self) -> str:
        """One sentence."""
        return f"{self.info.what} of {len(self.values)} samples, {len(self.layout)} parameters."

    def to_frame(self) -> pd.DataFrame:
        """A row per parameter: mean, standard deviation over samples, and extremes."""
        return _frame({name: self.of(name) for name in self.layout.names})

    __str__ = summary


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterValues:
    """Something per parameter entry: ``values`` ``[P]`` in the problem's parameter order.

    Made of the gradients of single samples' own terms, not divided by anything. ``scale`` is what
    the objective multiplies such a gradient by.
    """

    values: Tensor
    layout: Layout
    scale: float
    info: Provenance

    def of(self, name: str) -> Tensor:
        """One parameter's values, in its shape."""
        return self.values[self.layout.slices()[name]].reshape(_spec(self.layout, name))

    def summary(self) -> str:
        """One sentence."""
        return f"{self.info.what}, {self.layout.numel} parameters."

    def to_frame(self) -> pd.DataFrame:
        """A row per parameter: mean, standard deviation over entries, and extremes."""
        return _frame({name: self.of(name) for name in self.layout.names})

    __str__ = summary


def _spec(layout: Layout, name: str) -> tuple[int, ...]:
    for spec in layout:
        if spec.name == name:
            return spec.shape
    raise ParameterMismatchError(
        f"There is no parameter {name!r}.{nearest(name, layout.names)} "
        f"Parameters: {', '.join(layout.names)}."
    )


def _frame(columns: dict[str, Tensor]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for name, values in columns.items():
        flat = values.detach().double().cpu().reshape(-1)
        rows.append(
            {
                "parameter": name,
                "mean": float(flat.mean()),
                "std": float(flat.std(correction=0)),
                "min": float(flat.min()),
                "max": float(flat.max()),
            }
        )
    return pd.DataFrame.from_records(rows)
