"""Numbers about one matrix, each computed once, in the cheapest way that its size allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import memory
from ..errors import MemoryLimitError, NonFiniteError, NotDefinedError
from ..operators import DenseOperator, EigenKroneckerOperator, Operator
from ..operators.numerics import log_determinant, symmetric
from .coerce import in_float64
from .gram_form import GramForm
from .iterations import ConjugateGradients
from .lanczos import leading_of_dense
from .probes import Probes, squared_trace
from .quantity import Quantity, Value
from .spectrum import condition_of
from .structure import (
    as_numpy,
    eigen_form,
    eigen_rows,
    has_inverse_form,
    is_structured,
    leading_by_structure,
)
from .unformed import (
    SpectralSamples,
    bounded_condition,
    bounded_norm,
    outer_pairs,
    rows_of_diagonal,
)

_ROWS = 3000  # beyond, O(d^3) takes more than a few seconds
_COPIES = 6  # matrices of one size that a comparison holds at its peak
_STEPS = 500  # of conjugate gradients with a structured matrix
_UNSOLVED = 1e-2  # relative residual above which a solution is none
_ALLOW = "Pass a larger memory= (and, for a whole matrix, budget=) to allow it."
_ITERATED = 200_000  # rows beyond which a metric that iterates must be asked for
_SOLVED = 1e-10  # relative residual of conjugate gradients


class TooLargeError(MemoryLimitError):
    """A number would need a matrix to be formed that is too large; recorded as the reason."""


@dataclass(frozen=True)
class Limits:
    """What a comparison may spend.

    Matrices of up to ``rows`` rows are formed. Of one known by its products only, up to
    ``products`` are taken for an estimate, or fewer once its relative standard error is ``tol``.
    Matrices of more than 200,000 rows are iterated on only if the comparison is ``thorough``.
    ``by_products`` ignores the structure of references.
    """

    rows: int
    products: int = 100
    tol: float | None = None
    seed: int = 0
    thorough: bool = False
    by_products: bool = False


def affordable_rows(budget: int | None, device: torch.device | str = "cpu") -> int:
    """Rows that fit a budget in bytes; by default a quarter of the memory, and at most 3,000."""
    if budget is None:
        free = memory.available_bytes(device) // 4
        return min(_ROWS, math.isqrt(max(0, free // (8 * _COPIES))))
    return math.isqrt(max(0, budget // (8 * _COPIES)))


class Facts:
    """One matrix within a comparison. Raises :class:`TooLargeError` for what it cannot afford."""

    def __init__(self, op: Operator, limits: Limits, *, by_products: bool = False) -> None:
        self.given = op
        self.op = in_float64(op)
        self.limits = limits
        self.size = op.shape[0]
        self.small = self.size <= limits.rows
        self.structured = is_structured(op) and not by_products
        self.known = self.small or self.structured
        self.products = 0
        self.partner: Facts | None = None  # whose probes these are to be like
        use_gram = not (self.small or by_products)
        self.gram = GramForm.of(self.op, limits.rows) if use_gram else None
        self._dense: Tensor | None = None
        self._formed: DenseOperator | None = None
        self._solved: dict[float, tuple[Tensor, float]] = {}
        self._leading: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def name(self) -> str:
        return self.given.info.what

    @property
    def method(self) -> str:
        """How numbers that need all entries are got."""
        return "exact" if self.small else "structured"

    def too_large(self, what: str, instead: str = _ALLOW) -> TooLargeError:
        return TooLargeError(
            f"{what} of the {self.name} ({self.size:,} rows) would need it to be formed. {instead}"
        )

    @property
    def dense(self) -> Tensor:
        """The matrix in float64, kept until :meth:`release`."""
        if self._dense is None:
            if not self.small:
                raise self.too_large("The entries")
            # before the conversion: there its rounding would pass for asymmetry
            dense = symmetric(f"The {self.name}", self.op.dense()).to(torch.float64)
            if not math.isfinite(float(dense.sum())):  # cheaper than looking at every entry
                raise NonFiniteError(
                    f"The {self.name} has NaN or infinite entries; look for the first layer whose "
                    "output is not finite."
                )
            self._dense = dense
            if not self.structured:  # from here on products are cheap
                self.op = self.formed
        return self._dense

    @property
    def formed(self) -> DenseOperator:
        """The matrix as a stored one, with its parameters."""
        if self._formed is None:
            given = self.given
            self._formed = DenseOperator(
                self.dense,
                layout=given.layout,
                view=given.view,
                info=given.info,
                positive_semidefinite=given.positive_semidefinite,
            )
        return self._formed

    def release(self) -> None:
        """Forget what is large."""
        self._dense = self._formed = None
        self._solved.clear()
        self._leading.clear()
        self.op = in_float64(self.given)
        for name in ("eigen", "eigenvalues", "eigenvalues_or_samples"):
            vars(self).pop(name, None)
        if "probes" in vars(self):
            self.probes.release()

    def matmat(self, vectors: Tensor) -> Tensor:
        """Product with ``[P, k]``, counted where the matrix is known by its products only."""
        if not self.structured and self._dense is None:
            self.products += vectors.shape[1]
        return (self.op @ vectors).to(torch.float64)

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matmat(vector.unsqueeze(1)).squeeze(1)

    def count(self, products: int) -> None:
        """Note products that an estimator has taken."""
        if not self.structured and self._dense is None:
            self.products += products

    def may_iterate(self) -> None:
        """Refuse to iterate on a very large matrix unless that was asked for."""
        if self.size > _ITERATED and not (self.small or self.limits.thorough):
            raise self.too_large(
                "This number", "Iterating takes time: ask by name, metrics=[...], for an estimate."
            )

    @cached_property
    def probes(self) -> Probes:
        """Random vectors and their products."""
        return Probes(self, count=self.partner.probes.count if self.partner else None)

    # -- sums ------------------------------------------------------------------------------------

    @cached_property
    def norm2(self) -> float:
        """Squared Frobenius norm."""
        if self.small:
            return float(torch.linalg.vector_norm(self.dense)) ** 2
        if not self.structured:
            raise self.too_large("The norm", "It can be estimated by products.")
        return self.op.frobenius_norm() ** 2

    @cached_property
    def trace(self) -> float:
        return math.fsum(as_numpy(self.diagonal).tolist()) if self.small else self._trace()

    def _trace(self) -> float:
        if not self.structured:
            raise self.too_large("The trace", "Use cs.trace(op), which estimates it.")
        return self.op.trace()

    @cached_property
    def diagonal(self) -> Tensor:
        if self.small:
            return self.dense.diagonal().clone()
        if not self.structured:
            raise self.too_large("The diagonal", "Use cs.diagonal(op), which estimates it.")
        return self.op.diagonal().to(torch.float64)

    @property
    def energy(self) -> Quantity:
        """Squared Frobenius norm, or samples of it."""
        return self.norm2 if self.known else self.probes.squares

    @property
    def traces(self) -> Quantity:
        """Trace, or samples of it (Hutchinson)."""
        try:
            return self.trace
        except TooLargeError:
            return self.probes.traces

    @property
    def squared_trace(self) -> Quantity:
        """Squared trace, or samples of it."""
        return squared_trace(self.traces)

    @property
    def diagonal_energy(self) -> Quantity:
        """Squared length of the diagonal, or samples of it."""
        try:
            return float(self.diagonal.square().sum())
        except TooLargeError:
            return self.probes.diagonals.energy

    @cached_property
    def diagonal_rows(self) -> tuple[Tensor, Tensor]:
        """Some rows, drawn at random, and the entries of the diagonal there."""
        return rows_of_diagonal(self)

    # -- spectrum --------------------------------------------------------------------------------

    @cached_property
    def eigenvalues(self) -> Tensor:
        """All eigenvalues ``[P]``, ascending."""
        if self.gram is not None:
            return self.gram.eigenvalues
        if self.known and self.eigen is not None:
            return self.eigen.eigenvalues().to(torch.float64)
        rows = eigen_rows(self.op)
        if rows < self.size and rows <= max(self.limits.rows, _ROWS) and self.structured:
            return self.op.eigenvalues().to(torch.float64).sort().values
        if not self.small:
            raise self.too_large("All eigenvalues")
        return torch.linalg.eigvalsh(self.dense)

    @property
    def tolerance(self) -> float:
        """Magnitude up to which a computed eigenvalue may belong to a zero."""
        eps = torch.finfo(self.given.dtype).eps
        return self.size * eps * float(self.eigenvalues.abs().max())

    @cached_property
    def eigenvalues_or_samples(self) -> Tensor | SpectralSamples:
        """All eigenvalues, or samples of their distribution."""
        try:
            return self.eigenvalues
        except TooLargeError:
            self.may_iterate()
            return SpectralSamples(self)

    @cached_property
    def spectral_norm(self) -> tuple[float, float]:
        """Largest magnitude of an eigenvalue, and how much larger it may be."""
        try:
            return float(self.eigenvalues.abs().max()), 0.0
        except TooLargeError:
            self.may_iterate()
            found = bounded_norm(self)
            return found.value, found.stderr

    def condition(self, damping: float) -> Value:
        """Condition number under damping, and how much larger it may be."""
        try:
            values = self.eigenvalues
        except TooLargeError:
            self.may_iterate()
            return bounded_condition(self, damping)
        return Value(condition_of(values, damping, self.tolerance), 0.0, self.method)

    def leading(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ``count`` eigenvalues of largest magnitude, their vectors ``[P, count]``, and the
        norms of the residuals, zero where they are known directly."""
        if count not in self._leading:
            values, vectors, residuals = self._leading_pairs(count)
            self._leading[count] = values.to(torch.float64), vectors.to(torch.float64), residuals
        return self._leading[count]

    def _leading_pairs(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        found = None
        if self.small or self.structured:
            found = leading_by_structure(self.eigen or self.op, count)
        if found is None and self.gram is not None:
            found = self.gram.leading(count)
        if found is None and self.small:
            found = leading_of_dense(self.dense, count)
        if found is not None:
            return *found, torch.zeros(len(found[0]), dtype=torch.float64)
        self.may_iterate()
        return outer_pairs(self, count)

    # -- damped ----------------------------------------------------------------------------------

    def logdet(self, damping: float) -> tuple[Quantity, float]:
        """``log det(M + damping I)`` or samples of it, and the bias that these may have.

        Raises ``NotDefinedError`` unless it is positive definite.
        """
        known = self.eigenvalues_or_samples
        if isinstance(known, SpectralSamples):
            return known.logdet(damping)
        # the matrix was rounded in its own type, its eigenvalues are those of float64
        eps = torch.finfo(self.given.dtype).eps
        return log_determinant(known, damping, self.name, dim=self.size, eps=eps), 0.0

    @cached_property
    def eigen(self) -> EigenKroneckerOperator | None:
        """The matrix in its Kronecker-product eigenbasis, where it has one."""
        return eigen_form(self.op)

    def inverse(self, damping: float) -> Operator:
        """``(M + damping I)^-1`` where that is affordable."""
        if self.known and self.eigen is not None:
            return self.eigen.inverse(damping)
        if self.known and has_inverse_form(self.op):
            return self.op.inverse(damping)
        if not self.small:
            raise self.too_large("The inverse")
        return self.formed.inverse(damping)

    def solve(self, vector: Tensor, damping: float) -> tuple[Tensor, float]:
        """``(M + damping I)^-1 vector`` and its relative residual (0: solved directly).

        Kept per damping: a comparison has one vector. Conjugate gradients where the matrix is
        large; ``NotDefinedError`` where they meet negative curvature.
        """
        if damping not in self._solved:
            if self.small or (self.structured and has_inverse_form(self.op)):
                found = (self.inverse(damping) @ vector).to(torch.float64), 0.0
            elif self.gram is not None:
                found = self.gram.solve(vector, damping), 0.0
            else:
                steps = _STEPS if self.structured else self.limits.products
                found = conjugate_gradients(self, vector, damping, steps)
            self._solved[damping] = found
        return self._solved[damping]


def conjugate_gradients(
    facts: Facts, vector: Tensor, damping: float, steps: int
) -> tuple[Tensor, float]:
    """``(M + damping I)^-1 vector`` and the relative residual reached.

    Raises ``TooLargeError`` where that residual is too large to be of use.
    """
    running = ConjugateGradients(
        lambda v: facts.matmat(v) + damping * v, vector.to(torch.float64).unsqueeze(1)
    )
    size, only = float(running.norms), torch.zeros(1, dtype=torch.long, device=vector.device)
    for _ in range(steps):
        if float(running.norms) <= _SOLVED * size:
            break
        running.step(only)
        if bool(running.ended):
            raise NotDefinedError(
                f"The {facts.name} with damping {damping:g} has negative or no curvature along a "
                "direction that the gradient reaches, so its model has no minimum. Pass a larger "
                "damping."
            )
    reached = float(running.norms) / size if size else 0.0
    if reached > _UNSOLVED:
        raise TooLargeError(
            f"Conjugate gradients with the {facts.name} have not converged in {steps} products "
            f"(relative residual {reached:.2g}). Raise budget= or the damping."
        )
    return running.x.squeeze(1), reached
