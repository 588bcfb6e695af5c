"""M-FAC: every step against the dense inverse, for any window, and in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvscope as cs
from curvscope.errors import ModelError, OptionError, UncoveredError
from curvscope.optim import MFAC
from curvscope.optim.mfac import inverse_times, replace_row, solve_positive
from tests.optim.adaptive_cases import data, flat, flat_grad, mlp, relative, seeded


def dense_fisher(gradients, damping):
    V = torch.stack(gradients)
    return damping * torch.eye(V.shape[1], dtype=V.dtype) + V.mT @ V / len(V)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("memory", [1, 3, 50])
@pytest.mark.parametrize("damping", [1e-1, 1e-5])
def test_every_step_is_the_dense_one(memory, momentum, damping):
    """Ten steps: the window fills, and gradients leave it."""
    model = seeded(lambda: mlp(6, 5, 3))
    lr = 0.1 * damping
    optimizer = MFAC(model, lr, damping, memory, momentum, weight_decay=0.2)
    gradients, m = [], 0
    for t in range(1, 11):
        x, y = data(t, 8, 6)
        before = flat(model)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradients = [*gradients, flat_grad(model)][-memory:]
        m = momentum * m + (1 - momentum) * gradients[-1]
        optimizer.step()
        matrix = dense_fisher(gradients, damping)
        average = m / (1 - momentum**t)
        expected = torch.linalg.solve(matrix, average)
        step = (before - flat(model)) / lr - 0.2 * before
        # the dense solve loses as many digits as the condition number has
        tolerance = 1e-15 * float(torch.linalg.cond(matrix)) + 1e-10
        assert relative(step, expected) < tolerance
        assert relative(optimizer.averaged_gradient(), average) < 1e-13
        assert relative(optimizer.preconditioner() @ average, expected) < tolerance
        assert relative(optimizer.curvature().dense(), matrix) < 1e-13
        raw = optimizer.curvature(damped=False).dense()
        assert relative(raw, dense_fisher(gradients, 0.0)) < 1e-13


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 9),
    m=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    damping=st.floats(1e-4, 10.0),
    outside=st.booleans(),
)
def test_inverse_times_any_window(size, m, seed, damping, outside):
    generator = torch.Generator().manual_seed(seed)
    V = torch.zeros(m, size, dtype=torch.float64)
    gram = torch.zeros(m, m, dtype=torch.float64)
    for row in [*range(m), *range(m)]:  # every row is replaced once
        replace_row(V, gram, row, torch.randn(size, generator=generator, dtype=torch.float64))
    assert torch.allclose(gram, V @ V.mT, rtol=1e-13, atol=1e-13)
    c = torch.randn(m, generator=generator, dtype=torch.float64)
    rest = torch.randn(size, generator=generator, dtype=torch.float64) if outside else None
    x = c @ V + (rest if outside else 0)
    matrix = damping * torch.eye(size, dtype=torch.float64) + V.mT @ V / m
    found = inverse_times(V, gram, damping, c, rest)
    residual = (matrix @ found - x).norm() / (matrix.norm() * found.norm() + x.norm())
    assert float(residual) < 1e-11


def test_no_digits_cancel_in_single_precision():
    """The present gradient lies in the window's span, where Woodbury's formula loses it."""
    generator = torch.Generator().manual_seed(0)
    m, size, damping = 5, 400, 1e-7
    V64 = torch.randn(m, size, generator=generator, dtype=torch.float64)
    V = V64.float()
    gram = (V @ V.mT).double()
    c = torch.zeros(m, dtype=torch.float64)
    c[2] = 1.0
    matrix = damping * torch.eye(size, dtype=torch.float64) + V.double().mT @ V.double() / m
    exact = torch.linalg.solve(matrix, V[2].double())
    found = inverse_times(V, gram, damping, c, None)
    woodbury = inverse_times(V, gram, damping, torch.zeros(m).double(), V[2])
    assert relative(found.double(), exact) < 1e-5
    assert relative(woodbury.double(), exact) > 1e-2


def test_solve_of_a_matrix_that_rounding_made_indefinite():
    K = torch.diag(torch.tensor([4.0, -1e-9, 1.0], dtype=torch.float64))
    found = solve_positive(K, torch.ones(3).double(), 1e-3)
    assert torch.allclose(found, torch.tensor([0.25, 1e3, 1.0]).double())


def test_operators_and_reports():
    model = seeded(lambda: mlp(6, 5, 3))
    optimizer = MFAC(model, damping=1e-2, memory=4)
    assert optimizer.curvature().uncovered == optimizer.preconditioner().uncovered == ("0", "2")
    assert optimizer.averaged_gradient().norm() == 0
    with pytest.raises(UncoveredError, match="no step"):
        optimizer.factors("0")
    gradients = []
    for t in range(6):
        x, y = data(t, 8, 6)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradients.append(flat_grad(model))
        optimizer.step()
    matrix = dense_fisher(gradients[-4:], 1e-2)
    assert optimizer.factors("2")["V"].shape == (4, 18)
    block = optimizer.curvature().restrict(optimizer.blocks["2"]).dense()
    assert relative(block, matrix[-18:, -18:]) < 1e-13
    row = optimizer.diagnostics()[0]
    values = torch.linalg.eigvalsh(matrix)
    assert row["condition"] == pytest.approx(float(values[-1] / values[0]), rel=1e-10)
    assert row["gradients"] == 4 and 0 < row["angle"] < 90
    assert {r["rule"] for r in optimizer.coverage()} == {"M-FAC"}
    problem = cs.Problem(model, nn.CrossEntropyLoss(), (x, y))
    comparison = cs.compare(cs.hessian(problem), {"M-FAC": optimizer.curvature()})
    assert {r.block for r in comparison.rows} == {"0", "2", "(all)"}
    step = optimizer.preconditioner() @ optimizer.averaged_gradient()
    assert relative(optimizer.curvature() @ step, optimizer.averaged_gradient()) < 1e-11


def test_parameter_that_gets_no_gradient_stays():
    model = seeded(lambda: mlp(4, 4, 3))
    optimizer = MFAC(model, 0.1)
    x, _ = data(0, 6, 4)
    before = model[2].weight.detach().clone()
    model[0](x).square().mean().backward()
    optimizer.step()
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lr": -1.0}, "lr"),
        ({"damping": 0.0}, "damping"),
        ({"memory": 0}, "memory"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": float("nan")}, "weight_decay"),
    ],
)
def test_invalid_settings(options, words):
    with pytest.raises(OptionError, match=words):
        MFAC(mlp(3, 2), **options)


def test_states_and_parameters_that_do_not_fit():
    model = seeded(lambda: mlp(4, 3))
    optimizer = MFAC(model, memory=3)
    x, y = data(0, 6, 4)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.raises(OptionError, match="memory=5"):
        MFAC(model, memory=5).load_state_dict(optimizer.state_dict())
    with pytest.raises(OptionError, match="build a new"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2).double())]})
    with pytest.raises(ModelError, match="requires a gradient"):
        MFAC([torch.ones(2)])
