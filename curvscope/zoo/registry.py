"""What there is in the zoo: one entry per problem. To add one, write an entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import UnknownProblemError, nearest
from . import datasets, models
from .datasets import Dataset
from .recipes import Recipe


@dataclass(frozen=True)
class Entry:
    """A network, its data, its loss, and how it is trained.

    ``samples`` is how many training samples the curvature is taken over by default (None: all),
    ``chunk`` how many at a time; the last batch is what is left over. ``threads`` is how many
    threads train (None: torch's setting): for small networks one is as fast as several, does not
    suffer from a busy machine, and gives the same bits whatever the machine's number of cores.
    """

    description: str
    data: Callable[[str | Path | None], Dataset]
    model: Callable[[Dataset], nn.Module]
    recipe: Recipe
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    classifies: bool = True
    samples: int | None = None
    chunk: int = 600
    threads: int | None = 1


def _summed_over_pixels() -> nn.Module:
    """Binary cross-entropy, summed over the 784 pixels and averaged over samples.

    The mean over samples and pixels times 784, written as a weight: it stays a known likelihood
    (Bernoulli), of which every matrix is exact.
    """
    return nn.BCEWithLogitsLoss(weight=torch.tensor(784.0))


ENTRIES: dict[str, Entry] = {
    "digits-mlp": Entry(
        "64-24-24-10 with ReLU on scikit-learn's digits (2,410 parameters)",
        datasets.digits_flat,
        lambda data: models.mlp((64, 24, 24, data.classes), nn.ReLU),
        Recipe("adam", lr=0.01, epochs=20, batch_size=64),
    ),
    "digits-cnn": Entry(
        "two 3x3 convolutions (8 and 16 channels) with ReLU and max-pooling and a linear layer, "
        "on scikit-learn's digits (1,898 parameters)",
        datasets.digits,
        lambda data: models.digits_cnn(),
        Recipe("adam", lr=0.01, epochs=15, batch_size=64),
    ),
    "digits-tanh": Entry(
        "64-20-20-10 with tanh, whose loss is smooth, on scikit-learn's digits (1,930 parameters)",
        datasets.digits_flat,
        lambda data: models.mlp((64, 20, 20, data.classes), nn.Tanh),
        Recipe("adam", lr=0.01, epochs=15, batch_size=64),
    ),
    "digits-resnet": Entry(
        "five 3x3 convolutions with BatchNorm and two skip connections, a linear layer, on "
        "scikit-learn's digits (2,860 parameters)",
        datasets.digits,
        lambda data: models.ResNet(1, (6, 12), depth=1, classes=data.classes),
        Recipe("sgd", lr=0.1, epochs=12, batch_size=64, momentum=0.9, weight_decay=1e-4),
    ),
    "digits-transformer": Entry(
        "two transformer blocks of width 12 (LayerNorm, attention, GELU) on 8 patches with learned "
        "positions, on scikit-learn's digits (2,926 parameters)",
        datasets.digits,
        lambda data: models.DigitsTransformer(),
        Recipe("adam", lr=0.01, epochs=16, batch_size=64),
    ),
    "mnist-autoencoder": Entry(
        "784-1000-500-250-30-250-500-1000-784 with ReLU on MNIST, binary cross-entropy summed over "
        "pixels (2,837,314 parameters)",
        datasets.mnist_images,
        lambda data: models.autoencoder(),
        Recipe("adam", lr=1e-3, epochs=5, batch_size=500, description="about 10 s per epoch"),
        loss=_summed_over_pixels,
        classifies=False,
        samples=1000,
        chunk=300,
        threads=None,
    ),
    "cifar10-resnet20": Entry(
        "ResNet-20 with parameter-free shortcuts on CIFAR-10 (269,722 parameters)",
        datasets.cifar10,
        lambda data: models.ResNet(3, (16, 32, 64), depth=3, classes=data.classes),
        Recipe(
            "sgd",
            lr=0.1,
            epochs=5,
            batch_size=128,
            momentum=0.9,
            weight_decay=1e-4,
            description="about 3 minutes per epoch on 50,000 images; no augmentation",
        ),
        samples=1000,
        chunk=300,
        threads=None,
    ),
    "char-transformer": Entry(
        "a GPT of 4 layers and width 64 on characters, context 64 (about 210,000 parameters)",
        datasets.characters,
        lambda data: models.CharTransformer(data.classes),
        Recipe(
            "adamw",
            lr=3e-3,
            epochs=2,
            batch_size=32,
            weight_decay=0.1,
            description="about 40 s per epoch on a million characters",
        ),
        samples=256,
        chunk=96,
        threads=None,
    ),
}


def names() -> list[str]:
    """The names that :func:`curvscope.zoo.load` knows."""
    return list(ENTRIES)


def entry(name: str) -> Entry:
    """The entry of that name; raises ``UnknownProblemError`` with the nearest names."""
    try:
        return ENTRIES[name]
    except (KeyError, TypeError):
        raise UnknownProblemError(
            f"There is no problem {name!r} in the zoo.{nearest(str(name), ENTRIES)} "
            f"It has {', '.join(ENTRIES)}."
        ) from None
