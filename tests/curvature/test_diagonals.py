"""Diagonal approximations and KFRA against formulas written out for tiny nets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from tests.truth import flat_grad, relative

from . import factors as definition
from .cases import CASES, CE, MSE
from .draws import data, labels, real
from .nets import Apply, Residual, Reused, mlp, seeded, tokens_last
from .test_table import prepared, problem_of

S, T, R = nn.Sequential, nn.Tanh, nn.ReLU


def close(value: Tensor, truth: Tensor) -> None:
    assert value.shape == truth.shape
    assert relative(value, truth.detach()) < 1e-10


# -- exact diagonals ---------------------------------------------------------------------------

SOME = [
    i
    for i, c in enumerate(CASES)
    if c.name
    in {
        "relu-ce-uneven",
        "conv2d",
        "lstm",
        "tied-language",
        "weights",
        "quartic",
        "residual",
        "l1",
        "frozen",
    }
]


@pytest.mark.parametrize("index", SOME, ids=[CASES[i].name for i in SOME])
def test_exact_diagonals(index: int) -> None:
    problem, truth = prepared(index)
    matrices = {"hessian": truth.hessian, "ggn": truth.ggn}
    matrices["empirical_fisher"] = truth.empirical_fisher("sample")
    for name, matrix in matrices.items():
        op = cs.exact_diagonal(problem, name)
        assert torch.allclose(op.diagonal(), matrix.diagonal(), rtol=1e-10, atol=1e-12)
        assert torch.equal(op.dense(), torch.diag(op.diagonal()))
        assert not op.info.exact


# -- KFRA --------------------------------------------------------------------------------------


def test_kfra_of_a_multilayer_perceptron() -> None:
    """Botev et al. 2017, eq. 19: ``Q_l = E[(W^T Q W) * (f' f'^T)]``."""
    batches = data((3, 2), real(3), labels(3))()
    model = seeded(lambda: mlp(T, 3, 4, 3, 3))
    op = cs.kfra(cs.Problem(model, CE(), batches))
    x = torch.cat([b[0] for b in batches])
    z = model(x)
    p = z.softmax(1)
    Q = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    inputs = [x]
    for module in model[:-1]:
        inputs.append(module(inputs[-1]))
    for k in (4, 2, 0):
        a = torch.cat([inputs[k], torch.ones(5, 1, dtype=torch.float64)], 1)
        close(op.blocks[str(k)].factors["G"], Q)
        close(op.blocks[str(k)].factors["A"], a.T @ a / 5)
        if k:
            slope = 1 - inputs[k].square()
            middle = model[k].weight.T @ Q @ model[k].weight
            Q = middle * (slope.T @ slope / 5)


def test_kfra_of_convolutions() -> None:
    """``Q`` over all positions together, averaged over samples; ``G`` sums its diagonal blocks."""
    batches = data((2, 2), real(1, 3, 4), labels(3))()
    model = seeded(
        lambda: S(
            nn.Conv2d(1, 2, 2), T(), nn.Conv2d(2, 2, (1, 2)), R(), nn.Flatten(), nn.Linear(8, 3)
        )
    )
    op = cs.kfra(cs.Problem(model, CE(), batches))
    x = torch.cat([b[0] for b in batches])
    z, uses = definition.watch(model, x)
    p = z.softmax(1)
    Q = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    following = z
    for name in ("5", "2", "0"):
        out = uses[name].outputs[0]
        if name != "5":
            total = torch.zeros(out[0].numel(), out[0].numel(), dtype=torch.float64)
            for n in range(4):
                rows = [
                    torch.autograd.grad(v, out, retain_graph=True)[0][n].reshape(-1)
                    for v in following[n].reshape(-1)
                ]
                J = torch.stack(rows)
                total += J.T @ Q @ J / 4
            Q = total
        channels = out.shape[1]
        positions = out[0].numel() // channels
        Q4 = Q.reshape(channels, positions, channels, positions)
        close(op.blocks[name].factors["G"], torch.einsum("otpt->op", Q4))
        following = out


@pytest.mark.parametrize("model", [Residual, Reused])
def test_kfra_refuses_what_is_no_chain(model: type[nn.Module]) -> None:
    if model is Residual:
        net, batches = seeded(lambda: Residual(False)), data((2,), real(1, 3, 3), labels(3))()
    else:
        net, batches = seeded(Reused), data((2,), real(4), labels(3))()
    with pytest.raises(cs.errors.UnsupportedLayerError, match=r"cs\.kflr or cs\.kfac"):
        cs.kfra(cs.Problem(net, CE(), batches))


def test_kfra_refuses_lengths_that_differ() -> None:
    model = seeded(lambda: S(nn.Linear(2, 3), T(), nn.Linear(3, 3), Apply(tokens_last)))
    batches = [
        (torch.randn(2, t, 2, dtype=torch.float64), torch.zeros(2, t, dtype=torch.long))
        for t in (2, 3)
    ]
    with pytest.raises(cs.errors.UnsupportedLayerError, match="positions differs"):
        cs.kfra(cs.Problem(model, CE(), batches))


# -- AdaFisher ---------------------------------------------------------------------------------


class Net(nn.Module):
    """One of each layer that AdaFisher has a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.tokens = nn.Linear(2, 3)
        self.layer_norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x)))
        x = self.tokens(x.flatten(2).mT)
        return self.head(torch.relu(self.layer_norm(x)).mean(1))


