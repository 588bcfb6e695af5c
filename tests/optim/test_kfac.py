"""K-FAC as an optimizer: factors, damping, schedule, step, warm start, inspection."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors
from curvscope.operators import KroneckerOperator
from curvscope.optim import KFAC

from .kronecker_cases import closure_of, flat, labels, normal, relative, run, seeded, small

NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (7, 4)),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)),
        (6, 4),
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 2, dilation=2, groups=2, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (6, 2, 8, 8),
    ),
    "conv 1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(12, 3)),
        (5, 2, 6),
    ),
    "conv 3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 3)),
        (5, 1, 3, 3, 3),
    ),
}


class Tokens(nn.Module):
    """A Linear layer on three axes; ``[N, C, T]`` for the cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x))).mT


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    if name == "tokens":
        x = normal(5, 7, 4)
        return seeded(Tokens), x, labels(35).reshape(5, 7)
    make, shape = NETS[name]
    return seeded(make), normal(*shape), labels(shape[0])


@pytest.mark.parametrize("name", [*NETS, "tokens"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_factors_of_the_first_step_are_those_of_cs_kfac(name: str, fisher: str) -> None:
    model, x, y = case(name)
    problem = cs.Problem(model, nn.CrossEntropyLoss(), (x, y))
    # for several terms per sample, observed labels need the loss to be named
    loss = nn.CrossEntropyLoss() if name == "tokens" and fisher == "empirical" else None
    if name == "tokens" and fisher == "empirical":
        problem = cs.Problem(model, nn.CrossEntropyLoss(), (x, y))
    expected = cs.kfac(problem, fisher=fisher)
    optimizer = KFAC(model, 0.1, 0.01, fisher=fisher, loss=loss)
    optimizer.step(closure_of(optimizer, model, x, y))
    raw = optimizer.curvature(damped=False)
    for block, truth in expected.blocks.items():
        found = raw.blocks[block]
        assert isinstance(truth, KroneckerOperator) and isinstance(found, KroneckerOperator)
        assert relative(found.A, truth.A) < 1e-12
        assert relative(found.G, truth.G) < 1e-12


def test_sampled_factors_are_right_on_average() -> None:
    model, x, y = case("conv")
    problem = cs.Problem(model, nn.CrossEntropyLoss(), (x, y))
    truth = cs.kfac(problem, fisher="exact").blocks["5"]
    assert isinstance(truth, KroneckerOperator)
    draws = []
    for seed in range(400):
        optimizer = KFAC(model, 0.0, 0.1, fisher="mc", seed=seed)
        optimizer.step(closure_of(optimizer, model, x, y))
        draws.append(optimizer.factors("5")["G"])
    found = torch.stack(draws)
    z = (found.mean(0) - truth.G) / (found.std(0) / math.sqrt(len(found)))
    assert float(z.abs().max()) < 4
    assert float(z.square().mean()) < 3
    same = KFAC(model, 0.0, 0.1, fisher="mc", seed=7)
    same.step(closure_of(same, model, x, y))
    assert torch.equal(same.factors("5")["G"], draws[7])


@pytest.mark.parametrize("split", ["plain", "trace"])
def test_a_step_written_down_again(split: str) -> None:
    """Damping, momentum, weight decay and running averages with dense inverses."""
    model, x, y = case("linear")
    lr, damping, tau = 0.3, 0.05, 0.01
    optimizer = KFAC(model, lr, damping, fisher="exact", weight_decay=tau, split=split, decay=0.8)
    W = {b: optimizer.layers[b].matrix(*parts(model, b))[0].clone() for b in ("0", "2")}
    A: dict[str, Tensor] = {}
    G: dict[str, Tensor] = {}
    M = {b: torch.zeros_like(w) for b, w in W.items()}
    for step in range(4):
        x, y = normal(7, 4, seed=step), labels(7, seed=step)
        own = cs.kfac(cs.Problem(model, nn.CrossEntropyLoss(), (x, y)), fisher="exact").blocks
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        grads = dict(zip(dict(model.named_parameters()), gradient, strict=True))
        for b in W:
            block = own[b]
            assert isinstance(block, KroneckerOperator)
            A[b] = block.A if step == 0 else 0.8 * A[b] + 0.2 * block.A
            G[b] = block.G if step == 0 else 0.8 * G[b] + 0.2 * block.G
            g = torch.cat([grads[f"{b}.weight"], grads[f"{b}.bias"].unsqueeze(1)], 1)
            M[b] = 0.9 * M[b] + 0.1 * (g + tau * W[b])
            pi = 1.0
            if split == "trace":
                pi = math.sqrt(float((A[b].trace() / len(A[b])) / (G[b].trace() / len(G[b]))))
            eps = math.sqrt(damping)
            left = torch.linalg.inv(G[b] + eps / pi * torch.eye(len(G[b]), dtype=x.dtype))
            right = torch.linalg.inv(A[b] + pi * eps * torch.eye(len(A[b]), dtype=x.dtype))
            W[b] = W[b] - lr * left @ M[b] @ right
        optimizer.step(closure_of(optimizer, model, x, y))
        for b in W:
            assert relative(optimizer.layers[b].matrix(*parts(model, b))[0], W[b]) < 1e-12


def parts(model: nn.Module, block: str) -> tuple[Tensor, Tensor]:
    layer: Any = dict(model.named_modules())[block]
    return layer.weight.detach(), layer.bias.detach()


def test_inverses_are_made_in_the_first_steps_and_then_now_and_then() -> None:
    model = small()
    optimizer = KFAC(model, 0.01, 0.1, fisher="empirical", inverse_every=5)
    ages = []
    for step in range(32):
        before = optimizer.state[model[0].weight].get("H_a")
        x, y = normal(7, 5, seed=step), labels(7, seed=step)
        optimizer.step(closure_of(optimizer, model, x, y))
        after = optimizer.block_state("0")["H_a"]
        ages.append(optimizer.diagnostics()[0]["age"])
        renewed = step < 20 or step % 5 == 0
        assert (before is None or not torch.equal(before, after)) is renewed
    assert ages == [0] * 20 + [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("named", [False, True])
def test_warm_start_is_the_mean_over_minibatches(fisher: str, named: bool) -> None:
    model = small()
    batches = [(normal(n, 5, seed=n), labels(n, seed=n)) for n in (6, 4, 3)]
    loss = nn.CrossEntropyLoss() if named else None
    optimizer = KFAC(model, 0.1, 0.1, fisher=fisher, loss=loss)
    values = flat(model).clone()
    optimizer.warm_start(batches, loss=None if named and fisher == "exact" else F.cross_entropy)
    assert torch.equal(flat(model), values)
    assert all(p.grad is None for p in model.parameters())
    each = [
        cs.kfac(cs.Problem(model, nn.CrossEntropyLoss(), batch), fisher=fisher).blocks
        for batch in batches
    ]
    for block in optimizer.layers:
        found = optimizer.factors(block)
        for name in ("A", "G"):
            mean = torch.stack([getattr(blocks[block], name) for blocks in each]).mean(0)
            assert relative(found[name], mean) < 1e-12
    run(optimizer, model, 1)
    with pytest.raises(errors.OptionError, match="no warm start after"):
        optimizer.warm_start(batches, loss=F.cross_entropy)


def test_warm_start_needs_data_and_the_loss() -> None:
    optimizer = KFAC(small(), 0.1, 0.1)
    with pytest.raises(errors.OptionError, match="needs the loss"):
        optimizer.warm_start([(normal(3, 5), labels(3))])
    with pytest.raises(errors.DataError, match="no batch"):
        optimizer.warm_start([], loss=F.cross_entropy)


@pytest.mark.parametrize("name", [*NETS, "tokens"])
def test_curvature_is_the_inverse_of_the_preconditioner(name: str) -> None:
    model, x, y = case(name)
    optimizer = KFAC(model, 0.05, 0.3, split="trace")
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, x, y))
    inverse, damped = optimizer.preconditioner(), optimizer.curvature()
    assert list(damped.blocks) == list(cs.Problem(model, nn.CrossEntropyLoss(), (x, y)).blocks)
    for block in damped.blocks:
        product = inverse.blocks[block].dense() @ damped.blocks[block].dense()
        one = torch.eye(len(product), dtype=product.dtype)
        assert float((product - one).abs().max()) < 1e-8
        factors = optimizer.factors(block)
        assert set(factors) == {"A", "G", "H_a", "H_g"}
        A, G = factors["A"], factors["G"]
        if A.ndim == 2:
            pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
            shifted = A + pi * math.sqrt(0.3) * torch.eye(len(A), dtype=A.dtype)
            assert relative(torch.linalg.inv(shifted), factors["H_a"]) < 1e-9


def test_diagnostics_of_the_last_step() -> None:
    model = small()
    optimizer = KFAC(model, 0.1, 0.2)
    assert all("age" not in row for row in optimizer.diagnostics())
    run(optimizer, model, 3)
    before = flat(model).clone()
    run(optimizer, model, 1)
    rows = optimizer.diagnostics()
    moved = math.sqrt(sum(row["update_norm"] ** 2 for row in rows)) * 0.1
    assert moved == pytest.approx(float((flat(model) - before).norm()), rel=1e-10)
    for row in rows:
        inverse = optimizer.preconditioner().blocks[row["block"]]
        values = inverse.eigenvalues()
        assert row["condition"] == pytest.approx(float(values[-1] / values[0]), rel=1e-6)
        assert 0 <= row["angle"] < 90.0001
        assert row["rule"] and row["step"] == 4


def test_layers_that_never_run_as_modules_follow_the_fallback() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    model = seeded(Attending)
    x, y = normal(5, 4, 6), labels(5)
    optimizer = KFAC(model, 0.1, 0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, x, y))
    rules = {row["parameter"]: row for row in optimizer.coverage()}
    assert rules["head.weight"]["rule"] == "K-FAC"
    assert rules["attention.out_proj.weight"]["rule"] != "K-FAC"
    assert rules["attention.out_proj.weight"]["reason"]
    for name, p in model.named_parameters():
        if not name.endswith("in_proj_bias"):
            assert not torch.equal(p, before[name]), name


