"""Numbers about one matrix, each computed once, in the cheapest way that its size allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from .. import memory
from ..errors import CurvscopeError, NonFiniteError, NotDefinedError
from ..operators import DenseOperator, Operator
from ..operators.numerics import log_determinant
from .coerce import in_float64
from .structure import (
    as_numpy,
    eigen_rows,
    has_inverse_form,
    is_structured,
    leading_by_structure,
)

_ROWS = 3000  # beyond, O(d^3) takes more than a few seconds
_COPIES = 6  # matrices of one size that a comparison holds at its peak
_DIRECT = 500  # rows up to which a full eigen-decomposition beats Lanczos
_LANCZOS_TOL = 1e-6  # of eigenvalues of matrices that are not formed
_LANCZOS_STEPS = 60
_STEPS = 500  # of conjugate gradients with a structured matrix
_SOLVED = 1e-10  # relative residual of conjugate gradients


class TooLargeError(CurvscopeError):
    """A number would need a matrix to be formed that is too large; recorded as the reason."""


@dataclass(frozen=True)
class Limits:
    """What a comparison may spend.

    Matrices of up to ``rows`` rows are formed. Of one known by its products only, up to
    ``products`` are taken for an estimate, or fewer once its relative standard error is ``tol``.
    """

    rows: int
    products: int = 100
    tol: float | None = None
    seed: int = 0


def affordable_rows(budget: int | None, device: torch.device | str = "cpu") -> int:
    """Rows that fit a budget in bytes; by default a quarter of the memory, and at most 3,000."""
    if budget is None:
        free = memory.available_bytes(device) // 4
        return min(_ROWS, math.isqrt(max(0, free // (8 * _COPIES))))
    return math.isqrt(max(0, budget // (8 * _COPIES)))


class Facts:
    """One matrix within a comparison. Raises :class:`TooLargeError` for what it cannot afford."""

    def __init__(self, op: Operator, limits: Limits) -> None:
        self.given = op
        self.op = in_float64(op)
        self.limits = limits
        self.size = op.shape[0]
        self.small = self.size <= limits.rows
        self.structured = is_structured(op)
        self.known = self.small or self.structured
        self.products = 0
        self._dense: Tensor | None = None
        self._solved: dict[float, tuple[Tensor, float]] = {}
        self._leading: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def name(self) -> str:
        return self.given.info.what

    @property
    def method(self) -> str:
        """How numbers that need all entries are got."""
        return "exact" if self.small else "structured"

    def too_large(self, what: str, instead: str) -> TooLargeError:
        return TooLargeError(
            f"{what} of the {self.name} ({self.size:,} rows) would need it to be formed. {instead}"
        )

    @property
    def dense(self) -> Tensor:
        """The matrix in float64, kept until :meth:`release`."""
        if self._dense is None:
            if not self.small:
                raise self.too_large("The entries", "Pass memory= to allow it.")
            dense = self.op.dense().to(torch.float64)
            if not bool(torch.isfinite(dense).all()):
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
        given = self.given
        return DenseOperator(
            self.dense,
            layout=given.layout,
            view=given.view,
            info=given.info,
            positive_semidefinite=given.positive_semidefinite,
        )

    def release(self) -> None:
        """Forget what is large."""
        self._dense = None
        self._solved.clear()
        self._leading.clear()
        self.op = in_float64(self.given)

    def matmat(self, vectors: Tensor) -> Tensor:
        """Product with ``[P, k]``, counted where the matrix is known by its products only."""
        if not self.structured and self._dense is None:
            self.products += vectors.shape[1]
        return (self.op @ vectors).to(torch.float64)

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matmat(vector.unsqueeze(1)).squeeze(1)

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

    # -- spectrum --------------------------------------------------------------------------------

    @cached_property
    def eigenvalues(self) -> Tensor:
        """All eigenvalues ``[P]``, ascending."""
        rows = eigen_rows(self.op)
        if rows < self.size and rows <= self.limits.rows and self.structured:
            return self.op.eigenvalues().to(torch.float64).sort().values
        if not self.small:
            raise self.too_large("All eigenvalues", "Pass memory= to allow it.")
        return torch.linalg.eigvalsh(self.dense)

    @property
    def tolerance(self) -> float:
        """Magnitude up to which a computed eigenvalue may belong to a zero."""
        eps = torch.finfo(self.given.dtype).eps
        return self.size * eps * float(self.eigenvalues.abs().max())

    @cached_property
    def spectral_norm(self) -> tuple[float, float]:
        """Largest magnitude of an eigenvalue, and the residual where it was iterated."""
        try:
            return float(self.eigenvalues.abs().max()), 0.0
        except TooLargeError:
            return largest_magnitude(self.matvec, self.size, formed=False)

    def leading(self, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` eigenvalues of largest magnitude and their vectors ``[P, count]``."""
        if count not in self._leading:
            self._leading[count] = self._leading_pairs(count)
        return self._leading[count]

    def _leading_pairs(self, count: int) -> tuple[Tensor, Tensor]:
        found = leading_by_structure(self.op, count)
        if found is not None:
            return found[0].to(torch.float64), found[1].to(torch.float64)
        if self.small and self.size <= max(_DIRECT, 2 * count):
            values, vectors = torch.linalg.eigh(self.dense)
            order = values.abs().argsort(descending=True, stable=True)[:count]
            return values[order], vectors[:, order]
        if not self.known:
            raise self.too_large("Leading eigenvectors", "Use cs.eigsh(op, k).")
        product = self._dense_product if self.small else self.matvec
        try:
            values, vectors = _arpack(product, self.size, count, 0.0 if self.small else 1e-8)
        except ArpackNoConvergence as stopped:
            if self.small:
                values, vectors = map(np.asarray, torch.linalg.eigh(self.dense.cpu()))
            else:
                raise TooLargeError(
                    f"Lanczos iteration for {count} eigenvectors of the {self.name} has not "
                    "converged. Use cs.eigsh(op, k) with a larger budget."
                ) from stopped
        order = np.argsort(-np.abs(values), kind="stable")[:count]
        device = self.op.device
        return (
            torch.as_tensor(values[order], device=device),
            torch.as_tensor(np.ascontiguousarray(vectors[:, order]), device=device),
        )

    def _dense_product(self, vector: Tensor) -> Tensor:
        return self.dense @ vector.to(self.dense.device)

    # -- damped ----------------------------------------------------------------------------------

    def logdet(self, damping: float) -> float:
        """``log det(M + damping I)``; raises ``NotDefinedError`` unless positive definite."""
        return log_determinant(self.eigenvalues, damping, self.name, dim=self.size)

    def inverse(self, damping: float) -> Operator:
        """``(M + damping I)^-1`` where that is affordable."""
        if has_inverse_form(self.op):
            return self.op.inverse(damping)
        if not self.small:
            raise self.too_large("The inverse", "Pass memory= to allow it.")
        return self.formed.inverse(damping)

    def solve(self, vector: Tensor, damping: float) -> tuple[Tensor, float]:
        """``(M + damping I)^-1 vector`` and its relative residual (0: solved directly).

        Kept per damping: a comparison has one vector. Conjugate gradients where the matrix is
        large; ``NotDefinedError`` where they meet negative curvature.
        """
        if damping not in self._solved:
            if self.small or has_inverse_form(self.op):
                found = (self.inverse(damping) @ vector).to(torch.float64), 0.0
            else:
                steps = _STEPS if self.structured else self.limits.products
                found = conjugate_gradients(self, vector, damping, steps)
            self._solved[damping] = found
        return self._solved[damping]


