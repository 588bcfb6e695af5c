"""BackPACK's quantities as operators and plain records, normalised like everything else here.

BackPACK (Dangel, Kunstner and Hennig, ICLR 2020; backpack-for-pytorch 1.7.1) computes quantities
of one batch and leaves them on the parameters. Here each one belongs to the problem's objective
over all of its data, however cut into batches, in the problem's parameter order, and the model
stays as it was: BackPACK only ever extends a private copy that is thrown away, also after an
exception.

What BackPACK refuses, or is known to get wrong silently, raises ``BackpackError``, which names the
layer or argument and the curvscope function that can do it: :func:`supported` tells without
raising. Put right instead of refused: batches and means, in-place activations, layers without
parameters that are used twice, ``padding="same"``, squared gradient norms of grouped convolutions,
the positive-curvature Hessian, squared error on outputs with more than two axes, float64. A model
whose forward pass is no plain ``nn.Sequential`` goes through BackPACK's converter, and the result
is checked entry by entry against autograd on a few samples.

Second-order quantities need ``MSELoss``, ``CrossEntropyLoss`` or ``BCEWithLogitsLoss``; those of
first order (gradients of single samples) any loss.

Where an activation is not differentiable the conventions differ: BackPACK takes the second
derivative of ELU and SELU at exactly 0 from the left, autograd from the right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import CurvscopeError, check_option
from ...problem import Problem
from .matrices import diag_ggn, diag_hessian, ggnmp, hmp, kfac, kflr, kfra, pchmp, sqrt_ggn
from .results import ParameterValues, SampleNorms, SampleValues
from .running import Job, run
from .samples import (
    batch_diag_ggn,
    batch_diag_hessian,
    batch_grad,
    batch_l2,
    sum_grad_squared,
    variance,
)
from .table import spec_of

__all__ = [
    "ParameterValues",
    "SampleNorms",
    "SampleValues",
    "batch_diag_ggn",
    "batch_diag_hessian",
    "batch_grad",
    "batch_l2",
    "compute",
    "diag_ggn",
    "diag_hessian",
    "ggnmp",
    "hmp",
    "kfac",
    "kflr",
    "kfra",
    "names",
    "pchmp",
    "sqrt_ggn",
    "sum_grad_squared",
    "supported",
    "variance",
]


# name of the extension -> how it is reached
_PUBLIC: dict[str, Callable[..., Any]] = {
    "DiagHessian": diag_hessian,
    "DiagGGNExact": diag_ggn,
    "DiagGGNMC": lambda problem, mc=1, seed=0: diag_ggn(problem, mc=mc, seed=seed),
    "SqrtGGNExact": sqrt_ggn,
    "SqrtGGNMC": lambda problem, mc=1, seed=0: sqrt_ggn(problem, mc=mc, seed=seed),
    "KFAC": kfac,
    "KFLR": kflr,
    "KFRA": kfra,
    "BatchGrad": batch_grad,
    "BatchL2Grad": batch_l2,
    "SumGradSquared": sum_grad_squared,
    "Variance": variance,
    "BatchDiagGGNExact": batch_diag_ggn,
    "BatchDiagGGNMC": lambda problem, mc=1, seed=0: batch_diag_ggn(problem, mc=mc, seed=seed),
    "BatchDiagHessian": batch_diag_hessian,
    "HMP": hmp,
    "GGNMP": ggnmp,
    "PCHMP": pchmp,
}


def names() -> list[str]:
    """The extensions that :func:`compute` and :func:`supported` know, by BackPACK's names."""
    return list(_PUBLIC)


def compute(problem: Problem, extension: str, **options: Any) -> Any:
    """An extension by BackPACK's name; ``options`` are those of the function for it."""
    check_option("extension", extension, _PUBLIC)
    return _PUBLIC[extension](problem, **options)


def supported(problem: Problem, extension: str, *, unscaled: bool = False) -> tuple[bool, str]:
    """Whether an extension can be trusted with this problem, and else why not.

    Runs it on up to three samples of the first batch, with all checks. Later batches are not
    looked at: their targets may still be refused.
    """
    spec = spec_of(extension)
    try:
        run(Job(problem, spec, {}, unscaled=unscaled), lambda batch: None, batches=0)
    except CurvscopeError as error:
        return False, str(error)
    return True, ""
