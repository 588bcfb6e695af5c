"""Sums, multiples and damped operators, kept as expressions where nothing is simpler."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from ..errors import OptionError, ParameterMismatchError, ShapeError
from .base import Layout, Operator, Provenance
from .blocks import Blocks, MappedBlocks
from .numerics import symmetric
from .wrappers import Wrapper, norm_by_columns

_SMALL = 4096  # rows up to which a norm is taken column by column
_PARTS_NAMED = 3  # longer sums are called "sum of n matrices"


def add(left: Operator, right: Operator) -> Operator:
    """``left + right``, of the same class where that can be, else a :class:`Sum`."""
    _check_same_parameters([left, right])
    twin = left._plus(right)
    if twin is None:
        twin = right._plus(left)
    if twin is None:
        return Sum([left, right])
    twin = copy.copy(twin)
    if left.positive_semidefinite and right.positive_semidefinite:
        twin.positive_semidefinite = True
    twin.layout = left.layout if left.layout is not None else right.layout
    twin.view = left.view if left.view is not None else right.view
    twin.info = _joint_info([left, right])
    return twin


class Sum(Operator):
    """The sum of operators over the same parameters; nested sums are flattened."""

    _stored = True

    def __init__(self, terms: Sequence[Operator]) -> None:
        flat: list[Operator] = []
        for term in terms:
            flat.extend(term.terms if isinstance(term, Sum) else [term])
        if not flat:
            raise OptionError("A sum needs at least one operator.")
        _check_same_parameters(flat)
        self.terms: tuple[Operator, ...] = tuple(flat)
        self.shape, self.device = flat[0].shape, flat[0].device
        self.dtype = flat[0].dtype
        for term in flat:
            self.dtype = torch.promote_types(self.dtype, term.dtype)
            self.layout = self.layout if self.layout is not None else term.layout
            self.view = self.view if self.view is not None else term.view
        self.info = _joint_info(flat)
        if all(term.positive_semidefinite for term in flat):
            self.positive_semidefinite = True

    def _matmat(self, vectors: Tensor) -> Tensor:
        result = torch.zeros_like(vectors, memory_format=torch.contiguous_format)
        for term in self.terms:
            result += term @ vectors
        return result

    def _dense(self) -> Tensor:
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for term in self.terms:
            # where terms cancel, what rounding left unsymmetric in them would pass for asymmetry
            result += symmetric(f"The {term.info.what}", term.dense())
        return result

    def diagonal(self) -> Tensor:
        result = self.terms[0].diagonal().to(self.dtype)
        for term in self.terms[1:]:
            result += term.diagonal()
        return result

    def trace(self) -> float:
        return math.fsum(term.trace() for term in self.terms)

    def frobenius_norm(self) -> float:
        """From products for small matrices, else from inner products of the terms.

        The second loses digits where the terms cancel: a difference of relative size ``e`` is
        known to ``eps / e**2``.
        """
        if self.shape[0] <= _SMALL:
            return norm_by_columns(self)
        square = 0.0
        for place, term in enumerate(self.terms):
            square += term.frobenius_norm() ** 2
            square += 2.0 * math.fsum(term.inner(other) for other in self.terms[:place])
        return math.sqrt(max(square, 0.0))

    @property
    def blocks(self) -> Mapping[str, Operator]:
        parts = [term.blocks for term in self.terms]
        names = list(parts[0])
        if any(list(blocks) != names for blocks in parts):
            return Blocks({})

        def make(name: str) -> Operator:
            return reduce(add, (blocks[name] for blocks in parts))

        return MappedBlocks(names, make)

    @property
    def uncovered(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for term in self.terms for name in term.uncovered))

    def _plus(self, other: Operator) -> Operator | None:
        # try to melt the new term into one of the present ones before growing the list
        for place, term in enumerate(self.terms):
            joint = term._plus(other)
            if joint is None:
                joint = other._plus(term)
            if joint is not None:
                return Sum([*self.terms[:place], joint, *self.terms[place + 1 :]])
        return None

    def _restricted(self, index: Tensor, layout: Layout) -> Operator:
        return Sum([term._restricted(index, layout) for term in self.terms])


class Scaled(Wrapper):
    """``factor * base``."""

    def __init__(self, base: Operator, factor: float) -> None:
        self.factor = self._number(factor, "factor")
        super().__init__(base, base.info.with_(what=f"{factor:g} * ({base.info.what})"))
        self.positive_semidefinite = True if factor >= 0 and base.positive_semidefinite else None

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self.factor * (self.base @ vectors)

    def _dense(self) -> Tensor:
        return self.factor * self.base.dense()

    def diagonal(self) -> Tensor:
        return self.factor * self.base.diagonal()

    def trace(self) -> float:
        return self.factor * self.base.trace()

    def frobenius_norm(self) -> float:
        return abs(self.factor) * self.base.frobenius_norm()

    def eigenvalues(self) -> Tensor:
        values = self.factor * self.base.eigenvalues()
        return values if self.factor >= 0 else values.flip(0)

    def eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = self.base.eigh()
        if self.factor >= 0:
            return self.factor * values, vectors
        return (self.factor * values).flip(0), vectors.flip(1)

    @property
    def blocks(self) -> Mapping[str, Operator]:
        own = self.base.blocks
        return MappedBlocks(list(own), lambda name: own[name].scaled(self.factor))

    def _inverse(self, damping: float) -> Operator:
        if self.factor == 0:
            from .dense import IdentityOperator

            zero = IdentityOperator(self.shape[0], 0.0, dtype=self.dtype, device=self.device)
            return zero._inverse(damping)
        return self.base._inverted(damping / self.factor).scaled(1.0 / self.factor)

    def _scaled(self, factor: float) -> Operator:
        return self.base.scaled(factor * self.factor)

    def _restricted(self, index: Tensor, layout: Layout) -> Operator:
        return self.base._restricted(index, layout).scaled(self.factor)


class Damped(Wrapper):
    """``base + damping I``, with the inverse that the structure of ``base`` gives."""

    def __init__(self, base: Operator, damping: float) -> None:
        self.damping = self._number(damping, "damping")
        super().__init__(base, base.info.with_(what=f"{base.info.what} + {damping:g} I"))
        self.positive_semidefinite = True if damping >= 0 and base.positive_semidefinite else None

    def _matmat(self, vectors: Tensor) -> Tensor:
        return (self.base @ vectors).add_(vectors, alpha=self.damping)

    def _dense(self) -> Tensor:
        dense = self.base.dense()
        dense.diagonal().add_(self.damping)
        return dense

    def diagonal(self) -> Tensor:
        return self.base.diagonal() + self.damping

    def trace(self) -> float:
        return self.base.trace() + self.damping * self.shape[0]

    def frobenius_norm(self) -> float:
        own = self.base.frobenius_norm() ** 2
        square = own + self.damping * (2.0 * self.base.trace() + self.damping * self.shape[0])
        if square < 1e-6 * own and self.shape[0] <= _SMALL:  # most digits have cancelled
            return norm_by_columns(self)
        return math.sqrt(max(square, 0.0))

    def eigenvalues(self) -> Tensor:
        return self.base.eigenvalues() + self.damping

    def eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = self.base.eigh()
        return values + self.damping, vectors

    def logdet(self, damping: float = 0.0) -> float:
        return self.base.logdet(self.damping + self._number(damping, "damping"))

    @property
    def blocks(self) -> Mapping[str, Operator]:
        own = self.base.blocks
        return MappedBlocks(list(own), lambda name: own[name]._shifted(self.damping))

    def _inverse(self, damping: float) -> Operator:
        return self.base._inverted(self.damping + damping)

    def _scaled(self, factor: float) -> Operator:
        return self.base.scaled(factor)._shifted(factor * self.damping)

    def _damped(self, damping: float) -> Operator:
        return self.base._shifted(self.damping + damping)

    def _plus(self, other: Operator) -> Operator | None:
        joint = self.base._plus(other)
        return None if joint is None else joint._shifted(self.damping)

    def _restricted(self, index: Tensor, layout: Layout) -> Operator:
        return self.base._restricted(index, layout)._shifted(self.damping)


def _check_same_parameters(terms: Sequence[Operator]) -> None:
    first = terms[0]
    for other in terms[1:]:
        if other.shape != first.shape:
            raise ShapeError(
                f"Operators of shapes {first.shape} and {other.shape} cannot be added."
            )
        if other.device != first.device:
            raise ParameterMismatchError(
                f"Operators live on {first.device} and {other.device}; "
                "move one with op.to(device=...)."
            )
    known = [t.layout for t in terms if t.layout is not None]
    if any(layout != known[0] for layout in known):
        raise ParameterMismatchError(
            "The operators speak of different parameters or of another order: "
            f"{[list(layout.names) for layout in known[:2]]}. Use op.restrict(names) to align them."
        )


def _joint_info(terms: Sequence[Operator]) -> Provenance:
    infos = [term.info for term in terms]
    names = [info.what for info in infos]
    what = " + ".join(names) if len(names) <= _PARTS_NAMED else f"sum of {len(names)} matrices"
    return Provenance(
        what=what,
        route="sum",
        exact=all(info.exact for info in infos),
        notes=tuple(dict.fromkeys(note for info in infos for note in info.notes)),
        seconds=sum(info.seconds for info in infos),
        passes=sum(info.passes for info in infos),
    )
