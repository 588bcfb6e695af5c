"""The mapping from block names to blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ..display import Card, Shown, Table
from ..errors import UnknownBlockError, counted, nearest
from .base import Operator


class BlockMapping(Shown, Mapping[str, Operator]):
    """What mappings of blocks share: tab completion, and a table of names.

    ``blocks["conv1"]`` completes after the quote, ``blocks.conv1`` after the dot where the name is
    an identifier.
    """

    def __getattr__(self, name: str) -> Operator:
        if not name.startswith("_") and name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has neither an attribute nor a block {name!r}")

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *(name for name in self if name.isidentifier())]

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def _known(self) -> Mapping[str, Operator]:
        """Blocks that are there without computing anything."""
        found: Mapping[str, Operator] = vars(self).get("_blocks", {})
        return found

    def _card_(self) -> Card:
        known = self._known()
        rows = [
            {
                "block": name,
                "matrix": repr(block) if (block := known.get(name)) else "made when asked for",
            }
            for name in self
        ]
        return Card(title=counted(len(rows), "block"), tables=[Table(rows, where="list(blocks)")])


class Blocks(BlockMapping):
    """Blocks by name, in order; an unknown name raises ``UnknownBlockError`` with the nearest."""

    def __init__(self, blocks: Mapping[str, Operator], uncovered: Sequence[str] = ()) -> None:
        self._blocks = dict(blocks)
        self._uncovered = tuple(uncovered)

    def __getitem__(self, name: str) -> Operator:
        try:
            return self._blocks[name]
        except KeyError:
            pass
        if name in self._uncovered:
            raise UnknownBlockError(
                f"The block {name!r} is not defined by this matrix (see op.uncovered). "
                f"Defined are {', '.join(map(repr, self._blocks)) or 'none'}."
            )
        hint = nearest(str(name), self._blocks)
        raise UnknownBlockError(
            f"There is no block {name!r}.{hint} "
            f"Blocks are {', '.join(map(repr, self._blocks)) or 'none'}."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: object) -> bool:
        return name in self._blocks

    def __repr__(self) -> str:
        return f"Blocks({self._blocks!r})"


class MappedBlocks(BlockMapping):
    """Blocks made from other blocks when they are asked for, since those may be costly."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Operator]) -> None:
        self._names, self._make = tuple(names), make

    def __getitem__(self, name: str) -> Operator:
        return self._make(name)  # an unknown name is refused by the blocks underneath

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __repr__(self) -> str:
        return f"MappedBlocks({list(self._names)!r})"