def test_a_layer_used_twice_adds_its_uses_as_positions() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    model = seeded(Twice)
    x, y = normal(6, 4), labels(6)
    optimizer = KFAC(model, 0.0, 0.1, fisher="exact")
    optimizer.step(closure_of(optimizer, model, x, y))
    expected = cs.kfac(cs.Problem(model, nn.CrossEntropyLoss(), (x, y)), uncovered="zero")
    found = optimizer.factors("inner")
    hidden = torch.tanh(model.inner(x)).detach()
    rows = torch.cat([x, hidden])
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    assert relative(found["A"], rows.mT @ rows / len(rows)) < 1e-12
    if "inner" in expected.blocks:
        assert relative(found["G"], expected.blocks["inner"].G) < 1e-12  # type: ignore[attr-defined]


def test_settings_that_are_refused() -> None:
    for options, part in (
        ({"fisher": "true"}, "fisher"),
        ({"split": "half"}, "split"),
        ({"inverse_every": 0}, "inverse_every"),
        ({"decay": 1.0}, "decay"),
        ({"damping": 0.0}, "damping"),
        ({"loss": "poisson"}, "loss"),
    ):
        with pytest.raises(errors.CurvscopeError, match=part):
            KFAC(small(), **{"lr": 0.1, "damping": 0.1, **options})  # type: ignore[arg-type]
