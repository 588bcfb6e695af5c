"""Sampled extensions: means by z-scores over seeds, spread, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from tests.curvature.backpack_models import (
    N,
    Residual,
    Setting,
    classify,
    cross_entropy,
    randn,
    regress,
)
from tests.curvature.backpack_truth import dense_ggn

B = cs.backpack
SEEDS = 30


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3))


def binary() -> Setting:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    y = torch.randint(2, (N, 1)).double()
    return Setting(model, nn.BCEWithLogitsLoss(), cross_entropy, randn(N, 2), y)


LOSSES = {
    "cross-entropy": lambda: classify(small(), randn(N, 2)),
    "squared error": lambda: regress(small(), randn(N, 2)),
    "Bernoulli": binary,
}


@dataclass(frozen=True)
class Sampled:
    name: str
    draw: Callable[[cs.Problem, int, int], Tensor]  # problem, labels per term, seed
    exact: Callable[[cs.Problem], Tensor]


SAMPLED = (
    Sampled(
        "DiagGGNMC",
        lambda p, n, s: B.diag_ggn(p, mc=n, seed=s).diagonal(),
        lambda p: B.diag_ggn(p).diagonal(),
    ),
    Sampled(
        "SqrtGGNMC",
        lambda p, n, s: B.sqrt_ggn(p, mc=n, seed=s).dense().flatten(),
        lambda p: B.sqrt_ggn(p).dense().flatten(),
    ),
    Sampled(
        "BatchDiagGGNMC",
        lambda p, n, s: B.batch_diag_ggn(p, mc=n, seed=s).values.flatten(),
        lambda p: B.batch_diag_ggn(p).values.flatten(),
    ),
    Sampled(
        "KFAC",
        lambda p, n, s: B.kfac(p, samples=n, seed=s).dense().flatten(),
        lambda p: B.kflr(p).dense().flatten(),
    ),
)


def problem_of(loss: str) -> cs.Problem:
    torch.manual_seed(1)
    setting = LOSSES[loss]()
    data = [(setting.x[:1], setting.y[:1]), (setting.x[1:], setting.y[1:])]
    return cs.Problem(setting.model, setting.loss, data)


def z_scores(draws: Tensor, truth: Tensor) -> Tensor:
    """Of entries that vary; those that do not must be right."""
    spread = draws.std(0)
    varies = spread > 1e-9 * truth.abs().max()
    assert torch.allclose(draws.mean(0)[~varies], truth[~varies], atol=1e-10)
    return ((draws.mean(0) - truth) / (spread / len(draws) ** 0.5))[varies]


MEANS = [(case, "cross-entropy") for case in SAMPLED] + [
    (SAMPLED[k], loss) for k, loss in ((1, "squared error"), (3, "squared error"), (3, "Bernoulli"))
]


@pytest.mark.parametrize(("case", "loss"), MEANS, ids=lambda value: getattr(value, "name", value))
def test_mean_is_the_exact_quantity(case: Sampled, loss: str) -> None:
    problem = problem_of(loss)
    draws = torch.stack([case.draw(problem, 2, seed) for seed in range(SEEDS)])
    z = z_scores(draws, case.exact(problem))
    assert len(z) >= 6
    assert float(z.abs().max()) < 5.0
    # the mean is known well enough for a wrong factor of 1.3 to show
    norm = float(draws.mean(0).norm() / case.exact(problem).norm())
    assert 0.77 < norm < 1.3


@pytest.mark.parametrize("case", SAMPLED[1::2], ids=lambda case: case.name)
def test_more_labels_spread_less(case: Sampled) -> None:
    problem = problem_of("cross-entropy")
    spread = [
        torch.stack([case.draw(problem, n, seed) for seed in range(20)]).var(0).sum()
        for n in (1, 16)
    ]
    assert 8.0 < float(spread[0] / spread[1]) < 32.0  # 16 in expectation


def test_kfac_with_a_residual_connection() -> None:
    """BackPACK accumulates over branches here; the bias factor estimates the bias's GGN block."""
    torch.manual_seed(0)
    setting = classify(Residual(), randn(N, 3))
    problem = cs.Problem(setting.model, setting.loss, (setting.x, setting.y), blocks="parameter")
    pieces = (setting.model, setting.total, setting.x, setting.y)
    truth = dense_ggn(*pieces, [setting.model.fc1.bias]).flatten() / N
    draws = torch.stack(
        [
            B.kfac(problem, samples=8, seed=seed).blocks["fc1.bias"].dense().flatten()
            for seed in range(16)
        ]
    )
    z = z_scores(draws, truth)
    assert len(z) == 16 and float(z.abs().max()) < 5.0


@pytest.mark.parametrize("case", SAMPLED, ids=lambda case: case.name)
def test_seeds(case: Sampled) -> None:
    problem = problem_of("cross-entropy")
    first = case.draw(problem, 3, 7)
    torch.manual_seed(123)  # the global generator has no say
    assert torch.equal(case.draw(problem, 3, 7), first)
    assert not torch.equal(case.draw(problem, 3, 8), first)


def test_provenance_says_how_to_get_it_again() -> None:
    problem = problem_of("cross-entropy")
    info = B.sqrt_ggn(problem, mc=3, seed=5).info
    assert not info.exact and info.what == "GGN (sampled, 3 per term)"
    assert info.route == "BackPACK SqrtGGNMC"
    assert (info.settings["mc_samples"], info.settings["seed"]) == (3, 5)
    exact = B.sqrt_ggn(problem).info
    assert exact.exact and "seed" not in exact.settings and exact.seconds > 0


def test_batches_draw_independently() -> None:
    """Two copies of a batch get different labels, also with a loader that shuffles."""
    torch.manual_seed(1)
    setting = classify(small(), randn(N, 2))
    pair = (setting.x, setting.y)
    rows = B.batch_diag_ggn(cs.Problem(setting.model, setting.loss, [pair, pair]), mc=1).values
    assert not torch.equal(rows[:N], rows[N:])
    dataset = torch.utils.data.TensorDataset(*pair)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True)
    problem = cs.Problem(setting.model, setting.loss, loader)
    exact = B.batch_diag_ggn(problem).values
    again = B.batch_grad(problem).values
    assert torch.equal(B.batch_diag_ggn(problem).values, exact)  # the same order every time
    order = [int((setting.x == x).all(1).nonzero()) for x in ordered_inputs(problem)]
    assert sorted(order) == list(range(N))
    plain = B.batch_grad(cs.Problem(setting.model, setting.loss, pair)).values
    assert torch.allclose(again, plain[order], atol=1e-12)


def ordered_inputs(problem: cs.Problem) -> Tensor:
    with problem.session():
        return torch.cat([inputs for inputs, _ in problem.batches()])


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    torch.manual_seed(1)
    setting = classify(small(), randn(N, 2))
    here = cs.Problem(setting.model, setting.loss, (setting.x, setting.y))
    there = cs.Problem(setting.model, setting.loss, (setting.x, setting.y), device="cuda")
    before = torch.cuda.get_rng_state()
    for case in SAMPLED:
        exact = case.exact(there)
        assert exact.is_cuda and torch.allclose(exact.cpu(), case.exact(here), atol=1e-10)
        assert torch.equal(case.draw(there, 3, 7), case.draw(there, 3, 7))
        assert not torch.equal(case.draw(there, 3, 7), case.draw(there, 3, 8))
    assert torch.equal(torch.cuda.get_rng_state(), before)
