"""What every analysis returns: numbers with their cost, settings and warnings, never pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..display import Card, Shown, Table
from ..display.render import MOST_ROWS

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Cost:
    """Price of a result: products with whole matrices, and seconds of wall-clock time.

    Products with a stored matrix, or with a block that had to be formed anyway, do not count.
    """

    products: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.products + other.products, self.seconds + other.seconds)

    def __str__(self) -> str:
        products = f"{self.products} products, " if self.products else ""
        return f"{products}{self.seconds:.2g} s"


@dataclass(frozen=True, kw_only=True, eq=False)
class Result(Shown):
    """Base of what analyses return: a frozen record of plain numbers and CPU tensors.

    ``cost`` says what it took, ``settings`` holds the arguments that give it again, ``converged``
    whether every tolerance asked for was met, ``warnings`` what a reader must know, as sentences.
    Subclasses are ``@dataclass(frozen=True, kw_only=True, eq=False, repr=False)``.

    It prints as sentences, shows as a table in a notebook, and can be pickled. A subclass writes
    :meth:`summary` and :meth:`records`; fields whose metadata has ``json=False`` stay out of
    :meth:`to_dict`.
    """

    cost: Cost = Cost()
    settings: Mapping[str, Any] = field(default_factory=dict)
    converged: bool = True
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """The result in sentences."""
        return f"{type(self).__name__} ({self.cost})."

    def records(self) -> list[dict[str, Any]]:
        """The rows of :meth:`to_frame`, as dictionaries with the same keys."""
        return [{k: v for k, v in _fields(self).items() if not isinstance(v, list | dict)}]

    def to_frame(self) -> pd.DataFrame:
        """The result as a pandas frame."""
        import pandas as pd

        return pd.DataFrame.from_records(self.records())

    def to_dict(self) -> dict[str, Any]:
        """Everything as ``str``, ``float``, ``int``, ``bool``, ``None``, lists and dictionaries.

        Tensors become lists. NaN and infinity, which JSON does not have, become ``None``.
        """
        return {"type": type(self).__name__, **_fields(self)}

    def plot(self, **options: Any) -> Any:
        """Draw with :mod:`curvscope.plot`, which picks the picture by the type of the result."""
        from .. import plot

        return plot.plot(self, **options)

    def __str__(self) -> str:
        return "\n".join([self.summary(), *(f"Warning: {text}" for text in self.warnings)])

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    def _card_(self) -> Card:
        rows, total = self._shown_rows(MOST_ROWS)
        columns = list(rows[0]) if rows else []
        if all(row.get("converged") is True for row in rows):
            columns = [name for name in columns if name != "converged"]
        long = total > MOST_ROWS
        first = Table(rows, columns, f"{total:,} rows" if long else "", folded=long, total=total)
        summary, cost = self.summary(), str(self.cost)
        return Card(
            title=type(self).__name__,
            marks=() if self.converged else ("not converged",),
            facts={} if cost in summary else {"cost": cost},
            text=summary.splitlines(),
            warnings=self.warnings,
            pictures=self._pictures(),
            tables=[first, *self._more_tables()],
            hints=("result.plot()", "result.to_frame()"),
        )

    def _shown_rows(self, most: int) -> tuple[list[dict[str, Any]], int]:
        """At most ``most`` of :meth:`records`, and how many there are."""
        rows = self.records()
        return rows[:most], len(rows)

    def _pictures(self) -> list[tuple[str, str]]:
        """Small pictures for a notebook: captions with elements of :mod:`curvscope.display`."""
        return []

    def _more_tables(self) -> list[Table]:
        """Tables below the first one."""
        return []


def plain(value: Any) -> Any:
    """``value`` in types that JSON has; see :meth:`Result.to_dict`."""
    if isinstance(value, Result):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [plain(item) for item in value]
    return str(value)


def number(value: float, digits: int = 3) -> str:
    """A number for a sentence: ``0.42``, ``1.2e-08``, ``12,345``; NaN is ``"undefined"``."""
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if 1e4 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def listing(names: list[str] | tuple[str, ...], most: int = 4) -> str:
    """``"a, b and c"``; long lists end in ``"and 7 more"``."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def as_cpu(tensor: Tensor) -> Tensor:
    """A detached float64 copy on the CPU, as results keep them."""
    return tensor.detach().to(dtype=torch.float64, device="cpu", copy=True)


def _fields(value: Any) -> dict[str, Any]:
    return {
        item.name: plain(getattr(value, item.name))
        for item in dataclasses.fields(value)
        if item.metadata.get("json", True)
    }
