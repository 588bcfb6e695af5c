"""What an object shows of itself: plain data, without any HTML except finished pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """Rows as dictionaries with the same keys.

    ``columns`` chooses and orders (default: all of the first row). A column ``x`` with another
    ``x_stderr`` (or ``value`` with ``stderr``) is shown as ``0.123 ± 0.004``; columns that are
    empty in every row are left out. ``bars`` are columns of numbers of at least 0 that get a bar
    beside them. ``total`` is the number of rows there are, if more than are given, and ``where``
    says how to get all of them. ``title`` stands above; with ``folded`` the table is behind it.
    ``names`` are what columns are called and ``docs`` what they mean, where the name is not enough.
    """

    rows: Sequence[Mapping[str, Any]]
    columns: Sequence[str] | None = None
    title: str = ""
    folded: bool = False
    bars: Sequence[str] = ()
    total: int | None = None
    where: str = "to_frame()"
    names: Mapping[str, str] = field(default_factory=dict)
    docs: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Card:
    """Everything that an object shows.

    ``kind`` is the name of its class and ``title`` what it is; ``marks`` are one or two words each
    (``"exact"``), ``facts`` labels with short values, ``text`` sentences, ``warnings`` sentences
    that must be seen; ``pictures`` are captions with finished SVG or ``img`` elements of
    :mod:`curvscope.display.pictures`; ``hints`` are pieces of code that lead on.
    """

    title: str
    kind: str = ""
    marks: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: Sequence[str] = ()
    warnings: Sequence[str] = ()
    pictures: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    hints: Sequence[str] = ()


class Shown:
    """Mixed into what shows itself in a notebook.

    A class writes :meth:`_card_`, which must be cheap: no products, no matrix formed, no pass over
    data. Names that begin with an underscore stay out of tab completion.
    """

    def _card_(self) -> Card:
        return Card(title=str(self), kind=type(self).__name__)

    def _repr_html_(self) -> str:
        from .render import render

        return render(self._card_())

    def __dir__(self) -> Iterable[str]:
        names = super().__dir__()
        return [n for n in names if not n.startswith("_") or n.startswith("__") or "repr" in n]


class Readable:
    """A property that the Tab key may read.

    IPython does not evaluate properties of classes it does not know, since they may be slow, but
    it does follow other descriptors.
    """

    def __init__(self, given: property) -> None:
        self.fget = given.fget
        self.__doc__ = given.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self.fget(instance)  # type: ignore[misc]

    def __set__(self, instance: Any, value: Any) -> None:
        raise AttributeError(f"This attribute of {type(instance).__name__} cannot be set.")
