"""The pure functions of K-BFGS: damping, BFGS, compact form; and what must hold after updates."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from curvscope.errors import SingularError
from curvscope.optim.bfgs import (
    acceptable,
    bfgs_update,
    damp_on_identity,
    damp_on_inverse,
    dot,
    double_damping,
    hessian_action,
    symmetric_inverse,
    times,
)
from curvscope.optim.lbfgs import Memory, dense, memory_times, remember

from .kronecker_cases import normal, relative, textbook_bfgs


def definite(groups: int, n: int, seed: int = 0) -> Tensor:
    X = normal(groups, n, 2 * n, seed=seed)
    return X @ X.mT / n


ZERO = torch.zeros(1, 1, dtype=torch.float64)


def test_the_update_is_the_textbooks() -> None:
    H, s = definite(3, 5), normal(3, 5, seed=1)
    y = times(definite(3, 5, seed=2), s)
    expected = torch.stack([textbook_bfgs(h, a, b) for h, a, b in zip(H, s, y, strict=True)])
    done = bfgs_update(H, s, y, ZERO)
    assert done.all()
    assert relative(H, expected) < 1e-13


def test_groups_are_skipped_one_by_one() -> None:
    H, s = definite(4, 5), normal(4, 5, seed=1)
    y = times(definite(4, 5, seed=2), s)
    y[1] = -y[1]  # negative curvature
    y[2, 0] = math.nan
    y[3] *= 1e-5 * dot(s, s)[3] / dot(s, y)[3]  # curvature too small for this gradient
    before = H.clone()
    done = bfgs_update(H, s, y, torch.full((4, 1), 1.0, dtype=torch.float64))
    assert done.flatten().tolist() == [True, False, False, False]
    assert torch.equal(H[1:], before[1:])
    assert not torch.equal(H[0], before[0])


def test_a_result_that_overflows_is_skipped() -> None:
    H = torch.eye(3).unsqueeze(0)
    s, y = torch.full((1, 3), 1e30), torch.full((1, 3), 1e-30)
    assert not bfgs_update(H, s, y, torch.zeros(1, 1)).any()
    assert torch.equal(H[0], torch.eye(3))


def test_powell_damping_on_the_inverse() -> None:
    H, s = definite(1, 4), normal(1, 4, seed=1)
    for y in (normal(1, 4, seed=5), -times(definite(1, 4, seed=2), s), times(H, s)):
        Hy = times(H, y)
        damped, fired = damp_on_inverse(s, y, Hy)
        ratio = float(dot(damped, y) / dot(y, Hy))
        if fired:
            assert ratio == pytest.approx(0.2)
        else:
            assert ratio > 0.2 and torch.equal(damped, s)


@pytest.mark.parametrize("eps", [0.3, 0.99, 1.0, 1.7])
def test_powell_damping_on_the_identity(eps: float) -> None:
    s = normal(1, 4, seed=1)
    for y in (normal(1, 4, seed=5), -s, 0.2 * s, 3 * s, torch.zeros_like(s)):
        damped, fired = damp_on_identity(s, y, eps)
        ratio = float(dot(s, damped) / dot(s, s))
        if fired:
            assert ratio == pytest.approx(eps)
        else:
            assert ratio > eps and torch.equal(damped, y)


def test_double_damping_reports_what_it_did() -> None:
    s = normal(1, 4, seed=1)
    pair = double_damping(s, -s, -20 * s, 0.5)  # H = 20 I
    assert pair.damped_on_inverse.all() and pair.damped_on_identity.all()
    assert float(pair.before) == pytest.approx(-1) and float(pair.after) == pytest.approx(0.5)
    calm = double_damping(s, 2 * s, 2 * s, 0.5)
    assert not calm.damped_on_inverse.any() and not calm.damped_on_identity.any()


def test_hessian_action_pair_is_the_inverse_of_the_damped_factor() -> None:
    A, H, mean = definite(2, 4), definite(2, 4, seed=3), normal(2, 4, seed=4)
    s, y = hessian_action(H, A, 0.7, mean)
    assert torch.allclose(s, times(H, mean))
    assert torch.allclose(y, times(A + 0.7 * torch.eye(4, dtype=A.dtype), s))
    exact = symmetric_inverse(A, 0.7)
    before = exact.clone()
    bfgs_update(exact, *hessian_action(exact, A, 0.7, mean), ZERO)
    assert relative(exact, before) < 1e-13  # the inverse already knows its own action


def test_symmetric_inverse() -> None:
    A = definite(2, 6)
    inverse = symmetric_inverse(A, 0.1)
    assert torch.equal(inverse, inverse.mT)
    assert relative(inverse, torch.linalg.inv(A + 0.1 * torch.eye(6, dtype=A.dtype))) < 1e-12
    with pytest.raises(SingularError, match="raise damping"):
        symmetric_inverse(-A, 0.0)


@pytest.mark.parametrize(
    ("m", "n", "count"), [(3, 6, 2), (3, 6, 8), (3, 7, 3), (3, 9, 8), (8, 4, 8), (8, 20, 9)]
)
def test_compact_form_is_the_update_by_update_matrix(m: int, n: int, count: int) -> None:
    memory = Memory.empty(m, normal(2, n))
    kept: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for k in range(count):
        s = normal(2, n, seed=k)
        y = times(definite(2, n, seed=k + 50), s)
        if k == 1:
            y[1] = -y[1]  # the second group forgets this one
        memory, done = remember(memory, s, y, ZERO)
        assert done.flatten().tolist() == [True, k != 1]
        for g in range(2):
            if done[g]:
                kept[g] = [*kept[g], (s[g], y[g])][-m:]
    V = normal(2, n, 5, seed=99)
    found = memory_times(memory, V)
    assert (memory.H is None) == (n > 2 * m)
    for g in range(2):
        H = torch.eye(n, dtype=torch.float64)
        for s, y in kept[g]:
            H = textbook_bfgs(H, s, y)
        assert relative(found[g], H @ V[g]) < 1e-11
        assert relative(dense(memory)[g], H) < 1e-11
    assert memory.filled.flatten().tolist() == [len(pairs) for pairs in kept]


def test_an_empty_memory_is_the_identity() -> None:
    V = normal(1, 3, 2)
    assert torch.equal(memory_times(Memory.empty(4, V[..., 0]), V), V)


# -- properties ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    updates=st.integers(1, 25),
    eps=st.sampled_from([0.03, 0.3, 0.55, 1.5]),
    condition=st.sampled_from([1.0, 1e2, 1e4]),
    noise=st.sampled_from([0.0, 0.1, 10.0]),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_accepted_updates_keep_the_secant_equation_and_definiteness(
    n: int, updates: int, eps: float, condition: float, noise: float, seed: int, dtype: torch.dtype
) -> None:
    """Pairs of an indefinite, noisy curvature, damped twice, as K-BFGS sees them."""
    eps_machine = torch.finfo(dtype).eps
    curvature = normal(n, n, seed=seed) + torch.diag(torch.logspace(0, math.log10(condition), n))
    curvature = (curvature + curvature.T).to(dtype)
    H = torch.eye(n, dtype=dtype).unsqueeze(0)
    for k in range(updates):
        s = normal(1, n, seed=seed + 7 * k + 1, dtype=dtype)
        y = times(curvature.unsqueeze(0), s) + noise * normal(1, n, seed=seed + 3 * k, dtype=dtype)
        pair = double_damping(s, y, times(H, y), eps)
        done = bfgs_update(H, pair.s, pair.y, torch.zeros(1, 1, dtype=dtype))
        assert torch.equal(H, H.mT)
        values = torch.linalg.eigvalsh(H[0].double())
        assert float(values[0]) >= -10 * eps_machine * float(values[-1])
        if done:
            residual = (times(H, pair.y) - pair.s).double().norm()
            assert float(residual) <= 100 * eps_machine * float(values[-1]) * float(pair.y.norm())


def test_unacceptable_pairs() -> None:
    s = torch.ones(1, 3, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert acceptable(s, s, one).all()
    assert not acceptable(s, -s, ZERO).any()
    assert not acceptable(s, 0.9e-4 * s, one).any()
    assert not acceptable(s, s, math.inf * one).any()
    assert not acceptable(0 * s, 0 * s, ZERO).any()
