"""Over random models, data and settings: what every accepted update of K-BFGS must leave behind."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from curvscope.optim import KBFGS
from curvscope.optim.bfgs import times

from .kronecker_cases import closure_of, labels, normal, seeded


def is_sound(H: Tensor) -> bool:
    """Symmetric to the last bit, and no eigenvalue more negative than rounding."""
    values = torch.linalg.eigvalsh(H.double())
    limit = 10 * torch.finfo(H.dtype).eps * values[..., -1]
    return torch.equal(H, H.mT) and bool((values[..., 0] >= -limit).all())


def secant_holds(H: Tensor, s: Tensor, y: Tensor, done: Tensor, least: float = 0.0) -> bool:
    gap = (times(H, y) - s).double().norm(dim=-1, keepdim=True)
    size = torch.linalg.matrix_norm(H.double(), 2).unsqueeze(-1).clamp(min=least)
    limit = 100 * torch.finfo(H.dtype).eps * size * y.double().norm(dim=-1, keepdim=True)
    return bool((gap <= limit)[done].all())


def network(kind: str, width: int) -> nn.Module:
    if kind == "conv":
        return nn.Sequential(
            nn.Conv2d(2, 2 * width, 3, groups=2, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(2 * width * 9, 3),
        )
    bias = kind == "mlp"
    return nn.Sequential(
        nn.Flatten(), nn.Linear(18, width, bias=bias), nn.ReLU(), nn.Linear(width, 3, bias=bias)
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(["mlp", "no bias", "conv"]),
    width=st.integers(1, 9),
    samples=st.integers(1, 12),
    damping=st.sampled_from([1e-4, 1e-2, 0.3, 1.0, 4.0]),
    lr=st.sampled_from([0.01, 0.3, 3.0]),
    size=st.sampled_from([0.01, 1.0, 30.0]),
    full_batch=st.booleans(),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_factors_stay_sound(
    kind: str,
    width: int,
    samples: int,
    damping: float,
    lr: float,
    size: float,
    full_batch: bool,
    seed: int,
    dtype: torch.dtype,
) -> None:
    model = seeded(lambda: network(kind, width), seed, dtype)
    optimizer = KBFGS(model, lr, damping, full_batch=full_batch)
    for k in range(6):
        batch = 0 if full_batch else k
        x = size * normal(samples, 2, 3, 3, seed=seed + batch, dtype=dtype)
        y = labels(samples, seed=seed + batch)
        optimizer.step(closure_of(optimizer, model, x, y, F.cross_entropy))
        for block in optimizer.layers:
            state, last = optimizer.block_state(block), optimizer._last[block]
            assert is_sound(state["H_g"]) and is_sound(state["H_a"])
            if "done" in last:
                assert secant_holds(state["H_g"], last["s"], last["y"], last["done"])
                done = last["input_done"]
                assert secant_holds(state["H_a"], last["input_s"], last["input_y"], done)


@settings(max_examples=20, deadline=None)
@given(
    memory=st.integers(1, 6),
    width=st.integers(1, 6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_limited_memory_stays_sound(memory: int, width: int, seed: int, dtype: torch.dtype) -> None:
    model = seeded(lambda: network("mlp", width), seed, dtype)
    optimizer = KBFGS(model, 0.3, 0.3, memory=memory)
    for k in range(8):
        x, y = normal(6, 2, 3, 3, seed=seed + k, dtype=dtype), labels(6, seed=seed + k)
        optimizer.step(closure_of(optimizer, model, x, y))
    for block in optimizer.layers:
        H = optimizer.preconditioner().blocks[block].G
        last = optimizer._last[block]
        assert is_sound(H)
        # the matrix is made anew from I, so that roundings are those of a norm of one at least
        assert secant_holds(H.unsqueeze(0), last["s"], last["y"], last["done"], least=1.0)
