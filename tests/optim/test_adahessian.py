"""AdaHessian: recorded trajectories, exact products, probes, kernels, closures, what it reports."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvscope.errors import (
    ShapeError,
)
from curvscope.optim import AdaHessian
from curvscope.optim.adahessian import diagonal_estimate
from curvscope.optim.double_backward import gradient_and_products, rademacher
from tests.optim.adaptive_cases import (
    conv_net,
    data,
    flat,
    given,
    golden,
    mlp,
    relative,
    seeded,
    small_problem,
)
from tests.truth import dense_hessian

RECORDED = [
    ("adahessian_cnn", conv_net, {"weight_decay": 5e-4 / 0.15}),
    (
        "adahessian_mlp_power",
        lambda: mlp(10, 16, 8, 4),
        {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-2, "hessian_power": 0.5},
    ),
]


@pytest.mark.parametrize("way", ["closure", "backward", "parameters"])
@pytest.mark.parametrize("name, net, options", RECORDED, ids=[r[0] for r in RECORDED])
def test_recorded_trajectory(name, net, options, way):
    d = golden(name)
    model = net().double()
    nn.utils.vector_to_parameters(d["p0"], model.parameters())
    target = model.parameters() if way == "parameters" else model
    options = {"averaging": "release", "probes": given(d["probes"]), **options}
    optimizer = AdaHessian(target, **options)
    for index, after in zip(d["batches"], d["params"]):

        def loss(index=index):
            return F.cross_entropy(model(d["X"][index]), d["T"][index])

        if way == "closure":
            optimizer.step(loss)
        else:
            optimizer.zero_grad()
            optimizer.backward(loss())
            optimizer.step()
        assert relative(flat(model), after) <= 1e-11


def test_gradient_and_products_are_exact():
    model, loss = small_problem()
    parameters = list(model.parameters())
    H = dense_hessian(loss(), parameters)
    generator = torch.Generator().manual_seed(0)
    probes = [rademacher(parameters, generator) for _ in range(3)]
    gradient, products = gradient_and_products(loss(), parameters, probes, "test")
    expected = torch.autograd.grad(loss(), parameters)
    for g, e in zip(gradient, expected):
        assert torch.equal(g, e)
    for z, hz in zip(probes, products):
        z, hz = (torch.cat([v.reshape(-1) for v in vs]) for vs in (z, hz))
        assert relative(hz, H @ z) < 1e-13


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0, 0.0])
@pytest.mark.parametrize("n_probes", [1, 3])
def test_paper_formulas_by_hand(power, n_probes):
    """Signed estimates from the dense Hessian, three steps, all numbers written out."""
    model, loss = small_problem()
    twin, twin_loss = small_problem()
    parameters = list(twin.parameters())
    size = sum(p.numel() for p in parameters)
    generator = torch.Generator().manual_seed(5)
    draws = torch.randint(0, 2, (3 * n_probes, size), generator=generator) * 2 - 1
    lr, betas, eps, decay = 0.3, (0.8, 0.95), 1e-3, 0.1
    optimizer = AdaHessian(
        model, lr, betas, eps, decay, power, probes=given(draws), n_probes=n_probes
    )
    m = v = 0
    for t in range(1, 4):
        optimizer.step(loss)
        H = dense_hessian(twin_loss(), parameters)
        g = torch.cat([x.reshape(-1) for x in torch.autograd.grad(twin_loss(), parameters)])
        z = draws[(t - 1) * n_probes : t * n_probes].double()
        D = (z * (z @ H)).mean(0)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * D**2
        theta = flat(twin)
        denominator = (v / (1 - betas[1] ** t)) ** (power / 2) + eps
        theta = theta - lr * (m / (1 - betas[0] ** t) / denominator + decay * theta)
        nn.utils.vector_to_parameters(theta, parameters)
        assert relative(flat(model), theta) < 1e-12
        assert relative(optimizer.curvature().diagonal(), denominator) < 1e-12
        assert relative(optimizer.curvature(damped=False).diagonal() + eps, denominator) < 1e-12
        assert relative(optimizer.preconditioner().diagonal(), 1 / denominator) < 1e-12
        D_rms = torch.cat([optimizer.factors(b)["D"] for b in optimizer.blocks])
        assert relative(D_rms, (v / (1 - betas[1] ** t)).sqrt()) < 1e-12


def test_the_step_is_the_preconditioned_average():
    model, loss = small_problem()
    optimizer = AdaHessian(model, 0.1, (0.7, 0.9))
    m = 0
    for t in range(1, 5):
        before = flat(model)
        optimizer.step(loss)
        m = 0.7 * m + 0.3 * torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        step = -0.1 * (optimizer.preconditioner() @ (m / (1 - 0.7**t)))
        assert relative(flat(model) - before, step) < 1e-12
        g = torch.randn(len(before)).double()
        assert relative(optimizer.curvature() @ (optimizer.preconditioner() @ g), g) < 1e-14


# -- probes ---------------------------------------------------------------------------------------


def test_probes_have_mean_zero_and_covariance_identity():
    """z-scores over 4,000 draws; a constant or a repeated vector fails both."""
    model = mlp(3, 2)
    optimizer = AdaHessian(model, seed=3)
    draws = torch.stack(
        [
            torch.cat([z.reshape(-1) for z in rademacher(list(model.parameters()), g)])
            for g in [optimizer._generator]
            for _ in range(4000)
        ]
    ).double()
    assert set(draws.unique().tolist()) == {-1.0, 1.0}
    n, size = draws.shape
    assert float((draws.mean(0) * math.sqrt(n)).abs().max()) < 4.5
    covariance = draws.mT @ draws / n
    off = (covariance - torch.eye(size).double())[~torch.eye(size, dtype=torch.bool)]
    assert float((off * math.sqrt(n)).abs().max()) < 4.5
    assert float((off * math.sqrt(n)).std()) == pytest.approx(1.0, abs=0.2)


def test_default_probes_are_drawn_anew_by_seed_and_estimate_the_diagonal():
    model, loss = small_problem()
    seen = []

    def spy(optimizer):
        draw = optimizer._draw

        def drawing(parameters):
            found = draw(parameters)
            seen.append(torch.cat([z.reshape(-1) for z in found[0]]))
            return found

        optimizer._draw = drawing
        return optimizer

    for seed in (0, 0, 1):
        twin = copy.deepcopy(model)
        optimizer = spy(AdaHessian(twin, lr=0.0, seed=seed))
        state = torch.get_rng_state()
        for _ in range(2):
            optimizer.step(lambda twin=twin: twin[0].weight.square().sum() + loss())
        assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    first, second, again, _, other, _ = seen
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(first, other)


def test_signed_mean_over_probes_converges_to_the_diagonal():
    model, loss = small_problem()
    parameters = list(model.parameters())
    H = dense_hessian(loss(), parameters)
    n = 600
    optimizer = AdaHessian(model, lr=0.0, betas=(0.9, 0.0), n_probes=n)
    optimizer.step(loss)
    D = optimizer.curvature(damped=False).diagonal()  # |mean of z * Hz|
    variance = (H.square().sum(1) - H.diagonal().square()) / n
    score = (D - H.diagonal().abs()) / variance.sqrt()
    assert float(score.abs().max()) < 4.5
    assert float(score.abs().mean()) > 0.2  # and it is an estimate, not the diagonal itself


def test_probes_that_do_not_fit():
    model, loss = small_problem()
    for probes in (lambda p: p[:1], lambda p: [torch.ones(1)] * len(p), lambda p: torch.ones(3)):
        with pytest.raises(ShapeError, match="one tensor per parameter"):
            AdaHessian(model, probes=probes).step(loss)


# -- spatial averaging ----------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_kernel_positions_are_averaged_in_any_dimension(dims):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    net = nn.Sequential(seeded(lambda: kind(2, 3, 3, padding=1)), nn.Tanh())
    x, _ = data(0, 4, 2, *[4] * dims)
    optimizer = AdaHessian(net, lr=0.0, betas=(0.9, 0.0))
    optimizer.step(lambda: net(x).square().mean())
    D = optimizer.factors("0")["D"][: net[0].weight.numel()].reshape(3, 2, -1)
    assert torch.equal(D, D[..., :1].expand_as(D))
    probe, product = torch.randn(3, 2, 3, 3), torch.randn(3, 2, 3, 3)
    paper = diagonal_estimate(probe, product, "paper", 2)
    release = diagonal_estimate(probe, product, "release", 2)
    assert torch.allclose(paper[..., 0, 0], (probe * product).mean((2, 3)))
    assert torch.allclose(release[..., 0, 0], product.abs().mean((2, 3)))
    plain = AdaHessian(net, lr=0.0, betas=(0.9, 0.0), averaging="none")
    plain.step(lambda: net(x).square().mean())
    own = plain.factors("0")["D"][: net[0].weight.numel()].reshape(3, 2, -1)
    assert bool((own.mean(-1) >= D[..., 0] - 1e-6).all())  # |mean| <= mean |.|
    assert not torch.equal(own, own[..., :1].expand_as(own))


def test_only_convolution_weights_are_averaged():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(1, 5, 4))
            self.conv = nn.Conv1d(4, 3, 2)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 3, 2))
            self.up = nn.ConvTranspose1d(3, 3, 2)

    model = Net()
    averaged = {r["parameter"] for r in AdaHessian(model).coverage() if "kernel" in r["reason"]}
    v = "normed.parametrizations.weight.original1"
    assert averaged - {v, v[:-1] + "0"} == {"conv.weight", "up.weight"} and v in averaged
    release = AdaHessian(model, averaging="release").coverage()
    assert not [r for r in release if "kernel" in r["reason"]]  # 4-d weights only
    none = AdaHessian(model, averaging="none").coverage()
    assert not [r for r in none if "kernel" in r["reason"]]
    bare = AdaHessian(list(model.named_parameters())).coverage()
    assert "position" in {r["parameter"] for r in bare if "kernel" in r["reason"]}
