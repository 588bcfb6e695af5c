"""A stated memory is kept: batches are cut so that products fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors
from curvscope.memory import PeakBytes

from .test_engine import MATRICES, columns, gap, problem_of, smooth

NOTES: list[int] = []


class Note:
    def __init__(self, seen: list[int]) -> None:
        self.call = seen.append

    def __call__(self, count: int) -> None:
        NOTES.append(count)


class Counting(nn.Module):
    """Notes the batch sizes that it sees."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[int] = []
        self.noted = Note(self.seen)

    def forward(self, x: Tensor) -> Tensor:
        self.noted(len(x))
        return self.inner(x)


@pytest.mark.parametrize("name", MATRICES)
def test_a_stated_memory_cuts_batches(name: str) -> None:
    problem = problem_of(Counting(smooth()))
    whole = MATRICES[name](problem, engine="fresh")
    V = columns(problem, 2)
    truth = whole @ V
    whole @ V  # tries forward mode
    limit = int(0.7 * taken_by(whole, problem))
    op = MATRICES[name](problem, engine="fresh", memory=limit)
    op @ V
    NOTES.clear()
    assert gap(op @ V, truth) < 1e-12
    # labels are those of whole batches, whose outputs are computed first, part by part
    assert max(NOTES) < 7 and sum(NOTES) >= (30 if name == "sampled" else 15)
    assert "parts" in op.info.settings["engine"]


def taken_by(op: cs.Operator, problem: cs.Problem, count: int = 1) -> int:
    """Bytes that a product allocates at a time beside its result."""
    V = columns(problem, count)
    with PeakBytes() as peak:
        op @ V
    return peak.bytes - V.nbytes


@pytest.mark.parametrize("share", [0.6, 0.8])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("engine", ["fresh", "auto", "vmap"])
def test_a_stated_memory_is_kept(engine: str, name: str, count: int, share: float) -> None:
    """Everything that a product allocates beside its result is at most 1.1 times what it may."""
    problem = wide()
    whole = MATRICES[name](problem, engine="vmap" if engine == "vmap" and count > 1 else "fresh")
    whole @ columns(problem, count)
    limit = int(share * taken_by(whole, problem, count))
    op = MATRICES[name](problem, engine=engine, memory=limit)
    assert gap(op @ columns(problem, count), whole @ columns(problem, count)) < 1e-12
    for _ in range(2):  # the second product may keep graphs and try forward mode
        assert 0.3 * limit < taken_by(op, problem, count) <= 1.1 * limit
    assert "parts" in op.info.settings["engine"] or "forward" in op.info.settings["engine"]


def wide(times: int = 1) -> cs.Problem:
    """A network whose graphs, not its parameters, take the memory."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8 * 64, 3)).double()
    data = [(torch.randn(n, 1, 12, 12).double(), torch.randint(3, (n,))) for n in (24, 30, 7)]
    return cs.Problem(model, nn.CrossEntropyLoss(), data * times)


def test_memory_of_a_retained_graph_is_kept_or_refused() -> None:
    problem = wide()
    op = cs.hessian(problem, engine="fresh")
    one = taken_by(op, problem)
    with pytest.raises(errors.MemoryLimitError, match="all batches"):
        cs.hessian(problem, engine="retained", memory=int(1.2 * one)) @ columns(problem, 1)
    kept = cs.hessian(problem, engine="retained", memory=4 * one)
    assert gap(kept @ columns(problem, 1), op @ columns(problem, 1)) < 1e-12
    assert taken_by(kept, problem) < one


def test_memory_does_not_depend_on_the_number_of_batches() -> None:
    taken = [taken_by(cs.hessian(wide(times), engine="fresh"), wide(times)) for times in (1, 4)]
    assert taken[1] <= 1.01 * taken[0]


def test_memory_that_no_sample_fits_into() -> None:
    problem = problem_of()
    with pytest.raises(errors.MemoryLimitError, match="single sample"):
        cs.hessian(problem, memory=10) @ columns(problem, 1)


def test_coupled_samples_are_never_cut() -> None:
    class Centred(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    problem = problem_of(Centred(*smooth()))
    truth = cs.ggn(problem) @ columns(problem, 1)
    needed = taken_by(cs.hessian(problem, engine="fresh"), problem)
    with pytest.raises(errors.MemoryLimitError, match="coupled"):
        cs.hessian(problem, memory=needed // 2) @ columns(problem, 1)
    assert gap(cs.ggn(problem, memory=100 * needed) @ columns(problem, 1), truth) < 1e-12
