"""What a Problem says of itself: terms, scale, blocks, parameters, copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvscope as cs
from tests.curvature.nets import Apply, RootParameters, TiedLanguage, mlp, normalised, seeded

from .refusals import BCE, CE, MSE, X, Y, Z, net

W = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
TERMS: dict[str, tuple[Any, Any, float]] = {
    "samples": (CE(), Y, 6.0),
    "sum": (CE(reduction="sum"), Y, 6.0),
    "class weights": (CE(weight=W), Y, float(W[Y].sum())),
    "ignored": (CE(ignore_index=2), Y, 4.0),
    "weights and ignored": (CE(weight=W, ignore_index=0), Y, float(W[Y[Y != 0]].sum())),
    "soft labels": (CE(weight=W), Z.softmax(1), 6.0),
    "elements": (MSE(), Z, 18.0),
    "binary": (BCE(pos_weight=W), (Z > 0).double(), 18.0),
    "rows of a divergence": (nn.KLDivLoss(reduction="batchmean"), Z.softmax(1), 6.0),
    "margins": (nn.MultiMarginLoss(), Y, 6.0),
    "functions": (F.l1_loss, Z, 18.0),
}


@pytest.mark.parametrize("name", TERMS)
def test_terms(name: str) -> None:
    loss, y, terms = TERMS[name]
    problem = cs.Problem(net(), loss, [(X[:2], y[:2]), (X[2:], y[2:])])
    assert problem.n_samples == 6
    assert problem.n_terms == pytest.approx(terms, rel=1e-12)
    summed = getattr(loss, "reduction", "mean") == "sum"
    assert problem.scale == pytest.approx(1.0 if summed else 1 / terms, rel=1e-12)
    with torch.no_grad():
        assert problem.objective() == pytest.approx(float(loss(net()(X), y)), rel=1e-12)


def test_terms_of_a_callable() -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, ignore_index=1)

    data = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    problem = cs.Problem(net(), loss, data, reduction=lambda z, y: int((y != 1).sum()))
    assert problem.n_terms == 4
    assert problem.objective() == pytest.approx(float(loss(net()(X), Y).detach()), rel=1e-12)
    # a batch of nothing but ignored targets has a mean of 0/0 and adds nothing
    empty = [*data, (X[:2], torch.ones(2, dtype=torch.long))]
    again = cs.Problem(net(), loss, empty, reduction=lambda z, y: int((y != 1).sum()))
    assert again.objective() == pytest.approx(problem.objective(), rel=1e-12)


def test_blocks_by_layer() -> None:
    assert cs.Problem(net(), CE(), (X, Y)).blocks == {
        "0": ("0.weight", "0.bias"),
        "2": ("2.weight", "2.bias"),
    }
    root = cs.Problem(seeded(RootParameters), MSE(), (torch.zeros(2, 4), torch.zeros(2, 2)))
    assert root.blocks == {
        "(root)": ("weight", "bias", "gain"),
        "out": ("out.weight", "out.bias"),
    }
    linear = cs.Problem(nn.Linear(3, 3).double(), CE(), (X, Y))
    assert linear.blocks == {"(root)": ("weight", "bias")}
    # the originals of a parametrization belong to the layer
    x = torch.zeros(2, 4, dtype=torch.float64)
    parametrised = cs.Problem(seeded(lambda: normalised("weight_norm")), MSE(), (x, x[:, :2]))
    assert list(parametrised.blocks) == ["0", "2"]
    assert len(parametrised.blocks["0"]) == 3
    tied = cs.Problem(
        seeded(TiedLanguage), CE(), (torch.zeros(2, 3).long(), torch.zeros(2, 3).long())
    )
    assert tied.blocks == {"embed": ("embed.weight",), "mix": ("mix.weight", "mix.bias")}


def test_other_blocks() -> None:
    model = seeded(lambda: mlp(nn.Tanh, 3, 3, 3, 3))

    def blocks(way: Any, **more: Any) -> dict[str, tuple[str, ...]]:
        return cs.Problem(model, CE(), (X, Y), blocks=way, **more).blocks

    names = [n for n, _ in model.named_parameters()]
    assert blocks("parameter") == {n: (n,) for n in names}
    assert blocks("all") == {"all": tuple(names)}
    assert blocks({"weights": "*.weight", "biases": ["*.bias"]}) == {
        "weights": ("0.weight", "2.weight", "4.weight"),
        "biases": ("0.bias", "2.bias", "4.bias"),
    }
    # members are in the model's order, however they are named
    assert blocks({"a": ["4", "0.bias", "0.weight", "2"]}) == {"a": tuple(names)}
    assert blocks({"a": ["0"], "b": ["4"]}, params=["0", "4"]) == {
        "a": ("0.weight", "0.bias"),
        "b": ("4.weight", "4.bias"),
    }


def test_parameters_that_take_part() -> None:
    model = seeded(lambda: mlp(nn.Tanh, 3, 3, 3, 3))
    model[2].weight.requires_grad_(False)

    def names(params: Any) -> list[str]:
        return list(cs.Problem(model, CE(), (X, Y), params=params).params)

    assert names(None) == ["0.weight", "0.bias", "2.bias", "4.weight", "4.bias"]
    assert names("0") == ["0.weight", "0.bias"]
    assert names(["4", "0.bias"]) == ["0.bias", "4.weight", "4.bias"]
    assert names("!0") == ["2.bias", "4.weight", "4.bias"]
    assert names(["*.bias", "!2"]) == ["0.bias", "4.bias"]
    assert names(["0", "2"]) == ["0.weight", "0.bias", "2.bias"]
    root = seeded(RootParameters)
    problem = cs.Problem(root, MSE(), (torch.zeros(2, 4), torch.zeros(2, 2)), params="(root)")
    assert list(problem.params) == ["weight", "bias", "gain"]


def test_layout_and_gradient_are_in_model_order() -> None:
    model = net()
    problem = cs.Problem(model, CE(), (X, Y))
    assert problem.layout.names == tuple(n for n, _ in model.named_parameters())
    assert problem.layout.numel == sum(p.numel() for p in model.parameters())
    CE()(model(X), Y).backward()
    truth = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert torch.allclose(problem.gradient(), truth, rtol=1e-12, atol=1e-15)


def test_with_data_and_changes() -> None:
    problem = cs.Problem(net(), CE(weight=W), (X, Y), blocks="parameter", name="mine")
    other = problem.with_data((X[:3], Y[:3]))
    assert other.n_samples == 3
    assert (other.name, other.blocks) == ("mine", problem.blocks)
    assert problem.with_data((X, Y), dtype=torch.float32).dtype == torch.float32
    assert problem.n_samples == 6


def test_sentences() -> None:
    problem = cs.Problem(net(), CE(), [(X[:2], Y[:2]), (X[2:], Y[2:])], name="a net")
    sentence = problem.describe()
    for part in ("a net", "31 parameters", "2 blocks", "6 samples in 2 batches", "mean over 6"):
        assert part in sentence
    assert "CrossEntropyLoss" in repr(problem)
    assert problem.block_names(None) == ["0", "2"]
    with pytest.raises(cs.errors.UnknownBlockError, match="Did you mean '2'"):
        problem.block_names(["2."])


def test_loaders_give_the_same_order_every_time() -> None:
    generator = torch.Generator().manual_seed(4)
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True, generator=generator)
    problem = cs.Problem(net(), CE(), loader)
    orders = []
    for _ in range(2):
        with problem.session():
            orders.append(torch.cat([y for _, y in problem.batches()]))
    assert torch.equal(*orders)
    # and the user's next pass is as it would have been
    fresh = torch.Generator().manual_seed(4)
    again = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True, generator=fresh)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(loader, again, strict=True))


def test_unchecked_problems_skip_the_second_pass() -> None:
    calls = []
    model = nn.Sequential(net(), Apply(lambda x: calls.append(1) or x))
    cs.Problem(model, CE(), (X, Y), check=False).check()
    assert len(calls) == 1
    # facts are found once
    problem = cs.Problem(model, CE(), (X, Y))
    problem.check()
    count = len(calls)
    assert problem.n_samples == 6
    assert problem.scale == pytest.approx(1 / 6)
    assert len(calls) == count


def test_targets_move_to_the_type_of_the_model() -> None:
    """Integers as targets of a squared error, float64 data for a float32 model."""
    problem = cs.Problem(net().float(), MSE(), (X, (Z > 0).long()))
    with torch.no_grad():
        truth = MSE()(net().float()(X.float()), (Z > 0).float())
    assert problem.objective() == pytest.approx(float(truth), rel=1e-6)
    assert problem.dtype == torch.float32
