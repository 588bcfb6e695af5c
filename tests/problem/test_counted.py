"""Numbers of things in sentences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.errors import counted, nearest


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "block", "1 block"),
        (2, "block", "2 blocks"),
        (1, "batch", "1 batch"),
        (1200, "batch", "1,200 batches"),
        (0, "entry", "0 entries"),
    ],
    ids=["block", "blocks", "batch", "batches", "entries"],
)
def test_plurals(count: int, noun: str, text: str) -> None:
    assert counted(count, noun) == text


def test_one_block_and_one_batch() -> None:
    data = torch.randn(5, 3), torch.randn(5, 1)
    text = cs.Problem(nn.Linear(3, 1), nn.MSELoss(), data).describe()
    assert "in 1 block," in text and "in 1 batch," in text


def test_the_nearest_name_may_be_in_capitals() -> None:
    assert nearest("k-fac", ["K-FAC", "GGN"]) == " Did you mean 'K-FAC'?"
