"""Analyses: functions from operators to results."""

from .compare import compare
from .comparison import Comparison, ReferenceBlock, Row
from .concentration import Concentration, concentration
from .coverage import Cell, Coverage, ParameterRow, coverage
from .local import LocalModel, local_model
from .noise import GradientNoise, gradient_noise
from .result import Cost, Result
from .spectrum import Spectrum, spectrum
from .verify import Check, Verification, verify

__all__ = [
    "Cell",
    "Check",
    "Comparison",
    "Concentration",
    "Cost",
    "Coverage",
    "GradientNoise",
    "LocalModel",
    "ParameterRow",
    "ReferenceBlock",
    "Result",
    "Row",
    "Spectrum",
    "Verification",
    "compare",
    "concentration",
    "coverage",
    "gradient_noise",
    "local_model",
    "spectrum",
    "verify",
]
