"""Readers for the file formats in which MNIST and CIFAR-10 are passed on. Nothing is downloaded.

Every reader checks what it reads and raises :class:`~curvscope.errors.DataError` that names the
file; pickled batches go through an unpickler that can build NumPy arrays and nothing else.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

_CIFAR_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR_PIXELS = 3 * 32 * 32


def existing(data: str | Path | None, name: str, expected: str) -> Path:
    """The path that the user named, or an error that says what ``name`` looks for."""
    if data is None:
        raise DataError(
            f"{name!r} reads its data from files and downloads nothing: "
            f"pass data=FOLDER (on the command line --data FOLDER) holding {expected}."
        )
    path = Path(data).expanduser()
    if not path.exists():
        raise DataError(f"{name!r}: {path} does not exist; data= (--data) must name {expected}.")
    return path


def find(roots: list[Path], names: list[str]) -> Path | None:
    """The first file that exists: every name in the first root, then in the next."""
    for root in roots:
        for name in names:
            if (root / name).is_file():
                return root / name
    return None


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes (``.gz`` or not) as a uint8 tensor of its own shape.

    Format: two zero bytes, type 8, the number of axes, each size as a big-endian 32-bit number,
    then the values.
    """
    content = _bytes(path)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(
            f"{path} is not an IDX file of bytes (it starts with {content[:4].hex() or 'nothing'}, "
            "not 000008..); get the original file again."
        )
    axes = content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise DataError(f"{path} ends within its header; get the original file again.")
    shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path} is damaged: its header announces {math.prod(shape)} values "
            f"(shape {list(shape)}) and {len(content) - start} follow."
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _bytes(path: Path) -> bytes:
    """The content of a file, decompressed if it is gzip by its first bytes."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); get the original file again.") from error


def read_npz(path: Path, keys: list[str]) -> dict[str, Tensor]:
    """The named arrays of an ``.npz`` file, read without pickle."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive.files]
            if missing:
                raise DataError(
                    f"{path} lacks {', '.join(missing)}; it holds {', '.join(archive.files)}."
                )
            return {key: torch.from_numpy(archive[key]) for key in keys}
    except DataError:
        raise
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as .npz ({error}).") from error


class _ArraysOnly(pickle.Unpickler):
    """Builds the dictionaries of NumPy arrays of the CIFAR batches, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # the same function under either module name
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 pickles bytes under protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Images ``[n, 3, 32, 32]`` uint8 and labels ``[n]`` of one pickled batch."""
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images = torch.from_numpy(np.asarray(batch["data"]))
        labels = torch.as_tensor(batch["labels"])
    except Exception as error:  # a damaged pickle can raise almost anything
        raise DataError(f"{path} cannot be read as a CIFAR-10 batch ({error}).") from error
    if images.ndim != 2 or images.shape[1] != _CIFAR_PIXELS:
        raise DataError(f"{path}: 'data' has shape {list(images.shape)}, not [n, {_CIFAR_PIXELS}].")
    return check_images(images.reshape(-1, 3, 32, 32), labels, path)


def check_images(images: Tensor, labels: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    """Colour images as ``[n, 3, 32, 32]`` uint8 (channels may come last) and int64 labels 0-9."""
    if images.ndim == 4 and images.shape[1:] == (32, 32, 3):
        images = images.permute(0, 3, 1, 2).contiguous()
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, 32, 32):
        raise DataError(
            f"{path}: images are {images.dtype} of shape {list(images.shape)}, not uint8 "
            "[n, 3, 32, 32] or [n, 32, 32, 3]."
        )
    labels = labels.reshape(-1)
    if labels.is_floating_point() or len(labels) != len(images):
        raise DataError(
            f"{path}: {len(images)} images need as many whole-number labels, "
            f"not {len(labels)} of {labels.dtype}."
        )
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) > 9:
        raise DataError(f"{path}: labels must be 0 to 9, at least one of them.")
    return images, labels.long()


def read_cifar10(folder: Path) -> dict[str, tuple[Tensor, Tensor]] | None:
    """``train`` and ``test`` images and labels of ``cifar-10-batches-py``; None without it.

    ``folder`` is that folder or the one above it.
    """
    for root in (folder, folder / "cifar-10-batches-py"):
        wanted = [*_CIFAR_TRAIN, "test_batch"]
        missing = [name for name in wanted if not (root / name).is_file()]
        if len(missing) == len(wanted):
            continue
        if missing:
            raise DataError(f"{root} lacks {', '.join(missing)} of the CIFAR-10 batches.")
        batches = [_read_cifar_batch(root / name) for name in _CIFAR_TRAIN]
        train = (torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))
        return {"train": train, "test": _read_cifar_batch(root / "test_batch")}
    return None
