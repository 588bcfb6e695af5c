"""Block-diagonal matrices over a layout, of which some blocks may be undefined."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    OptionError,
    ParameterMismatchError,
    ShapeError,
    check_option,
)
from .base import Layout, Operator, Provenance
from .blocks import Blocks
from .dense import IdentityOperator


class BlockDiagonalOperator(Operator):
    """Blocks on the diagonal, each over some parameters of ``layout``; zero between them.

    ``members`` maps block names to parameter names; left out, every block brings a layout of its
    own. The rows of a block need not be contiguous. A name in ``members`` or ``uncovered_names``
    without a block, and parameters in no block, are *uncovered*: with ``uncovered="raise"``
    everything that needs their rows raises ``UncoveredError``; with ``"zero"`` their rows are those
    of the zero matrix (plus whatever damping is added to the whole later).
    """

    def __init__(
        self,
        blocks: Mapping[str, Operator],
        layout: Layout,
        members: Mapping[str, Sequence[str]] | None = None,
        *,
        uncovered: str = "raise",
        uncovered_names: Sequence[str] = (),
        info: Provenance | None = None,
    ) -> None:
        check_option("uncovered", uncovered, ("raise", "zero"))
        self.layout = layout
        self.info = info or Provenance()
        self.members = _members(blocks, layout, members)
        self._mode = uncovered
        self._rest = 0.0  # what damping has added to the diagonal of uncovered rows
        self._blocks: dict[str, Operator] = {}
        self._rows: dict[str, Tensor] = {}
        for name, block in blocks.items():
            self._blocks[name] = _fitting(name, block, layout.restrict(self.members[name]))
            self._rows[name] = layout.index(self.members[name])
        kinds = {(block.dtype, block.device) for block in blocks.values()}
        if len(kinds) > 1:
            raise OptionError(
                f"The blocks differ in dtype or device: {sorted(map(str, kinds))}. "
                "Convert them with block.to(dtype, device)."
            )
        self.dtype, self.device = (
            kinds.pop() if kinds else (torch.get_default_dtype(), torch.device("cpu"))
        )
        self._rows = {name: rows.to(self.device) for name, rows in self._rows.items()}
        self.shape = (layout.numel, layout.numel)
        self._uncovered = _uncovered_names(self.members, self._blocks, layout, uncovered_names)
        if all(block.positive_semidefinite for block in blocks.values()):
            self.positive_semidefinite = True

    @property
    def blocks(self) -> Mapping[str, Operator]:
        return Blocks(self._blocks, self._uncovered)

    @property
    def uncovered(self) -> tuple[str, ...]:
        return self._uncovered

    def with_uncovered(self, uncovered: str) -> BlockDiagonalOperator:
        """The same matrix with ``uncovered`` rows treated as said (``"raise"`` or ``"zero"``)."""
        check_option("uncovered", uncovered, ("raise", "zero"))
        twin = copy.copy(self)
        twin._mode = uncovered
        return twin

    # -- numbers ---------------------------------------------------------------------------------

    def _matmat(self, vectors: Tensor) -> Tensor:
        self._check("a product with all parameters")
        result = self._rest * vectors.clone(memory_format=torch.contiguous_format)
        for name, rows in self._rows.items():
            result[rows] = self._blocks[name] @ vectors[rows]
        return result

    def _dense(self) -> Tensor:
        self._check("the dense matrix")
        one = IdentityOperator(self.shape[0], self._rest, dtype=self.dtype, device=self.device)
        dense = torch.diag(one.diagonal())
        for name, rows in self._rows.items():
            dense[rows.unsqueeze(1), rows] = self._blocks[name].dense()
        return dense

    def diagonal(self) -> Tensor:
        self._check("the diagonal")
        one = IdentityOperator(self.shape[0], self._rest, dtype=self.dtype, device=self.device)
        diagonal = one.diagonal()
        for name, rows in self._rows.items():
            diagonal[rows] = self._blocks[name].diagonal()
        return diagonal

    def trace(self) -> float:
        self._check("the trace")
        parts = [block.trace() for block in self._blocks.values()]
        return math.fsum([*parts, self._rest * self._free_rows()])

    def frobenius_norm(self) -> float:
        self._check("the norm")
        squares = [block.frobenius_norm() ** 2 for block in self._blocks.values()]
        return math.sqrt(math.fsum([*squares, self._rest**2 * self._free_rows()]))

    def eigenvalues(self) -> Tensor:
        self._check("the spectrum")
        rest = torch.full((self._free_rows(),), self._rest, dtype=self.dtype, device=self.device)
        return torch.cat([*(b.eigenvalues() for b in self._blocks.values()), rest]).sort().values

    def eigh(self) -> tuple[Tensor, Tensor]:
        self._check("the spectrum")
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        values, basis, start = [], like.new_zeros(self.shape), 0
        for name, rows in self._rows.items():
            own, vectors = self._blocks[name].eigh()
            values.append(own)
            basis[rows, start : start + len(rows)] = vectors
            start += len(rows)
        free = self._free_index()
        basis[free, torch.arange(start, self.shape[0], device=self.device)] = 1.0
        values.append(like.new_full((len(free),), self._rest))
        joint, order = torch.cat(values).sort()
        return joint, basis[:, order]

    def logdet(self, damping: float = 0.0) -> float:
        self._check("the determinant")
        damping = self._number(damping, "damping")
        parts = [block.logdet(damping) for block in self._blocks.values()]
        if self._free_rows():
            parts.append(IdentityOperator(self._free_rows(), self._rest).logdet(damping))
        return math.fsum(parts)

    # -- algebra ---------------------------------------------------------------------------------

    def _inverse(self, damping: float) -> Operator:
        rest = 0.0
        if self._free_rows() and (self._mode == "zero" or self._rest + damping != 0):
            rest = IdentityOperator(1, self._rest, info=self.info)._inverted(damping).trace()
        return self._map(lambda block: block._inverted(damping), rest)

    def _scaled(self, factor: float) -> Operator:
        return self._map(lambda block: block.scaled(factor), factor * self._rest)

    def _damped(self, damping: float) -> Operator:
        return self._map(lambda block: block._shifted(damping), self._rest + damping)

    def _plus(self, other: Operator) -> Operator | None:
        if not isinstance(other, BlockDiagonalOperator) or not self.same_blocks(other):
            return None
        if self._uncovered and self._mode != other._mode:
            return None
        blocks = {name: block + other._blocks[name] for name, block in self._blocks.items()}
        return self._with(blocks, self._rest + other._rest)

    def _restricted(self, index: Tensor, layout: Layout) -> Operator:
        wanted = set(layout.names)
        blocks, members = {}, {}
        for name, names in self.members.items():
            kept = [n for n in names if n in wanted]
            if kept:
                members[name] = kept
                if name in self._blocks:
                    blocks[name] = self._blocks[name].restrict(kept)
        twin = BlockDiagonalOperator(blocks, layout, members, uncovered=self._mode)
        if not blocks:
            twin.dtype, twin.device = self.dtype, self.device
        twin._rest = self._rest
        return twin

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Operator:
        twin = self._map(lambda block: block.to(dtype, device), self._rest)
        twin.dtype = dtype or self.dtype
        twin.device = torch.device(device) if device is not None else self.device
        twin._rows = {name: rows.to(twin.device) for name, rows in self._rows.items()}
        return twin

    def same_blocks(self, other: Operator) -> bool:
        """Whether ``other`` is block-diagonal over the same blocks of the same parameters."""
        return (
            isinstance(other, BlockDiagonalOperator)
            and self.layout == other.layout
            and {name: self.members[name] for name in self._blocks}
            == {name: other.members[name] for name in other._blocks}
        )

    def _map(self, change: Any, rest: float) -> BlockDiagonalOperator:
        blocks = {name: change(block) for name, block in self._blocks.items()}
        return self._with(blocks, rest if self._free_rows() else 0.0)

    def _with(self, blocks: dict[str, Operator], rest: float) -> BlockDiagonalOperator:
        twin = copy.copy(self)
        twin._blocks, twin._rest = blocks, rest
        if blocks:
            twin.dtype = next(iter(blocks.values())).dtype
        definite = all(block.positive_semidefinite for block in blocks.values()) and rest >= 0
        twin.positive_semidefinite = True if definite else None
        return twin

    def _check(self, action: str) -> None:
        if self._mode == "raise":
            self._require_covered(action)

    def _free_index(self) -> Tensor:
        free = torch.ones(self.shape[0], dtype=torch.bool, device=self.device)
        for rows in self._rows.values():
            free[rows] = False
        return free.nonzero().squeeze(1)

    def _free_rows(self) -> int:
        return self.shape[0] - sum(len(rows) for rows in self._rows.values())


def _members(
    blocks: Mapping[str, Operator], layout: Layout, members: Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    """Parameter names of every block, in the layout's order, checked to be disjoint."""
    given: dict[str, Sequence[str]] = dict(members or {})
    for name, block in blocks.items():
        if not isinstance(block, Operator):
            raise OptionError(
                f"Block {name!r} must be an Operator, not {type(block).__name__}. Leave out a "
                "block that is not defined: members= then says which parameters are uncovered."
            )
        if name not in given:
            if members is not None or block.layout is None:
                raise OptionError(
                    f"members= does not say which parameters block {name!r} consists of: pass "
                    "members=problem.blocks, or a mapping of block names to parameter names."
                )
            given[name] = block.layout.names
    result: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for name, names in given.items():
        result[name] = layout.restrict(names).names
        for parameter in result[name]:
            if parameter in owner:
                raise ParameterMismatchError(
                    f"The parameter {parameter!r} is in two blocks, {owner[parameter]!r} "
                    f"and {name!r}."
                )
            owner[parameter] = name
    return result


