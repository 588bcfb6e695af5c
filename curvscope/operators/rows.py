"""The factored forms of a layer's block."""

from .rowgram import RowGramOperator
from .rowhessian import RowHessianOperator

__all__ = ["RowGramOperator", "RowHessianOperator"]
