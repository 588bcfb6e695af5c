"""Looking into an optimizer: its matrix as Operators, its factors, what covers which parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UncoveredError, UnknownBlockError, nearest
from ..operators import BlockDiagonalOperator, Layout, Operator, Provenance
from .rows import Rows

if TYPE_CHECKING:
    from .layer import Layer


class Inspection:
    """The read-only half of :class:`~curvscope.optim.base.CurvatureOptimizer`."""

    method: ClassVar[str]
    model: nn.Module
    fallback: str
    steps: int
    device: torch.device
    dtype: torch.dtype
    params: dict[str, nn.Parameter]
    layout: Layout
    blocks: dict[str, tuple[str, ...]]
    layers: dict[str, Layer]
    _reasons: Mapping[str, str]
    _fired: set[str]

    # -- given by subclasses ---------------------------------------------------------------------

    def _operator(self, block: str, kind: str) -> Operator | None:
        """The block's ``"preconditioner"``, ``"damped"`` or ``"raw"`` curvature, or ``None``."""
        return None

    def _damping(self, block: str) -> float | None:
        """The multiple of the identity that ``"damped"`` adds to ``"raw"``, as far as it is one
        number: what ``cs.compare`` adds to the exact matrix."""
        return None

    def curvature_work(self, block: str) -> float:
        """About how many operations a block of :meth:`curvature` takes, beside reading it."""
        return 0.0

    def _factors(self, block: str) -> dict[str, Tensor]:
        """The named factors of a block; only called where :meth:`_operator` gives one."""
        return {}

    def _diagnose(self, block: str) -> dict[str, Any]:
        """Numbers about the last step for one block."""
        return {}

    # -- for everybody ---------------------------------------------------------------------------

    def curvature(
        self, *, damped: bool = True, blocks: Sequence[str] | None = None
    ) -> BlockDiagonalOperator:
        """The matrix that the method believes in, in the blocks of ``cs.Problem``.

        ``damped=True``: exactly the inverse of :meth:`preconditioner`; ``damped=False``: from the
        raw factors. Blocks that the fallback updates, or that have not been seen yet, are in
        ``uncovered``, with reasons in ``info.settings["uncovered"]``; before the first step these
        are all. ``info.settings`` also holds the ``"damping"`` (a mapping from blocks where they
        differ) and whether the matrix is ``"damped"``, for ``cs.compare``.

        ``blocks`` are the names of those wanted, by default all; the others are in ``uncovered``.
        Where a method keeps inverses only, making a block takes O(n^3) for its factors' sizes n.
        Raises ``UnknownBlockError`` for a name that is no block's.
        """
        for name in blocks or ():
            if name not in self.blocks:
                raise UnknownBlockError(
                    f"There is no block {name!r}.{nearest(name, list(self.blocks))} Blocks are "
                    f"{list(self.blocks)}."
                )
        return self._assemble("damped" if damped else "raw", blocks)

    def preconditioner(self) -> BlockDiagonalOperator:
        """The matrix by which the (averaged) gradient is multiplied, as applied."""
        return self._assemble("preconditioner")

    def _assemble(self, kind: str, wanted: Sequence[str] | None = None) -> BlockDiagonalOperator:
        title = {"preconditioner": "preconditioner", "damped": "curvature", "raw": "raw curvature"}
        info = Provenance(what=f"{self.method} {title[kind]}", route="optimizer", exact=False)
        blocks: dict[str, Operator] = {}
        missing: dict[str, str] = {}
        for name, members in self.blocks.items():
            if wanted is not None and name not in wanted:
                missing[name] = "not asked for"
                continue
            op = self._operator(name, kind)
            if op is None:
                missing[name] = self._why_not(name)
            else:
                op.layout = self.layout.restrict(members)
                op.info = info.with_(settings=self._settings(kind, [name]))
                blocks[name] = op
        info = info.with_(settings={"uncovered": missing, **self._settings(kind, list(blocks))})
        op = BlockDiagonalOperator(blocks, self.layout, self.blocks, info=info)
        if not blocks:
            op.dtype, op.device = torch.promote_types(self.dtype, torch.float32), self.device
        return op

    def _settings(self, kind: str, blocks: Sequence[str]) -> dict[str, Any]:
        """What ``cs.compare`` reads: steps taken, the damping, and whether it is in the matrix."""
        found: dict[str, Any] = {"steps": self.steps}
        if kind == "preconditioner":
            return found
        own = {name: self._damping(name) for name in blocks}
        each: dict[str, float] = {name: value for name, value in own.items() if value is not None}
        if each:
            same = len(each) == len(own) and len(set(each.values())) == 1
            found["damping"] = next(iter(each.values())) if same else each
        return {**found, "damped": kind == "damped"}

    def _why_not(self, block: str) -> str:
        if block in self._reasons:
            return self._reasons[block]
        if self.steps == 0:
            return "no step has been taken"
        return "its layer has not been seen to run as a module (its hook never fired)"

    def factors(self, block: str) -> dict[str, Tensor]:
        """The named factors of a block, such as ``A`` and ``G``; copies.

        Of a convolution with groups they have an axis of groups first. On the input side the last
        entry belongs to the 1 that a bias appends.

        Raises ``UnknownBlockError`` or, for a block that the method does not define,
        ``UncoveredError``.
        """
        if block not in self.blocks:
            raise UnknownBlockError(
                f"{self.method} has no block {block!r}.{nearest(block, self.blocks)} "
                f"Blocks: {', '.join(self.blocks)}."
            )
        if self._operator(block, "preconditioner") is None:
            raise UncoveredError(
                f"{self.method} has no factors for block {block!r}: {self._why_not(block)}."
            )
        return {k: v.detach().clone() for k, v in self._factors(block).items()}

    def coverage(self) -> Rows:
        """Parameter by parameter: ``parameter``, ``block``, ``shape``, ``rule``, ``reason``.

        ``rule`` is the method's name, the fallback, or (before a layer has been seen to run) the
        method's name with the reason ``"expected"``.
        """
        rows = Rows()
        for block, names in self.blocks.items():
            covered = block in self.layers and (block in self._fired or self.steps == 0)
            for name in names:
                if covered:
                    reason = type(self.layers[block].module).__name__
                    reason += "" if block in self._fired else ", expected: no step has been taken"
                else:
                    reason = self._why_not(block)
                shape = tuple(self.params[name].shape)
                rule = self.method if covered else self.fallback
                row = {"parameter": name, "block": block, "shape": shape}
                rows.append({**row, "rule": rule, "reason": reason})
        return rows

    def diagnostics(self) -> Rows:
        """One row per block about the last step: ``block``, ``step``, ``rule`` and the method's
        own numbers."""
        rules = {row["block"]: row["rule"] for row in self.coverage()}
        return Rows(
            {
                "block": block,
                "step": self.steps,
                "rule": rules[block],
                **(self._diagnose(block) if block in self.layers else {}),
            }
            for block in self.blocks
        )
