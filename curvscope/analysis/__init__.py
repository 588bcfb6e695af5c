"""Analyses: functions from operators to results."""

from .compare import compare
from .comparison import Comparison, ReferenceBlock, Row
from .concentration import Concentration, concentration
from .coverage import Cell, Coverage, ParameterRow, coverage
from .estimators import (
    Density,
    DiagonalEstimate,
    Eigenpairs,
    Estimate,
    NegativeCurvature,
    density,
    diagonal,
    eigsh,
    negative_curvature,
    trace,
)
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
    "Density",
    "DiagonalEstimate",
    "Eigenpairs",
    "Estimate",
    "GradientNoise",
    "LocalModel",
    "NegativeCurvature",
    "ParameterRow",
    "ReferenceBlock",
    "Result",
    "Row",
    "Spectrum",
    "Verification",
    "compare",
    "concentration",
    "coverage",
    "density",
    "diagonal",
    "eigsh",
    "gradient_noise",
    "local_model",
    "negative_curvature",
    "spectrum",
    "trace",
    "verify",
]
