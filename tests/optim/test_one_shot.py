"""The approximations of a Problem and the factors that the optimizers keep are the same ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs

from .kronecker_cases import labels, normal, relative, seeded

PROBES = 300


class Net(nn.Module):
    """A grouped convolution, a table of three axes that is no convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 4, 4))
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x * self.table)).flatten(1))


def case() -> tuple[nn.Module, cs.Problem, Tensor, Tensor]:
    model = seeded(Net)
    x, y = normal(6, 2, 4, 4), labels(6)
    return model, cs.Problem(model, nn.CrossEntropyLoss(), (x, y)), x, y


def test_spatial_averaging_concerns_convolutions_only() -> None:
    """AdaHessian's first estimate, from its own probes, averaged over the kernel as ours is."""
    model, problem, x, y = case()
    H = cs.hessian(problem).dense()
    exact = cs.hutchinson_diagonal(problem, probes=1, seed=3).diagonal()
    ours = cs.hutchinson_diagonal(problem, probes=1, seed=3, spatial=True).diagonal()
    optimizer = cs.optim.AdaHessian(model, n_probes=PROBES)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    theirs = torch.cat([optimizer.factors(b)["D"].reshape(-1) for b in optimizer.blocks])
    start = 0
    for spec in problem.layout:
        rows = slice(start, start + spec.numel)
        start += spec.numel
        if spec.name == "conv.weight":
            kernels = exact[rows].reshape(-1, 9).mean(1, keepdim=True).expand(-1, 9).reshape(-1)
            assert relative(ours[rows], kernels) < 1e-12
            assert theirs[rows].reshape(-1, 9).std(1).max() < 1e-12
        else:
            assert torch.equal(ours[rows], exact[rows]), spec.name
            truth = H.diagonal()[rows].abs()
            error = ((H.square().sum(1) - H.diagonal().square()) / PROBES).sqrt()[rows]
            assert float((((theirs[rows] - truth) / error).abs()).max()) < 5, spec.name


@pytest.mark.parametrize("block", ["conv", "head"])
def test_factors_are_the_same_and_min_max_runs_over_all_groups_together(block: str) -> None:
    model, problem, x, y = case()
    optimizer = cs.optim.AdaFisher(model, lr=1e-3, averaging="paper", update_every=1)
    F.cross_entropy(model(x), y).backward()
    state_before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer.step()
    model.load_state_dict(state_before)
    kept = optimizer.factors(block)
    op = cs.diagonal_kf(problem, scale="adafisher").blocks[block]
    for name, one_shot in (("H_D", op.factors["A"]), ("S_D", op.factors["G"])):
        assert relative(kept[name].reshape(-1), one_shot.reshape(-1)) < 1e-12
    normalised = cs.diagonal_kf(problem, scale="adafisher", normalise="minmax").blocks[block]
    for name, one_shot in normalised.factors.items():
        raw = op.factors[name]
        expected = (raw - raw.min()) / (raw.max() - raw.min() + 1e-6)
        assert relative(one_shot, expected) < 1e-12, name
        assert float(one_shot.min()) == 0
