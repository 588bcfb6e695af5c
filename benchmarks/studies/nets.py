"""Networks, data and the training loop that the questions of the study share."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope.zoo import datasets, files, models

Closure = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and test samples as tensors."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


def folder(data: Path, name: str) -> Path:
    """``data/name`` where it exists, else ``data`` itself."""
    return data / name if (data / name).is_dir() else data


def mnist(data: Path) -> Data:
    """Images ``[n, 1, 28, 28]`` in [0, 1] and labels, from the four IDX files."""
    root = folder(data, "mnist")
    roots = [root, root / "MNIST" / "raw", root / "raw"]
    parts: list[Tensor] = []
    for stem, kind in (
        ("train-images", "idx3"),
        ("train-labels", "idx1"),
        ("t10k-images", "idx3"),
        ("t10k-labels", "idx1"),
    ):
        names = [f"{stem}{sep}{kind}-ubyte{end}" for end in ("", ".gz") for sep in "-."]
        path = files.find(roots, names)
        if path is None:
            raise SystemExit(f"{root} has no {names[0]} (plain or .gz).")
        parts.append(files.read_idx(path))
    x, y, test_x, test_y = parts
    x, test_x = (images.reshape(-1, 1, 28, 28).float() / 255 for images in (x, test_x))
    return Data(x, y.long(), test_x, test_y.long())


def half_mnist(data: Path) -> Data:
    """MNIST at 14 x 14: means of 2 x 2 pixels."""
    full = mnist(data)
    small, test = (F.avg_pool2d(x, 2) for x in (full.inputs, full.test_inputs))
    return Data(small, full.labels, test, full.test_labels)


def cifar(data: Path) -> Data:
    """Standardised images ``[n, 3, 32, 32]`` and labels; as many as the folder has."""
    found = datasets.cifar10(folder(data, "cifar10"))
    return Data(*found.train.take(slice(None)), *found.test.take(slice(None)))


def digits(_: Path) -> Data:
    """scikit-learn's digits ``[n, 1, 8, 8]``, with which the tests try the study."""
    found = datasets.digits()
    return Data(*found.train.take(slice(None)), *found.test.take(slice(None)))


def flat_mlp(*widths: int) -> nn.Module:
    layers = OrderedDict(flatten=nn.Flatten(), **dict(models.mlp(widths, nn.ReLU).named_children()))
    return nn.Sequential(layers)


def cnn(channels: int, widths: tuple[int, ...], features: int) -> nn.Module:
    """3x3 convolutions, each with ReLU and 2x2 max-pooling, then one linear layer."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for k, width in enumerate(widths, 1):
        layers[f"conv{k}"] = nn.Conv2d(channels, width, 3, padding=1)
        layers[f"act{k}"], layers[f"pool{k}"] = nn.ReLU(), nn.MaxPool2d(2)
        channels = width
    layers["flatten"], layers["fc"] = nn.Flatten(), nn.Linear(features, 10)
    return nn.Sequential(layers)


def normed_cnn() -> nn.Module:
    """The convolutions of ``mnist-cnn`` with BatchNorm, for 14 x 14 pixels."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in cnn(1, (8, 16), 144).named_children():
        layers[name] = layer
        if isinstance(layer, nn.Conv2d):
            layers[name.replace("conv", "bn")] = nn.BatchNorm2d(layer.out_channels)
    return nn.Sequential(layers)


def resnet(channels: int, widths: tuple[int, ...], depth: int) -> nn.Module:
    return models.ResNet(channels, widths, depth, 10)


@dataclasses.dataclass(frozen=True)
class Net:
    """A network with its data and a sentence about it."""

    name: str
    words: str
    make: Callable[[], nn.Module]
    data: Callable[[Path], Data]


NETS = {
    net.name: net
    for net in (
        Net("mnist-mlp", "784-128-64-10, ReLU", lambda: flat_mlp(784, 128, 64, 10), mnist),
        Net("mnist-cnn", "3x3 conv 8, 16; linear", lambda: cnn(1, (8, 16), 784), mnist),
        Net("cifar-cnn", "3x3 conv 16, 32, 32; linear", lambda: cnn(3, (16, 32, 32), 512), cifar),
        Net("cifar-resnet8", "ResNet-8, half width", lambda: resnet(3, (8, 16, 32), 1), cifar),
        Net("mnist14-cnn", "3x3 conv 8, 16 with BatchNorm; linear", normed_cnn, half_mnist),
        Net("cifar-resnet20", "ResNet-20", lambda: resnet(3, (16, 32, 64), 3), cifar),
        Net("digits-mlp", "64-16-10, ReLU", lambda: flat_mlp(64, 16, 10), digits),
        Net("digits-cnn", "3x3 conv 4, 4; linear", lambda: cnn(1, (4, 4), 16), digits),
    )
}


def initial(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[name].make()


def batches(data: Data, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Minibatches of permuted epochs without end; what is left over of an epoch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for index in order.split(size):
            if len(index) == size:
                yield data.inputs[index], data.labels[index]


def train(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch: int,
    seed: int,
    after: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Losses of all minibatches; ``after(step, loss)`` is called after every step, from 1.

    Stops early, the last loss being infinite, when the loss is no number any more.
    """
    model.train()
    losses: list[float] = []
    backward = not isinstance(optimizer, cs.optim.AdaHessian)
    for step, (x, y) in zip(range(1, steps + 1), batches(data, batch, seed)):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if backward:
                loss.backward()
            return loss

        try:
            losses.append(float(optimizer.step(closure).detach()))  # type: ignore[union-attr]
        except cs.errors.NonFiniteError:
            return [*losses, float("inf")]
        after(step, losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode."""
    training = model.training
    model.eval()
    loss = right = 0.0
    for x, y in zip(inputs.split(1000), labels.split(1000)):
        out = model(x)
        loss += float(F.cross_entropy(out, y, reduction="sum"))
        right += int((out.argmax(1) == y).sum())
    model.train(training)
    return loss / len(labels), right / len(labels)


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Tensor) -> None:
    """Let BatchNorm's running statistics be those of ``inputs``, as after a forward pass."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    training = model.training
    model.train()
    model(inputs)
    model.train(training)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum


def problem(model: nn.Module, data: Data, samples: int, chunk: int = 100) -> cs.Problem:
    """The first ``samples`` training samples as a Problem, in eval mode."""
    x, y = data.inputs[:samples], data.labels[:samples]
    model.eval()
    return cs.Problem(model, nn.CrossEntropyLoss(), list(zip(x.split(chunk), y.split(chunk))))
