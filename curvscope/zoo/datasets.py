"""The data of the zoo, each split as raw tensors and a function that makes batches of them.

Raw images stay bytes and text stays numbers until a batch is asked for, which keeps CIFAR-10 at
150 MB. The order of samples is fixed; nothing is drawn at random here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from .files import check_images, existing, find, read_cifar10, read_idx, read_npz

# Per channel over the 50,000 training images of CIFAR-10, in units of 255.
_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR_STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Split:
    """Samples in a fixed order: ``raw`` and ``labels`` ``[n, ...]``, and how to batch them."""

    raw: Tensor
    labels: Tensor
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return len(self.raw)

    def take(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Inputs (float32, or int64 for characters) and targets of the chosen samples."""
        return self.prepare(self.raw[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Training and test split, the number of classes, and for text the characters."""

    train: Split
    test: Split
    classes: int
    vocabulary: str = ""


def digits(data: str | Path | None = None, *, flat: bool = False) -> Dataset:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn, scaled to [0, 1].

    Every seventh sample (256) is for testing, 1,541 are for training, both in the file's order.
    Inputs are ``[n, 64]`` if ``flat``, else ``[n, 1, 8, 8]``. Source: E. Alpaydin and C. Kaynak,
    *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998.
    """
    if data is not None:
        raise DataError("The digits come with scikit-learn: leave data= out.")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float() / 16
    images = images.flatten(1) if flat else images.unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    # 7 has no factor in common with 10, the period in which the classes come.
    held_out = torch.arange(len(labels)) % 7 == 6
    return Dataset(
        train=Split(images[~held_out], labels[~held_out], _as_they_are),
        test=Split(images[held_out], labels[held_out], _as_they_are),
        classes=10,
    )


def digits_flat(data: str | Path | None = None) -> Dataset:
    """:func:`digits` with inputs ``[n, 64]``."""
    return digits(data, flat=True)


def _as_they_are(raw: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return raw, labels


def mnist_images(data: str | Path | None) -> Dataset:
    """MNIST images ``[n, 784]`` in [0, 1] as inputs and as targets; labels are not needed.

    ``data`` is a folder with ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte`` (plain or
    ``.gz``, also in ``MNIST/raw`` as torchvision leaves them), or an ``.npz`` file, or a folder
    with one, of ``train_images`` and ``test_images``.
    """
    name = "mnist-autoencoder"
    expected = (
        "train-images-idx3-ubyte and t10k-images-idx3-ubyte (plain or .gz, also in MNIST/raw), "
        "or an .npz file with train_images and test_images"
    )
    path = existing(data, name, expected)
    roots = [path, path / "MNIST" / "raw", path / "raw"]
    images: dict[str, Tensor] = {}
    for split, stem in (("train", "train-images"), ("test", "t10k-images")):
        names = [f"{stem}{sep}idx3-ubyte{end}" for end in ("", ".gz") for sep in ("-", ".")]
        if (file := find(roots, names)) is not None:
            images[split] = _mnist_shape(read_idx(file), file)
    if not images and (archive := _archive(path)) is not None:
        arrays = read_npz(archive, ["train_images", "test_images"])
        images = {s: _mnist_shape(arrays[f"{s}_images"], archive) for s in ("train", "test")}
    if missing := [s for s in ("train", "test") if s not in images]:
        raise DataError(f"{path} has no {' and no '.join(missing)} images: looked for {expected}.")
    return Dataset(
        train=Split(images["train"], images["train"], _image_and_itself),
        test=Split(images["test"], images["test"], _image_and_itself),
        classes=784,
    )


def _mnist_shape(images: Tensor, path: Path) -> Tensor:
    flat = images.flatten(1) if images.ndim > 1 else images
    if images.dtype != torch.uint8 or flat.ndim != 2 or flat.shape[1] != 784 or not len(flat):
        raise DataError(
            f"{path}: MNIST images are uint8 of shape [n, 28, 28], "
            f"not {images.dtype} of {list(images.shape)}."
        )
    return flat


def _image_and_itself(raw: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    pixels = raw.float() / 255
    return pixels, pixels


def cifar10(data: str | Path | None) -> Dataset:
    """CIFAR-10 images ``[n, 3, 32, 32]``, standardised per channel, and labels; no augmentation.

    ``data`` is a folder with the pickled batches ``cifar-10-batches-py``, or an ``.npz`` file, or
    a folder with one, of ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.
    Source: A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """
    expected = (
        "the folder cifar-10-batches-py (data_batch_1 ... data_batch_5, test_batch), or an .npz "
        "file with train_images, train_labels, test_images and test_labels"
    )
    path = existing(data, "cifar10-resnet20", expected)
    splits = read_cifar10(path) if path.is_dir() else None
    if splits is None and (archive := _archive(path)) is not None:
        keys = [f"{split}_{kind}" for split in ("train", "test") for kind in ("images", "labels")]
        arrays = read_npz(archive, keys)
        splits = {
            split: check_images(arrays[f"{split}_images"], arrays[f"{split}_labels"], archive)
            for split in ("train", "test")
        }
    if splits is None:
        raise DataError(f"{path} has no CIFAR-10 images: looked for {expected}.")
    return Dataset(
        train=Split(*splits["train"], _standardised),
        test=Split(*splits["test"], _standardised),
        classes=10,
    )


def _standardised(raw: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (_CIFAR_MEAN, _CIFAR_STD))
    return (raw.float() / 255 - mean) / std, labels


def _archive(path: Path) -> Path | None:
    """The ``.npz`` file that ``path`` is, or the only one in the folder ``path``."""
    if path.is_file():
        return path
    archives = sorted(path.glob("*.npz"))
    if len(archives) > 1:
        listing = ", ".join(p.name for p in archives)
        raise DataError(f"{path} holds several .npz files ({listing}); pass data= one of them.")
    return archives[0] if archives else None


def characters(data: str | Path | None, *, context: int = 64) -> Dataset:
    """Text cut into windows: inputs ``[n, context]``, targets the same one character later.

    ``data`` is a text file or a folder, of which all ``*.txt`` are read in the order of their
    names. Windows follow each other without overlap of their inputs; the last tenth of them is
    for testing. The vocabulary is every character that occurs, sorted.
    """
    expected = "a text file (UTF-8), or a folder with *.txt files"
    path = existing(data, "char-transformer", expected)
    files = [path] if path.is_file() else sorted(path.glob("*.txt"))
    if not files:
        raise DataError(f"{path} holds no *.txt file; data= must name {expected}.")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as UTF-8 text ({error}).") from error
    text = "\n".join(texts)
    count = (len(text) - 1) // context
    if count < 2:
        raise DataError(
            f"{path}: {len(text)} characters are too few; two windows need {2 * context + 1}."
        )
    vocabulary = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(vocabulary)}
    codes = torch.tensor([number[c] for c in text[: count * context + 1]])
    windows = codes.unfold(0, context + 1, context)
    cut = min(count - 1, round(0.9 * count))
    return Dataset(
        train=Split(windows[:cut], windows[:cut], _next_character),
        test=Split(windows[cut:], windows[cut:], _next_character),
        classes=len(vocabulary),
        vocabulary=vocabulary,
    )


def _next_character(raw: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    return raw[:, :-1], raw[:, 1:]
