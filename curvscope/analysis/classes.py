"""The best that a class of matrices can do: how far its nearest member is from the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..errors import NotDefinedError, ShapeError
from ..operators import (
    BlockDiagonalOperator,
    EigenKroneckerOperator,
    LowRankOperator,
    MatrixView,
    Operator,
)
from ..operators.eigenbasis import kronecker_eigenvalue_correction
from ..operators.nearest import best_diagonal_kronecker, best_kronecker
from .facts import Facts, TooLargeError
from .quantity import Quantity, add
from .structure import eigen_form, family

CLASSES = ("identity", "diagonal", "Kronecker", "diagonal-Kronecker")
"""Classes whose nearest member is known for every weight matrix."""

_CLOSE = 1e-6  # relative squared distance below which differences of squares have cancelled
_ITERATED = 60  # rank up to which leading eigenvalues are iterated for
_LOOSE = 1e-2  # relative residual above which they are not known
_TOL = 1e-10  # of the nearest Kronecker product


def gap_identity(reference: Facts, view: MatrixView | None = None) -> float:
    """``min_c ||R - c I||_F^2``."""
    mean = reference.trace / reference.size
    gap = reference.norm2 - mean * mean * reference.size
    if gap < _CLOSE * reference.norm2 and reference.small:
        shifted = reference.dense.clone()
        shifted.diagonal().sub_(mean)
        return _square(shifted)
    return max(gap, 0.0)


def gap_diagonal(reference: Facts, view: MatrixView | None = None) -> float:
    """``||R - diag(R)||_F^2``."""
    gap = reference.norm2 - _square(reference.diagonal)
    if gap < _CLOSE * reference.norm2 and reference.small:
        bare = reference.dense.clone()
        bare.diagonal().zero_()
        return _square(bare)
    return max(gap, 0.0)


def gap_kronecker(reference: Facts, view: MatrixView | None = None) -> float:
    """Squared distance of the nearest Kronecker product (Van Loan and Pitsianis 1993)."""
    return _gap_product(best_kronecker, reference, view)


def gap_diagonal_kronecker(reference: Facts, view: MatrixView | None = None) -> float:
    """Squared distance of the nearest Kronecker product of diagonal matrices."""
    return _gap_product(best_diagonal_kronecker, reference, view)


GAPS: dict[str, Callable[[Facts, MatrixView | None], float]] = {
    "identity": gap_identity,
    "diagonal": gap_diagonal,
    "Kronecker": gap_kronecker,
    "diagonal-Kronecker": gap_diagonal_kronecker,
}


class Nearest:
    """Squared distances from one reference block to the nearest member of classes, kept.

    ``parts`` are those of smaller blocks, by their parameters, where they are known already.
    """

    def __init__(
        self, reference: Facts, parts: Mapping[tuple[str, ...], Nearest] | None = None
    ) -> None:
        self.reference = reference
        self.parts = dict(parts or {})
        self._kept: dict[tuple[str, MatrixView | None], Quantity] = {}

    @property
    def energy(self) -> Quantity:
        """``||R||_F^2``, or samples of it."""
        return self.reference.energy

    def gap(self, name: str, view: MatrixView | None = None) -> Quantity:
        """For a class of :data:`CLASSES`. Raises ``NotDefinedError`` where it has no meaning."""
        view = view or self.reference.given.view
        if name in ("identity", "diagonal"):
            view = None
        elif view is None:
            raise NotDefinedError(
                f"The rows of this block of the {self.reference.name} form no weight matrix."
            )
        key = (name, view)
        if key not in self._kept:
            self._kept[key] = self._gap(name, view)
        return self._kept[key]

    def _gap(self, name: str, view: MatrixView | None) -> Quantity:
        reference = self.reference
        if not reference.known:
            if name == "identity":
                return add(reference.energy, -reference.squared_trace / reference.size)
            if name == "diagonal":
                return add(reference.energy, -reference.diagonal_energy)
            raise reference.too_large(f"The nearest {name} matrix")
        return GAPS[name](self.reference, view)

    def of(self, op: Operator) -> tuple[str, Quantity]:
        """The class of ``op`` and the squared distance of its nearest member.

        For a matrix in a Kronecker-product eigenbasis the class is that of all matrices with the
        same eigenbasis; for one of low rank that of all matrices of that rank (Eckart and Young).
        """
        name = family(op)
        if isinstance(op, BlockDiagonalOperator) and name != "diagonal":
            return name, self._by_blocks(op)
        if name in CLASSES:
            return name, self.gap(name, op.view)
        if name == "dense":
            return name, 0.0
        if name == "Kronecker-eigenbasis":
            return name, self._in_basis(op)
        if isinstance(op, LowRankOperator):
            return f"rank-{op.rank}", self._beside_leading(op.rank)
        raise NotDefinedError(f"The nearest {name} matrix is not known in closed form.")

    def _beside_leading(self, rank: int) -> Quantity:
        """Energy of all but the leading eigenvalues."""
        reference = self.reference
        try:
            values = reference.eigenvalues.abs().sort(descending=True).values
        except TooLargeError:
            if rank > _ITERATED:
                raise
            values, vectors, residuals = reference.leading(rank)
            if float(residuals.max()) > _LOOSE * float(values.abs().max()):
                raise reference.too_large(
                    f"The {rank} leading eigenvalues", "Raise budget= for an estimate."
                ) from None
            if reference.known:
                return max(reference.norm2 - _square(values), 0.0)
            gaps = []  # noise of the large part would drown the small one
            for z, image in reference.probes:
                rest = image - vectors @ (values.unsqueeze(1) * (vectors.mT @ z))
                gaps.append(rest.square().sum(0))
            return torch.cat(gaps).cpu()
        return _square(values[rank:])

    def _in_basis(self, op: Operator) -> float:
        form = eigen_form(op)
        assert form is not None, "the family says so"
        if not self.reference.known:
            raise self.reference.too_large("The diagonal in that basis")
        factors = form.factors
        source = matrix_of(self.reference)
        found = kronecker_eigenvalue_correction(source, factors["U_G"], factors["U_A"], form.view)
        gap = self.reference.norm2 - _square(found)
        if gap < _CLOSE * self.reference.norm2 and self.reference.small:
            U_G, U_A = factors["U_G"], factors["U_A"]
            nearest = EigenKroneckerOperator(U_G, U_A, found.to(U_G.dtype), form.view)
            return _square(self.reference.dense - nearest.dense().to(torch.float64))
        return max(gap, 0.0)

    def _by_blocks(self, op: BlockDiagonalOperator) -> Quantity:
        """Everything outside the blocks, and the nearest member inside each."""
        gap, withins = self.energy, []
        for name, block in op.blocks.items():
            inside = self.part(op.members[name])
            withins.append(inside.of(block)[1])
            gap = add(gap, add(-inside.energy, withins[-1]))
        if isinstance(gap, torch.Tensor):
            return gap
        small = self.reference.small and self.reference.given.layout is not None
        if gap < _CLOSE * self.reference.norm2 and small:
            gap = self._outside(op)
            for within in withins:
                gap = add(gap, within)
        return gap if isinstance(gap, torch.Tensor) else max(gap, 0.0)

    def _outside(self, op: BlockDiagonalOperator) -> float:
        """Energy outside the blocks, added up there."""
        layout = self.reference.given.layout
        assert layout is not None
        rest = self.reference.dense.clone()
        for name in op.blocks:
            rows = layout.index(op.members[name])
            rest[rows.unsqueeze(1), rows] = 0.0
        return _square(rest)

    def part(self, members: tuple[str, ...]) -> Nearest:
        """The same for the block of some of the parameters."""
        if members not in self.parts:
            reference = self.reference
            source = reference.formed if reference.small else reference.given
            self.parts[members] = Nearest(Facts(source.restrict(members), reference.limits))
        return self.parts[members]


def matrix_of(facts: Facts) -> Operator:
    """The operator whose contractions with factors are cheapest."""
    simple = getattr(facts.op, "simple", True)
    return facts.op if facts.structured and (simple or not facts.small) else facts.formed


def _gap_product(
    nearest: Callable[..., Operator], reference: Facts, view: MatrixView | None
) -> float:
    source = matrix_of(reference)
    try:
        found = nearest(source, view=view, tol=_TOL)
    except ShapeError as error:
        raise NotDefinedError(str(error)) from error
    if reference.small:
        return _square(reference.dense - found.dense().to(torch.float64))
    # at the optimum <R, K> = ||K||^2
    return max(reference.norm2 - found.frobenius_norm() ** 2, 0.0)


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2
