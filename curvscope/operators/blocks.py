"""The mapping from block names to blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ..errors import UnknownBlockError, nearest
from .base import Operator


class Blocks(Mapping[str, Operator]):
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


class MappedBlocks(Mapping[str, Operator]):
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
