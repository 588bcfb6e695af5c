"""Sampled quantities by z-scores over seeds, and the draws themselves.

A tolerance would hide a wrong formula behind the noise; a z-score does not. Seeds are fixed, so the
tests give the same numbers every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import curvscope as cs
from curvscope.curvature.diagonal import rademacher
from curvscope.problem.recognise import recognise

from .cases import BCE, CE, MSE
from .draws import POS, W3, bits, data, labels, real, some_ignored
from .nets import Apply, mlp, seeded, tokens_last

S, T = nn.Sequential, nn.Tanh

SETTINGS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "softmax": (lambda: mlp(T, 2, 3, 3), CE(), data((3, 2), real(2), labels(3))),
    "softmax-weights": (
        lambda: mlp(T, 2, 2, 3),
        CE(weight=W3, label_smoothing=0.2),
        data((4,), real(2), labels(3)),
    ),
    "log-softmax": (
        lambda: S(nn.Linear(2, 3), nn.LogSoftmax(1)),
        nn.NLLLoss(),
        data((4,), real(2), labels(3)),
    ),
    "bernoulli": (lambda: mlp(T, 2, 2, 3), BCE(pos_weight=POS), data((4,), real(2), bits(3))),
    "normal": (lambda: mlp(T, 2, 3, 2), MSE(), data((4,), real(2), real(2))),
    "tokens": (
        lambda: S(nn.Linear(2, 3), T(), nn.Linear(3, 3), Apply(tokens_last)),
        CE(reduction="sum"),
        data((2, 1), real(3, 2), some_ignored(3, 3)),
    ),
}


def problem_of(name: str) -> cs.Problem:
    model, loss, batches = SETTINGS[name]
    return cs.Problem(seeded(model), loss, batches())


def z_scores(draws: Tensor, truth: Tensor) -> Tensor:
    """``[seeds, k]`` draws against ``[k]``: the deviation of their mean in standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    return (draws.mean(0) - truth) / error


def honest(draws: Tensor, truth: Tensor) -> None:
    """The mean is right within its error, and the error is not so large that anything would be."""
    assert float(z_scores(draws, truth).abs().max()) < 4.0
    spread = draws.std(0) / math.sqrt(len(draws))
    assert float((spread / truth.abs()).min()) < 0.2


@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_fisher(name: str) -> None:
    problem = problem_of(name)
    exact = cs.fisher(problem).dense()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(exact), 4, generator=generator, dtype=torch.float64)

    def draw(samples: int, seeds: int) -> Tensor:
        ops = [cs.fisher(problem, samples=samples, seed=s) for s in range(seeds)]
        return torch.stack([(directions * (op @ directions)).sum(0) for op in ops])

    truth = (directions * (exact @ directions)).sum(0)
    many = draw(8, 60)
    honest(many, truth)
    if name in ("softmax", "normal"):
        # eight labels per term: an eighth of the variance, within what 60 and 120 draws can tell
        ratio = many.var(0) / draw(1, 120).var(0)
        low, high = stats.f.ppf([1e-4, 1 - 1e-4], 59, 119)
        # quadratic forms of one label are skewed, so the F quantiles are widened
        assert float(ratio.min()) > low / 8 * 0.7
        assert float(ratio.max()) < high / 8 / 0.7


@pytest.mark.parametrize("name", SETTINGS)
def test_routes_draw_the_same_labels(name: str) -> None:
    problem = problem_of(name)
    for samples in (1, 3):
        op = cs.fisher(problem, samples=samples, seed=7)
        forced = cs.fisher(problem, samples=samples, seed=7, route="autograd")
        dense = op.dense()
        assert torch.allclose(forced.dense(), dense, rtol=1e-10, atol=1e-13)
        assert torch.allclose(op @ torch.eye(len(dense), dtype=dense.dtype), dense, atol=1e-13)
        for block, members in op.members.items():
            index = op.layout.index(members)
            assert torch.allclose(op.blocks[block].dense(), dense[index][:, index], atol=1e-13)
    assert not torch.allclose(cs.fisher(problem, samples=1, seed=8).dense(), dense)
    assert not op.info.exact
    assert op.info.settings["sampled_labels"] == 3


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_kfac(name: str, sharing: str) -> None:
    problem = problem_of(name)
    exact = cs.kfac(problem, sharing=sharing)
    # many labels in each, as the label that a token hardly ever has makes a skewed distribution
    drawn = [cs.kfac(problem, fisher="mc", sharing=sharing, samples=12, seed=s) for s in range(50)]
    for block in exact.blocks:
        G = exact.blocks[block].factors["G"]
        keep = G.abs() > 1e-3 * G.abs().max()
        draws = torch.stack([op.blocks[block].factors["G"][keep] for op in drawn])
        assert float(z_scores(draws, G[keep]).abs().max()) < 4.5
        A = exact.blocks[block].factors["A"]
        assert all(torch.equal(op.blocks[block].factors["A"], A) for op in drawn[:3])


