"""K-FAC reads from the loss's graph what the labels' distribution is and what each term weighs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors
from curvscope.operators import KroneckerOperator
from curvscope.optim import KFAC

from .kronecker_cases import closure_of, flat, labels, normal, relative, seeded, small

WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
X, Y = normal(8, 5), labels(8)
SOFT = torch.softmax(normal(8, 3, seed=5), -1)
REAL = normal(8, 3, seed=6)
BITS = (normal(8, 3, seed=7) > 0).double()
SOME = torch.where(torch.arange(8) % 3 == 0, -100, Y)

# name -> the loss as a user writes it, the same for cs.Problem, targets
CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], nn.Module, Tensor]] = {
    "cross-entropy": (F.cross_entropy, nn.CrossEntropyLoss(), Y),
    "sum": (
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        nn.CrossEntropyLoss(reduction="sum"),
        Y,
    ),
    "sum divided": (
        lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(z),
        nn.CrossEntropyLoss(),
        Y,
    ),
    "mean of none": (
        lambda z, y: F.cross_entropy(z, y, reduction="none").mean(),
        nn.CrossEntropyLoss(),
        Y,
    ),
    "class weights": (
        lambda z, y: F.cross_entropy(z, y, weight=WEIGHT),
        nn.CrossEntropyLoss(weight=WEIGHT),
        Y,
    ),
    "ignored": (F.cross_entropy, nn.CrossEntropyLoss(), SOME),
    "smoothed": (
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        Y,
    ),
    "soft targets": (F.cross_entropy, nn.CrossEntropyLoss(), SOFT),
    "log-softmax and nll": (
        lambda z, y: F.nll_loss(F.log_softmax(z, -1), y),
        nn.CrossEntropyLoss(),
        Y,
    ),
    "picked by hand": (
        lambda z, y: -torch.log_softmax(z, 1)[torch.arange(len(z)), y].mean(),
        nn.CrossEntropyLoss(),
        Y,
    ),
    "squared error": (F.mse_loss, nn.MSELoss(), REAL),
    "squared error, sum": (
        lambda z, y: F.mse_loss(z, y, reduction="sum"),
        nn.MSELoss(reduction="sum"),
        REAL,
    ),
    "logits": (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss(), BITS),
    "logits, pos_weight": (
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=WEIGHT),
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
        BITS,
    ),
    "sigmoid and bce": (
        lambda z, y: F.binary_cross_entropy(torch.sigmoid(z), y),
        nn.BCEWithLogitsLoss(),
        BITS,
    ),
}


def factors(function: Callable[[Tensor, Tensor], Tensor], targets: Tensor, **options: Any) -> Any:
    model = small()
    optimizer = KFAC(model, 0.0, 0.1, **{"fisher": "exact", **options})
    optimizer.step(closure_of(optimizer, model, X, targets, loss=function))
    return {block: optimizer.factors(block) for block in optimizer.layers}


@pytest.mark.parametrize("name", CASES)
def test_the_distribution_is_read_from_the_graph(name: str) -> None:
    loss, module, targets = CASES[name]
    found = factors(loss, targets)
    truth = cs.kfac(cs.Problem(small(), module, (X, targets)), fisher="exact")
    for block, own in truth.blocks.items():
        assert isinstance(own, KroneckerOperator)
        assert relative(found[block]["G"], own.G) < 1e-11
        assert relative(found[block]["A"], own.A) < 1e-11


def test_a_scaled_loss_scales_the_factor() -> None:
    plain, tripled = (factors(lambda z, y, c=c: c * F.cross_entropy(z, y), Y) for c in (1.0, 3.0))
    for block in plain:
        assert relative(tripled[block]["G"], 3 * plain[block]["G"]) < 1e-12


def test_pixels() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(),
                                         nn.Conv2d(4, 3, 1)))  # fmt: skip
    x, y = normal(4, 2, 3, 3), labels(36).reshape(4, 3, 3)
    y[0, 0] = -100
    optimizer = KFAC(model, 0.0, 0.1, fisher="exact")
    optimizer.step(closure_of(optimizer, model, x, y))
    truth = cs.kfac(cs.Problem(model, nn.CrossEntropyLoss(), (x, y)), fisher="exact")
    for block, own in truth.blocks.items():
        assert relative(optimizer.factors(block)["G"], own.G) < 1e-11  # type: ignore[attr-defined]


def test_accumulated_backward_passes_are_one_batch() -> None:
    whole = factors(F.cross_entropy, Y)
    model = small()
    optimizer = KFAC(model, 0.0, 0.1, fisher="exact")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for part in (slice(0, 2), slice(2, 8)):
            value = F.cross_entropy(model(X[part]), Y[part], reduction="sum") / len(X)
            value.backward()
            total += value.detach()
        return total

    optimizer.step(closure)
    for block, own in whole.items():
        assert relative(optimizer.factors(block)["G"], own["G"]) < 1e-11
        assert relative(optimizer.factors(block)["A"], own["A"]) < 1e-11


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), "categorical"], ids=["module", "string"])
def test_accumulated_passes_of_a_named_loss_are_one_batch(loss: Any) -> None:
    """What was seen of passes that ``zero_grad`` discards does not count."""
    whole = factors(F.cross_entropy, Y)
    model = small()
    optimizer = KFAC(model, 0.0, 0.1, fisher="exact", loss=loss)
    F.cross_entropy(model(X), Y).backward()
    optimizer.zero_grad()
    for part in (slice(0, 3), slice(3, 8)):
        (F.cross_entropy(model(X[part]), Y[part], reduction="sum") / len(X)).backward()
    optimizer.step()
    F.cross_entropy(torch.stack([model(x) for x in X]), Y).backward()  # one sample at a time
    optimizer.step()
    for block, own in whole.items():
        assert relative(optimizer.factors(block)["G"], own["G"]) < 1e-11
        assert relative(optimizer.factors(block)["A"], own["A"]) < 1e-11


class Tokens(nn.Module):
    """A sample's tokens see one another, so that their terms must not share a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh().cumsum(1))


