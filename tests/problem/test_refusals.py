"""Arguments of a Problem that are none: the message says what was probably meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import curvscope as cs

X, Y = torch.randn(6, 3), torch.randint(0, 2, (6,))


def model() -> nn.Module:
    return nn.Linear(3, 2)


def test_model_and_loss_swapped() -> None:
    with pytest.raises(cs.errors.ModelError, match=r"swapped.*cs\.Problem\(model, loss, data\)"):
        cs.Problem(nn.CrossEntropyLoss(), model(), (X, Y))
    with pytest.raises(cs.errors.ModelError, match=r"cs\.Problem\(model, loss, data\)"):
        cs.Problem(nn.functional.cross_entropy, model(), (X, Y))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((X.numpy(), Y.numpy()), r"torch\.as_tensor"),
        ((X, Y.numpy()), r"torch\.as_tensor"),
        ([(X.numpy(), Y.numpy())], r"torch\.as_tensor"),
        (X.numpy(), r"torch\.as_tensor"),
        ((X, Y, Y), "a tuple of 3 tensors"),
        (TensorDataset(X, Y), "wrap it in a DataLoader"),
    ],
    ids=["arrays", "array as target", "list of arrays", "one array", "three", "dataset"],
)
def test_data_of_another_form_are_refused_at_once(data: Any, words: str) -> None:
    with pytest.raises(cs.errors.DataError, match=words):
        cs.Problem(model(), nn.CrossEntropyLoss(), data)


def test_unpack_may_sort_three_tensors_and_arrays() -> None:
    three = cs.Problem(
        model(), nn.CrossEntropyLoss(), (X, Y, Y), unpack=lambda batch: (batch[0], batch[1])
    )
    arrays = cs.Problem(
        model(),
        nn.CrossEntropyLoss(),
        [(X.numpy(), Y.numpy())],
        unpack=lambda batch: tuple(map(torch.as_tensor, batch)),
    )
    assert three.n_samples == arrays.n_samples == 6
