"""Models whose parameters are frozen or replaced after the problem was made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import curvscope as cs
from curvscope.errors import ModelError, NonDeterministicError

DATA = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3), torch.tensor([0, 1, 1, 0])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def new_layer(model: nn.Sequential) -> None:
    model[2] = nn.Linear(4, 2).double()


CHANGES = {
    "layer": new_layer,
    "assign": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "parametrization": lambda model: parametrizations.weight_norm(model[2]),
}


@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_replaced_parameters_are_named_instead_of_taken_for_constant(change):
    """Gradient and blocks of a replaced layer were zero, without a word."""
    model = network()
    problem = cs.Problem(model, nn.CrossEntropyLoss(), DATA)
    op = cs.ggn(problem)
    change(model)
    for use in (problem.gradient, lambda: cs.hessian(problem), lambda: op @ torch.ones(26)):
        with pytest.raises(ModelError, match=r"no longer has .*'2\.weight'.* a new Problem"):
            use()
    assert cs.Problem(model, nn.CrossEntropyLoss(), DATA).gradient().norm() > 0


def test_copies_follow_replaced_parameters_by_name_and_refuse_other_shapes():
    model = network()
    problem = cs.Problem(model, nn.CrossEntropyLoss(), DATA, dtype=torch.float32)
    new_layer(model)
    own = cs.Problem(model, nn.CrossEntropyLoss(), DATA)
    torch.testing.assert_close(problem.gradient().double(), own.gradient(), atol=1e-6, rtol=0)
    model[2] = nn.Linear(4, 3).double()
    with pytest.raises(ModelError, match=r"'2\.weight'.*Make a new Problem"):
        problem.gradient()


def test_layers_frozen_later_stay_in_the_matrix():
    model = network()
    problem = cs.Problem(model, nn.CrossEntropyLoss(), DATA)
    op, gradient = cs.hessian(problem), problem.gradient()
    before = cs.hessian(problem).dense()
    model[0].weight.requires_grad_(False)
    torch.testing.assert_close(problem.gradient(), gradient)
    torch.testing.assert_close(cs.hessian(problem).dense(), before)
    torch.testing.assert_close(op @ torch.ones(26).double(), before.sum(1))
    torch.testing.assert_close(cs.ggn(problem).blocks["2"].dense(), before[16:, 16:])
    assert not model[0].weight.requires_grad and model[0].weight.grad is None
    assert model[0].bias.requires_grad


class Tracking(nn.Module):
    """Keeps a running mean of its inputs by hand, in training and evaluation alike."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.layer, self.used = nn.Linear(3, 2).double(), used
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0) + 1, 0.1)
        return self.layer(x - self.mean if self.used else x)


def test_buffers_that_every_pass_changes():
    """With one batch, two passes over the data agree: the second evaluation of a pass does not."""
    with pytest.raises(NonDeterministicError, match="changes its buffers"):
        cs.Problem(Tracking(True), nn.CrossEntropyLoss(), DATA).check()
    assert cs.Problem(Tracking(False), nn.CrossEntropyLoss(), DATA).check().samples == 4
