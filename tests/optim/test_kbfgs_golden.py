"""K-BFGS reproduces the recorded runs of its authors' release, step by step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope.optim import KBFGS

from .kronecker_cases import flat, golden, relative


def recorded_model(data: dict[str, Tensor], relu: list[bool]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for k, activated in enumerate(relu):
        weight = data[f"W0_{k}"]
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(data[f"b0_{k}"])
        modules += [layer, nn.ReLU()] if activated else [layer]
    return nn.Sequential(*modules)


def cross_entropy(z: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, t, reduction="sum") / len(z)


def half_square(z: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (z - t).square().sum() / len(z)


CASES = [
    ("kbfgs_autoencoder", None, [True, False, True, False], cross_entropy, 0.3, 1e-7),
    ("kbfgs_l_autoencoder", 5, [True, False, True, False], cross_entropy, 0.3, 1e-7),
    ("kbfgs_fullbatch", None, [True, False], half_square, 0.1, 1e-10),
]


@pytest.mark.parametrize(("name", "memory", "relu", "loss", "setting", "limit"), CASES)
def test_every_step(name, memory, relu, loss, setting, limit) -> None:
    data = golden(name)
    model = recorded_model(data, relu)
    full = name.endswith("fullbatch")
    optimizer = KBFGS(model, setting, setting, memory=memory, weight_decay=1e-5, full_batch=full)
    if not full:
        optimizer.warm_start([data["X"][rows] for rows in data["warm_batches"]])
    X, T = data["X"], data["T"]

    for rows, params, value in zip(data["batches"], data["params"], data["loss"], strict=True):

        def closure(rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            result = loss(model(X[rows]), T[rows])
            result.backward()
            return result

        found = optimizer.step(closure)
        assert relative(flat(model), params) <= limit
        assert abs(float(found.detach() - value)) <= max(limit, 2e-7) * abs(float(value))

    for k, block in enumerate(optimizer.blocks):
        factors = optimizer.factors(block)
        assert relative(factors["A"], data[f"A_final_{k}"]) <= limit
        assert relative(factors["H_a"], data[f"Ha_final_{k}"]) <= limit
        if memory is None:
            assert relative(factors["H_g"], data[f"Hg_final_{k}"]) <= limit
        else:
            assert int(optimizer.block_state(block)["filled"]) == int(data[f"npairs_{k}"])