def test_sampled_labels_follow_the_model() -> None:
    """Frequencies of classes, of ones, and the moments of the normal noise."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.5, -1.0, 1.5], [0.0, 2.0, -0.3]], dtype=torch.float64)
    loss = recognise(CE())
    rows = logits.repeat_interleave(4000, 0).unsqueeze(1)
    p = rows.softmax(-1)
    drawn = (p - loss.term_scores(rows, generator)).squeeze(1).reshape(2, 4000, 3)
    assert torch.equal(drawn.sum(-1).round(), torch.ones(2, 4000, dtype=torch.float64))
    for counts, expected in zip(drawn.sum(1), logits.softmax(1), strict=True):
        assert stats.chisquare(counts.numpy(), 4000 * expected.numpy()).pvalue > 1e-3
    loss = recognise(BCE())
    terms = torch.tensor([0.7, -1.2], dtype=torch.float64).repeat(5000).reshape(1, -1, 1)
    ones = (terms.sigmoid() - loss.term_scores(terms, generator)).reshape(5000, 2)
    assert float(z_scores(ones, terms.sigmoid().reshape(5000, 2)[0]).abs().max()) < 3.5
    loss = recognise(MSE())
    scores = loss.term_scores(torch.zeros(1, 10000, 1, dtype=torch.float64), generator).reshape(-1)
    # the Fisher of N(z, 1/2) is 2
    assert float(z_scores(scores.unsqueeze(1), torch.zeros(1)).abs()) < 3.5
    assert float(z_scores(scores.square().unsqueeze(1), torch.tensor([2.0])).abs()) < 3.5
    assert stats.kstest(scores.numpy(), "norm", args=(0, 2**0.5)).pvalue > 1e-3


# -- probes ------------------------------------------------------------------------------------


def test_probes_have_mean_zero_and_unit_covariance() -> None:
    generator = torch.Generator().manual_seed(1)
    like = torch.empty(0, dtype=torch.float64)
    z = torch.cat([rademacher(7, 8, generator, like) for _ in range(2500)], 1)
    assert torch.equal(z.abs(), torch.ones_like(z))
    assert float(z_scores(z.T, torch.zeros(7)).abs().max()) < 4
    products = (z.unsqueeze(0) * z.unsqueeze(1)).reshape(49, -1)
    off = ~torch.eye(7, dtype=torch.bool).reshape(-1)
    assert float(z_scores(products[off].T, torch.zeros(int(off.sum()))).abs().max()) < 4.5
    # consecutive probes are independent of each other as well, also across chunks
    lagged = (z[:, 1:] * z[:, :-1]).T
    assert float(z_scores(lagged, torch.zeros(7)).abs().max()) < 4


def hutchinson_problem() -> cs.Problem:
    model = seeded(lambda: S(nn.Conv2d(1, 2, (1, 2)), T(), nn.Flatten(), nn.Linear(8, 2)))
    return cs.Problem(model, CE(), data((4,), real(1, 2, 3), labels(2))()[0])


def test_hutchinson_standard_errors_are_honest() -> None:
    """``(estimate - truth) / stderr`` over seeds is distributed as a t statistic."""
    problem = hutchinson_problem()
    H = cs.hessian(problem).dense()
    truth = H.diagonal()
    variance = H.square().sum(1) - truth.square()
    ops = [cs.hutchinson_diagonal(problem, probes=16, seed=s) for s in range(100)]
    estimates = torch.stack([op.diagonal() for op in ops])
    errors = torch.stack([op.stderr for op in ops])
    assert float(z_scores(estimates, truth).abs().max()) < 4
    # the errors estimate the known variance of the mean of 16 probes
    ratio = errors.square().mean(0) / (variance / 16)
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=0.15)
    z = (estimates - truth) / errors
    for entry in range(0, len(truth), 3):
        assert stats.kstest(z[:, entry].numpy(), "t", args=(15,)).pvalue > 1e-3


def test_hutchinson_of_the_ggn_and_with_spatial_averaging() -> None:
    problem = hutchinson_problem()
    exact = cs.ggn(problem).dense().diagonal()
    draws = torch.stack(
        [
            cs.hutchinson_diagonal(problem, probes=4, seed=s, matrix="ggn").diagonal()
            for s in range(50)
        ]
    )
    assert float(z_scores(draws, exact).abs().max()) < 4
    truth = cs.hessian(problem).dense().diagonal().clone()
    kernel = truth[:4].reshape(2, 2).mean(1, keepdim=True).expand(2, 2).reshape(-1)
    draws = torch.stack(
        [
            cs.hutchinson_diagonal(problem, probes=4, seed=s, spatial=True).diagonal()
            for s in range(50)
        ]
    )
    expected = torch.cat([kernel, truth[4:]])
    assert float(z_scores(draws, expected).abs().max()) < 4
    op = cs.hutchinson_diagonal(problem, probes=4, spatial=True)
    assert op.stderr.shape == truth.shape


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["softmax", "normal"])
def test_the_labels_of_a_sampled_fisher_do_not_depend_on_the_memory(loss):
    """Products of batches that were cut drew other labels than blocks and the dense matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = torch.randn(40, 4, dtype=torch.float64)
    y = torch.arange(40) % 3
    if isinstance(loss, nn.MSELoss):
        y = torch.randn(40, 3, dtype=torch.float64)
    problem = cs.Problem(model, loss, [(x[:27], y[:27]), (x[27:], y[27:])])
    whole = cs.fisher(problem, samples=2, seed=1)
    cut = cs.fisher(problem, samples=2, seed=1, memory=12_000)
    v = torch.randn(whole.shape[0], 2, dtype=torch.float64)
    true = whole.dense() @ v
    for _ in range(2):
        torch.testing.assert_close(cut @ v, true)
        assert "parts" in cut.info.settings["engine"]
    torch.testing.assert_close(whole @ v, true)
