"""Models, losses and data as a table, with the extensions that must not work on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tests.curvature.backpack_models import (
    Doubled,
    Functional,
    N,
    Recurrent,
    Residual,
    Setting,
    Wrapped,
    bernoulli_setting,
    class_weights_setting,
    classify,
    frozen,
    hooked,
    ignored_setting,
    image,
    mlp,
    randn,
    random_statistics,
    regress,
    shared_activation,
    smoothed,
    with_head,
)

ALL = (
    *("DiagHessian", "BatchDiagHessian", "DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact"),
    *("HMP", "GGNMP", "BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"),
)
HESSIAN = ("DiagHessian", "BatchDiagHessian")
PRODUCTS = ("HMP", "GGNMP")
CURVED = ALL[:7]
MOMENTS = ("BatchL2Grad", "SumGradSquared", "Variance")  # depend on the layers with parameters only


@dataclass(frozen=True)
class Case:
    """``refused`` extensions must raise; ``untested`` ones take the same path as in other cases."""

    name: str
    build: Callable[[], Setting]
    refused: tuple[str, ...] = ()
    untested: tuple[str, ...] = ()

    def extensions(self) -> list[str]:
        return [name for name in ALL if name not in self.untested]


CASES = (
    Case("tanh, sigmoid", lambda: classify(mlp(), randn(N, 3))),
    Case(
        "in-place relu", lambda: classify(mlp(nn.ReLU(inplace=True)), randn(N, 3)), untested=MOMENTS
    ),
    Case(
        "leaky relu, elu",
        lambda: classify(mlp(nn.LeakyReLU(0.3, True), nn.ELU(0.7)), randn(N, 3)),
        PRODUCTS,
        untested=MOMENTS,
    ),
    Case(
        "selu, log-sigmoid",
        lambda: classify(mlp(nn.SELU(), nn.LogSigmoid()), randn(N, 3)),
        PRODUCTS,
        untested=MOMENTS,
    ),
    Case(
        "no-ops",
        lambda: classify(mlp(nn.AlphaDropout(), nn.Identity()), randn(N, 3)),
        untested=MOMENTS,
    ),
    Case("shared activation", lambda: classify(shared_activation(), randn(N, 3)), untested=MOMENTS),
    Case("frozen parameters", lambda: classify(frozen(), randn(N, 3))),
    Case("observing hook", lambda: classify(hooked(), randn(N, 3)), untested=MOMENTS),
    Case("single layer", lambda: classify(nn.Linear(3, 3), randn(N, 3))),
    Case("squared error", lambda: regress(mlp(), randn(N, 3))),
    Case("Bernoulli", bernoulli_setting, PRODUCTS, untested=MOMENTS),
    Case("Bernoulli, soft targets", lambda: bernoulli_setting(True), PRODUCTS, untested=MOMENTS),
    Case(
        "label smoothing",
        lambda: classify(mlp(), randn(N, 3), nn.CrossEntropyLoss(label_smoothing=0.2), smoothed),
        untested=MOMENTS,
    ),
    Case(
        "functional loss", lambda: classify(mlp(), randn(N, 3), F.cross_entropy), untested=MOMENTS
    ),
    Case("class weights", class_weights_setting, CURVED, untested=MOMENTS),
    Case("ignored targets", ignored_setting, CURVED, untested=MOMENTS),
    Case(
        "linear on tokens",
        lambda: classify(
            nn.Sequential(
                *(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten(), nn.Linear(4, 3))
            ),
            randn(N, 2, 3),
        ),
    ),
    Case(
        "pixels",
        lambda: classify(
            nn.Sequential(nn.Conv2d(2, 2, 2), nn.Sigmoid(), nn.Conv2d(2, 3, 2)), randn(N, 2, 4, 3)
        ),
    ),
    Case(
        "squared error of images",
        lambda: regress(
            nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Conv2d(2, 1, 2)), randn(N, 1, 4, 3)
        ),
    ),
    Case(
        "strided, dilated, average-pool",
        lambda: image(
            nn.Conv2d(2, 2, 3, 2, (1, 0), (1, 2), bias=False), nn.AvgPool2d(2, 1, 1), size=5
        ),
    ),
    Case(
        "padding in words",
        lambda: image(nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 1, 2, padding="valid")),
    ),
    Case(
        "padding, max-pool",
        lambda: image(nn.ZeroPad2d((1, 0, 2, 1)), nn.MaxPool2d(3, stride=2, padding=1), size=3),
        untested=MOMENTS,
    ),
    Case("grouped", lambda: image(nn.Conv2d(2, 4, 3, groups=2))),
    Case(
        "grouped, transposed 1d",
        lambda: with_head(
            *(nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 3, groups=2)),
            x=randn(N, 2, 4),
        ),
        PRODUCTS,
    ),
    Case(
        "3d",
        lambda: with_head(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.MaxPool3d(2), x=randn(N, 1, 3, 3, 3)),
        PRODUCTS,
    ),
    Case(
        "transposed",
        lambda: with_head(
            nn.Conv2d(2, 2, 1),
            nn.Tanh(),
            nn.ConvTranspose2d(2, 1, 2, stride=2),
            x=randn(N, 2, 2, 2),
        ),
        PRODUCTS,
    ),
    Case(
        "adaptive pool",
        lambda: image(nn.AdaptiveAvgPool2d(2)),
        ("SqrtGGNExact", *PRODUCTS),
        untested=MOMENTS,
    ),
    Case(
        "BatchNorm2d",
        lambda: image(random_statistics(nn.BatchNorm2d(2))),
        (*HESSIAN, *PRODUCTS),
    ),
    Case(
        "BatchNorm1d",
        lambda: classify(mlp(random_statistics(nn.BatchNorm1d(4))), randn(N, 3)),
        HESSIAN,
    ),
    Case(
        "embedding",
        lambda: classify(
            nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 3)),
            torch.randint(6, (N, 2)),
        ),
        (*HESSIAN, *PRODUCTS),
    ),
    Case(
        "container",
        lambda: classify(Wrapped(mlp(nn.ReLU(inplace=True))), randn(N, 3)),
        untested=MOMENTS,
    ),
    Case("residual", lambda: classify(Residual(), randn(N, 3)), (*HESSIAN, *PRODUCTS)),
    Case(
        "factors", lambda: classify(Doubled(), randn(N, 3)), (*HESSIAN, *PRODUCTS), untested=MOMENTS
    ),
    Case("functional forward", lambda: classify(Functional(), randn(N, 3)), CURVED),
    Case("GELU", lambda: classify(mlp(nn.GELU()), randn(N, 3)), CURVED, untested=MOMENTS),
    Case(
        "LSTM",
        lambda: classify(Recurrent(), randn(N, 3, 3)),
        (*HESSIAN, "SqrtGGNExact", *PRODUCTS),
    ),
)
