"""Two processes with half of the batch each train like one process with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import curvscope as cs
from curvscope.errors import ModelError
from curvscope.optim import KBFGS, KFAC, AdaFisher

from .kronecker_cases import closure_of, flat, labels, normal, relative, seeded, small

STEPS, BATCH = 4, 8
METHODS: dict[str, Any] = {
    "K-FAC, exact": (KFAC, {"fisher": "exact"}),
    "K-FAC, empirical": (KFAC, {"fisher": "empirical"}),
    "K-BFGS": (KBFGS, {}),
    "K-BFGS(L)": (KBFGS, {"memory": 2}),
}


def warm_start(optimizer: Any, data: tuple[Tensor, ...]) -> None:
    if isinstance(optimizer, KBFGS):
        optimizer.warm_start([data])
    else:
        optimizer.warm_start([data], loss=F.cross_entropy)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return normal(BATCH, 5, seed=step), labels(BATCH, seed=step)


def worker(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        model = small()
        wrapped = DistributedDataParallel(model)
        make, options = METHODS[name]
        optimizer = make(wrapped, 0.2, 0.1, **options)
        share = slice(rank, BATCH, 2)
        warm_start(optimizer, tuple(t[share] for t in batch(9)))
        for step in range(STEPS):
            x, y = batch(step)
            optimizer.step(closure_of(optimizer, wrapped, x[share], y[share]))
        if rank == 0:
            torch.save(flat(model), os.path.join(folder, "weights.pt"))
        for seen in (model, wrapped):  # the matrices have the parameters of the model within
            problem = cs.Problem(seen, nn.CrossEntropyLoss(), batch(0))
            comparison = cs.compare(cs.hessian(problem), {name: optimizer.curvature()})
            assert {row["block"] for row in comparison.records()} >= set(optimizer.layers)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_are_one_process_with_the_joint_batch(tmp_path: Path, name: str) -> None:
    mp.start_processes(worker, args=(str(tmp_path), name), nprocs=2, start_method="spawn")
    model = small()
    start = flat(model).clone()
    make, options = METHODS[name]
    optimizer = make(model, 0.2, 0.1, **options)
    warm_start(optimizer, batch(9))
    for step in range(STEPS):
        optimizer.step(closure_of(optimizer, model, *batch(step)))
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert relative(found, flat(model)) < 1e-12
    assert relative(found, start) > 0.05


class Gated(nn.Module):
    """Its second layer runs where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.on = nn.Linear(5, 3), nn.Linear(5, 3), True

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + self.sometimes(x if self.on else x[:0]).sum(0)


def uneven_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        for make, options in [*METHODS.values(), (AdaFisher, {"update_every": 1})]:
            model = seeded(Gated)
            wrapped = DistributedDataParallel(model)
            optimizer = make(wrapped, 0.01, 0.3, **options)
            optimizer.step(closure_of(optimizer, wrapped, *batch(rank)))
            model.on = rank == 0
            if make is not AdaFisher:  # on the other rank no batch has the layer
                warm = make(wrapped, 0.01, 0.3, **options)
                with pytest.raises(ModelError, match="warm start: the layer 'sometimes' ran on"):
                    warm_start(warm, batch(rank))
                assert not warm.state
            before = flat(model)
            closure = closure_of(optimizer, wrapped, *batch(2 + rank))
            if make is AdaFisher:  # its diagonals can wait
                learned = optimizer.factors("sometimes")["H_D"]
                optimizer.step(closure)
                assert torch.equal(optimizer.factors("sometimes")["H_D"], learned)
                continue
            with pytest.raises(ModelError, match="'sometimes' ran on some ranks only"):
                optimizer.step(closure)
            assert torch.equal(flat(model), before)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_a_layer_that_runs_on_some_ranks_only_is_refused(tmp_path: Path) -> None:
    mp.start_processes(uneven_worker, args=(str(tmp_path),), nprocs=2, start_method="spawn")
