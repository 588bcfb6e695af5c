"""Small models with a loss and data, in float64, that the BackPACK tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.backpack_truth import Total

N = 4


@dataclass(frozen=True)
class Setting:
    model: nn.Module
    loss: object
    total: Total
    x: Tensor
    y: Tensor


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets, reduction="sum")


def bernoulli(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")


def classify(
    model: nn.Module, x: Tensor, loss: object = None, total: Total = cross_entropy
) -> Setting:
    """Cross-entropy over as many classes as the model has outputs."""
    model = model.double().eval()
    with torch.no_grad():
        shape = model(x).shape
    y = torch.randint(shape[1], (shape[0], *shape[2:]))
    return Setting(model, loss or nn.CrossEntropyLoss(), total, x, y)


def regress(model: nn.Module, x: Tensor) -> Setting:
    model = model.double().eval()
    with torch.no_grad():
        shape = model(x).shape
    return Setting(model, nn.MSELoss(), squared_error, x, randn(*shape))


def with_head(*layers: nn.Module, x: Tensor) -> Setting:
    body = nn.Sequential(*layers, nn.Flatten()).double().eval()
    with torch.no_grad():
        width = body(x).shape[1]
    return classify(nn.Sequential(*body, nn.Linear(width, 3)), x)


def mlp(act: nn.Module | None = None, other: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(3, 4), act or nn.Tanh(), nn.Linear(4, 3), other or nn.Sigmoid()),
        nn.Linear(3, 3),
    )


def random_statistics(layer: nn.Module) -> nn.Module:
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act1 = nn.Linear(3, 4), nn.Tanh()
        self.fc2, self.act2 = nn.Linear(4, 4), nn.ReLU()
        self.skip, self.fc3 = nn.Identity(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.fc1(x))
        return self.fc3(self.skip(h) + self.act2(self.fc2(h)))


class Doubled(nn.Module):
    """Factors between layers, and an activation that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(3, 4), nn.Linear(4, 3), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.act(self.fc2(self.act(self.fc1(x)) * 2.0))


class Functional(nn.Module):
    """Layers joined by functions that only autograd can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)) * x.shape[1])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.flat = nn.LSTM(3, 2, batch_first=True), nn.Flatten()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flat(self.rnn(x)[0]))


def shared_activation() -> nn.Sequential:
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3), act, nn.Linear(3, 3))


def hooked() -> nn.Sequential:
    """A hook that only looks on must not matter."""
    model = mlp()
    model[0].register_forward_hook(lambda module, args, output: None)
    return model


def frozen() -> nn.Sequential:
    model = mlp()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, label_smoothing=0.2, reduction="sum")


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    return F.cross_entropy(outputs, targets, weight=weight, reduction="sum")


def ignored_setting() -> Setting:
    setting = classify(mlp(), randn(N, 3))
    setting.y[1] = -100
    return setting


def class_weights_setting() -> Setting:
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    return classify(mlp(), randn(N, 3), nn.CrossEntropyLoss(weight=weight), weighted)


def bernoulli_setting(soft: bool = False) -> Setting:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    y = torch.rand(N, 1).double()
    return Setting(model, nn.BCEWithLogitsLoss(), bernoulli, randn(N, 3), y if soft else y.round())


def image(*layers: nn.Module, size: int = 4) -> Setting:
    x = randn(N, 2, size, size)
    return with_head(nn.Conv2d(2, 2, 1), nn.Tanh(), *layers, nn.Sigmoid(), x=x)
