"""Losses that use parameters themselves, besides the outputs, or have no second derivative."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvscope as cs
from curvscope.errors import UnsupportedLossError
from tests.truth import dense_ggn, dense_hessian, relative

SQUARED = {"reduction": lambda outputs, targets: outputs.numel()}


def penalised(dtype: torch.dtype = torch.float64, *, layers: tuple[int, ...] = (0, 2)):
    """A network, a loss with a cubic penalty on some of its layers, and data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    data = torch.randn(5, 3, dtype=dtype), torch.randn(5, 2, dtype=dtype)

    def loss(outputs, targets):
        penalty = sum((p**3).sum() for k in layers for p in model[k].parameters())
        return F.mse_loss(outputs, targets) + 0.1 * penalty

    return model, loss, data


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 2)], ids=str)
def test_hessian_blocks_take_in_a_penalty(layers):
    model, loss, (x, y) = penalised(layers=layers)
    problem = cs.Problem(model, loss, (x, y), **SQUARED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op = cs.hessian(problem)
        true = dense_hessian(loss(model(x), y), list(model.parameters()))
        assert relative(op.dense(), true) < 1e-12
        for name, part in (("0", slice(0, 16)), ("2", slice(16, 26))):
            assert relative(op.blocks[name].dense(), true[part, part]) < 1e-12
        assert relative(cs.exact_diagonal(problem, "hessian").diagonal(), true.diagonal()) < 1e-12
    for name in op.blocks:  # the fast routes stay for the layers that the loss does not use
        assert (op.route_of(name) == "autograd") == (int(name) in layers)


def test_the_ggn_is_without_a_penalty_and_says_so():
    model, loss, (x, y) = penalised()
    op = cs.ggn(cs.Problem(model, loss, (x, y), **SQUARED))
    true = dense_ggn(lambda z: F.mse_loss(z, y), model(x), list(model.parameters()))
    assert relative(op.dense(), true) < 1e-12
    assert any("besides the outputs" in note and "0.weight" in note for note in op.info.notes)
    plain = cs.ggn(cs.Problem(model, nn.MSELoss(), (x, y)))
    assert not plain.info.notes


@pytest.mark.parametrize("matrix", [cs.empirical_fisher, cs.gradient_noise], ids=["ef", "noise"])
def test_gradients_of_single_samples_are_refused_with_a_penalty(matrix):
    model, loss, data = penalised()
    with pytest.raises(UnsupportedLossError, match=r"uses parameters itself.*0\.weight"):
        matrix(cs.Problem(model, loss, data, **SQUARED))


def test_a_penalty_on_other_parameters_than_the_copys_is_refused():
    model, loss, data = penalised(torch.float32)
    problem = cs.Problem(model, loss, data, dtype=torch.float64, **SQUARED)
    with pytest.raises(UnsupportedLossError, match="copy of the model"):
        cs.hessian(problem)


def test_a_penalty_on_frozen_or_left_out_parameters_changes_nothing():
    model, loss, data = penalised(layers=(0,))
    problem = cs.Problem(model, loss, data, params="2", **SQUARED)
    assert cs.hessian(problem).route_of("2") == "piecewise-linear"
    assert cs.empirical_fisher(problem).shape == (10, 10)


def test_losses_without_second_derivative_are_named():
    torch.manual_seed(0)
    problem = cs.Problem(
        nn.Linear(3, 4), nn.MultiMarginLoss(), (torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0]))
    )
    op = cs.ggn(problem)
    for compute in (op.dense, lambda: op.blocks["(root)"], lambda: op @ torch.ones(16)):
        with pytest.raises(UnsupportedLossError, match=r"MultiMarginLoss .* second derivative"):
            compute()
    assert cs.empirical_fisher(problem).trace() > 0
