"""Two processes with half of the batch each take the steps of one process with all of it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from curvscope.errors import NonFiniteError
from curvscope.optim import AdaHessian
from tests.optim.adaptive_cases import METHODS, data, flat, relative, seeded

STEPS = 4


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 5),
    )


def train(method, model, optimizer, rows: slice) -> None:
    for t in range(STEPS):
        x, y = data(t, 8, 2, 6, 6, classes=5)
        optimizer.step(method.closure(optimizer, model, x[rows], y[rows]))


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        result = {}
        for method in METHODS:
            model = DistributedDataParallel(seeded(net))
            optimizer = method.build(model)
            train(method, model, optimizer, slice(4 * rank, 4 * rank + 4))
            factors = {b: optimizer.factors(b) for b in ("0", "1", "4", "5")}
            result[method.name] = (flat(model), factors)
            check_refusal_on_all_ranks(method, model, optimizer, rank)
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def check_refusal_on_all_ranks(method, model, optimizer, rank: int) -> None:
    """One rank sees NaN: no rank takes the step."""
    before = flat(model)

    def closure():
        optimizer.zero_grad()
        x, y = data(0, 4, 2, 6, 6, classes=5)
        loss = F.cross_entropy(model(x), y) * (float("nan") if rank == 1 else 1.0)
        if not isinstance(optimizer, AdaHessian):
            loss.backward()
        return loss

    try:
        optimizer.step(closure)
    except NonFiniteError:
        assert torch.equal(flat(model), before)
    else:
        raise AssertionError(f"rank {rank} took the step")


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(worker, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for method in METHODS:
        model = seeded(net)
        optimizer = method.build(model)
        train(method, model, optimizer, slice(None))
        for parameters, factors in (rank[method.name] for rank in ranks):
            assert relative(parameters, flat(model)) < 1e-11, method.name
            for block, own in factors.items():
                for key, value in own.items():
                    assert relative(value, optimizer.factors(block)[key]) < 1e-9, (block, key)
