"""Estimators: numbers of a matrix from its products, each with its error."""

from .density import Density, density
from .diagonal import DiagonalEstimate, diagonal
from .eigenpairs import Eigenpairs, NegativeCurvature
from .eigsh import eigsh, negative_curvature
from .estimate import Estimate
from .trace import trace

__all__ = [
    "Density",
    "DiagonalEstimate",
    "Eigenpairs",
    "Estimate",
    "NegativeCurvature",
    "density",
    "diagonal",
    "eigsh",
    "negative_curvature",
    "trace",
]
