"""Analyses: functions from operators to results."""

from .compare import compare
from .comparison import Comparison, ReferenceBlock, Row
from .concentration import Concentration, concentration
from .result import Cost, Result
from .spectrum import Spectrum, spectrum
from .verify import Check, Verification, verify

__all__ = [
    "Check",
    "Comparison",
    "Concentration",
    "Cost",
    "ReferenceBlock",
    "Result",
    "Row",
    "Spectrum",
    "Verification",
    "compare",
    "concentration",
    "spectrum",
    "verify",
]
