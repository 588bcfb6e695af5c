"""Curvature of minibatches: measured values, the noise by hand, predictions on random matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors
from curvscope.analysis.batch_spectra import _predictions
from tests.truth import dense_hessian


def problem(reduction: str = "mean", samples: int = 24) -> cs.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = torch.randn(samples, 3, dtype=torch.float64), torch.randint(3, (samples,))
    return cs.Problem(model, nn.CrossEntropyLoss(reduction=reduction), data)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_all_samples_are_the_problem_itself(matrix: str) -> None:
    p = problem()
    found = cs.batch_spectra(p, [24], matrix=matrix, k=3, draws=2, tol=1e-10)
    op = getattr(cs, matrix)(p)
    truth = torch.linalg.eigvalsh(op.dense()).flip(0)[:3]
    assert torch.allclose(found.full, truth, rtol=1e-8)
    assert torch.allclose(found.values, truth.expand(1, 2, 3), rtol=1e-8)
    assert torch.allclose(found.predicted, truth.unsqueeze(0), rtol=1e-8)
    assert torch.allclose(found.predicted_along, truth.unsqueeze(0), rtol=1e-8)


@pytest.mark.parametrize("reduction, draws", [("mean", 50), ("sum", 15)])
def test_noise_is_the_variance_over_samples(reduction: str, draws: int) -> None:
    """Against the Hessians of single samples, by z-scores over batches."""
    p = problem(reduction)
    x, y = next(iter(p.batches()))
    size = 24 if reduction == "sum" else 1
    losses = [nn.functional.cross_entropy(p.model(x[i : i + 1]), y[i : i + 1]) for i in range(24)]
    one = [size * dense_hessian(loss, list(p.model.parameters())) for loss in losses]
    stack = torch.stack(one)
    spread = stack - stack.mean(0)
    exact = float(spread.square().sum() / 23 / spread.shape[1])
    found = cs.batch_spectra(p, [8], k=2, draws=draws, tol=1e-4)
    assert abs(found.noise - exact) < 4 * found.noise_stderr
    assert found.noise_stderr < 0.2 * exact * math.sqrt(60 / draws)
    vectors = cs.eigsh(cs.hessian(p), 2, which="LA", tol=1e-10).vectors
    along = (spread @ vectors).square().sum((0, 1)) / 23
    assert float(((found.noise_along - along) / along).abs().max()) < 0.5


def test_prediction_on_random_matrices() -> None:
    """Spikes plus a symmetric matrix of independent entries, as the theorem says."""
    size, n = 300, 10**9
    generator = torch.Generator().manual_seed(0)
    spikes = torch.tensor([9.0, 5.0, 0.1], dtype=torch.float64)
    base = torch.zeros(size, dtype=torch.float64)
    base[:3] = spikes
    noise = 4.0  # E ||E z||^2 of a "batch" of one
    for batch in (1, 2):
        tops = []
        for _ in range(12):
            G = torch.randn(size, size, generator=generator, dtype=torch.float64)
            E = (G + G.mT) * math.sqrt(noise / batch / size / 2)
            tops.append(torch.linalg.eigvalsh(torch.diag(base) + E).flip(0)[:3])
        spiked, _ = _predictions(spikes, [batch], n, noise, torch.zeros(3, 3), torch.zeros(3))
        mean = torch.stack(tops).mean(0)
        assert torch.allclose(spiked[0, :2], mean[:2], rtol=0.02)
        assert abs(float(spiked[0, 2]) - 2 * math.sqrt(noise / batch)) < 1e-8
        assert abs(float(mean[2] / spiked[0, 2]) - 1) < 0.06


def test_second_order_prediction() -> None:
    """For small noise of any kind the mean over draws is that of perturbation theory."""
    torch.manual_seed(1)
    values = torch.tensor([4.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    pattern = torch.rand(5, 5, dtype=torch.float64)
    pattern = pattern + pattern.mT
    shifts, mixing, beyond = [], torch.zeros(2, 2).double(), torch.zeros(2).double()
    for _ in range(4000):
        E = torch.randn(5, 5, dtype=torch.float64)
        E = 0.1 * (E + E.mT) * pattern
        shifts += [torch.linalg.eigvalsh(torch.diag(values) + s * E).flip(0)[:2] for s in (1, -1)]
        mixing += E[:2, :2].square() / 4000
        beyond += E[2:, :2].square().sum(0) / 4000
    _, along = _predictions(values[:2], [1], 10**9, 0.0, mixing, beyond)
    measured = torch.stack(shifts).mean(0)
    gain = (measured - values[:2]) / (along[0] - values[:2])
    assert float((gain - 1).abs().max()) < 0.15


def test_frame_learning_rates_and_densities() -> None:
    found = cs.batch_spectra(problem(), [4, 16], draws=2, densities=True)
    frame = found.to_frame()
    assert list(frame["batch_size"]) == [4, 16]
    assert torch.allclose(found.learning_rates, 2 / found.largest)
    assert frame["lr_linear_scaling"][1] == pytest.approx(4 * frame["lr_limit"][0])
    assert frame["lr_sqrt_scaling"][1] == pytest.approx(2 * frame["lr_limit"][0])
    assert len(found.densities) == 2 and found.values.shape == (2, 2, 3)
    again = cs.batch_spectra(problem(), [4, 16], draws=2)
    assert torch.equal(again.values, found.values) and again.noise == found.noise
    assert "learning rate" in str(found)


def test_bad_input() -> None:
    p = problem()
    for sizes in ([0], [25], [2.5], []):
        with pytest.raises(errors.OptionError, match="between 1 and the 24 samples"):
            cs.batch_spectra(p, sizes)
    with pytest.raises(errors.OptionError, match="draws"):
        cs.batch_spectra(p, draws=0)
    with pytest.raises(errors.OptionError, match="matrix"):
        cs.batch_spectra(p, matrix="fisher")
    with pytest.raises(errors.DataError, match="two samples"):
        cs.batch_spectra(p.subset(1))

    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x - x.mean(0))

    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,))
    with pytest.raises(errors.BatchNormError, match="influence each other"):
        cs.batch_spectra(cs.Problem(Coupled(), nn.CrossEntropyLoss(), (x, y)))
