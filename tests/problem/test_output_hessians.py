"""Hessians of the known losses in the outputs, in closed form, against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from curvscope.problem.losses import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError


def _labels(*shape: int) -> Tensor:
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(2))


def _uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _ignored(*shape: int) -> Tensor:
    labels = _labels(*shape)
    labels[0] = -100
    return labels


_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)
_PIXELS = _uniform(1, 5, 3)

CASES: dict[str, tuple[Loss, Any]] = {
    "labels": (CrossEntropy(), _labels(4, 3)),
    "ignored": (CrossEntropy(), _ignored(4, 3)),
    "class weights": (CrossEntropy(weight=_WEIGHT), _ignored(4, 3)),
    "smoothing": (CrossEntropy(label_smoothing=0.2), _ignored(4, 3)),
    "smoothing and weights": (CrossEntropy(weight=_WEIGHT, label_smoothing=0.2), _ignored(4, 3)),
    "probabilities": (CrossEntropy(weight=_WEIGHT, label_smoothing=0.1), _uniform(4, 5, 3)),
    "squared error": (SquaredError(), _uniform(4, 5, 3)),
    "binary": (BinaryCrossEntropy(), _uniform(4, 5, 3)),
    "binary, weights": (
        BinaryCrossEntropy(weight=_PIXELS, pos_weight=_uniform(5, 1)),
        _uniform(4, 5, 3),
    ),
}


def _case(name: str) -> tuple[Loss, Tensor, Any, Tensor]:
    loss, targets = CASES[name]
    generator = torch.Generator().manual_seed(1)
    z, v = (torch.randn(4, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return loss, z, targets, v


@pytest.mark.parametrize("name", CASES)
def test_closed_form_is_the_second_derivative(name: str) -> None:
    loss, z, targets, v = _case(name)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(loss.total(z, targets), z, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, z, v)
    found = loss.hessian_product(z.detach(), targets, v)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_computed_in_single(name: str) -> None:
    loss, z, targets, v = _case(name)
    z, v = z.bfloat16(), v.bfloat16()
    expected = loss.hessian_product(z.float(), targets, v.float())
    found = loss.hessian_product(z, targets, v)
    assert expected is not None and found is not None
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)
