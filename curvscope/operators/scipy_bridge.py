"""To and from ``scipy.sparse.linalg.LinearOperator``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError
from .base import Layout, Operator, Provenance
from .matrix_free import FunctionOperator

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

_NUMPY: dict[torch.dtype, type] = {torch.float32: np.float32, torch.float64: np.float64}


def to_scipy(op: Operator) -> LinearOperator:
    """``op`` as a SciPy ``LinearOperator`` on NumPy arrays, for ``eigsh``, ``cg`` and the like.

    Arrays are converted to the operator's dtype and device at each product.
    """
    from scipy.sparse.linalg import LinearOperator

    def product(array: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(array):
            return product(array.real) + 1j * product(array.imag)
        # a fresh array: torch accepts neither negative strides nor read-only memory
        tensor = torch.from_numpy(np.array(array, dtype=_NUMPY[op.dtype], order="C"))
        return (op @ tensor).cpu().numpy()

    return LinearOperator(
        shape=op.shape,
        dtype=_NUMPY[op.dtype],
        matvec=product,
        rmatvec=product,
        matmat=product,
        rmatmat=product,
    )


def from_scipy(
    matrix: Any,
    *,
    device: torch.device | str = "cpu",
    layout: Layout | None = None,
    info: Provenance | None = None,
) -> FunctionOperator:
    """A symmetric SciPy ``LinearOperator``, sparse matrix or array as an Operator.

    Symmetry is checked on random vectors; products run in NumPy on the CPU.
    """
    from scipy.sparse.linalg import aslinearoperator

    linear = aslinearoperator(matrix)
    if len(linear.shape) != 2 or linear.shape[0] != linear.shape[1]:
        raise OptionError(f"The matrix has shape {linear.shape}; operators are square.")
    if np.dtype(linear.dtype).kind == "c":
        raise OptionError("The matrix is complex; operators are real.")
    dtype = torch.float32 if linear.dtype == np.float32 else torch.float64

    def product(vectors: Tensor) -> Tensor:
        array = np.ascontiguousarray(vectors.cpu().numpy())
        return torch.as_tensor(np.asarray(linear.matmat(array)), dtype=dtype, device=device)

    return FunctionOperator(
        product, linear.shape[0], dtype=dtype, device=device, layout=layout, info=info
    )
