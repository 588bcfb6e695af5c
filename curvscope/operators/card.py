"""What a matrix shows of itself in a notebook: only what is known without computing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..display import Card, Table, spark, strip, thumbnail
from .parameters import Provenance

if TYPE_CHECKING:
    from .base import Operator

_SORTED_LIMIT = 1 << 20  # entries of a stored diagonal that are sorted for a picture


def operator_card(op: Operator) -> Card:
    """Name, size, blocks and stored factors; blocks not computed yet stay so."""
    info = op.info
    sizes, computed = block_sizes(op), computed_blocks(op)
    missing = [name for name in op.uncovered if name in sizes]
    facts: dict[str, Any] = {
        "size": f"{op.shape[0]:,} × {op.shape[1]:,}",
        "form": form(op),
        "route": info.route if info.route != "given" else "",
        "number type": str(op.dtype)[6:],
        "device": str(op.device) if op.device.type != "cpu" else "",
        "computed in": f"{info.seconds:.2g} s" if info.seconds else "",
        "backward passes": info.passes or "",
        "samples": info.settings.get("samples"),
    }
    total = sum(sizes.values())
    rows = [
        {
            "block": name,
            "size": size,
            "share": size / total if total else None,
            "form": "not covered" if name in missing else _block_form(op, name, computed),
            "route": computed[name].info.route if name in computed else "",
        }
        for name, size in sizes.items()
    ]
    said = info != Provenance()
    marks = ["exact" if info.exact else "approximate"] if said else []
    if op.positive_semidefinite:
        marks.append("positive semidefinite")
    notes = list(info.notes)
    if op.uncovered:
        names = ", ".join(op.uncovered[:6]) + (" ..." if len(op.uncovered) > 6 else "")
        notes.append(f"It does not define {names}: products need op.with_uncovered('zero').")
    pictures = [("blocks, as wide as large", strip(sizes, missing))] if len(sizes) > 1 else []
    first = next(iter(sizes), "")
    settings = [{"setting": name, "value": str(value)} for name, value in info.settings.items()]
    tables = [
        Table(rows, bars=("share",), where="op.blocks"),
        Table(settings, title="Settings", folded=True, where="op.info.settings"),
    ]
    return Card(
        title=info.what,
        kind=type(op).__name__,
        marks=marks,
        facts=facts,
        warnings=notes,
        pictures=[*pictures, *stored_pictures(op)],
        tables=tables,
        hints=[f"op.blocks[{first!r}]"] if first else [],
    )


def block_sizes(op: Operator) -> dict[str, int]:
    """Names and sizes of the blocks, uncovered ones included; nothing is computed."""
    from .algebra import Sum
    from .wrappers import Wrapper

    members: Mapping[str, Any] | None = getattr(op, "members", None)
    if members and op.layout is not None:
        entries = {spec.name: spec.numel for spec in op.layout}
        return {name: sum(entries.get(p, 0) for p in own) for name, own in members.items()}
    if len(op.blocks) and isinstance(op, Wrapper):
        return block_sizes(op.base)
    if len(op.blocks) and isinstance(op, Sum):
        return block_sizes(op.terms[0])
    return {}


def computed_blocks(op: Operator) -> dict[str, Operator]:
    """Those blocks that are there already."""
    return dict(getattr(op, "_blocks", {}))


def form(op: Operator) -> str:
    """How a matrix is held, in a few words: ``"10 × 10 ⊗ 65 × 65"``, ``"rank 12"``."""
    from .dense import DenseOperator, IdentityOperator
    from .diagonal import DiagonalOperator
    from .kronecker import DiagonalKroneckerOperator, KroneckerOperator
    from .lowrank import LowRankOperator

    if isinstance(op, KroneckerOperator | DiagonalKroneckerOperator):
        out, inp = op.view.shape[1:]
        groups = f"{op.view.groups} times " if op.view.groups > 1 else ""
        diagonal = "" if isinstance(op, KroneckerOperator) else " (diagonal factors)"
        return f"{groups}{out:,} × {out:,} ⊗ {inp:,} × {inp:,}{diagonal}"
    if isinstance(op, LowRankOperator):
        return f"rank at most {op.rank:,}"
    if isinstance(op, IdentityOperator):
        return "multiple of the identity"
    if isinstance(op, DenseOperator):
        return "all entries"
    if isinstance(op, DiagonalOperator):
        return "diagonal"
    words = {
        "EigenKroneckerOperator": "diagonal in a Kronecker eigenbasis",
        "RowGramOperator": "rows of the square root",
        "RowHessianOperator": "Hessians of the rows",
        "BlockDiagonalOperator": "block-diagonal",
        "WholeOperator": "matrix-free",
        "AutogradOperator": "matrix-free",
        "FunctionOperator": "matrix-free",
        "Sum": "a sum, not formed",
        "Scaled": "a multiple, not formed",
        "Damped": "a shift, not formed",
        "Restricted": "a part, not formed",
    }
    return words.get(type(op).__name__, "")


def stored_pictures(op: Operator) -> list[tuple[str, str]]:
    """Small pictures of stored entries: of factors, of a dense matrix, of a diagonal."""
    from .dense import DenseOperator
    from .diagonal import DiagonalOperator

    if isinstance(op, DenseOperator):
        return [("entries", thumbnail(op._matrix, "entries"))]
    if isinstance(op, DiagonalOperator):
        return _line("diagonal, sorted", op._diagonal)
    found: list[tuple[str, str]] = []
    factors: Mapping[str, Tensor] = getattr(op, "factors", {})
    for name, factor in factors.items():
        caption = f"{name} {' × '.join(map(str, factor.shape))}"
        if factor.ndim == 1:
            found += _line(f"{caption}, sorted", factor)
        elif factor.ndim == 2:
            found.append((caption, thumbnail(factor, f"factor {name}")))
    return found


def _line(caption: str, values: Tensor) -> list[tuple[str, str]]:
    if not 1 < values.numel() <= _SORTED_LIMIT:
        return []
    ordered = values.detach().flatten().sort(descending=True).values.tolist()
    return [(caption, spark(ordered, caption))]


def _block_form(op: Operator, name: str, computed: Mapping[str, Operator]) -> str:
    if name in computed:
        return form(computed[name]) or type(computed[name]).__name__
    return "made when asked for"
