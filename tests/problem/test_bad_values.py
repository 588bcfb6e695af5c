"""Models and data that change from pass to pass, and NaN or infinity anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import curvscope as cs
from curvscope import errors
from tests.curvature.nets import Apply, seeded

from .refusals import Refusal, X, Y, Z, batchnorm, checked, net, problem, refused

# -- determinism -------------------------------------------------------------------------------


class Augmented(Dataset):
    """Adds noise whenever a sample is read."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + 0.1 * torch.randn(3, dtype=torch.float64), Y[index]


class NumpyAugmented(Augmented):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] * float(np.random.rand()), Y[index]


class Once(IterableDataset):
    """Gives its samples only once."""

    def __init__(self) -> None:
        self.left = iter(range(6))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in self.left:
            yield X[index], Y[index]


def dropping() -> nn.Module:
    return nn.Sequential(net(), Apply(lambda x: F.dropout(x, 0.5)))


def with_replacement() -> DataLoader:
    data = TensorDataset(X, Y)
    return DataLoader(data, batch_size=2, sampler=RandomSampler(data, replacement=True))


def noisy(sigma: float) -> nn.Module:
    return nn.Sequential(Apply(lambda x: x + sigma * torch.randn_like(x)), net())


CHANGING: dict[str, Refusal] = {
    "noise": (
        checked(model=noisy(1e-9)),
        errors.NonDeterministicError,
        ("draws random numbers", "noise layers"),
    ),
    "noise of numpy": (
        checked(model=nn.Sequential(Apply(lambda x: x * (1 + 1e-9 * np.random.rand())), net())),
        errors.NonDeterministicError,
        ("outputs of the first batch differ",),
    ),
    "functional dropout": (
        checked(model=dropping()),
        errors.NonDeterministicError,
        ("functional dropout", "training=self.training"),
    ),
    "augmentation": (
        checked(data=DataLoader(Augmented(), batch_size=2)),
        errors.NonDeterministicError,
        ("random augmentation", "list(loader)"),
    ),
    "augmentation by numpy": (
        checked(data=DataLoader(NumpyAugmented(), batch_size=2)),
        errors.NonDeterministicError,
        ("list(loader)",),
    ),
    "replacement": (
        checked(data=with_replacement()),
        errors.NonDeterministicError,
        ("pass to pass",),
    ),
    "last batch dropped": (
        checked(
            data=DataLoader(TensorDataset(X[:5], Y[:5]), batch_size=2, shuffle=True, drop_last=True)
        ),
        errors.NonDeterministicError,
        ("list(loader)",),
    ),
    "read once": (
        checked(data=DataLoader(Once(), batch_size=2)),
        errors.DataError,
        ("no batch",),
    ),
    "batch statistics and dropout": (
        lambda: problem(model=batchnorm(nn.Dropout(0.2)).train(), batchnorm="batch"),
        errors.BatchNormError,
        ("'2'", "p=0.2", "eval()"),
    ),
    "batch statistics and dropout of attention": (
        lambda: problem(
            model=nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, dropout=0.1)}), batchnorm="batch"
        ),
        errors.BatchNormError,
        ("'a'", "p=0.1"),
    ),
    "batch statistics and shuffling": (
        checked(
            data=DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True),
            model=batchnorm(),
            batchnorm="batch",
        ),
        errors.NonDeterministicError,
        ("shuffles samples between batches",),
    ),
    "batch statistics of one sample": (
        checked(data=[(X[:1], Y[:1]), (X[1:], Y[1:])], model=batchnorm(), batchnorm="batch"),
        errors.BatchNormError,
        ("one value per channel", 'batchnorm="eval"'),
    ),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_from_pass_to_pass(name: str) -> None:
    refused(CHANGING[name][0], CHANGING[name][1], *CHANGING[name][2])


def test_dropout_under_eval_is_no_problem() -> None:
    model = batchnorm(nn.Dropout(0.5)).train()
    assert problem(model=model).objective() == problem(model=model.eval()).objective()
    # switched off by hand, batch statistics are allowed
    model = batchnorm(nn.Dropout(0.5)).train()
    model[2].eval()
    problem(model=model, batchnorm="batch").check()


# -- NaN and infinity --------------------------------------------------------------------------


def spoiled(name: str, value: float) -> nn.Module:
    model = net()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[1] = value
    return model


def spoiled_buffer() -> nn.Module:
    model = batchnorm()
    model[1].running_mean[0] = torch.nan
    return model


class Logarithm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).log()


def frozen_nan() -> nn.Module:
    model = spoiled("0.weight", torch.nan)
    model[0].requires_grad_(False)
    return model


NONFINITE: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "parameter": (
        checked(model=spoiled("2.weight", torch.nan)),
        ("'2.weight'", "1 entries", "checkpoint"),
    ),
    "infinite parameter": (checked(model=spoiled("0.bias", torch.inf)), ("'0.bias'",)),
    "frozen parameter": (checked(model=frozen_nan()), ("'0.weight'",)),
    "buffer": (checked(model=spoiled_buffer()), ("batch 0", "first layer", "'1'")),
    "activation": (
        checked(model=nn.Sequential(net(), Apply(torch.log), nn.Linear(3, 3).double())),
        ("first layer", "'1'"),
    ),
    "overflow": (
        checked(model=nn.Sequential(net(), Apply(lambda x: (1e4 * x.abs()).exp()))),
        ("first layer", "'1'"),
    ),
    "in the forward of a container": (
        checked(model=nn.Sequential(net(), seeded(Logarithm))),
        ("first layer", "'1'"),
    ),
    "inputs": (
        checked(data=(X.clone().index_fill(0, torch.tensor([2]), torch.nan), Y)),
        ("inputs of batch 0",),
    ),
    "second batch": (
        checked(data=[(X, Y), (X * torch.inf, Y)]),
        ("inputs of batch 1",),
    ),
    "targets": (checked(nn.MSELoss(), (X, Z * torch.nan)), ("invalid targets",)),
    "loss": (
        checked(lambda z, y: (z * 1e308).sum() * 1e308, reduction="sum"),
        ("the loss itself",),
    ),
}


@pytest.mark.parametrize("name", NONFINITE)
def test_nan_and_infinity(name: str) -> None:
    refused(NONFINITE[name][0], errors.NonFiniteError, *NONFINITE[name][1])


def test_nan_that_comes_later() -> None:
    """A problem that was checked once notices parameters that have diverged since."""
    model = net()
    p = problem(model=model)
    cs.ggn(p)
    with torch.no_grad():
        model[2].bias.fill_(torch.nan)
    for call in (cs.ggn, cs.kfac, cs.hessian):
        refused(lambda call=call: call(p), errors.NonFiniteError, "'2.bias'")


def test_draws_that_change_nothing_are_allowed() -> None:
    def idle(x: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        return x

    assert problem(model=nn.Sequential(Apply(idle), net())).check().samples == 6
