"""BackPACK's extensions: what each one leaves where, and what has to be put right in it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import MissingPackageError, check_option


@dataclass(frozen=True)
class Spec:
    """One extension of BackPACK.

    ``field`` is the attribute that it sets on parameters. ``curved`` ones propagate second
    derivatives back through every layer; the others need nothing but each layer's own input and
    output gradient. ``proxy`` is the extension whose numbers autograd can check entry by entry
    when the model had to be converted. ``instead`` is the curvscope function to fall back on.
    """

    name: str
    field: str
    instead: str
    curved: bool = True
    sampled: bool = False
    kronecker: bool = False
    proxy: str = ""


_H, _G, _E = "cs.hessian(problem)", "cs.ggn(problem)", "cs.empirical_fisher(problem)"
_SPECS = (
    Spec("DiagHessian", "diag_h", f"{_H}.diagonal()", proxy="DiagHessian"),
    Spec("BatchDiagHessian", "diag_h_batch", f"{_H}.diagonal()", proxy="DiagHessian"),
    Spec("DiagGGNExact", "diag_ggn_exact", f"{_G}.diagonal()", proxy="DiagGGNExact"),
    Spec("DiagGGNMC", "diag_ggn_mc", f"{_G}.diagonal()", sampled=True, proxy="DiagGGNExact"),
    Spec("BatchDiagGGNExact", "diag_ggn_exact_batch", f"{_G}.diagonal()", proxy="DiagGGNExact"),
    Spec(
        "BatchDiagGGNMC",
        "diag_ggn_mc_batch",
        f"{_G}.diagonal()",
        sampled=True,
        proxy="DiagGGNExact",
    ),
    Spec("SqrtGGNExact", "sqrt_ggn_exact", _G, proxy="DiagGGNExact"),
    Spec(
        "SqrtGGNMC",
        "sqrt_ggn_mc",
        "cs.fisher(problem, samples=n)",
        sampled=True,
        proxy="DiagGGNExact",
    ),
    Spec(
        "KFAC",
        "kfac",
        "cs.kfac(problem, fisher='mc')",
        sampled=True,
        kronecker=True,
        proxy="DiagGGNExact",
    ),
    Spec("KFLR", "kflr", "cs.kflr(problem)", kronecker=True, proxy="DiagGGNExact"),
    Spec("KFRA", "kfra", "cs.kfra(problem)", kronecker=True, proxy="DiagGGNExact"),
    Spec("HMP", "hmp", _H, proxy="HMP"),
    Spec("GGNMP", "ggnmp", _G, proxy="GGNMP"),
    Spec("PCHMP", "pchmp", _H, proxy="GGNMP"),
    Spec("BatchGrad", "grad_batch", _E, curved=False, proxy="BatchGrad"),
    Spec("BatchL2Grad", "batch_l2", _E, curved=False, proxy="BatchGrad"),
    Spec("SumGradSquared", "sum_grad_squared", f"{_E}.diagonal()", curved=False, proxy="BatchGrad"),
    Spec("Variance", "variance", f"{_E}.diagonal()", curved=False, proxy="BatchGrad"),
)
SPECS: dict[str, Spec] = {spec.name: spec for spec in _SPECS}


def spec_of(extension: str) -> Spec:
    """The table's row of an extension. Raises ``OptionError`` for an unknown name."""
    check_option("extension", extension, SPECS)
    return SPECS[extension]


def library() -> Any:
    """The package ``backpack``. Raises ``MissingPackageError`` where it is not installed."""
    try:
        import backpack
        import backpack.extensions
    except ImportError as error:
        raise MissingPackageError(
            "cs.backpack needs BackPACK: pip install backpack-for-pytorch. "
            f"({type(error).__name__}: {error})"
        ) from error
    return backpack


def make_extension(spec: Spec, *, grouped: bool = False, **options: Any) -> Any:
    """An instance of the extension, corrected where BackPACK 1.7.1 is known to be wrong.

    ``grouped``: the model has grouped convolutions. BackPACK's shortcut for their squared gradient
    norms mixes the groups; the general rule from individual gradients does not.
    """
    extension = getattr(library().extensions, spec.name)(**options)
    if spec.name == "PCHMP":
        for module_extension in layer_rules(extension).values():
            rule = functools.partial(_positive_residual, module_extension)
            module_extension.modified_residual_mat_prod = rule
    if spec.name == "BatchL2Grad" and grouped:
        base = _batch_l2_base()
        for kind, old in list(layer_rules(extension).items()):
            if kind.__name__.startswith("Conv"):
                general = base(["bias", "weight"], derivatives=old.derivatives)
                extension.set_module_extension(kind, general, overwrite=True)
    return extension


def layer_rules(extension: Any) -> dict[type, Any]:
    """Layer type -> what the extension does there."""
    rules: dict[type, Any] = vars(extension)["_BackpropExtension__module_extensions"]
    return rules


@functools.cache
def supported_types(spec: Spec) -> frozenset[type]:
    """Layer types that the extension knows; it looks them up by exact type."""
    return frozenset(layer_rules(getattr(library().extensions, spec.name)()))


def _positive_residual(
    rule: Any, ext: Any, module: Any, g_inp: Any, g_out: Any, mat: Tensor, modify: str
) -> Tensor:
    """``max(f'' g, 0)`` or ``|f'' g|`` times ``mat``.

    BackPACK multiplies by the output gradient g once more, ``f'' g^2``, because its
    ``hessian_diagonal`` contains g already.
    """
    residual = rule.modifications[modify](rule.derivatives.hessian_diagonal(module, g_inp, g_out))
    return torch.einsum("...,v...->v...", residual, mat)


def _batch_l2_base() -> Any:
    from backpack.extensions.firstorder.batch_l2_grad.batch_l2_base import BatchL2Base

    return BatchL2Base
