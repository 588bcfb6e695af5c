"""The three networks on which products and spectra are timed, at their real sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvscope.zoo import models


@dataclass(frozen=True)
class Case:
    """A network in eval mode, its loss, and batches of random data of the real shape."""

    name: str
    model: nn.Module
    loss: nn.Module
    batches: list[tuple[Tensor, Tensor]]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def double(self) -> Case:
        """The same in float64."""
        import copy

        def cast(x: Tensor) -> Tensor:
            return x.double() if x.is_floating_point() else x

        batches = [(cast(x), cast(y)) for x, y in self.batches]
        return Case(self.name, copy.deepcopy(self.model).double(), self.loss, batches)


def resnet20(count: int) -> Case:
    """ResNet-20 on batches of 128 images of CIFAR-10's shape."""
    model = models.ResNet(3, (16, 32, 64), depth=3, classes=10).eval()
    batches = [(torch.randn(128, 3, 32, 32), torch.randint(10, (128,))) for _ in range(count)]
    return Case("ResNet-20, batch 128", model, nn.CrossEntropyLoss(), batches)


def autoencoder(count: int) -> Case:
    """The MNIST autoencoder on batches of 256."""
    images = [torch.rand(256, 784) for _ in range(count)]
    loss = nn.BCEWithLogitsLoss()
    return Case(
        "MNIST autoencoder, batch 256", models.autoencoder(), loss, [(x, x) for x in images]
    )


def gpt(count: int) -> Case:
    """A transformer of 4 layers on 8 sequences of 64 characters."""
    model = models.CharTransformer(65).eval()
    batches = [(torch.randint(65, (8, 64)), torch.randint(65, (8, 64))) for _ in range(count)]
    return Case("GPT of 4 layers, 8 x 64 tokens", model, nn.CrossEntropyLoss(), batches)


CASES: dict[str, Callable[[int], Case]] = {
    "resnet20": resnet20,
    "autoencoder": autoencoder,
    "gpt": gpt,
}


def make(name: str, count: int = 1) -> Case:
    """A case with ``count`` batches, seeded."""
    torch.manual_seed(0)
    return CASES[name](count)