def test_terms_in_any_order() -> None:
    """Picked by a mask (6 of 12, not evenly), or with the axes of samples and tokens exchanged."""
    x, y = normal(3, 4, 5), labels(12).reshape(3, 4)
    kept = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    some = torch.where(kept, y, -100)
    ways: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "mask": (lambda z: F.cross_entropy(z[kept], y[kept]), some),
        "exchanged": (lambda z: F.cross_entropy(z.transpose(0, 1).flatten(0, 1), y.T.flatten()), y),
        "flat": (lambda z: F.cross_entropy(z.flatten(0, 1), y.flatten()), y),
        "turned": (lambda z: F.cross_entropy(z.mT, y), y),
    }
    for name, (loss, targets) in ways.items():
        found = []
        for function in (loss, lambda z, t=targets: F.cross_entropy(z.transpose(1, 2), t)):
            model = seeded(Tokens)
            optimizer = KFAC(model, 0.0, 0.1, fisher="exact")
            optimizer.step(closure_of(optimizer, model, x, y, lambda z, _, f=function: f(z)))
            found.append(optimizer.factors("first")["G"])
        assert relative(*found) < 1e-12, name


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (nn.CrossEntropyLoss(), "cross-entropy"),
        ("categorical", "cross-entropy"),
        (nn.CrossEntropyLoss(reduction="sum"), "sum"),
        (nn.MSELoss(), "squared error"),
        (nn.BCEWithLogitsLoss(), "logits"),
    ],
    ids=["module", "string", "sum", "mse", "bce"],
)
def test_a_named_loss_needs_no_closure(loss: Any, name: str) -> None:
    function, module, targets = CASES[name]
    truth = cs.kfac(cs.Problem(small(), module, (X, targets)), fisher="exact")
    model = small()
    optimizer = KFAC(model, 0.0, 0.1, fisher="exact", loss=loss)
    function(model(X), targets).backward()
    optimizer.step()
    for block, own in truth.blocks.items():
        assert relative(optimizer.factors(block)["G"], own.G) < 1e-11  # type: ignore[attr-defined]


