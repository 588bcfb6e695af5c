"""Data and losses of the cases: functions that draw inputs and targets of tiny problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from .reference import Batches, cat

Draw = Callable[[int, torch.Generator], Any]


# -- data --------------------------------------------------------------------------------------


def real(*shape: int) -> Draw:
    return lambda n, g: torch.randn(n, *shape, generator=g, dtype=torch.float64)


def positive(*shape: int) -> Draw:
    return lambda n, g: torch.rand(n, *shape, generator=g, dtype=torch.float64) * 3


def bits(*shape: int) -> Draw:
    return lambda n, g: torch.randint(0, 2, (n, *shape), generator=g).double()


def labels(classes: int, *shape: int) -> Draw:
    return lambda n, g: torch.randint(0, classes, (n, *shape), generator=g)


def some_ignored(classes: int, *shape: int, index: int = -100) -> Draw:
    """Labels of which about a third are ``index``."""

    def draw(n: int, g: torch.Generator) -> Tensor:
        y = torch.randint(0, classes, (n, *shape), generator=g)
        return torch.where(torch.rand(y.shape, generator=g) < 0.35, torch.full_like(y, index), y)

    return draw


def soft(classes: int, *shape: int) -> Draw:
    return lambda n, g: torch.randn(n, classes, *shape, generator=g, dtype=torch.float64).softmax(1)


def both(*draws: Draw) -> Draw:
    return lambda n, g: tuple(d(n, g) for d in draws)


def named(**draws: Draw) -> Draw:
    return lambda n, g: {k: d(n, g) for k, d in draws.items()}


def data(sizes: tuple[int, ...], x: Draw, y: Draw, seed: int = 0) -> Callable[[], Batches]:
    def build() -> Batches:
        g = torch.Generator().manual_seed(seed)
        return [(x(n, g), y(n, g)) for n in sizes]

    return build


def lengths(sizes: tuple[tuple[int, int], ...], x: Any, y: Any) -> Callable[[], Batches]:
    """Batches of sequences, ``(samples, length)`` each."""

    def build() -> Batches:
        g = torch.Generator().manual_seed(3)
        return [(x(t)(n, g), y(t)(n, g)) for n, t in sizes]

    return build


def ignore_batch(build: Callable[[], Batches], index: int, value: int = -100) -> Callable[[], Any]:
    """The same batches with every target of one of them ignored."""

    def changed() -> Batches:
        batches = build()
        x, y = batches[index]
        batches[index] = (x, torch.full_like(y, value))
        return batches

    return changed


def folded(build: Callable[[], Batches]) -> Callable[[], Batches]:
    """Targets ``[N, T]`` as ``[N T]``."""
    return lambda: [(x, y.flatten()) for x, y in build()]


def loader(batch_size: int, **options: Any) -> Callable[[Batches], DataLoader]:
    def load(batches: Batches) -> DataLoader:
        x, y = cat([b[0] for b in batches]), cat([b[1] for b in batches])
        if "generator" in options:
            options["generator"] = torch.Generator().manual_seed(5)
        return DataLoader(TensorDataset(x, y), batch_size=batch_size, **options)

    return load


def one(batches: Batches) -> Any:
    return batches[0]


# -- losses ------------------------------------------------------------------------------------

W3 = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)
POS = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)


def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
    """Couples the outputs of a sample and is not convex."""
    z = outputs - targets
    return (z.square().sum(1).square() - z[:, 0].square() + z.sum(1).sin()).mean()


def quartic_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.stack([quartic(z[None], y[None]) for z, y in zip(outputs, targets)])


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    logp = outputs.log_softmax(1).gather(1, targets[:, None])
    return -((1 - logp.exp()).square() * logp).sum()


def focal_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.stack([focal(z[None], y[None]) for z, y in zip(outputs, targets)])


def masked_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over the entries that are not NaN."""
    keep = ~targets.isnan()
    return (outputs - targets.nan_to_num())[keep].square().sum() / keep.sum()


def masked_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    keep = ~targets.isnan()
    return torch.where(keep, (outputs - targets.nan_to_num()).square(), 0.0)


def with_gaps(*shape: int) -> Draw:
    def draw(n: int, g: torch.Generator) -> Tensor:
        y = torch.randn(n, *shape, generator=g, dtype=torch.float64)
        return torch.where(torch.rand(y.shape, generator=g) < 0.3, torch.nan, y)

    return draw
