"""The published MNIST autoencoder run of K-BFGS, repeated with every optimizer.

    python benchmarks/kbfgs_mnist.py --data FOLDER      (torchvision's layout, or plain IDX files)

Goldfarb, Ren, Bahamou 2020: 784-1000-500-250-30-250-500-1000-784, ReLU except after the code layer
and the output, batches of 1000, binary cross-entropy summed over pixels; the reported loss is that
of all 60,000 images plus the weight decay's term. A seed gives the initial weights and the orders
of the images that it gives in the authors' code: there the pass that starts the input factors
uses up the file's order, and every epoch of training is permuted, the first one too. Seed 9999,
the authors' own, comes first. K-BFGS, which is near its stability limit there, runs with fifteen
seeds, with and without its safeguard; other methods run with the first.
Every run is kept in ``--work`` when it ends: an interrupted benchmark continues there.
With ``--merge`` only the methods of ``--only`` are run, and put among those of the last results.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import mnist_report
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope.zoo import datasets, models

BATCH, DECAY = 1000, 1e-5
SEEDS = (9999, *range(14))  # 9999 is that of the published run
PACE = 20  # timed steps
LOOK_BACK = 6  # steps before a divergence of which the diagnostics are kept
Make = Callable[[nn.Module], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer at one setting; ``settings`` says in words which."""

    name: str
    settings: str
    make: Make
    closure: str = "backward"  # "loss": the closure returns the loss and leaves backward alone


