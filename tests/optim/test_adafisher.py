"""AdaFisher and AdaFisherW: recorded trajectories, the paper's formulas, what they report."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvscope as cs
from curvscope.errors import OptionError, UncoveredError, UnknownBlockError
from curvscope.optim import AdaFisher, AdaFisherW
from curvscope.optim.adafisher import adafisher_update, averaged_diagonal, fisher_diagonal
from curvscope.optim.factor_diagonals import min_max
from tests.optim.adaptive_cases import conv_net, data, flat, golden, mlp, relative, seeded

RECORDED = [
    ("adafisher_cnn", conv_net, AdaFisher, {"update_every": 5, "weight_decay": 5e-4}),
    (
        "adafisherw_mlp",
        lambda: mlp(10, 16, 8, 4),
        AdaFisherW,
        {"update_every": 1, "weight_decay": 1e-2},
    ),
]


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name, net, kind, options", RECORDED, ids=[r[0] for r in RECORDED])
def test_recorded_trajectory(name, net, kind, options, closure):
    d = golden(name)
    model = net().double()
    nn.utils.vector_to_parameters(d["p0"], model.parameters())
    optimizer = kind(model, 1e-3, 0.9, 1e-3, 0.8, averaging="release", **options)
    for index, after in zip(d["batches"], d["params"]):

        def evaluate(index=index):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(d["X"][index]), d["T"][index])
            loss.backward()
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        assert relative(flat(model), after) <= 1e-12
    for j, block in enumerate(optimizer.layers):
        factors = optimizer.factors(block)
        for key in ("H_D", "S_D"):
            torch.testing.assert_close(factors[key], d[f"{key}_{j}"], rtol=1e-11, atol=1e-15)


def one_step(optimizer, model, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def test_paper_formulas_by_hand():
    """Two layers, three steps, every operation of the docstring written out."""
    model = seeded(lambda: mlp(5, 4, 3))
    twin = copy.deepcopy(model)
    lr, beta, damping, decay = 0.02, 0.7, 0.05, 0.6
    optimizer = AdaFisher(model, lr, beta, damping, decay, update_every=2)
    H, S, H_used, S_used, m = {}, {}, {}, {}, {}
    for t in range(1, 6):
        x, y = data(t, 8, 5)
        one_step(optimizer, model, x, y)
        z1 = F.linear(x, twin[0].weight, twin[0].bias)
        a2 = z1.relu()
        z2 = F.linear(a2, twin[2].weight, twin[2].bias)
        found = torch.autograd.grad(F.cross_entropy(z2, y), [z1, z2, *twin.parameters()])
        for k, (a, s) in enumerate([(x, found[0]), (a2.detach(), found[1])]):
            if t % 2 == 1:
                ones = torch.ones(8, 1, dtype=a.dtype)
                h_new = torch.cat([a, ones], 1).square().mean(0)
                s_new = s.square().mean(0)
                H[k] = h_new if t == 1 else decay * H[k] + (1 - decay) * h_new
                S[k] = s_new if t == 1 else decay * S[k] + (1 - decay) * s_new
                H_used[k] = (H[k] - H[k].min()) / (H[k].max() - H[k].min() + 1e-6)
                S_used[k] = (S[k] - S[k].min()) / (S[k].max() - S[k].min() + 1e-6)
            denominator = torch.outer(S_used[k], H_used[k]) + damping
            W, b = twin[2 * k].weight, twin[2 * k].bias
            g = torch.cat([found[2 + 2 * k], found[3 + 2 * k].unsqueeze(1)], 1)
            m[k] = (1 - beta) * g if t == 1 else beta * m[k] + (1 - beta) * g
            step = lr * (m[k] / (1 - beta**t)) / denominator
            with torch.no_grad():
                W -= step[:, :-1]
                b -= step[:, -1]
        assert relative(flat(model), flat(twin)) < 1e-14
    assert torch.allclose(optimizer.factors("2")["H_D"], H[1], rtol=1e-12)
    assert torch.allclose(optimizer.factors("2")["S"], S_used[1], rtol=1e-12)


def test_factors_are_those_of_the_curvature_package():
    """On one batch the first statistics equal ``diagonal_kf`` on the AdaFisher scale."""
    model = seeded(conv_net)
    x, y = data(3, 12, 2, 8, 8, classes=5)
    model.eval()  # what a Problem evaluates
    problem = cs.Problem(model, nn.CrossEntropyLoss(), (x, y))
    expected = cs.diagonal_kf(problem, scale="adafisher")
    optimizer = AdaFisher(model)
    one_step(optimizer, model, x, y)
    for block in ("0", "1", "3", "6"):
        theirs = expected.blocks[block].factors
        ours = optimizer.factors(block)
        assert relative(ours["H_D"], theirs["A"]) < 1e-12
        assert relative(ours["S_D"], theirs["G"]) < 1e-12
        raw = optimizer.curvature(damped=False).blocks[block]
        assert relative(raw.diagonal(), expected.blocks[block].diagonal()) < 1e-12


@pytest.mark.parametrize("averaging", ["paper", "release"])
@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
def test_curvature_is_the_inverse_of_what_the_step_applies(kind, averaging):
    model = seeded(conv_net)
    optimizer = kind(model, 0.01, 0.8, update_every=2, averaging=averaging)
    m = 0
    for t in range(1, 5):
        x, y = data(t, 10, 2, 8, 8, classes=5)
        before = flat(model)
        one_step(optimizer, model, x, y)
        g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        m = 0.8 * m + 0.2 * g
        step = optimizer.preconditioner() @ (m / (1 - 0.8**t))
        assert relative(flat(model) - before, -0.01 * step) < 1e-11
        product = optimizer.curvature() @ (optimizer.preconditioner() @ g)
        assert relative(product, g) < 1e-14
        difference = optimizer.curvature().diagonal() - 1e-3
        assert float(difference.min()) >= -1e-15


def test_release_approaches_sgd():
    """The released averaging shrinks its factors until only the damping is left."""
    model = seeded(lambda: mlp(6, 5, 3))
    paper, release = (
        AdaFisher(model, averaging=averaging, update_every=1) for averaging in ("paper", "release")
    )
    for t in range(6):
        x, y = data(t, 8, 6)
        for optimizer in (paper, release):
            one_step(optimizer, model, x, y)
    for shrunk, kept in zip(release.diagnostics(), paper.diagnostics()):
        assert shrunk["condition"] < 1.2 and shrunk["damping_share"] > 0.9
        assert kept["condition"] > 100
        assert shrunk["angle"] < kept["angle"]


def test_averaging_formulas():
    old, new = torch.tensor([0.5, 1.0]), torch.tensor([3.0, 7.0])
    assert torch.equal(averaged_diagonal(None, new, 0.8, "paper"), new)
    assert torch.allclose(averaged_diagonal(old, new, 0.8, "paper"), 0.8 * old + 0.2 * new)
    normalised = (new / 4 - 0.75) / (1.0 + 1e-6)
    release = averaged_diagonal(None, new, 0.8, "release", divisor=4)
    assert torch.allclose(release, 0.08 * torch.ones(2) + 0.008 * normalised)
    assert torch.allclose(min_max(new), torch.tensor([0.0, 4 / (4 + 1e-6)]))
    F_ = fisher_diagonal(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0]]), 0.5)
    assert torch.equal(F_, torch.tensor([[[3.5, 4.5, 5.5], [6.5, 8.5, 10.5]]]))


def test_weight_decay_coupled_and_decoupled():
    theta = torch.tensor([2.0, -1.0], dtype=torch.float64)
    gradient, F_ = torch.tensor([0.5, 0.25]).double(), torch.tensor([0.1, 0.2]).double()
    options = {"lr": 0.01, "beta": 0.9, "weight_decay": 0.3}
    coupled, m = theta.clone(), torch.zeros(2).double()
    adafisher_update(coupled, gradient, m, F_, 1, **options)
    assert torch.allclose(coupled, theta - 0.01 * (gradient + 0.3 * theta) / F_, rtol=1e-14)
    decoupled, m = theta.clone(), torch.zeros(2).double()
    adafisher_update(decoupled, gradient, m, F_, 1, decoupled=True, **options)
    expected = theta - 0.01 * (gradient / F_ + 0.3 * theta)
    assert torch.allclose(decoupled, expected, rtol=1e-14)


def test_compare_with_the_hessian():
    model = seeded(lambda: mlp(6, 5, 3))
    x, y = data(0, 16, 6)
    optimizer = AdaFisher(model, update_every=1)
    one_step(optimizer, model, x, y)
    problem = cs.Problem(model, nn.CrossEntropyLoss(), (x, y))
    comparison = cs.compare(cs.hessian(problem), {"AdaFisher": optimizer.curvature()})
    assert {row.block for row in comparison.rows} >= {"0", "2"}
    assert all(row.error > 0 for row in comparison.rows)


def test_statistics_are_taken_only_when_due():
    model = seeded(lambda: mlp(6, 5, 3))
    optimizer = AdaFisher(model, update_every=4)
    refreshed = []
    for t in range(9):
        x, y = data(t, 8, 6)
        before = optimizer.factors("0")["H_D"] if t else None
        assert optimizer._tap.active is (t % 4 == 0)
        one_step(optimizer, model, x, y)
        if t:
            refreshed.append(not torch.equal(before, optimizer.factors("0")["H_D"]))
        assert optimizer.diagnostics()[0]["age"] == t % 4
    assert refreshed == [t % 4 == 0 for t in range(1, 9)]


def test_reports_before_the_first_step():
    model = seeded(lambda: mlp(6, 5, 3))
    optimizer = AdaFisher(model)
    assert optimizer.curvature().uncovered == ("0", "2")
    assert [row["rule"] for row in optimizer.coverage()] == ["AdaFisher"] * 4
    assert "expected" in optimizer.coverage()[0]["reason"]
    assert len(optimizer.diagnostics()) == 2
    with pytest.raises(UncoveredError, match="no step"):
        optimizer.factors("0")
    with pytest.raises(UnknownBlockError, match="Did you mean"):
        optimizer.factors("00")


def test_diagnostics_are_those_of_the_matrix():
    model = seeded(conv_net)
    optimizer = AdaFisher(model, update_every=1)
    x, y = data(0, 10, 2, 8, 8, classes=5)
    one_step(optimizer, model, x, y)
    for row in optimizer.diagnostics():
        diagonal = optimizer.curvature().blocks[row["block"]].diagonal()
        assert row["F_min"] == pytest.approx(float(diagonal.min()), rel=1e-12)
        assert row["F_max"] == pytest.approx(float(diagonal.max()), rel=1e-12)
        assert row["condition"] == pytest.approx(row["F_max"] / row["F_min"], rel=1e-12)
        g = torch.cat(
            [optimizer.params[n].grad.reshape(-1) for n in optimizer.blocks[row["block"]]]
        )
        step = g / diagonal
        cosine = float(step @ g / (step.norm() * g.norm()))
        assert torch.cos(torch.deg2rad(torch.tensor(row["angle"]))) == pytest.approx(
            cosine, abs=1e-6
        )
    assert "condition" in optimizer.diagnostics().to_frame().columns


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lr": -1.0}, "lr"),
        ({"beta": 1.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"damping": 0.0}, "damping"),
        ({"decay": 1.0}, "decay"),
        ({"update_every": 0}, "update_every"),
        ({"update_every": 2.5}, "update_every"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"averaging": "papers"}, "Did you mean 'paper'"),
        ({"fallback": "adm"}, "Did you mean 'adam'"),
    ],
)
def test_invalid_settings(options, words):
    with pytest.raises(OptionError, match=words):
        AdaFisher(mlp(3, 2), **options)
    if set(options) <= {"lr", "beta", "damping", "decay", "weight_decay"}:
        model = mlp(3, 2)
        with pytest.raises(OptionError, match=words):
            AdaFisher(model, params=[{"params": list(model.parameters()), **options}])
