"""Gradient noise against the gradients of single samples, and against resampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batches(sizes: tuple[int, ...] = (9, 6, 5)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 6, generator=generator, dtype=torch.float64),
            torch.randint(4, (n,), generator=generator),
        )
        for n in sizes
    ]


WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=WEIGHT),
    "smooth": nn.CrossEntropyLoss(label_smoothing=0.1),
}


def gradients(net: nn.Module, loss: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``[n, P]``: scaled so that their mean is the gradient of the objective."""
    total = nn.CrossEntropyLoss(
        weight=loss.weight, label_smoothing=loss.label_smoothing, reduction="sum"
    )
    rows = []
    for x, y in data:
        for k in range(len(x)):
            value = total(net(x[k : k + 1]), y[k : k + 1])
            parts = torch.autograd.grad(value, list(net.parameters()))
            rows.append(torch.cat([p.reshape(-1) for p in parts]))
    labels = torch.cat([y for _, y in data])
    terms = len(labels) if loss.weight is None else float(loss.weight[labels].sum())
    scale = 1.0 if loss.reduction == "sum" else 1 / terms
    return torch.stack(rows) * len(rows) * scale


@pytest.mark.parametrize("name", LOSSES)
def test_every_number_against_single_gradients(name: str) -> None:
    net, loss, data = model(), LOSSES[name], batches()
    G = gradients(net, loss, data)
    g, n = G.mean(0), len(G)
    square = float(g @ g)
    variance = float((G - g).square().sum() / (n - 1))
    inner = float((G @ g).var())
    across = float((G - torch.outer(G @ g / square, g)).square().sum() / (n - 1))
    found = cs.gradient_noise(cs.Problem(net, loss, data), theta=0.5, nu=2.0)
    assert found.samples == n
    for value, truth in (
        (found.gradient_norm, math.sqrt(square)),
        (found.variance, variance),
        (found.noise_scale, variance / square),
        (found.norm_test, variance / (0.25 * square)),
        (found.inner_product_test, inner / (0.25 * square**2)),
        (found.orthogonality_test, across / (4 * square)),
    ):
        assert value == pytest.approx(truth, rel=1e-10)
    assert math.isnan(found.curvature_noise_scale)


def test_norm_test_says_what_batches_of_that_size_do() -> None:
    """At the batch size of the norm test, the mean squared error is ``theta^2 ||g||^2``."""
    net, data = model(), batches((40,))
    G = gradients(net, LOSSES["mean"], data)
    g = G.mean(0)
    found = cs.gradient_noise(cs.Problem(net, LOSSES["mean"], data), theta=0.9)
    size = max(1, round(found.norm_test))
    generator = torch.Generator().manual_seed(2)
    draws = torch.randint(len(G), (4000, size), generator=generator)
    errors_ = (G[draws].mean(1) - g).square().sum(1)
    # drawn with replacement, the variance of a sample is that with n, not n - 1
    expected = found.variance * (len(G) - 1) / len(G) / size
    z = (float(errors_.mean()) - expected) / (float(errors_.std()) / math.sqrt(len(errors_)))
    assert abs(z) < 4


def test_noise_scale_with_curvature() -> None:
    net, loss, data = model(), LOSSES["weighted"], batches()
    problem = cs.Problem(net, loss, data)
    G = gradients(net, loss, data)
    g = G.mean(0)
    H = cs.hessian(problem).dense()
    cov = (G - g).mT @ (G - g) / (len(G) - 1)
    truth = float((H @ cov).trace() / (g @ H @ g))
    scores = []
    for seed in range(20):
        found = cs.gradient_noise(problem, probes=100, seed=seed)
        scores.append((found.curvature_noise_scale - truth) / found.curvature_noise_scale_stderr)
    mean = sum(scores) / len(scores)
    spread = math.sqrt(sum((z - mean) ** 2 for z in scores) / (len(scores) - 1))
    assert abs(mean) < 4 / math.sqrt(len(scores))
    assert 0.7 < spread < 1.4
    again = cs.gradient_noise(problem, probes=30, seed=3)
    other = cs.gradient_noise(problem, probes=30, seed=3)
    assert again.curvature_noise_scale == other.curvature_noise_scale


def test_identical_samples_have_no_noise() -> None:
    x, y = batches((1,))[0]
    data = [(x.repeat(5, 1), y.repeat(5))]
    found = cs.gradient_noise(cs.Problem(model(), LOSSES["mean"], data))
    assert found.variance < 1e-12 * found.gradient_norm**2
    assert "noise scale" in str(found)


def test_refusals() -> None:
    net = model()
    problem = cs.Problem(net, LOSSES["mean"], batches())
    with pytest.raises(errors.DataError, match="two samples"):
        cs.gradient_noise(cs.Problem(net, LOSSES["mean"], batches((1,))))
    with pytest.raises(errors.OptionError, match="theta"):
        cs.gradient_noise(problem, theta=0.0)
    with pytest.raises(errors.OptionError, match="probes"):
        cs.gradient_noise(problem, probes=-1)
    with pytest.raises(errors.OptionError, match="Problem"):
        cs.gradient_noise(net)
    norm = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
    coupled = cs.Problem(norm, LOSSES["mean"], batches(), batchnorm="batch")
    with pytest.raises(errors.BatchNormError, match="influence each other"):
        cs.gradient_noise(coupled)
