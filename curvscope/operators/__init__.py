"""The matrices themselves: linear algebra by structure, without any knowledge of networks."""

from .algebra import Damped, Scaled, Sum
from .base import Layout, Operator, ParameterSpec, Provenance
from .blockdiag import BlockDiagonalOperator
from .blocks import Blocks
from .dense import DenseOperator, IdentityOperator
from .diagonal import DiagonalOperator
from .eigenbasis import kronecker_eigenvalue_correction
from .eigenkronecker import EigenKroneckerOperator
from .inner import inner
from .kronecker import DiagonalKroneckerOperator, KroneckerOperator
from .lowrank import LowRankOperator
from .matrix_free import FunctionOperator
from .nearest import best_diagonal, best_diagonal_kronecker, best_identity, best_kronecker
from .rowgram import RowGramOperator
from .rowhessian import RowHessianOperator
from .scipy_bridge import from_scipy, to_scipy
from .view import MatrixView
from .wrappers import Converted, Restricted

__all__ = [
    "BlockDiagonalOperator",
    "Blocks",
    "Converted",
    "Damped",
    "DenseOperator",
    "DiagonalKroneckerOperator",
    "DiagonalOperator",
    "EigenKroneckerOperator",
    "FunctionOperator",
    "IdentityOperator",
    "KroneckerOperator",
    "Layout",
    "LowRankOperator",
    "MatrixView",
    "Operator",
    "ParameterSpec",
    "Provenance",
    "Restricted",
    "RowGramOperator",
    "RowHessianOperator",
    "Scaled",
    "Sum",
    "best_diagonal",
    "best_diagonal_kronecker",
    "best_identity",
    "best_kronecker",
    "from_scipy",
    "inner",
    "kronecker_eigenvalue_correction",
    "to_scipy",
]
