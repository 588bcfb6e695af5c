"""Turning what users pass to an analysis into operators that it can work with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError
from ..operators import DenseOperator, Operator
from ..problem import Problem


def as_operator(matrix: Any, name: str = "The matrix") -> Operator:
    """``matrix`` itself if it is an Operator, else a :class:`DenseOperator` of a square array."""
    if isinstance(matrix, Operator):
        return matrix
    if isinstance(matrix, np.ndarray):
        if matrix.dtype.kind not in "fiub":
            raise OptionError(f"{name} holds {matrix.dtype}; it must hold real numbers.")
        matrix = torch.from_numpy(np.array(matrix))
    if isinstance(matrix, Problem):
        raise OptionError(
            f"{name} is a Problem; say which of its matrices: cs.ggn(problem), "
            "cs.hessian(problem), cs.kfac(problem), ..."
        )
    if not isinstance(matrix, Tensor):
        raise OptionError(
            f"{name} must be an Operator, a torch tensor or a NumPy array, "
            f"not {type(matrix).__name__}."
        )
    if matrix.is_complex():
        raise OptionError(f"{name} is complex; curvature matrices are real.")
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.to(torch.float64)
    return DenseOperator(matrix)


def in_float64(op: Operator) -> Operator:
    """``op`` in float64 where it is stored; a matrix known by its products stays as it is."""
    if op.dtype == torch.float64 or not op._stored or op.device.type == "mps":
        return op
    return op.to(torch.float64)
