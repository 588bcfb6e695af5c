"""K-BFGS as an optimizer: what a step does, layer types, what can be read from it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors
from curvscope.operators import KroneckerOperator
from curvscope.optim import KBFGS

from .kronecker_cases import (
    closure_of,
    flat,
    labels,
    normal,
    relative,
    run,
    seeded,
    small,
)

# -- what a step does ------------------------------------------------------------------------------


def test_closure_is_called_twice_and_gradients_are_those_of_the_first_call() -> None:
    model = small()
    optimizer = KBFGS(model, 0.3, 0.3)
    x, y = normal(7, 5), labels(7)
    F.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    start = flat(model)
    calls: list[tuple[bool, bool]] = []

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=len(calls) == 0)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        first = next(model.parameters())
        calls.append((first.requires_grad, first.grad is not None))
        return loss

    before = F.cross_entropy(model(x), y)
    loss = optimizer.step(closure)
    # the second call computes no gradients of weights
    assert calls == [(True, True), (False, False)]
    assert torch.equal(loss, before)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert p.requires_grad and torch.equal(p.grad, gradient)
    assert not torch.equal(flat(model), start)


def test_second_call_sees_the_random_numbers_of_the_first_and_buffers_advance_once() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )

    model, once = seeded(make), seeded(make)
    optimizer = KBFGS(model, 0.3, 0.3)
    x, y = normal(9, 5), labels(9)
    masks = []
    model[3].register_forward_hook(lambda m, i, out: masks.append((out != 0) | (i[0] == 0)))
    torch.manual_seed(5)
    once(x)
    after_one = torch.get_rng_state()
    torch.manual_seed(5)
    optimizer.step(closure_of(optimizer, model, x, y))
    dropped = [mask.double() for mask in masks]
    assert len(masks) == 2
    # activations differ between the passes, so compare where both were alive
    assert float((dropped[0] != dropped[1]).double().mean()) < 0.2
    assert torch.equal(torch.get_rng_state(), after_one)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(once.named_buffers())[name]), name
    assert int(model[1].num_batches_tracked) == 1


def test_dropout_masks_are_equal_where_everything_is_alive() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Linear(40, 3)))
    optimizer = KBFGS(model, 0.3, 0.3)
    masks = []
    model[1].register_forward_hook(lambda m, i, out: masks.append(out == 0))
    optimizer.step(closure_of(optimizer, model, normal(9, 5), labels(9)))
    assert torch.equal(masks[0], masks[1]) and masks[0].any()


def test_the_step_is_the_preconditioned_momentum() -> None:
    for memory in (None, 3):
        model = small()
        optimizer = KBFGS(model, 0.2, 0.3, memory=memory, weight_decay=0.1)
        run(optimizer, model, 3)
        start, H = flat(model), optimizer.preconditioner().dense()
        run(optimizer, model, 1)
        momentum = torch.cat(
            [
                torch.cat([M[0, :, :-1].reshape(-1), M[0, :, -1]])
                for M in (optimizer.block_state(b)["M"] for b in optimizer.blocks)
            ]
        )
        assert relative(flat(model) - start, -0.2 * (H @ momentum)) < 1e-12


def test_curvature_is_exactly_the_inverse_of_the_preconditioner() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, groups=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
    )
    for memory in (None, 2):
        optimizer = KBFGS(model, 0.1, 0.1, memory=memory)
        for k in range(4):
            x, y = normal(5, 1, 5, 5, seed=k), labels(5, seed=k)
            optimizer.step(closure_of(optimizer, model, x, y))
        inverse, matrix = optimizer.preconditioner(), optimizer.curvature()
        assert list(inverse.blocks) == ["0", "2", "4"] and not inverse.uncovered
        for name in inverse.blocks:
            product = inverse.blocks[name].dense() @ matrix.blocks[name].dense()
            assert relative(product, torch.eye(len(product), dtype=product.dtype)) < 1e-12
        raw = optimizer.curvature(damped=False).blocks["4"]
        factors = optimizer.factors("4")
        assert isinstance(raw, KroneckerOperator)
        assert torch.equal(raw.A, factors["A"]) and torch.equal(raw.G, factors["G"])
        assert set(factors) == {"A", "G", "H_a", "H_g"}
        assert relative(factors["G"] @ factors["H_g"], torch.eye(3, dtype=torch.float64)) < 1e-12


def test_it_can_be_compared_with_the_hessian() -> None:
    model = small()
    optimizer = KBFGS(model, 0.1, 0.1)
    assert set(optimizer.curvature().uncovered) == {"0", "2"}  # nothing is known yet
    x, y = normal(20, 5), labels(20)
    for _ in range(5):
        optimizer.step(closure_of(optimizer, model, x, y))
    problem = cs.Problem(model, nn.CrossEntropyLoss(), (x, y))
    assert problem.layout == optimizer.layout and dict(problem.blocks) == optimizer.blocks
    comparison = cs.compare(cs.hessian(problem), {"K-BFGS": optimizer.curvature()})
    row = comparison.row("0", "K-BFGS")
    assert row.status == "compared" and math.isfinite(row.error)
    A = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    assert relative(optimizer.factors("0")["A"], A.T @ A / 20) < 1e-12


def test_warm_start_is_the_mean_over_minibatches() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    optimizer = KBFGS(model, 0.1, 0.1)
    batches = [(normal(n, 5, seed=n), labels(n)) for n in (4, 7)]
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    state = torch.get_rng_state()
    optimizer.warm_start(batches)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(b, buffers[k]) for k, b in model.named_buffers())
    rows = [torch.cat([x, torch.ones_like(x[:, :1])], 1) for x, _ in batches]
    A = sum(a.T @ a / len(a) for a in rows) / 2
    assert relative(optimizer.factors("0")["A"], A) < 1e-13
    one = torch.eye(6, dtype=A.dtype)
    assert (
        relative(optimizer.factors("0")["H_a"], torch.linalg.inv(A + math.sqrt(0.1) * one)) < 1e-12
    )
    # the first step leaves it as it is, the second does not
    optimizer.step(closure_of(optimizer, model, *batches[0]))
    assert relative(optimizer.factors("0")["A"], A) < 1e-13
    optimizer.step(closure_of(optimizer, model, *batches[0]))
    assert relative(optimizer.factors("0")["A"], 0.9 * A + 0.1 * rows[0].T @ rows[0] / 4) < 1e-13


def test_warm_start_on_other_batches() -> None:
    model = small()
    optimizer = KBFGS(model, 0.1, 0.1)
    x = normal(4, 5)
    with pytest.raises(errors.OptionError, match="forward="):
        optimizer.warm_start([{"x": x}])
    optimizer.warm_start([{"x": x}], forward=lambda m, batch: m(batch["x"]))
    plain = KBFGS(model, 0.1, 0.1)
    plain.warm_start([x])
    assert torch.equal(plain.factors("0")["A"], optimizer.factors("0")["A"])
    with pytest.raises(errors.DataError, match="no batch"):
        KBFGS(model, 0.1, 0.1).warm_start([])
    with pytest.raises(errors.NonFiniteError, match="layer '0'"):
        KBFGS(model, 0.1, 0.1).warm_start([x * math.inf])
    run(plain, model, 1)
    with pytest.raises(errors.OptionError, match="after the first step"):
        plain.warm_start([x])
    with pytest.raises(errors.OptionError, match="full_batch"):
        KBFGS(model, 0.1, 0.1, full_batch=True).warm_start([x])


def test_the_loss_falls() -> None:
    for options in ({}, {"memory": 5}, {"full_batch": True}, {"max_update_norm": 0.5}):
        model = small()
        optimizer = KBFGS(model, 0.1, 0.1, **options)
        x = normal(30, 5)
        y = x[:, :3].argmax(1)
        losses = [
            float(optimizer.step(closure_of(optimizer, model, x, y)).detach()) for _ in range(60)
        ]
        assert losses[-1] < 0.5 * losses[0]


def test_max_update_norm_shortens_the_step_of_all_layers_together() -> None:
    free, model = small(), small()
    run(KBFGS(free, 0.3, 0.1), free, 1)
    optimizer = KBFGS(model, 0.3, 0.1, max_update_norm=1e-3)
    start = flat(model)
    run(optimizer, model, 1)
    step, whole = flat(model) - start, flat(free) - start
    assert float(step.norm()) == pytest.approx(1e-3)
    assert relative(step / step.norm(), whole / whole.norm()) < 1e-12
    rows = optimizer.diagnostics()
    assert math.hypot(*(0.3 * r["update_norm"] for r in rows)) == pytest.approx(1e-3)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole, parts = small(), small()
    one, two = KBFGS(whole, 0.3, 0.3), KBFGS(parts, 0.3, 0.3)
    for k in range(4):
        x, y = normal(8, 5, seed=k), labels(8, seed=k)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            two.zero_grad()
            total = torch.zeros((), dtype=x.dtype)
            for rows in (slice(0, 4), slice(4, 8)):
                loss = F.cross_entropy(parts(x[rows]), y[rows]) / 2
                loss.backward()
                total = total + loss.detach()
            return total

        one.step(closure_of(one, whole, x, y))
        two.step(closure)
        assert relative(flat(parts), flat(whole)) < 1e-12


def test_a_layer_used_twice_counts_both_uses_as_positions() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    model = seeded(Twice)
    optimizer = KBFGS(model, 0.1, 0.3)
    x = normal(6, 4)
    a = [x, torch.relu(model.layer(x)).detach()]
    rows = torch.cat([torch.cat([t, torch.ones_like(t[:, :1])], 1) for t in a])
    optimizer.step(closure_of(optimizer, model, x, labels(6, 4)))
    assert relative(optimizer.factors("layer")["A"], rows.T @ rows / 6) < 1e-12


# -- diagnostics -----------------------------------------------------------------------------------


def test_diagnostics() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)))
    optimizer = KBFGS(model, 0.3, 0.3)
    assert [r["step"] for r in optimizer.diagnostics()] == [0, 0, 0]
    run(optimizer, model, 4)
    rows = {r["block"]: r for r in optimizer.diagnostics()}
    assert rows["1"] == {"block": "1", "step": 4, "rule": "adam"}
    row = rows["0"]
    assert row["updates"] + row["skipped"] == 4 and row["not_finite"] == 0
    assert row["sy_ss_after"] >= math.sqrt(0.3) * (1 - 1e-12)
    assert 0 <= row["damped_on_inverse"] <= 4 and 0 <= row["damped_on_identity"] <= 4
    assert row["secant_residual"] < 1e-12 and row["secant_residual_input"] < 1e-10
    assert 0 < row["angle"] < 90 and row["update_norm"] > 0
    values = torch.linalg.eigvalsh(optimizer.factors("0")["H_g"])
    assert row["H_g_min"] == pytest.approx(float(values[0]))
    assert row["H_g_max"] == pytest.approx(float(values[-1]))
    P = optimizer.preconditioner().blocks["0"].eigenvalues()
    assert row["condition"] == pytest.approx(float(P[-1] / P[0]))
    assert "H_g_min" not in optimizer.diagnostics(eigenvalues=False)[0]
    assert "sy_ss_after" in optimizer.diagnostics().to_frame().columns


def test_a_pair_that_is_not_finite_is_not_learned() -> None:
    """The step leads out of the domain of the loss: the second pass gives NaN."""
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(0.1)
    optimizer = KBFGS(model, 1e3, 0.1)
    x = torch.ones(3, 2, dtype=torch.float64)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return z.sqrt().mean()  # falls towards zero, and has no value beyond

    optimizer.step(closure_of(optimizer, model, x, x, loss))
    assert optimizer.diagnostics()[0]["not_finite"] == 1
    state = optimizer.block_state("(root)")
    for name in ("s", "y", "H_g", "H_a", "A"):
        assert torch.isfinite(state[name]).all(), name
    with pytest.raises(errors.NonFiniteError, match="step 2"):
        optimizer.step(closure_of(optimizer, model, x, x, loss))