def _fitting(name: str, block: Operator, layout: Layout) -> Operator:
    """``block`` with its layout, after checking that it is the one it should have."""
    if block.shape[0] != layout.numel:
        raise ShapeError(
            f"Block {name!r} has {block.shape[0]} rows, but its parameters "
            f"{list(layout.names)} have {layout.numel}."
        )
    if block.layout is None:
        _check_order(name, block, layout)
        block = copy.copy(block)
        block.layout = layout
    elif block.layout != layout:
        raise ParameterMismatchError(
            f"Block {name!r} speaks of {[tuple(spec.shape) for spec in block.layout]} "
            f"{list(block.layout.names)}, not of {list(layout.names)} in this order."
        )
    return block


def _check_order(name: str, block: Operator, layout: Layout) -> None:
    """Refuse factors of ``[W b]`` in the order of the parameters, where the bias comes last."""
    view = getattr(block, "view", None)
    if view is None or view.perm is not None or "kronecker" not in type(block).__name__.lower():
        return
    shapes = [tuple(spec.shape) for spec in layout]
    if len(shapes) != 2 or len(shapes[0]) < 2 or shapes[1] != shapes[0][:1] or shapes[1][0] == 1:
        return
    inp = math.prod(shapes[0][1:])
    if view.inp == inp + 1:
        raise OptionError(
            f"Block {name!r} is a weight and a bias, of which its factors take the bias for the "
            f"last column: pass view=MatrixView.for_weight_and_bias({shapes[1][0]}, {inp}"
            f"{f', groups={view.groups}' if view.groups > 1 else ''}), which says so."
        )


def _uncovered_names(
    members: Mapping[str, Sequence[str]],
    blocks: Mapping[str, Operator],
    layout: Layout,
    extra: Sequence[str],
) -> tuple[str, ...]:
    """Names of blocks that are missing, and of parameters that no block has."""
    owned = {name for names in members.values() for name in names}
    loose = [name for name in layout.names if name not in owned]
    missing = [name for name in members if name not in blocks]
    wrong = [name for name in extra if name in blocks]
    if wrong:
        raise OptionError(f"{wrong} are listed as uncovered, but have a block.")
    if extra and loose:  # the names given speak for the loose parameters
        loose = []
    elif extra and not missing:
        raise OptionError(
            f"{list(extra)} are listed as uncovered, but every parameter has a block."
        )
    return tuple(dict.fromkeys([*missing, *extra, *loose]))
