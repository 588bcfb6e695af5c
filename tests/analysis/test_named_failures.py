"""What goes wrong inside a solver is said in terms of the matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope import errors
from curvscope.operators import FunctionOperator


def test_products_that_are_nan_are_named_wherever_eigenvalues_are_taken() -> None:
    broken = FunctionOperator(lambda v: math.nan * v, 20, check=False)
    for take in (cs.spectrum, cs.concentration, lambda op: op.eigh()):
        with pytest.raises(errors.NonFiniteError, match="NaN or infinite entries"):
            take(broken)


def test_scipy_and_the_zero_matrix() -> None:
    zero = FunctionOperator(lambda v: 0 * v, 20, check=False)
    with pytest.raises(errors.NotDefinedError, match="Use method='lanczos'"):
        cs.eigsh(zero, 2, method="scipy")
    assert float(cs.eigsh(zero, 2).values.abs().max()) == 0


def test_a_random_batch_without_terms_is_named() -> None:
    targets = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])
    loss = nn.CrossEntropyLoss(ignore_index=0)
    problem = cs.Problem(nn.Linear(2, 2), loss, (torch.eye(8, 2), targets))
    with pytest.raises(errors.DataError, match="random batches of 1 samples"):
        cs.batch_spectra(problem, [1], draws=4, k=1)
