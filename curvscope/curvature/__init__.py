"""From a Problem to its curvature: exact matrices and approximations, all as Operators."""

from .diagonal import diagonal_kf, exact_diagonal, hutchinson_diagonal
from .exact import empirical_fisher, fisher, ggn, hessian
from .kfra import kfra
from .kronecker import ekfac, foof, kfac, kflr
from .registered import forget_approximation, register_approximation

__all__ = [
    "diagonal_kf",
    "ekfac",
    "empirical_fisher",
    "exact_diagonal",
    "fisher",
    "foof",
    "forget_approximation",
    "ggn",
    "hessian",
    "hutchinson_diagonal",
    "kfac",
    "kflr",
    "kfra",
    "register_approximation",
]
