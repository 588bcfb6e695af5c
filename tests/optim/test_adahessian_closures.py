"""AdaHessian: closures, graphs, attention, what it reports and refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvscope as cs
from curvscope.errors import (
    NonFiniteError,
    OptionError,
    UncoveredError,
    UnsupportedLayerError,
    UnsupportedLossError,
)
from curvscope.optim import AdaHessian
from curvscope.optim.adahessian import adahessian_update
from tests.optim.adaptive_cases import (
    data,
    flat,
    mlp,
    relative,
    seeded,
    small_problem,
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 24)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.q(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2)).mean(1)


def test_attention_is_switched_to_a_kernel_with_a_second_derivative_and_back():
    model = seeded(Attention, dtype=torch.float32)
    x, y = data(0, 4, 6, 8, dtype=torch.float32)
    used = []

    def loss():
        used.append(torch.backends.cuda.flash_sdp_enabled())
        return F.cross_entropy(model(x), y)

    optimizer = AdaHessian(model)
    before = torch.backends.cuda.flash_sdp_enabled()
    optimizer.step(loss)
    assert used == [False] and torch.backends.cuda.flash_sdp_enabled() == before
    with pytest.raises(UnsupportedLayerError, match=r"SDPBackend\.MATH"):
        optimizer.backward(loss())  # outside a closure the kernel is the user's
    optimizer.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):
        outside = loss()
    optimizer.backward(outside)
    optimizer.step()
    # the same when the closure fails
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_multihead_attention_and_recurrent_layers():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.rnn = nn.LSTM(4, 4, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.rnn(x)[0][:, -1])

    model = seeded(Net)
    x, y = data(0, 4, 5, 4)
    optimizer = AdaHessian(model, 0.01)
    before = flat(model)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert bool((flat(model) != before).double().mean() > 0.9)
    assert all(row["rule"] == "AdaHessian" for row in optimizer.coverage())


def test_piecewise_linear_loss_has_no_curvature_but_trains():
    model = nn.Linear(3, 1).double()
    optimizer = AdaHessian(model, 1e-5)
    before = flat(model)
    optimizer.step(lambda: model(torch.ones(2, 3).double()).sum())
    assert relative(before - flat(model), 1e-5 * torch.tensor([2.0] * 4).double() / 1e-4) < 1e-8


def test_bad_closures():
    model, loss = small_problem()
    optimizer = AdaHessian(model)
    before = flat(model)

    def backwards():
        value = loss()
        value.backward()
        return value

    for closure, error, words in [
        (backwards, OptionError, "does not call backward"),
        (lambda: None, OptionError, "NoneType"),
        (lambda: 3.0, OptionError, "float"),
        (lambda: loss().detach(), UnsupportedLossError, "no graph"),
        (lambda: torch.stack([loss(), loss()]), OptionError, r"shape \[2\]"),
    ]:
        with pytest.raises(error, match=words):
            optimizer.step(closure)
    with pytest.raises(OptionError, match="function"):
        optimizer.step(3)
    loss().backward(create_graph=False)
    with pytest.raises(OptionError, match=r"optimizer\.backward\(loss\)"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(OptionError, match="No parameter has a gradient"):
        optimizer.step()
    assert torch.equal(flat(model), before) and optimizer.steps == 0 and not optimizer.state


def test_products_that_are_not_finite_name_the_layer():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.kink = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)

        def forward(self, x):
            w = self.kink.weight
            return self.fine(x).sum() + torch.where(w > 0, w, w.abs() ** 1.5).sum()

    model = seeded(Root)
    with torch.no_grad():
        model.kink.weight.zero_()
    optimizer = AdaHessian(model)
    before = flat(model)
    probes = optimizer.state_dict()["curvscope"]["generator"]
    with pytest.raises(NonFiniteError, match="'kink'"):
        optimizer.step(lambda: model(torch.ones(1, 2).double()))
    assert torch.equal(optimizer.state_dict()["curvscope"]["generator"], probes)
    assert torch.equal(flat(model), before) and optimizer.steps == 0 and not optimizer.state


def test_update_every():
    model, loss = small_problem()
    optimizer = AdaHessian(model, 0.05, update_every=3)
    for t in range(7):
        if t % 3:
            kept = optimizer.curvature().diagonal()
            optimizer.zero_grad()
            loss().backward()  # no product is needed
            optimizer.step()
            assert torch.equal(optimizer.curvature().diagonal(), kept)
        else:
            optimizer.step(loss)
        assert optimizer.diagnostics()[0]["age"] == t % 3
    assert optimizer.diagnostics()[0]["refreshes"] == 3


def test_v_is_corrected_by_the_number_of_its_updates():
    theta, m = torch.tensor([1.0]).double(), torch.zeros(1).double()
    adahessian_update(
        theta, torch.tensor([2.0]), m, torch.tensor([0.5]).double(), 1,
        lr=0.1, beta1=0.9, weight_decay=0.5,
    )  # fmt: skip
    assert float(theta) == pytest.approx(1 - 0.1 * (2.0 / 0.5 + 0.5 * 1.0), rel=1e-6)


def test_parameters_added_between_products_wait_for_theirs():
    model, loss = small_problem()
    model[2].requires_grad_(False)
    optimizer = AdaHessian(model, 0.05, update_every=5)
    optimizer.step(loss)
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.01})
    before = flat(model)
    optimizer.step(loss)  # takes products although it is not the fifth step
    assert bool((flat(model) != before).all())
    assert not optimizer.curvature().uncovered


# -- inspection -----------------------------------------------------------------------------------


def test_compare_with_the_hessian():
    model = seeded(lambda: mlp(6, 5, 3))
    x, y = data(0, 16, 6)
    for target in (model, model.named_parameters()):
        optimizer = AdaHessian(target, lr=0.0, n_probes=50)
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        problem = cs.Problem(model, nn.CrossEntropyLoss(), (x, y))
        comparison = cs.compare(
            cs.hessian(problem),
            {
                "AdaHessian": optimizer.curvature(damped=False),
                "I": cs.best_identity(cs.ggn(problem)),
            },
        )
        errors = {r.approximation: r.error for r in comparison.rows if r.block == "2"}
        assert errors["AdaHessian"] < errors["I"]


def test_before_the_first_step():
    model, _ = small_problem()
    optimizer = AdaHessian(model)
    assert optimizer.curvature().uncovered == ("0", "2")
    with pytest.raises(UncoveredError, match="no step has been taken"):
        optimizer.factors("0")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lr": float("inf")}, "lr"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"eps": 0.0}, "eps"),
        ({"hessian_power": -1.0}, "hessian_power"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"averaging": "signed"}, "averaging"),
        ({"n_probes": 0}, "n_probes"),
        ({"update_every": 1.5}, "update_every"),
        ({"params": []}, "empty"),
    ],
)
def test_invalid_settings(options, words):
    with pytest.raises(OptionError, match=words):
        AdaHessian(mlp(3, 2), **options)


def test_invalid_targets():
    parameters = list(mlp(3, 2).parameters())
    for target, words in [
        (3, "int"),
        ([], "empty"),
        (parameters[0], "Tensor|Parameter"),
        ([1.0], "float"),
        ([{"lr": 0.1}], "params"),
    ]:
        with pytest.raises(OptionError, match=words):
            AdaHessian(target)
    with pytest.raises(OptionError, match="pass the model"):
        AdaHessian(parameters, params=["0.weight"])
