"""Refused losses: the class of the error, what it names, and what to do instead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors

from .refusals import CE, Refusal, X, Z, checked, problem, refused

# -- losses ------------------------------------------------------------------------------------


def no_sum(z: Tensor, y: Tensor) -> Tensor:
    return z.var()


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


class Learned(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.weight * F.cross_entropy(z, y)


LOSSES: dict[str, Refusal] = {
    "reduction none": (
        checked(CE(reduction="none")),
        errors.UnsupportedLossError,
        ("CrossEntropyLoss(reduction='none')", "reduction='mean' or 'sum'"),
    ),
    "three inputs": (
        checked(nn.TripletMarginLoss()),
        errors.UnsupportedLossError,
        ("TripletMarginLoss", "Wrap it"),
    ),
    "gaussian nll": (
        checked(nn.GaussianNLLLoss()),
        errors.UnsupportedLossError,
        ("GaussianNLLLoss", "Wrap it"),
    ),
    "callable without reduction": (
        checked(no_sum),
        errors.OptionError,
        ("'no_sum'", "reduction='mean'", "reduction='sum'"),
    ),
    "not additive": (
        checked(no_sum, reduction="mean"),
        errors.UnsupportedLossError,
        ("'no_sum'", "not additive over samples", "reduction=lambda"),
    ),
    "contrastive": (
        checked(contrastive, reduction="mean"),
        errors.UnsupportedLossError,
        ("'contrastive'", "couples samples"),
    ),
    "mean called a sum": (
        checked(lambda z, y: F.mse_loss(z, Z[: len(z)]), reduction="sum"),
        errors.UnsupportedLossError,
        ("not additive", "reduction='sum'"),
    ),
    "contradiction": (
        checked(CE(), reduction="sum"),
        errors.OptionError,
        ("reduction='sum' contradicts CrossEntropyLoss(reduction='mean')", "leave reduction= out"),
    ),
    "unknown reduction": (
        checked(no_sum, reduction="median"),
        errors.OptionError,
        ("reduction='median'", "'mean', 'sum'"),
    ),
    "vector": (
        checked(lambda z, y: z.sum(1), reduction="mean"),
        errors.UnsupportedLossError,
        ("not one number", "reduction="),
    ),
    "without the outputs": (
        lambda: cs.ggn(
            problem(lambda z, y: z.detach().square().sum(), (X, Z), reduction="sum")
        ).trace(),
        errors.UnsupportedLossError,
        ("does not depend on the outputs", "detach()", "0 * outputs.sum()"),
    ),
    "Hessian without the outputs": (
        lambda: cs.hessian(
            problem(lambda z, y: z.detach().square().sum(), (X, Z), reduction="sum")
        ).trace(),
        errors.UnsupportedLossError,
        ("does not depend on the outputs", "detach()"),
    ),
    "the loss of a Problem": (
        lambda: problem(problem().loss),
        errors.UnsupportedLossError,
        (".loss of a Problem", "problem.user_loss"),
    ),
    "no callable": (
        checked("cross_entropy"),
        errors.UnsupportedLossError,
        ("callable", "str"),
    ),
    "negative weights": (
        checked(CE(weight=torch.tensor([1.0, -1.0, 1.0]))),
        errors.UnsupportedLossError,
        ("negative weight", "at least zero"),
    ),
    "weight per sample": (
        checked(nn.BCEWithLogitsLoss(weight=torch.ones(6, 3)), (X, (Z > 0).double())),
        errors.UnsupportedLossError,
        ("[6, 3]", "one per sample", "callable"),
    ),
    "trainable loss": (
        checked(Learned(), reduction="mean"),
        errors.UnsupportedLossError,
        ("Learned", "trainable parameters", "part of the model"),
    ),
    "a module of torch.nn that is no loss": (
        checked(nn.Sequential(nn.Tanh())),
        errors.UnsupportedLossError,
        ("Sequential", "Wrap it"),
    ),
    "logits to NLLLoss": (
        checked(nn.NLLLoss()),
        errors.UnsupportedLossError,
        ("NLLLoss needs log-probabilities", "CrossEntropyLoss on the logits"),
    ),
    "fisher of l1": (
        lambda: cs.fisher(problem(nn.L1Loss(), (X, Z))),
        errors.UnsupportedLossError,
        ("L1Loss", "cs.ggn or cs.hessian"),
    ),
    "k-fac of l1": (
        lambda: cs.kfac(problem(nn.L1Loss(), (X, Z))),
        errors.UnsupportedLossError,
        ("L1Loss", "cs.ggn or cs.hessian"),
    ),
    "kflr of a loss that is not convex": (
        lambda: cs.kflr(
            problem(lambda z, y: (z - y).square().sum(1).sin().mean(), (X, Z), reduction="mean")
        ),
        errors.UnsupportedLossError,
        ("not convex", "cs.ggn"),
    ),
    "terms of a callable": (
        lambda: cs.empirical_fisher(
            problem(lambda z, y: F.cross_entropy(z, y, reduction="sum"), reduction="sum"),
            per="term",
        ).dense(),
        errors.UnsupportedLossError,
        ("what its terms are", "per='sample'"),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    refused(LOSSES[name][0], LOSSES[name][1], *LOSSES[name][2])


def test_a_loss_of_nothing_has_zero_curvature() -> None:
    nothing = problem(lambda z, y: (y * 0).sum(), (X, Z), reduction="sum")
    for matrix in (cs.ggn(nothing), cs.hessian(nothing)):
        assert matrix.trace() == 0.0 and not bool(matrix.dense().any())
