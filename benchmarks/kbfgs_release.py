"""K-BFGS's authors' own code on the published run, beside curvscope's K-BFGS.

    python benchmarks/kbfgs_release.py --code FOLDER --data FOLDER
    python benchmarks/kbfgs_mnist.py --data FOLDER --merge --only      (puts them into its table)

``--code`` is a clone of github.com/renyiryry/kbfgs_neurips2020_public (MIT licence), which runs as
it is but for its data, seed and console. Two questions: which losses it reaches with the seeds of
``kbfgs_mnist.py`` (weights, orders and batches are then the same in both), and how far both are
from each other, step by step, in float64. Every run is kept in ``--work`` when it ends.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import common
import kbfgs_mnist
import numpy as np
import torch
from torch import Tensor, nn

from curvscope.zoo import datasets, models

STEPS = 60  # of the comparison in float64: one epoch
UNUSED = ("mat4py", "torchvision", "torchvision.transforms", "torchvision.datasets")


class _Enough(Exception):
    """As many steps as were asked for."""


class Release:
    """The authors' ``train_model`` on given images, with any seed and in any precision."""

    def __init__(self, folder: str, images: Tensor) -> None:
        sys.path.insert(0, folder)
        for name in UNUSED:  # imported by the code
            sys.modules.setdefault(name, mock.MagicMock())
        sys.modules.setdefault("pytz", mock.Mock(timezone=lambda name: datetime.UTC))
        self.training = importlib.import_module("training_function")
        self.data = importlib.import_module("datasets_utils")
        self.pixels = (images * 255).round().to(torch.uint8).numpy()

    def run(
        self, seed: int, epochs: int, *, dtype: torch.dtype = torch.float32, steps: int = 10**9
    ) -> tuple[list[float], list[float]]:
        """Losses of all images before and after each epoch, and of every minibatch."""
        batches: list[float] = []
        result: dict[str, Any] = {"train_losses": []}
        with self._instead(seed, dtype, batches, steps), suppress(_Enough):
            result = self.training.train_model(
                dataset_name="MNIST",
                algorithm="K-BFGS",
                lr=0.3,
                lambda_damping=0.3,
                batch_size=kbfgs_mnist.BATCH,
                if_gpu=False,
                if_max_epoch=1,
                max_epoch=epochs,
                verbose=False,
            )
        return [float(loss) for loss in result["train_losses"]], batches

    @contextmanager
    def _instead(
        self, seed: int, dtype: torch.dtype, batches: list[float], steps: int
    ) -> Iterator[None]:
        """Another seed, the images at hand, another precision; ``batches`` gets the losses."""
        training: ModuleType = self.training
        seed_numpy, seed_torch = np.random.seed, torch.manual_seed
        loss_of, make = training.get_loss_from_z, training.get_model

        def data_sets(*args: Any, **options: Any) -> Any:
            found = mock.Mock()
            for name, images in (("train", self.pixels), ("test", self.pixels[:1000])):
                scaled = np.multiply(images, 1.0 / 255.0).reshape(-1, 28, 28, 1)
                made = self.data.DataSet(scaled, scaled, True, "fully-connected")
                made._images = made._images.astype(torch.empty(0, dtype=dtype).numpy().dtype)
                made._labels = made._images
                setattr(found, name, made)
            return found

        def model(params: Any) -> nn.Module:
            made = make(params)  # drawn in float32
            made.to(dtype)
            made.layers_weight = [{"W": layer.weight, "b": layer.bias} for layer in made.layers_all]
            torch.set_default_dtype(dtype)
            return made

        def loss(*args: Any, **options: Any) -> Tensor:
            if len(batches) == steps:
                raise _Enough
            value = loss_of(*args, **options)
            batches.append(float(value.detach()))
            return value

        with ExitStack() as stack:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            for owner, name, new in (
                (np.random, "seed", lambda _: seed_numpy(seed)),
                (torch, "manual_seed", lambda _: seed_torch(seed)),
                (training, "read_data_sets", data_sets),
                (training, "get_model", model),
                (training, "get_loss_from_z", loss),
                (Tensor, "float", lambda t: t.to(dtype)),  # of targets: rounds the whole loss
            ):
                stack.enter_context(mock.patch.object(owner, name, new))
            yield


def ours(images: Tensor, seed: int, steps: int) -> list[float]:
    """Minibatch losses of curvscope's K-BFGS in float64."""
    torch.manual_seed(seed)
    model = models.autoencoder().double()
    method = kbfgs_mnist.METHODS["K-BFGS"]
    optimizer = method.make(model)
    images = images.double()
    kbfgs_mnist.warm_start(optimizer, images)
    epochs = kbfgs_mnist.epochs_of(images, seed)
    batches = itertools.islice(itertools.chain.from_iterable(epochs), steps)
    return [kbfgs_mnist.take_step(method, optimizer, model, batch) for batch in batches]


def kept(path: Path, make: Any) -> Any:
    """What a file holds, or what ``make()`` returns, which is then put there."""
    if not path.exists():
        print(path.stem, flush=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(make()))
        part.replace(path)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--code", required=True, help="folder with the authors' code")
    parser.add_argument("--data", required=True, help="folder with MNIST")
    parser.add_argument("--work", type=Path, default=Path("runs/kbfgs_release"))
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a run (default 5)")
    parser.add_argument("--seeds", type=int, default=15, help="how many seeds (default 15, most)")
    parser.add_argument("--double", type=int, nargs="*", default=[9999, 1], help="float64: seeds")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    chosen.work.mkdir(parents=True, exist_ok=True)
    split = datasets.mnist_images(chosen.data).train
    images = split.take(slice(0, len(split)))[0].reshape(len(split), -1)
    release = Release(chosen.code, images)
    runs = {}
    for seed in kbfgs_mnist.SEEDS[: chosen.seeds]:
        path = chosen.work / f"seed{seed}_epochs{chosen.epochs}.json"
        runs[seed] = kept(path, lambda s=seed: release.run(s, chosen.epochs)[0])

    def both(seed: int) -> list[list[float]]:
        theirs = release.run(seed, 2, dtype=torch.float64, steps=STEPS)[1]
        return [theirs, ours(images, seed, STEPS)]

    gaps = {}
    for seed in chosen.double:
        pair = kept(chosen.work / f"float64_seed{seed}.json", lambda s=seed: both(s))
        gaps[seed] = [abs(a / b - 1) for a, b in zip(*pair, strict=True)]
    data = {"machine": common.machine(), "losses": runs, "float64": gaps}
    path = common.RESULTS / "kbfgs_release.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    for seed, losses in runs.items():
        print(f"seed {seed}:", ", ".join(f"{loss:.1f}" for loss in losses[1:]) or "diverged")
    for seed, each in gaps.items():
        print(f"float64, seed {seed}: {max(each[:30]):.0e} in 30 steps, {max(each):.0e} in {STEPS}")


if __name__ == "__main__":
    main()