def test_strings_are_sums_over_a_sample() -> None:
    truth = cs.kfac(cs.Problem(small(), nn.BCEWithLogitsLoss(), (X, BITS)), fisher="exact")
    found = factors(F.binary_cross_entropy_with_logits, BITS, loss="bernoulli")
    for block, own in truth.blocks.items():
        assert relative(found[block]["G"], 3 * own.G) < 1e-11  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("loss", "part"),
    [
        (lambda z, y: F.l1_loss(z, z.detach() + 1), "loss="),
        (lambda z, y: z.square().mean(), "loss="),
        (lambda z, y: F.smooth_l1_loss(z, z.detach() + 1), "loss="),
        (lambda z, y: -F.cross_entropy(z, y), "negative weight"),
    ],
    ids=["absolute", "own", "huber", "negative"],
)
def test_losses_that_say_nothing_of_the_labels(loss: Any, part: str) -> None:
    model = small()
    before = flat(model).clone()
    optimizer = KFAC(model, 0.1, 0.1)
    with pytest.raises(errors.UnsupportedLossError, match=part):
        optimizer.step(closure_of(optimizer, model, X, Y, loss=loss))
    assert torch.equal(flat(model), before) and optimizer.steps == 0
    if part == "loss=":
        other = KFAC(model, 0.1, 0.1, fisher="empirical")
        other.step(closure_of(other, model, X, Y, loss=loss))
        assert not torch.equal(flat(model), before)


def test_closures_that_do_not_fit() -> None:
    model = small()
    optimizer = KFAC(model, 0.1, 0.1)
    with pytest.raises(errors.OptionError, match=r"backward\(\)"):
        optimizer.step(lambda: F.cross_entropy(model(X), Y))
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(errors.OptionError, match="closure"):
        optimizer.step()
    assert optimizer.steps == 0
    with pytest.raises(errors.UnsupportedLossError, match="weights"):
        KFAC(model, 0.1, 0.1, loss=nn.CrossEntropyLoss(weight=WEIGHT))
    with pytest.raises(errors.UnsupportedLossError):
        KFAC(model, 0.1, 0.1, loss=nn.L1Loss())


def test_sampled_labels_of_a_weighted_loss_on_average() -> None:
    """Labels drawn from the model never go back into the weighted loss."""
    truth = factors(CASES["class weights"][0], Y)["2"]["G"]
    draws = torch.stack(
        [
            factors(CASES["class weights"][0], Y, fisher="mc", seed=seed)["2"]["G"]
            for seed in range(300)
        ]
    )
    z = (draws.mean(0) - truth) / (draws.std(0) / math.sqrt(len(draws)))
    assert float(z.abs().max()) < 4


@pytest.mark.parametrize("kind", ["second term", "penalty of outputs", "weights", "known terms"])
def test_terms_that_cannot_be_read_are_told(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """A term of the outputs beside a likelihood; a penalty of the weights is none."""
    model = small()
    optimizer = KFAC(model, lr=0.1, damping=1.0, fisher="exact")

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = model(X)
        loss = F.cross_entropy(z, Y)
        if kind == "second term":
            loss = loss + 0.3 * ((z - REAL) ** 2).mean()
        elif kind == "penalty of outputs":
            loss = loss + 0.1 * z.abs().sum()
        elif kind == "weights":
            loss = loss + 0.1 * sum((p**2).sum() for p in model.parameters())
        else:
            loss = loss + 0.3 * F.mse_loss(z, REAL)
        loss.backward()
        return loss

    optimizer.step(closure)
    told = [str(w.message) for w in recwarn if "part of the loss" in str(w.message)]
    expected = {"second term": "Pow", "penalty of outputs": "Abs"}
    assert len(told) == (kind in expected)
    assert kind not in expected or expected[kind] in told[0]