def min_max(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min() + 1e-6)


@pytest.mark.parametrize("normalise", [None, "minmax"])
@pytest.mark.parametrize("sizes", [(5,), (2, 3)])
def test_adafisher_factors(sizes: tuple[int, ...], normalise: str | None) -> None:
    batches = data(sizes, real(1, 3, 3), labels(2))()
    model = seeded(Net)
    op = cs.diagonal_kf(cs.Problem(model, CE(), batches), scale="adafisher", normalise=normalise)
    assert op.uncovered == ()
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])

    captured: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in model.named_children():

        def hook(_m: nn.Module, inputs: tuple[Tensor], out: Tensor, name: str = name) -> None:
            captured[name] = (inputs[0].detach(), out)

        handles.append(module.register_forward_hook(hook))
    loss = nn.CrossEntropyLoss()(model(x), y)
    for handle in handles:
        handle.remove()
    samples = len(x)
    for name, module in model.named_children():
        h, z = captured[name]
        s = torch.autograd.grad(loss, z, retain_graph=True)[0]
        if isinstance(module, nn.Linear | nn.Conv2d):
            a = definition.with_one(module, definition.patches(module, h)).flatten(0, 2)
            g = definition.output_rows(module, s).flatten(0, 2)
            H, G = a.square().mean(0), g.square().mean(0)
        else:
            channel = 1 if isinstance(module, nn.BatchNorm2d) else 2
            others = [d for d in range(h.ndim) if d != channel]
            positions = h.numel() // (samples * h.shape[channel])
            q = h.sum(others) / positions**2
            H = torch.stack([q.square().sum(), torch.tensor(float(len(q)), dtype=q.dtype)])
            H = H / samples**2
            G = s.sum(others).square() / samples
        if normalise:
            H, G = min_max(H), min_max(G)
        matrix = torch.outer(G, H)
        wanted = torch.cat([matrix[:, :-1].reshape(-1), matrix[:, -1]])
        if module.bias is None:
            wanted = matrix.reshape(-1)
        close(op.blocks[name].diagonal(), wanted)


def test_adafisher_needs_the_observed_labels() -> None:
    problem = problem_of(CASES[0])
    with pytest.raises(cs.errors.OptionError, match="observed labels"):
        cs.diagonal_kf(problem, fisher="exact", scale="adafisher")


# -- Hutchinson --------------------------------------------------------------------------------


def test_hutchinson_is_exact_for_a_diagonal_hessian() -> None:
    """One probe is enough, whatever its signs."""

    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    x, y = data((4,), real(3), real(3))()[0]
    problem = cs.Problem(seeded(Separate), MSE(), (x, y))
    op = cs.hutchinson_diagonal(problem, probes=1)
    close(op.diagonal(), cs.hessian(problem).dense().diagonal())
    assert bool(op.stderr.isnan().all())
    many = cs.hutchinson_diagonal(problem, probes=3)
    assert float(many.stderr.max()) < 1e-12


def test_spatial_averaging() -> None:
    """The mean over the kernel positions of convolution weights, everything else untouched."""
    batches = data((3,), real(1, 4, 4), labels(2))()
    model = seeded(lambda: S(nn.Conv2d(1, 2, (2, 3)), T(), nn.Flatten(), nn.Linear(12, 2)))
    problem = cs.Problem(model, CE(), batches)
    plain = cs.hutchinson_diagonal(problem, probes=2, seed=4).diagonal()
    averaged = cs.hutchinson_diagonal(problem, probes=2, seed=4, spatial=True).diagonal()
    close(averaged[:12].reshape(2, 6), plain[:12].reshape(2, 6).mean(1, keepdim=True).expand(2, 6))
    assert torch.equal(averaged[12:], plain[12:])


def test_standard_errors_by_hand() -> None:
    """``mean z * Hz`` and its standard error over the very probes that the seed gives."""
    problem = cs.Problem(seeded(lambda: mlp(T, 2, 3, 2)), CE(), data((4,), real(2), labels(2))()[0])
    op = cs.hutchinson_diagonal(problem, probes=20, seed=3)
    H = cs.hessian(problem).dense()
    generator = torch.Generator().manual_seed(3)
    bits = [torch.randint(0, 2, (min(8, 20 - k), len(H)), generator=generator) for k in (0, 8, 16)]
    z = (2 * torch.cat(bits) - 1).double()
    values = z * (z @ H)
    close(op.diagonal(), values.mean(0))
    close(op.stderr, values.std(0) / math.sqrt(20))


def test_gradient_of_the_terms_of_a_sample() -> None:
    """The empirical Fisher's diagonal is the mean of squared per-sample gradients."""
    x, y = data((4,), real(3), labels(3))()[0]
    model = seeded(lambda: mlp(T, 3, 4, 3))
    rows = [
        flat_grad(CE()(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters()))
        for n in range(4)
    ]
    problem = cs.Problem(model, CE(), (x, y))
    close(
        cs.exact_diagonal(problem, "empirical_fisher").diagonal(),
        torch.stack(rows).square().mean(0),
    )
