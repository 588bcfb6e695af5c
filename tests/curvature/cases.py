"""The table: model x loss x reduction x batching. Each case has dense truth in ``reference``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from .draws import (
    POS,
    W3,
    bits,
    both,
    data,
    focal,
    focal_terms,
    folded,
    ignore_batch,
    labels,
    lengths,
    loader,
    masked_mse,
    masked_terms,
    named,
    one,
    positive,
    quartic,
    quartic_terms,
    real,
    soft,
    some_ignored,
    with_gaps,
)
from .nets import (
    Apply,
    Attention,
    Autograd,
    FirstToken,
    Functional,
    Pair,
    Product,
    Recurrent,
    Residual,
    Reused,
    RootParameters,
    TiedLanguage,
    TiedTranspose,
    TwoNames,
    Windows,
    WrittenOut,
    flat_tokens,
    mlp,
    normalised,
    seeded,
    tokens_last,
)
from .reference import Case

# -- the table ---------------------------------------------------------------------------------

CASES: list[Case] = []


def case(name: str, model: Callable[..., nn.Module], loss: Any, batches: Any, **more: Any) -> None:
    """``load``, ``terms``, ``merge`` and ``truth`` go to the case, all else to the Problem."""
    own = {k: more.pop(k) for k in ("load", "terms", "merge", "truth") if k in more}
    CASES.append(Case(name, functools.partial(seeded, model), loss, batches, more, **own))


CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss
UNEVEN = (4, 2, 1)
S, T, R = nn.Sequential, nn.Tanh, nn.ReLU

# activations and batching
case("tanh-ce", lambda: mlp(T, 4, 5, 3), CE(), data((5,), real(4), labels(3)), load=one)
case("relu-ce-uneven", lambda: mlp(R, 4, 5, 3), CE(), data(UNEVEN, real(4), labels(3)))
case("relu-mse", lambda: mlp(R, 4, 4, 3, 2), MSE(), data(UNEVEN, real(4), real(2)))
case("gelu-bce", lambda: mlp(nn.GELU, 4, 4, 3), BCE(), data((3, 3), real(4), bits(3)))
case(
    "sigmoid-mse-sum",
    lambda: mlp(nn.Sigmoid, 4, 4, 2),
    MSE(reduction="sum"),
    data(UNEVEN, real(4), real(2)),
)
case("elu-singles", lambda: mlp(nn.ELU, 3, 4, 3), CE(), data((1, 1, 1), real(3), labels(3)))
case("leaky-ce", lambda: mlp(nn.LeakyReLU, 4, 5, 3), CE(), data((4, 3), real(4), labels(3)))
case("softplus-bce", lambda: mlp(nn.Softplus, 3, 4, 2), BCE(), data((2, 4), real(3), bits(2)))
case(
    "silu-no-bias",
    lambda: mlp(nn.SiLU, 4, 4, 3, bias=False),
    CE(reduction="sum"),
    data((4, 2), real(4), labels(3)),
)
case("linear-mse", lambda: nn.Linear(3, 2), MSE(), data((5, 1), real(3), real(2)))
case("softmax-regression", lambda: nn.Linear(4, 3), CE(), data((4, 3), real(4), labels(3)))
case(
    "loader",
    lambda: mlp(R, 4, 5, 3),
    CE(),
    data((7,), real(4), labels(3)),
    load=loader(3, shuffle=True),
)
case(
    "loader-own-generator",
    lambda: mlp(T, 4, 4, 3),
    CE(weight=W3),
    data((7,), real(4), labels(3)),
    load=loader(2, shuffle=True, generator=None),
)
case("one-sample", lambda: mlp(T, 4, 4, 3), CE(), data((1,), real(4), labels(3)), load=one)
case("samples-equal-width", lambda: mlp(T, 4, 4, 4), CE(), data((4,), real(4), labels(4)))

# weights as [in, out]
for _how in ("addmm", "bias first", "matmul"):
    case(
        f"product-{_how}",
        functools.partial(
            lambda how: S(Product(3, 4, how), T(), Product(4, 3, how), Apply(tokens_last)), _how
        ),
        CE(),
        data((2, 3), real(3, 3), labels(3, 3)),
    )

# Linear with more axes, and tokens
case(
    "linear-3d",
    lambda: S(nn.Linear(3, 4), T(), nn.Linear(4, 3), Apply(tokens_last)),
    CE(),
    data((2, 3), real(3, 3), labels(3, 3)),
)
case(
    "linear-4d",
    lambda: S(nn.Linear(2, 3), T(), nn.Linear(3, 2)),
    MSE(),
    data((2, 1), real(2, 3, 2), real(2, 3, 2)),
)
case(
    "tokens-flat",
    lambda: S(nn.Linear(3, 4), T(), nn.Linear(4, 3), Apply(flat_tokens)),
    CE(reduction="sum"),
    folded(data((2, 3), real(4, 3), labels(3, 4))),
)
case(
    "tokens-flat-ignored",
    lambda: TiedLanguage(flat=True),
    CE(ignore_index=-1),
    folded(data((3, 2), labels(5, 3), some_ignored(5, 3, index=-1))),
)
case(
    "samples-equal-tokens",
    lambda: S(nn.Linear(3, 3), T(), nn.Linear(3, 3), Apply(tokens_last)),
    CE(),
    data((3,), real(3, 3), labels(3, 3)),
)
case(
    "lengths-differ",
    lambda: TiedLanguage(),
    CE(ignore_index=4),
    lengths(((2, 4), (3, 2), (1, 3)), lambda t: labels(5, t), lambda t: labels(5, t)),
)
case(
    "lengths-differ-linear",
    lambda: S(nn.Linear(2, 3), T(), nn.Linear(3, 3), Apply(tokens_last)),
    CE(),
    lengths(((2, 2), (2, 4), (4, 1), (1, 3)), lambda t: real(t, 2), lambda t: labels(3, t)),
)
case(
    "lengths-from-one",
    lambda: S(nn.Linear(2, 3), T(), nn.Linear(3, 3), Apply(tokens_last)),
    CE(),
    lengths(((3, 1), (2, 3)), lambda t: real(t, 2), lambda t: labels(3, t)),
)

# convolutions
case(
    "conv1d",
    lambda: S(nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), T(), nn.Conv1d(4, 2, 2)),
    CE(),
    data((2, 3), real(2, 7), labels(2, 3)),
)
case(
    "conv2d",
    lambda: S(
        nn.Conv2d(1, 2, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        R(),
        nn.MaxPool2d((2, 1)),
        nn.Flatten(),
        nn.Linear(8, 3),
    ),
    CE(),
    data((3, 2), real(1, 7, 6), labels(3)),
)
case(
    "conv2d-same-smooth",
    lambda: S(
        nn.Conv2d(1, 2, (2, 3), padding="same", dilation=(2, 1), bias=False),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 2),
    ),
    BCE(),
    data((2, 2), real(1, 4, 5), bits(2)),
)
case(
    "conv2d-circular-groups",
    lambda: S(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", groups=2),
        R(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    CE(),
    data((2, 3), real(2, 4, 4), labels(3)),
)
case(
    "conv3d",
    lambda: S(
        nn.Conv3d(1, 2, (1, 2, 2), padding=(0, 1, 0)),
        R(),
        nn.MaxPool3d(2),
        nn.Flatten(),
        nn.Linear(4, 2),
    ),
    CE(),
    data((2, 2), real(1, 2, 4, 3), labels(2)),
)
case(
    "pixels",
    lambda: S(nn.Conv2d(1, 3, 2), T(), nn.Conv2d(3, 3, 1)),
    CE(weight=W3, ignore_index=1),
    data((2, 3), real(1, 3, 4), labels(3, 2, 3)),
)
case(
    "transposed1d",
    lambda: S(
        nn.Linear(3, 6),
        T(),
        Apply(lambda x: x.reshape(-1, 2, 3)),
        nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        R(),
        nn.Flatten(),
        nn.Linear(24, 1),
    ),
    MSE(),
    data((2, 1), real(3), real(1)),
)
case(
    "transposed2d",
    lambda: S(nn.ConvTranspose2d(2, 2, 2, stride=(1, 2), dilation=(2, 1)), R(), nn.Conv2d(2, 2, 2)),
    MSE(),
    data((2, 2), real(2, 2, 2), real(2, 3, 3)),
)
case(
    "transposed3d",
    lambda: S(nn.ConvTranspose3d(1, 2, (1, 2, 1), stride=(1, 2, 1), bias=False), nn.Softplus()),
    MSE(),
    data((1, 2), real(1, 2, 2, 2), real(2, 2, 4, 2)),
)

# normalisation
case(
    "batchnorm1d-eval",
    lambda: S(nn.Linear(3, 4), nn.BatchNorm1d(4), R(), nn.Linear(4, 3)),
    CE(),
    data(UNEVEN, real(3), labels(3)),
)
case(
    "batchnorm1d-positions",
    lambda: S(nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), T(), nn.Flatten(), nn.Linear(9, 2)),
    CE(),
    data((3, 2), real(1, 4), labels(2)),
)
case(
    "batchnorm2d-batch",
    lambda: S(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), R(), nn.Flatten(), nn.Linear(8, 3)),
    CE(),
    data((4, 3), real(1, 3, 3), labels(3)),
    batchnorm="batch",
    merge=False,
)
case(
    "batchnorm1d-batch-smooth",
    lambda: S(nn.Linear(3, 4), nn.BatchNorm1d(4), T(), nn.Linear(4, 2)),
    MSE(),
    data((4, 2), real(3), real(2)),
    batchnorm="batch",
    merge=False,
)
case(
    "layernorm",
    lambda: S(nn.Linear(3, 4), nn.LayerNorm(4), T(), nn.Linear(4, 3), Apply(tokens_last)),
    CE(),
    data((2, 3), real(3, 3), labels(3, 3)),
)
case(
    "layernorm-2d",
    lambda: S(nn.Linear(3, 4), nn.LayerNorm((2, 4)), R(), nn.Flatten(), nn.Linear(8, 2)),
    MSE(),
    data((3, 1), real(2, 3), real(2)),
)
case(
    "groupnorm",
    lambda: S(nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2)),
    CE(),
    data((2, 3), real(1, 3, 3), labels(2)),
)
case(
    "instancenorm",
    lambda: S(
        nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3, affine=True), R(), nn.Flatten(), nn.Linear(9, 2)
    ),
    CE(),
    data((2, 3), real(1, 4), labels(2)),
)
case(
    "rmsnorm",
    lambda: S(nn.Linear(3, 4), nn.RMSNorm(4), nn.SiLU(), nn.Linear(4, 3)),
    CE(),
    data((2, 3), real(3), labels(3)),
)

# embeddings, attention, recurrent layers
case(
    "embedding-padding",
    lambda: S(nn.Embedding(5, 3, padding_idx=2), T(), nn.Flatten(), nn.Linear(9, 2)),
    CE(),
    data((3, 2), labels(5, 3), labels(2)),
)
case("tied-language", lambda: TiedLanguage(), CE(), data((3, 2), labels(5, 4), labels(5, 4)))
case(
    "attention-batch-first",
    lambda: Attention(True),
    CE(),
    data((2, 1), real(3, 4), labels(3, 3)),
)
case(
    "attention-time-first",
    lambda: Attention(False),
    CE(reduction="sum"),
    data((3, 2), real(3, 4), some_ignored(3, 3)),
)
case(
    "attention-kdim-vdim",
    lambda: Attention(True, kdim=3, vdim=2),
    CE(),
    data((2, 2), real(2, 4), labels(3, 2)),
)
for n in (2, 3, 4, 5):  # as many samples as positions: which axis is which?
    case(f"attention-first-token-{n}", FirstToken, MSE(), data((n,), real(n, 2), real(2)))
case(
    "transformer-layer",
    lambda: S(
        nn.TransformerEncoderLayer(2, 1, 3, batch_first=True, activation="gelu"),
        nn.Linear(2, 2),
        Apply(tokens_last),
    ),
    CE(),
    data((2, 2), real(3, 2), labels(2, 3)),
)
case(
    "lstm",
    lambda: Recurrent(nn.LSTM(2, 2, batch_first=True), True, 2, 3),
    CE(),
    data((2, 1), real(3, 2), labels(3, 3)),
)
case(
    "gru-last-time-first",
    lambda: Recurrent(nn.GRU(2, 3), False, 3, 2),
    CE(),
    data((3,), real(3, 2), labels(2)),
)
case(
    "rnn-bidirectional",
    lambda: Recurrent(nn.RNN(2, 2, bidirectional=True, batch_first=True), False, 4, 2),
    MSE(),
    data((2, 2), real(2, 2), real(2)),
)

# how a model uses its parameters
case("residual", lambda: Residual(False), CE(), data((2, 3), real(1, 3, 3), labels(3)))
case("residual-inplace", lambda: Residual(True), CE(), data((2, 3), real(1, 3, 3), labels(3)))
case("reused-layer", Reused, CE(), data((3, 2), real(4), labels(3)))
case("two-names", TwoNames, CE(), data((3, 2), real(4), labels(3)))
case("tied-transpose", TiedTranspose, MSE(), data((3, 2), real(4), real(4)))
case("root-parameters", RootParameters, MSE(), data((3, 2), real(4), real(2)))
case("functional", Functional, CE(), data((3, 2), real(1, 4, 4), labels(3)))
case(
    "bilinear-prelu",
    Pair,
    CE(),
    data((3, 2), both(real(3), real(2)), labels(3)),
    forward=lambda model, x: model(*x),
)
case(
    "dict-inputs",
    Pair,
    MSE(),
    data((2, 3), named(left=real(3), right=real(2)), real(3)),
    forward=lambda model, x: model(**x),
)
case(
    "weight-norm",
    lambda: normalised("weight_norm"),
    CE(),
    data((3, 2), real(4), labels(2)),
    truth=WrittenOut,
)
case("spectral-norm", lambda: normalised("spectral_norm"), MSE(), data((3, 2), real(4), real(2)))
case("physics-informed", Autograd, MSE(), data((3, 2), real(2), real(2)))
case(
    "adaptive-max-pool",
    lambda: S(nn.Conv2d(1, 3, 2), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)),
    CE(),
    data((2, 2), real(1, 4, 4), labels(2)),
)
for inner in (True, False):
    case(
        f"windows-{'inner' if inner else 'outer'}",
        functools.partial(Windows, inner),
        CE(),
        data((2, 3), real(4, 2), labels(2)),
    )


# blocks and parts of a model
def frozen() -> nn.Module:
    model = mlp(T, 3, 4, 4, 3)
    model[2].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    return model


case("frozen", frozen, CE(), data((3, 2), real(3), labels(3)))
case(
    "params-subset",
    lambda: mlp(T, 3, 4, 4, 3),
    CE(),
    data((3, 2), real(3), labels(3)),
    params=["2", "4.bias"],
)
case(
    "params-left-out",
    lambda: mlp(R, 3, 4, 4, 3),
    CE(),
    data((3, 2), real(3), labels(3)),
    params="!0.*",
)
case(
    "blocks-named",
    lambda: mlp(T, 3, 4, 4, 3),
    CE(),
    data((3, 2), real(3), labels(3)),
    blocks={"first two": ["0", "2.weight"], "rest": ["2.bias", "4"]},
)
case(
    "blocks-parameter",
    lambda: mlp(T, 3, 4, 3),
    CE(),
    data((3, 2), real(3), labels(3)),
    blocks="parameter",
)
case(
    "blocks-all",
    lambda: mlp(R, 3, 4, 3),
    CE(),
    data((3, 2), real(3), labels(3)),
    blocks="all",
)

# losses
A = functools.partial(mlp, T, 3, 3, 3)
case("weights", A, CE(weight=W3), data(UNEVEN, real(3), labels(3)))
case("weights-sum", A, CE(weight=W3, reduction="sum"), data(UNEVEN, real(3), labels(3)))
case("ignored", A, CE(ignore_index=2), data(UNEVEN, real(3), labels(3)))
case("ignored-batch", A, CE(), ignore_batch(data(UNEVEN, real(3), labels(3)), 1))
case(
    "ignored-first-batch",
    lambda: mlp(R, 3, 3, 3),
    CE(weight=W3),
    ignore_batch(data((2, 3), real(3), labels(3)), 0),
)
case("smoothing", A, CE(label_smoothing=0.2), data(UNEVEN, real(3), labels(3)))
case(
    "smoothing-weights-ignored",
    A,
    CE(label_smoothing=0.2, weight=W3, ignore_index=0),
    data((5, 4), real(3), labels(3)),
)
case("soft-labels", A, CE(), data(UNEVEN, real(3), soft(3)))
case(
    "soft-labels-weights",
    A,
    CE(weight=W3, label_smoothing=0.1),
    data(UNEVEN, real(3), soft(3)),
)
case(
    "soft-pixels",
    lambda: nn.Conv2d(1, 3, 2),
    CE(),
    data((2, 1), real(1, 3, 2), soft(3, 2, 1)),
)
case(
    "nll",
    lambda: S(nn.Linear(3, 4), T(), nn.Linear(4, 3), nn.LogSoftmax(1)),
    nn.NLLLoss(),
    data(UNEVEN, real(3), labels(3)),
)
case(
    "nll-relu-weights-ignored",
    lambda: S(nn.Linear(3, 4), R(), nn.Linear(4, 3), nn.LogSoftmax(1)),
    nn.NLLLoss(weight=W3, ignore_index=1),
    data((4, 3), real(3), labels(3)),
)
case("pos-weight", A, BCE(pos_weight=POS), data(UNEVEN, real(3), bits(3)))
case(
    "bce-weight-sum",
    A,
    BCE(weight=POS, pos_weight=POS, reduction="sum"),
    data((4, 2), real(3), bits(3)),
)
B = functools.partial(mlp, T, 3, 3, 2)
case("l1", B, nn.L1Loss(), data(UNEVEN, real(3), real(2)))
case("l1-relu", lambda: mlp(R, 3, 3, 2), nn.L1Loss(), data(UNEVEN, real(3), real(2)))
case("smooth-l1", B, nn.SmoothL1Loss(beta=0.5), data(UNEVEN, real(3), real(2)))
case("huber-sum", B, nn.HuberLoss(reduction="sum"), data((4, 2), real(3), real(2)))
case("poisson", B, nn.PoissonNLLLoss(), data(UNEVEN, real(3), positive(2)))
case(
    "kl-batchmean",
    lambda: S(nn.Linear(3, 3), T(), nn.Linear(3, 3), nn.LogSoftmax(1)),
    nn.KLDivLoss(reduction="batchmean"),
    data(UNEVEN, real(3), soft(3)),
)
case(
    "kl-mean",
    lambda: S(nn.Linear(3, 3), R(), nn.Linear(3, 3), nn.LogSoftmax(1)),
    nn.KLDivLoss(reduction="mean"),
    data((4, 2), real(3), soft(3)),
)
case(
    "kl-sum",
    lambda: S(nn.Linear(3, 3), nn.LogSoftmax(1)),
    nn.KLDivLoss(reduction="sum"),
    data((4, 2), real(3), soft(3)),
)
case(
    "quartic",
    B,
    quartic,
    data(UNEVEN, real(3), real(2)),
    reduction="mean",
    terms=quartic_terms,
)
case(
    "quartic-relu",
    lambda: mlp(R, 3, 4, 2),
    quartic,
    data(UNEVEN, real(3), real(2)),
    reduction="mean",
    terms=quartic_terms,
)
case("focal", A, focal, data((3, 3), real(3), labels(3)), reduction="sum", terms=focal_terms)
case(
    "masked",
    B,
    masked_mse,
    data((4, 3), real(3), with_gaps(2)),
    reduction=lambda z, y: int((~y.isnan()).sum()),
    terms=masked_terms,
)
case("function", A, F.cross_entropy, data(UNEVEN, real(3), labels(3)))
case("function-sum", A, F.cross_entropy, data((4, 2), real(3), labels(3)), reduction="sum")
case(
    "partial",
    A,
    functools.partial(F.cross_entropy, weight=W3.double(), label_smoothing=0.1),
    data((4, 2), real(3), labels(3)),
)
case(
    "partial-bce",
    A,
    functools.partial(F.binary_cross_entropy_with_logits, pos_weight=POS),
    data((4, 2), real(3), bits(3)),
)
