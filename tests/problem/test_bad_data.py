"""Data and targets that cannot be used."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvscope as cs
from curvscope import errors
from tests.curvature.nets import Apply

from .refusals import BCE, CE, MSE, Refusal, X, Y, Z, checked, net, problem, refused

# -- data and targets --------------------------------------------------------------------------

DATA: dict[str, Refusal] = {
    "nothing": (checked(data=[]), errors.DataError, ("empty",)),
    "empty loader": (
        checked(data=DataLoader(TensorDataset(X[:0], Y[:0]))),
        errors.DataError,
        ("empty",),
    ),
    "only empty batches": (checked(data=[(X[:0], Y[:0])]), errors.DataError, ("no batch",)),
    "iterator": (checked(data=iter([(X, Y)])), errors.DataError, ("only once", "list(data)")),
    "generator": (checked(data=((x, y) for x, y in [(X, Y)])), errors.DataError, ("list(data)",)),
    "map": (checked(data=map(tuple, [[X, Y]])), errors.DataError, ("list(data)",)),
    "inputs alone": (checked(data=X), errors.DataError, ("without targets",)),
    "dict": (checked(data={"x": X, "y": Y}), errors.DataError, ("unpack=",)),
    "triples": (checked(data=[(X, Y, Z)]), errors.DataError, ("of 3", "unpack=")),
    "number": (checked(data=3), errors.DataError, ("int", "DataLoader")),
    "no tensors": (checked(data=[("a", "b")]), errors.DataError, ("no tensor",)),
    "class out of range": (checked(data=(X, Y + 1)), errors.TargetError, ("[1, 3]", "0 to 2")),
    "negative class": (checked(data=(X, Y - 1)), errors.TargetError, ("[-1, 1]", "ignore_index")),
    "real classes": (checked(data=(X, Y.double())), errors.TargetError, ("[6]", "integer")),
    "boolean classes": (checked(data=(X, Y > 0)), errors.TargetError, ("torch.bool", "long()")),
    "shape of classes": (
        checked(data=(X, Y.unsqueeze(1))),
        errors.TargetError,
        ("[6, 1]", "expected [6]"),
    ),
    "other number of samples": (checked(data=(X, Y[:5])), errors.TargetError, ("[5]", "[6, 3]")),
    "outputs without classes": (
        checked(model=nn.Sequential(net(), Apply(lambda x: x.sum(1)))),
        errors.TargetError,
        ("[N, C, ...]", "forward="),
    ),
    "negative probabilities": (checked(data=(X, Z)), errors.TargetError, ("negative",)),
    "class weights": (
        checked(CE(weight=torch.ones(4))),
        errors.TargetError,
        ("4 class weights", "3 classes"),
    ),
    "broadcast": (checked(MSE(), (X, Z[:, 0])), errors.TargetError, ("[6]", "[6, 3]", "broadcast")),
    "broadcast l1": (
        checked(nn.L1Loss(), (X, Z[:, :1])),
        errors.TargetError,
        ("[6, 1]", "broadcast"),
    ),
    "not between 0 and 1": (checked(BCE(), (X, Z)), errors.TargetError, ("between 0 and 1",)),
    "loss fails": (
        checked(lambda z, y: (z @ y).sum(), (X, torch.zeros(6, 2).double()), reduction="sum"),
        errors.TargetError,
        ("failed on outputs of shape [6, 3]", "forward="),
    ),
    "nothing but ignored": (
        checked(data=(X, torch.full_like(Y, -100))),
        errors.DataError,
        ("ignore_index",),
    ),
    "dict inputs": (checked(data=({"x": X}, Y)), errors.ModelError, ("dict", "model(**inputs)")),
    "tuple inputs": (checked(data=((X, X), Y)), errors.ModelError, ("tuple", "model(*inputs)")),
    "tuple outputs": (
        checked(model=nn.Sequential(net(), Apply(lambda x: (x, x)))),
        errors.ModelError,
        ("tuple", "forward="),
    ),
    "forward= returns a dict": (
        checked(forward=lambda model, x: {"u": model(x)}),
        errors.ModelError,
        ("forward= returned dict", "torch.cat"),
    ),
    "subset too large": (
        lambda: problem().subset(7),
        errors.OptionError,
        ("subset(7)", "6 samples"),
    ),
    "subset of nothing": (lambda: problem().subset(0), errors.OptionError, ("subset(0)",)),
    "samples last": (
        lambda: cs.empirical_fisher(
            problem(MSE(), (X, Z.T), nn.Sequential(net(), Apply(lambda x: x.T)))
        ),
        errors.DataError,
        ("[3, 6]", "forward="),
    ),
    "positions first": (
        lambda: cs.empirical_fisher(
            problem(
                MSE(),
                (
                    torch.randn(3, 3, 3, dtype=torch.float64),
                    torch.zeros(3, 3, 3, dtype=torch.float64),
                ),
                nn.Sequential(net(), Apply(lambda x: x.transpose(0, 1))),
            )
        ),
        errors.DataError,
        ("one after the other", "transpose"),
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data_and_targets(name: str) -> None:
    refused(DATA[name][0], DATA[name][1], *DATA[name][2])


class Last(nn.Module):
    """A recurrent net in torch's default layout, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.GRU(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(x)[0][-1])


@pytest.mark.parametrize("steps", [7, 5, 20, 40])
def test_time_first_inputs(steps: int) -> None:
    """Their first axis is not that of samples, by which everything counts and cuts."""
    data = torch.randn(steps, 20, 3), torch.randn(20, 2)
    with pytest.raises(errors.DataError, match=r"time first.*transpose\(0, 1\)"):
        cs.Problem(Last(), nn.MSELoss(), data).check()
    turned = data[0].transpose(0, 1), data[1]
    forward = lambda model, x: model(x.transpose(0, 1))  # noqa: E731
    problem = cs.Problem(Last(), nn.MSELoss(), turned, forward=forward)
    assert problem.n_samples == 20 and problem.subset(5).n_samples == 5
