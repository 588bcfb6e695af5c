"""Analyses: functions from operators to results."""

from .compare import compare
from .comparison import Comparison, ReferenceBlock, Row
from .concentration import Concentration, concentration
from .result import Cost, Result
from .spectrum import Spectrum, spectrum

__all__ = [
    "Comparison",
    "Concentration",
    "Cost",
    "ReferenceBlock",
    "Result",
    "Row",
    "Spectrum",
    "compare",
    "concentration",
    "spectrum",
]
