"""The factored forms of a layer's block, :class:`RowGramOperator` and :class:`RowHessianOperator`."""

from .rowgram import RowGramOperator
from .rowhessian import RowHessianOperator

__all__ = ["RowGramOperator", "RowHessianOperator"]
