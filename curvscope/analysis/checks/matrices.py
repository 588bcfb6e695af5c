"""Properties that every curvature matrix has: symmetry, and none below zero where promised."""

from __future__ import annotations

import torch

from ...curvature.exact import fisher, ggn, hessian
from ..result import listing, number
from .base import CURVSCOPE, Outcome, judged, not_applicable, register
from .case import Case

_PAIRS = 3


@register("symmetry", about=CURVSCOPE, underlies=("Hessian", "GGN", "Fisher"))
def symmetry(case: Case) -> Outcome:
    """``x^T M y = y^T M x`` for products with the Hessian and the GGN."""
    details = {}
    for op in (hessian(case.few), ggn(case.few)):
        vectors = torch.stack([case.direction(20 + k) for k in range(2 * _PAIRS)], 1)
        forms = vectors.T @ (op @ vectors)
        scale = max(float(forms.abs().max()), torch.finfo(forms.dtype).tiny)
        details[op.info.what] = float((forms - forms.T).abs().max()) / scale
    value = max(details.values())
    wrong = [name for name, v in details.items() if not v <= case.exact]
    sentence = (
        f"x^T M y and y^T M x differ by {number(value, 2)} (relative) for {listing(wrong)}."
        if wrong
        else f"x^T M y = y^T M x up to {number(value, 2)} for {listing(list(details))}."
    )
    advice = (
        "Double backward is not the derivative of the gradient: look at custom "
        "torch.autograd.Functions and at .detach() or .data in the forward pass."
    )
    return judged(value, case.exact, sentence, advice=advice, details=details)


@register("positive semi-definiteness", about=CURVSCOPE, underlies=("GGN", "Fisher"))
def semidefinite(case: Case) -> Outcome:
    """``x^T G x >= 0`` for GGN and Fisher of a loss that is convex in the outputs."""
    problem = case.few
    if problem.loss.likelihood is None:
        return not_applicable(
            f"{problem.loss.name} is not known to be convex in the outputs, so that the GGN may "
            "have negative eigenvalues."
        )
    details = {}
    for op in (ggn(problem), fisher(problem)):
        vectors = torch.stack([case.direction(30 + k) for k in range(2 * _PAIRS)], 1)
        products = op @ vectors
        forms = (vectors * products).sum(0)
        scale = max(float(products.norm(dim=0).max()), torch.finfo(forms.dtype).tiny)
        details[op.info.what] = max(0.0, -float(forms.min()) / scale)
    value = max(details.values())
    wrong = [name for name, v in details.items() if not v <= case.exact]
    sentence = (
        f"x^T M x is negative (by {number(value, 2)} of |M x|) for {listing(wrong)}."
        if wrong
        else f"x^T M x >= 0 in {2 * _PAIRS} random directions for {listing(list(details))}."
    )
    advice = "Report this with the loss; its second derivative in the outputs is not convex."
    return judged(value, case.exact, sentence, advice=advice, details=details)
