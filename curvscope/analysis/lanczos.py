"""Leading eigenvalues by Lanczos iteration, of matrices that are formed or known by products."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_DIRECT = 500  # rows up to which a full eigen-decomposition beats iterating
_PRODUCTS = 400  # after which a full decomposition is as cheap
_NORM_TOL = 1e-10
_STEPS = 30
_TOL = 1e-3


def leading_of_dense(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` eigenvalues of largest magnitude of ``[d, d]`` and their vectors, to rounding.

    By ARPACK for large matrices, and by a full decomposition where that has not converged.
    """
    if matrix.shape[0] > max(_DIRECT, 4 * count):
        from scipy.sparse.linalg import ArpackError  # a fifth of the package's import

        try:
            return _arpack(matrix, count, tol=0.0)
        except ArpackError:  # not converged, or a matrix that maps the start to zero
            pass
    found, basis = torch.linalg.eigh(matrix)
    places = found.abs().argsort(descending=True, stable=True)[:count]
    return found[places], basis[:, places]


def norm_of_dense(matrix: Tensor) -> float:
    """Spectral norm of a symmetric ``[d, d]``, to ten digits at least."""
    if matrix.shape[0] > _DIRECT:
        from scipy.sparse.linalg import ArpackError

        try:
            return float(_arpack(matrix, 1, tol=_NORM_TOL)[0].abs()[0])
        except ArpackError:
            pass
    return float(torch.linalg.eigvalsh(matrix).abs().max())


def _arpack(matrix: Tensor, count: int, tol: float) -> tuple[Tensor, Tensor]:
    """Raises ``ArpackError`` once the products cost as much as a full decomposition would."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    size = matrix.shape[0]

    def multiply(array: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(np.array(array, dtype=np.float64).reshape(-1))
        return (matrix @ vector.to(matrix.device)).cpu().numpy()

    linear = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    krylov = min(size, max(2 * count + 1, 40))
    values, vectors = eigsh(
        linear,
        k=count,
        which="LM",
        tol=tol,
        v0=_start(size).numpy(),
        ncv=krylov,
        maxiter=max(1, _PRODUCTS // (krylov - count)),
    )
    order = np.argsort(-np.abs(values), kind="stable")
    return (
        torch.as_tensor(values[order], device=matrix.device),
        torch.as_tensor(np.ascontiguousarray(vectors[:, order]), device=matrix.device),
    )


def leading_by_products(
    product: Callable[[Tensor], Tensor],
    size: int,
    count: int = 1,
    *,
    device: torch.device | str = "cpu",
    steps: int = _STEPS,
    tol: float = _TOL,
    positive: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lanczos with full reorthogonalisation: values, vectors ``[d, count]`` and residuals.

    ``product`` maps ``[d]`` to ``[d]`` in float64. At most ``steps`` products; stops once all
    residuals are below ``tol`` times the first value's magnitude. Values are ordered by magnitude,
    or with ``positive`` by value, so that the first is the largest. Residuals are at least the
    rounding of ``dtype``, in which ``product`` computes: its machine epsilon times the largest
    magnitude.
    """
    steps = min(steps, size)
    basis = torch.zeros(steps, size, dtype=torch.float64, device=device)
    diagonal: list[float] = []
    beside: list[float] = []
    vector = _start(size).to(device)
    basis[0] = vector / vector.norm()
    for step in range(steps):
        image = product(basis[step])
        diagonal.append(float(basis[step] @ image))
        for _ in range(2):  # once is not enough (Parlett)
            image -= basis[: step + 1].mT @ (basis[: step + 1] @ image)
        length = float(image.norm())
        values, rotation = of_tridiagonal(diagonal, beside)
        top = float(values.abs().max())
        ranked = values if positive else values.abs()
        order = ranked.argsort(descending=True, stable=True)[:count]
        values, rotation = values[order], rotation[:, order]
        residuals = length * rotation[-1].abs()
        done = len(order) == count and float(residuals.max()) <= tol * float(values[0].abs())
        if done or step == steps - 1 or length <= 1e-14 * max(top, math.ulp(1.0)):
            vectors = basis[: step + 1].mT @ rotation.to(device)
            return values, vectors, residuals.clamp_min(torch.finfo(dtype).eps * top)
        beside.append(length)
        basis[step + 1] = image / length
    raise AssertionError("unreachable")


def of_tridiagonal(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and vectors of a matrix: its entries on and beside the diagonal."""
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values, vectors


def _start(size: int) -> Tensor:
    """Always the same random vector, from a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float64)