def conjugate_gradients(
    facts: Facts, vector: Tensor, damping: float, steps: int
) -> tuple[Tensor, float]:
    """``(M + damping I)^-1 vector`` and the relative residual reached."""
    solution = torch.zeros_like(vector)
    residual, square = vector.clone(), float(vector @ vector)
    goal, direction = _SOLVED**2 * square, vector.clone()
    size = math.sqrt(square)
    for _ in range(steps):
        if square <= goal:
            break
        image = facts.matvec(direction) + damping * direction
        curvature = float(direction @ image)
        if curvature <= 0:
            raise NotDefinedError(
                f"The {facts.name} with damping {damping:g} has negative or no curvature along a "
                "direction that the gradient reaches, so its model has no minimum. Pass a larger "
                "damping."
            )
        solution += (square / curvature) * direction
        residual -= (square / curvature) * image
        before, square = square, float(residual @ residual)
        direction = residual + (square / before) * direction
    return solution, math.sqrt(square) / size if size else 0.0


def largest_magnitude(product, size: int, *, formed: bool) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """``||M||_2`` by Lanczos iteration, and the residual of the eigenpair."""
    tol = 1e-12 if formed else _LANCZOS_TOL
    values, vectors = _arpack(product, size, 1, tol)
    vector = torch.as_tensor(vectors[:, 0])
    residual = float(torch.linalg.vector_norm(product(vector).cpu() - values[0] * vector))
    return abs(float(values[0])), 0.0 if formed else residual


def _arpack(product, size: int, count: int, tol: float) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    def multiply(array: np.ndarray) -> np.ndarray:
        return as_numpy(product(torch.from_numpy(np.array(array, dtype=np.float64).reshape(-1))))

    start = np.random.default_rng(0).standard_normal(size)  # its own generator, always the same
    linear = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    steps = None if tol == 0.0 or tol <= 1e-12 else _LANCZOS_STEPS
    values, vectors = eigsh(linear, k=count, which="LM", tol=tol, v0=start, maxiter=steps)
    return values, vectors
