"""What BackPACK must refuse, as a table: how to build it, which extensions, what to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.backpack_models import (
    N,
    Residual,
    Setting,
    bernoulli,
    classify,
    image,
    mlp,
    randn,
    random_statistics,
    regress,
    squared_error,
    with_head,
)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Slicing(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :3]


class Loose(nn.Module):
    """A parameter outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class Functions(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.function = nn.Linear(3, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.function(self.fc1(x)))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(3, 3), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.fc(x)))


class Transposed(nn.Module):
    """Uses a weight a second time, behind the layer's back."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(3, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act(self.fc(x)), self.fc.weight.T)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class TimeFirst(nn.Module):
    """Moves the samples to the second axis for a while; ``T = N`` hides it from shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(2, 2), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x.transpose(0, 1)))
        return self.fc2(h.transpose(0, 1).flatten(1))


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h - h.mean(0))


class Hidden(nn.Module):
    """Takes an LSTM's last state, not its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[1][0][0])


def twice() -> nn.Sequential:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def normed() -> nn.Sequential:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 3))


def bce(outputs: int = 1, **options: Any) -> Setting:
    model = nn.Sequential(nn.Linear(3, outputs)).double()
    y = torch.rand(N, outputs).double()
    return Setting(model, nn.BCEWithLogitsLoss(**options), bernoulli, randn(N, 3), y)


def log_softmax() -> Setting:
    model = nn.Sequential(nn.Linear(3, 3), nn.LogSoftmax(1))
    return classify(model, randn(N, 3), nn.NLLLoss())


def regression(loss: Any) -> Setting:
    setting = regress(mlp(), randn(N, 3))
    return Setting(setting.model, loss, squared_error, setting.x, setting.y)


def vectors(model: nn.Module) -> Callable[[], Setting]:
    return lambda: classify(model, randn(N, 3))


def tokens() -> Setting:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    return classify(model, randn(N, 2, 3))


@dataclass(frozen=True)
class Refusal:
    name: str
    build: Callable[[], Setting]
    extensions: tuple[str, ...]
    message: str
    options: tuple[tuple[str, Any], ...] = ()


CURVED = ("DiagHessian", "DiagGGNExact", "SqrtGGNMC", "KFLR", "GGNMP")
FIRST = ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance")
KRONECKER = ("KFAC", "KFLR", "KFRA")

REFUSALS = (
    # layers
    Refusal("subclass", vectors(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Doubling(4, 3))), CURVED,
            r"Layer '2' is a Doubling, a subclass of Linear"),
    Refusal("subclass, first order", vectors(nn.Sequential(Doubling(3, 3))), FIRST,
            r"does not support layer '0' \(Doubling\).*params=\['!0'\]"),
    Refusal("GELU", vectors(mlp(nn.GELU())), CURVED, r"layer '1' \(GELU\)"),
    Refusal("LayerNorm", vectors(mlp(nn.LayerNorm(4))), (*CURVED, *FIRST),
            r"layer '1' \(LayerNorm\)"),
    Refusal("attention", lambda: classify(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True),
                                          randn(N, 2, 4)),
            CURVED, r"\(TransformerEncoderLayer\)"),
    Refusal("leaky relu", vectors(mlp(nn.LeakyReLU())), (*KRONECKER, "HMP", "GGNMP", "PCHMP"),
            r"layer '1' \(LeakyReLU\)"),
    Refusal("weight norm", lambda: classify(normed(), randn(N, 3)), (*CURVED, *FIRST),
            r"weight of layer '0' is computed from other parameters"),
    Refusal("BatchNorm", vectors(mlp(random_statistics(nn.BatchNorm1d(4)))),
            ("DiagHessian", "BatchDiagHessian", *KRONECKER), r"layer '1' \(BatchNorm1d\)"),
    Refusal("BatchNorm by batch", vectors(mlp(nn.BatchNorm1d(4))), ("DiagGGNExact", *FIRST),
            "batchnorm=\"batch\" couples samples in layer '1'", (("batchnorm", "batch"),)),
    Refusal("BatchNorm without statistics",
            vectors(mlp(nn.BatchNorm1d(4, track_running_stats=False))),
            ("DiagGGNExact", *FIRST), "Layer '1' has no running statistics"),
    Refusal("output padding",
            lambda: with_head(nn.ConvTranspose1d(2, 2, 2, stride=2, output_padding=1),
                              x=randn(N, 2, 3)),
            ("DiagGGNExact", *FIRST), r"layer '0' \(ConvTranspose1d\).*output_padding=\(1,\)"),
    Refusal("average-pool, ceiling", lambda: image(nn.AvgPool2d(3, 2, ceil_mode=True)),
            ("DiagHessian", "DiagGGNExact", "SqrtGGNExact"), r"failed at layer '2': ValueError"),
    Refusal("average-pool, in products", lambda: image(nn.AvgPool2d(3, 2, ceil_mode=True)),
            ("HMP", "GGNMP"), r"in the product for parameter '0\.weight'"),
    Refusal("grouped", lambda: image(nn.Conv2d(2, 4, 3, groups=2)), KRONECKER,
            r"layer '0' \(Conv2d\)"),
    Refusal("tokens", tokens, KRONECKER, r"layer '3'|layer '0'.*2d inputs"),
    Refusal("embedding with padding",
            lambda: classify(nn.Sequential(nn.Embedding(5, 3, 0), nn.Flatten(), nn.Linear(6, 3)),
                             torch.randint(5, (N, 2))),
            ("DiagGGNExact", *FIRST), r"failed at layer '0'.*padding_idx"),
    # containers
    Refusal("slicing container", vectors(nn.Sequential(nn.Linear(3, 4), Slicing(nn.Linear(4, 4)))),
            CURVED, r"failed at layer|does not support layer|rewrite|in the product"),
    Refusal("loose parameter", vectors(Loose()), (*CURVED, *FIRST), r"\(root\)|'scale'"),
    Refusal("function", vectors(Functions(torch.tanh)), CURVED, "uses 'tanh'"),
    Refusal("in-place function", vectors(Functions(lambda h: h.relu_())), CURVED, "uses 'relu_'"),
    Refusal("a view", vectors(Functions(lambda h: h.view(h.size(0), -1))), CURVED,
            r"uses '(size|view)'"),
    Refusal("adding a number", vectors(Functions(lambda h: h + 1.0)), ("DiagGGNExact", "SqrtGGNMC"),
            "tuple of tensors"),
    Refusal("control flow", vectors(Functions(lambda h: h if h.sum() > 1e9 else -h)), CURVED,
            "converter cannot rewrite Functions"),
    Refusal("residual", vectors(Residual()), ("DiagHessian", "BatchDiagHessian", "HMP"),
            "'sum_module0'"),
    Refusal("residual, Kronecker", vectors(Residual()), ("KFLR", "KFRA"), "residual connections"),
    Refusal("layer twice in a chain", vectors(twice()), (*CURVED, *FIRST),
            r"layer '0' \(Linear\): it is used 2 times"),
    Refusal("reused layer", vectors(Reused()), (*CURVED, *FIRST), "'?fc'?.* used 2 times"),
    Refusal("weight used twice", vectors(Transposed()), FIRST, r"'fc\.weight' is used more than"),
    Refusal("unused layer", vectors(Unused()), FIRST, r"'other\.weight'.*params=\['!other"),
    Refusal("samples moved", lambda: classify(TimeFirst(), randn(3, 3, 2)), (*CURVED, *FIRST),
            "silently wrong|Batch axis"),
    Refusal("coupled samples", vectors(Coupled()), FIRST, "gradient of sample 0"),
    Refusal("hidden state", lambda: classify(Hidden(), randn(N, 2, 3)), FIRST, "layer 'rnn'"),
    # losses
    Refusal("NLLLoss", log_softmax, CURVED, "does not know NLLLoss"),
    Refusal("L1Loss", lambda: regression(nn.L1Loss()), CURVED, "not the loss 'L1Loss'"),
    Refusal("pos_weight", lambda: bce(pos_weight=torch.tensor([2.0])), CURVED, "pos_weight="),
    Refusal("two Bernoulli outputs", lambda: bce(2), CURVED[:4], r"outputs \[N, 1\], not \[3, 2\]"),
    Refusal("Bernoulli", bce, ("KFRA", "HMP", "GGNMP", "PCHMP"),
            "does not support BCEWithLogitsLoss"),
    Refusal("soft targets, sampled", bce, ("DiagGGNMC", "KFAC"),
            r"the loss \(BCEWithLogitsLoss\).*binary targets"),
    # the way in
    Refusal("forward=", vectors(mlp()), (*CURVED, *FIRST), "through forward=",
            (("forward", lambda model, x: model(x)),)),
    Refusal("half precision", vectors(mlp()), ("DiagGGNExact", "BatchGrad"), "float32 or float64",
            (("dtype", torch.bfloat16),)),
)  # fmt: skip
