"""Analyses: functions from operators to results."""

from .batch_spectra import BatchSpectra, batch_spectra
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
    Solution,
    condition_number,
    cosine,
    density,
    diagonal,
    effective_dimension,
    eigsh,
    logdet,
    negative_curvature,
    norm,
    solve,
    trace,
)
from .local import LocalModel, local_model
from .noise import GradientNoise, gradient_noise
from .result import Cost, Result
from .spectrum import Spectrum, spectrum
from .verify import Check, Verification, verify

__all__ = [
    "BatchSpectra",
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
    "Solution",
    "Spectrum",
    "Verification",
    "batch_spectra",
    "compare",
    "concentration",
    "condition_number",
    "cosine",
    "coverage",
    "density",
    "diagonal",
    "effective_dimension",
    "eigsh",
    "gradient_noise",
    "local_model",
    "logdet",
    "negative_curvature",
    "norm",
    "solve",
    "spectrum",
    "trace",
    "verify",
]
