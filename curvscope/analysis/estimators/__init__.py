"""Estimators: numbers of a matrix from its products, each with its error."""

from .condition import condition_number
from .density import Density, density
from .diagonal import DiagonalEstimate, diagonal
from .eigenpairs import Eigenpairs, NegativeCurvature
from .eigsh import eigsh, negative_curvature
from .estimate import Estimate
from .functions import effective_dimension, logdet
from .linear import solve
from .norm import cosine, norm
from .solution import Solution
from .trace import trace

__all__ = [
    "Density",
    "DiagonalEstimate",
    "Eigenpairs",
    "Estimate",
    "NegativeCurvature",
    "Solution",
    "condition_number",
    "cosine",
    "density",
    "diagonal",
    "effective_dimension",
    "eigsh",
    "logdet",
    "negative_curvature",
    "norm",
    "solve",
    "trace",
]