def kbfgs(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return cs.optim.KBFGS(model, lr=0.3, damping=0.3, weight_decay=DECAY, **options)


GUARD = 3.0
METHODS = {
    m.name: m
    for m in (
        Method("K-BFGS", "lr 0.3, damping 0.3 (published)", kbfgs),
        Method("K-BFGS(L)", "lr 0.3, damping 0.3, memory 100", lambda m: kbfgs(m, memory=100)),
        Method(
            "K-FAC",
            "lr 1, damping 3, sampled labels, inverses every 20 steps (published)",
            lambda m: cs.optim.KFAC(m, lr=1.0, damping=3.0, weight_decay=DECAY),
        ),
        Method(
            f"K-BFGS, max_update_norm={GUARD:g}",
            f"lr 0.3, damping 0.3, max_update_norm {GUARD:g}",
            lambda m: kbfgs(m, max_update_norm=GUARD),
        ),
        Method(
            "AdaFisher",
            "lr 3e-5, damping 1e-3, update_every 100 (1e-4 diverges)",
            lambda m: cs.optim.AdaFisher(m, lr=3e-5, damping=1e-3, weight_decay=DECAY),
        ),
        Method(
            "AdaFisherW",
            "lr 3e-5, damping 1e-3, update_every 100 (6e-5 and 1e-4 diverge, 1e-5 is worse)",
            lambda m: cs.optim.AdaFisherW(m, lr=3e-5, damping=1e-3, weight_decay=DECAY),
        ),
        Method(
            "M-FAC",
            "lr 3, damping 100, memory 100 (damping 1e-3 diverges in epoch 3 for lr 1, 2, 3)",
            lambda m: cs.optim.MFAC(m, lr=3.0, damping=100.0, memory=100, weight_decay=DECAY),
        ),
        Method(
            "AdaHessian",
            "lr 0.1 (0.3 is worse)",
            lambda m: cs.optim.AdaHessian(m, lr=0.1, weight_decay=DECAY),
            closure="loss",
        ),
        Method("Adam", "lr 1e-3", lambda m: torch.optim.Adam(m.parameters(), 1e-3)),
        Method(
            "SGD",
            "lr 3e-3, momentum 0.9 (3e-2 diverges)",
            lambda m: torch.optim.SGD(m.parameters(), 3e-3, momentum=0.9, weight_decay=DECAY),
        ),
    )
}


def objective(model: nn.Module, images: Tensor) -> Tensor:
    """Binary cross-entropy summed over pixels, mean over images."""
    logits = model(images)
    return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


@torch.no_grad()
def whole_loss(model: nn.Module, images: Tensor) -> float:
    """The loss of all images, and half the weight decay times the squared length of the weights."""
    total = sum(float(objective(model, part)) * len(part) for part in images.split(5000))
    square = sum(float(p.double().square().sum()) for p in model.parameters())
    return total / len(images) + DECAY / 2 * square


def epochs_of(images: Tensor, seed: int) -> Iterator[Iterator[Tensor]]:
    """The batches of epoch after epoch, in the order that the authors' code gives them.

    Every epoch permutes the order of the last. That code also permutes the samples within a batch,
    which changes nothing but what NumPy's legacy generator draws next.
    """
    generator = np.random.RandomState(seed)
    order = np.arange(len(images))

    def epoch() -> Iterator[Tensor]:
        for index in torch.from_numpy(order).split(BATCH):
            yield images[index]
            generator.permutation(len(index))

    while True:
        order = order[generator.permutation(len(order))]
        yield epoch()


def train(method: Method, images: Tensor, seed: int, epochs: int) -> dict[str, Any]:
    """One run: losses after every epoch, seconds of training, and how it ended."""
    torch.manual_seed(seed)
    model = models.autoencoder()
    optimizer = method.make(model)
    start = whole_loss(model, images)
    run: dict[str, Any] = {"method": method.name, "settings": method.settings, "seed": seed}
    run |= {"losses": [start], "seconds": [0.0], "diverged": None, "before": []}
    clock = time.perf_counter()
    warm_start(optimizer, images)
    spent = time.perf_counter() - clock
    steps: list[float] = []
    recent: list[dict[str, Any]] = []
    for epoch, batches in zip(range(1, epochs + 1), epochs_of(images, seed), strict=False):
        for batch in batches:
            clock = time.perf_counter()
            try:
                loss = take_step(method, optimizer, model, batch)
            except cs.errors.NonFiniteError as error:
                run["diverged"] = {"step": len(steps) + 1, "epoch": epoch, "error": str(error)}
                run["before"] = recent
                run["factors"] = _extremes(optimizer)
                return run | {"step_seconds": statistics.median(steps)}
            steps.append(time.perf_counter() - clock)
            spent += steps[-1]
            if epoch == 1 and isinstance(optimizer, cs.optim.KBFGS):
                recent = [*recent, _diagnosis(optimizer, len(steps), loss)][-LOOK_BACK:]
        run["losses"].append(whole_loss(model, images))
        run["seconds"].append(spent)
        run["step_seconds"] = statistics.median(steps)
        print(f"  epoch {epoch}: {run['losses'][-1]:.2f}  ({spent:.0f} s)", flush=True)
        if not run["losses"][-1] < 2 * start:
            run["diverged"] = {"step": len(steps), "epoch": epoch, "error": "the loss grew"}
            run["before"] = recent
            return run
    return run


def warm_start(optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    """One pass over the data for the methods that begin with one."""
    parts = images.split(BATCH)
    if isinstance(optimizer, cs.optim.KBFGS):
        optimizer.warm_start(parts)
    elif isinstance(optimizer, cs.optim.KFAC):
        optimizer.warm_start(
            [(part, part) for part in parts],
            loss=lambda z, x: F.binary_cross_entropy_with_logits(z, x, reduction="sum") / len(x),
        )


def take_step(
    method: Method, optimizer: torch.optim.Optimizer, model: nn.Module, batch: Tensor
) -> float:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(model, batch)
        if method.closure == "backward":
            loss.backward()
        return loss

    loss = float(optimizer.step(closure).detach())  # type: ignore[union-attr]
    if not math.isfinite(loss):
        raise cs.errors.NonFiniteError(f"The loss is {loss}.")
    return loss


def _diagnosis(optimizer: cs.optim.KBFGS, step: int, loss: float) -> dict[str, Any]:
    """What ``diagnostics()`` shows after a step, over all layers."""
    rows = optimizer.diagnostics(eigenvalues=False)
    worst = max(rows, key=lambda row: row["update_norm"])
    fired = {
        name: sum(row[name] for row in rows) / (step * len(rows))
        for name in ("damped_on_inverse", "damped_on_identity", "skipped")
    }
    return {
        "step": step,
        "loss": loss,
        "layer": worst["block"],
        "update_norm": math.hypot(*(row["update_norm"] for row in rows)),
        "angle": max(row["angle"] for row in rows),
        "sy_ss_before": min(row.get("sy_ss_before", math.nan) for row in rows),
        **fired,
    }


def _extremes(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, float]]:
    """Extreme eigenvalues of the factors of every layer, where they are finite."""
    if not isinstance(optimizer, cs.optim.KBFGS):
        return {}
    keys = ("H_g_min", "H_g_max", "H_a_min", "H_a_max")
    return {row["block"]: {k: row[k] for k in keys} for row in optimizer.diagnostics()}


def paces(names: list[str], images: Tensor) -> dict[str, float]:
    """Seconds per step of every method, one after the other in each round.

    Means of the ``PACE`` steps after the first ``PACE``, in each of which K-FAC takes its inverses.
    """
    takers, spent = {}, dict.fromkeys(names, 0.0)
    for name in names:
        torch.manual_seed(SEEDS[0])
        model = models.autoencoder()
        optimizer = METHODS[name].make(model)
        warm_start(optimizer, images)
        takers[name] = (METHODS[name], optimizer, model)
    batches = itertools.chain.from_iterable(epochs_of(images, SEEDS[0]))
    for k, batch in enumerate(itertools.islice(batches, 2 * PACE)):
        for name, taker in takers.items():
            clock = time.perf_counter()
            take_step(*taker, batch)
            spent[name] += (time.perf_counter() - clock) * (k >= PACE)
    return {name: seconds / PACE for name, seconds in spent.items()}


def kept(work: Path, method: Method, images: Tensor, seed: int, epochs: int) -> dict[str, Any]:
    """The run from ``work``, or a new one."""
    name = "".join(c if c.isalnum() else "-" for c in method.name.lower()).strip("-")
    path = work / f"{name}_seed{seed}_epochs{epochs}.json"
    if not path.exists():
        print(f"{method.name}, seed {seed}", flush=True)
        run = train(method, images, seed, epochs)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(run, indent=1))
        part.replace(path)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with MNIST")
    parser.add_argument("--work", type=Path, default=Path("runs/kbfgs_mnist"))
    parser.add_argument("--epochs", type=int, default=10, help="epochs of a run (default 10)")
    parser.add_argument("--seeds", type=int, default=15, help="seeds of K-BFGS (default 15, most)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--only", nargs="*", default=list(METHODS), help="methods by name")
    parser.add_argument("--merge", action="store_true", help="keep the other runs of the results")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    chosen.work.mkdir(parents=True, exist_ok=True)
    split = datasets.mnist_images(chosen.data).train
    images = split.take(slice(0, len(split)))[0].reshape(len(split), -1)
    runs: dict[str, list[dict[str, Any]]] = mnist_report.read() if chosen.merge else {}
    for name in chosen.only:
        method = METHODS[name]
        seeds = chosen.seeds if name.partition(",")[0] == "K-BFGS" else 1
        runs[name] = [
            kept(chosen.work, method, images, seed, chosen.epochs) for seed in SEEDS[:seeds]
        ]
    for name, pace in paces(chosen.only, images).items():
        for run in runs[name]:
            per_epoch = pace * (len(images) // BATCH)
            run |= {
                "step_seconds": pace,
                "seconds": [per_epoch * e for e in range(len(run["losses"]))],
            }
    mnist_report.write({name: runs[name] for name in METHODS if name in runs}, common.machine())


if __name__ == "__main__":
    main()
