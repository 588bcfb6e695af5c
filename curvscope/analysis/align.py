"""Bringing a reference and approximations to the same parameters and the same blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import (
    NonFiniteError,
    OptionError,
    ParameterMismatchError,
    ShapeError,
    UnknownBlockError,
    nearest,
)
from ..operators import BlockDiagonalOperator, Layout, Operator
from .coerce import as_operator
from .comparison import WHOLE, place
from .result import listing

Members = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Part:
    """An approximation on one block: the operator, or why there is none."""

    op: Operator | None
    status: str = "compared"
    note: str = ""


def align(
    reference: Operator, approximations: Mapping[str, Operator] | Operator
) -> tuple[Operator, dict[str, Operator]]:
    """All operators over the same layout and on the reference's device.

    An operator without a layout takes that of the others, if it has as many rows. Raises
    ``ParameterMismatchError`` that names what differs.
    """
    reference = as_operator(reference, "The reference")
    if not isinstance(approximations, Mapping):
        single = as_operator(approximations, "The approximation")
        approximations = {single.info.what: single}
    if not approximations:
        raise OptionError('There is nothing to compare: pass {"name": operator, ...}.')
    given = {
        str(name): as_operator(op, f"The approximation {name!r}")
        for name, op in approximations.items()
    }
    layout = reference.layout
    for op in given.values():
        layout = layout if layout is not None else op.layout
    reference = _with_layout(reference, layout, "reference")
    result = {}
    for name, op in given.items():
        op = _with_layout(op, layout, repr(name))
        if op.shape != reference.shape:
            raise ShapeError(
                f"{name!r} has {op.shape[0]} rows, the reference {reference.shape[0]}. "
                "Compare operators of the same parameters: reference.restrict(names)."
            )
        result[name] = op if op.device == reference.device else op.to(device=reference.device)
    return reference, result


def _with_layout(op: Operator, layout: Layout | None, name: str) -> Operator:
    if layout is None or op.layout == layout:
        return op
    if op.layout is not None:
        raise ParameterMismatchError(_difference(name, op.layout, layout))
    if op.shape[0] != layout.numel:
        raise ParameterMismatchError(
            f"The {name} has {op.shape[0]} rows and no layout; the others are over "
            f"{layout.numel} parameters."
        )
    op = copy.copy(op)
    op.layout = layout
    return op


def _difference(name: str, left: Layout, right: Layout) -> str:
    """What differs between two layouts, in words."""
    ours = {spec.name: spec.shape for spec in left}
    theirs = {spec.name: spec.shape for spec in right}
    parts = []
    missing = [n for n in theirs if n not in ours]
    extra = [n for n in ours if n not in theirs]
    shapes = [n for n in ours if n in theirs and ours[n] != theirs[n]]
    if missing:
        parts.append(f"it lacks {missing}")
    if extra:
        parts.append(f"it has {extra} in addition")
    for n in shapes[:3]:
        parts.append(f"{n!r} is {list(ours[n])} instead of {list(theirs[n])}")
    if not parts:
        parts.append(f"the order is {list(left.names)} instead of {list(right.names)}")
    return (
        f"The parameters of {name} are not those of the others: {'; '.join(parts)}. Restrict the "
        "larger one with op.restrict(names), or compute both from the same Problem."
    )


def partition(
    reference: Operator, approximations: Mapping[str, Operator], blocks: Any
) -> tuple[Members, bool]:
    """Blocks and their parameters, and whether the whole matrix is wanted as well.

    The blocks are those of the reference, else of the first approximation that has any, or what
    the user maps names to.
    """
    if isinstance(blocks, Mapping):
        if reference.layout is None:
            raise ParameterMismatchError("blocks= needs operators that know their parameters.")
        chosen = {
            str(name): reference.layout.restrict([m] if isinstance(m, str) else list(m)).names
            for name, m in blocks.items()
        }
        owners = [n for names in chosen.values() for n in names]
        twice = sorted({n for n in owners if owners.count(n) > 1})
        if twice:
            raise OptionError(f"The parameters {twice} are in more than one of blocks=.")
        return chosen, True
    members: Members = {}
    for op in (reference, *approximations.values()):
        members = _members(op)
        if members:
            break
    if blocks is None:
        return members, True
    wanted = [blocks] if isinstance(blocks, str) else list(blocks)
    for name in wanted:
        if name != WHOLE and name not in members:
            raise UnknownBlockError(
                f"There is no block {name!r}.{nearest(str(name), members)} Blocks are "
                f"{', '.join(map(repr, members)) or 'none'}."
            )
    return {n: m for n, m in members.items() if n in wanted}, WHOLE in wanted


def _members(op: Operator) -> Members:
    own = getattr(op, "members", None)
    if own is not None:
        return {name: tuple(names) for name, names in own.items()}
    found: Members = {}
    for name, block in op.blocks.items():
        if block.layout is None:
            raise ParameterMismatchError(
                f"Block {name!r} of the {op.info.what} does not know its parameters; "
                "give it a layout."
            )
        found[name] = block.layout.names
    return found


def part(op: Operator, name: str, members: Sequence[str]) -> Part:
    """``op`` on one block of the partition."""
    members = tuple(members)
    own = _members(op)
    if own.get(name) == members and name in op.blocks:
        return Part(op.blocks[name])
    if own.get(name) == members and name in op.uncovered and not _rest(op):
        return Part(None, "uncovered", _missing(op, "this block", name))
    if op.layout is None:
        raise ParameterMismatchError(
            f"The {op.info.what} does not know its parameters, so it has no block {name!r}."
        )
    found = op.restrict(members)
    if isinstance(found, BlockDiagonalOperator):
        return _covered(found)
    return Part(found)


def whole(op: Operator) -> Part:
    """``op`` over all parameters, what it does not define taken as zero."""
    if isinstance(op, BlockDiagonalOperator):
        return _covered(op)
    return Part(op)


def _covered(op: BlockDiagonalOperator) -> Part:
    if len(op.blocks) == 1 and not op.uncovered:
        (name,) = op.blocks
        if op.blocks[name].shape == op.shape:
            return Part(op.blocks[name])
    if not op.uncovered:
        return Part(op)
    names = listing([place(name) for name in op.uncovered])
    if not op.blocks and not _rest(op):
        return Part(None, "uncovered", _missing(op, names))
    taken = "a multiple of the identity" if _rest(op) else "zero"
    return Part(op.with_uncovered("zero"), "partial", f"{names} not covered, taken as {taken}")


def _missing(op: Operator, what: str, name: str | None = None) -> str:
    """That a block is not defined, and why if the operator says so."""
    reasons = op.info.settings.get("uncovered")
    reason = reasons.get(name) if isinstance(reasons, Mapping) else None
    return f"the {op.info.what} does not define {what}" + (f": {reason}" if reason else "")


def _rest(op: Operator) -> float:
    return getattr(op, "_rest", 0.0) if getattr(op, "_mode", "raise") == "zero" else 0.0


def damping_of(
    op: Operator, name: str, damping: float | Mapping[str, float] | None, block: str | None = None
) -> tuple[float | None, bool]:
    """The damping to compare under, and whether the approximation contains it already.

    ``None`` takes what the approximation says of itself: ``info.settings["damping"]``, a number or
    one per block (the whole matrix then has none), and ``info.settings["damped"]`` where it is part
    of the matrix.
    """
    settings = op.info.settings
    given = damping.get(name) if isinstance(damping, Mapping) else damping
    own = settings.get("damping")
    if isinstance(own, Mapping):
        own = own.get(block)
    inside = settings.get("damped") is True
    if given is None:
        return float(own) if isinstance(own, int | float) else None, inside
    value = float(given)
    if not value >= 0 or value == float("inf"):
        raise (OptionError if value < 0 else NonFiniteError)(
            f"damping={given!r} must be a finite number that is not negative."
        )
    return value, inside
