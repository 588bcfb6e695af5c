"""How products are computed changes nothing about their values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors
from curvscope.curvature import along as along_module
from curvscope.curvature import engine as engine_module
from curvscope.curvature import ways
from curvscope.curvature.engine import ENGINES, Engine
from curvscope.curvature.ways import vectorising_pays
from curvscope.curvature.whole import WholeOperator

from .nets import seeded

MATRICES: dict[str, Callable[..., WholeOperator]] = {
    "hessian": cs.hessian,
    "ggn": cs.ggn,
    "fisher": cs.fisher,
    "sampled": lambda problem, **options: cs.fisher(problem, samples=3, seed=4, **options),
    "empirical": cs.empirical_fisher,
    "per term": lambda problem, **options: cs.empirical_fisher(problem, per="term", **options),
}


def smooth(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5), nn.Sigmoid(),
        nn.Linear(5, 4),
    ).to(dtype)  # fmt: skip


def batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = [7, 5, 3, 6, 4, 2][:count]
    return [
        (
            torch.randn(n, 1, 4, 4, generator=generator, dtype=dtype),
            torch.randint(4, (n,), generator=generator),
        )
        for n in sizes
    ]


def problem_of(model: nn.Module | None = None, **options: Any) -> cs.Problem:
    return cs.Problem(model or smooth(), nn.CrossEntropyLoss(), batches(), **options)


def columns(problem: cs.Problem, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(problem.layout.numel, count, generator=generator, dtype=problem.dtype)


def gap(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("mode", ENGINES)
@pytest.mark.parametrize("name", MATRICES)
def test_all_engines_agree_with_the_dense_matrix(name: str, mode: str) -> None:
    problem = problem_of()
    dense = MATRICES[name](problem).dense()
    op = MATRICES[name](problem, engine=mode)
    for count in (1, 2, 6):
        V = columns(problem, count)
        for _ in range(3):  # graphs are kept, and forward mode tried, from the second on
            assert gap(op @ V, dense @ V) < 1e-12
    assert gap(op @ V[:, 0], dense @ V[:, 0]) < 1e-12
    assert op.info.settings["engine"]


@pytest.mark.parametrize("mode", ["auto", "retained", "fresh"])
def test_blocks_and_sides(mode: str) -> None:
    problem = problem_of()
    truth = cs.hessian(problem, route="autograd").blocks["3"].dense()
    block = cs.hessian(problem, route="autograd", engine=mode).blocks["3"]
    V = columns(problem, 5)[: block.shape[0]]
    for _ in range(2):
        assert gap(block @ V, truth @ V) < 1e-12


@pytest.mark.parametrize("mode", ["auto", "retained"])
@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_kept_graphs_survive_training_on(name: str, mode: str) -> None:
    """The operator stays at its parameters, whatever the optimizer does to the model."""
    layers = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    model = seeded(lambda: nn.Sequential(*layers))
    problem = problem_of(model)
    dense = MATRICES[name](problem).dense()
    op = MATRICES[name](problem, engine=mode)
    v = columns(problem, 2)
    op @ v
    op @ v
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for change in ("step", "data", "train mode"):
        if change == "step":
            problem_loss = nn.functional.cross_entropy(model(batches()[0][0]), batches()[0][1])
            problem_loss.backward()
            optimizer.step()
        elif change == "data":
            for p in model.parameters():
                p.data.mul_(1.5)
        else:
            model.train()
            model(batches()[0][0])
        values = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):
            assert gap(op @ v, dense @ v) < 1e-12, change
        assert all(torch.equal(p, x) for p, x in zip(model.parameters(), values, strict=True))
    fresh = MATRICES[name](problem, engine="fresh") @ v
    assert gap(fresh, dense @ v) > 1e-3  # what trained on is another matrix


def test_graphs_are_kept_from_the_second_call_on() -> None:
    problem = problem_of()
    op = cs.hessian(problem)
    v = columns(problem, 1)
    op @ v
    assert op._engine is not None and op._engine._kept is None
    op @ v
    kept = op._engine._kept
    assert kept is not None and len(kept) == 3
    assert op.info.settings["engine"] == "retained graphs"
    op @ v
    assert op._engine._kept is kept
    twin = copy.deepcopy(op)
    assert gap(twin @ v, op @ v) < 1e-14
    op.release()
    assert op._engine is None
    assert gap(op @ v, twin @ v) < 1e-14


def test_nothing_is_kept_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of()
    v = columns(problem, 1)
    op = cs.hessian(problem)
    op @ v
    monkeypatch.setattr(engine_module.memory, "available_bytes", lambda device: 1000)
    op @ v
    assert op._engine is not None and op._engine._kept is None
    assert op.info.settings["engine"] == "a fresh graph per batch"
    forced = cs.hessian(problem, engine="retained")
    with pytest.raises(errors.MemoryLimitError, match="engine='auto'"):
        for _ in range(2):
            forced.release()
            forced._engine = None
            engine = Engine(problem, forced.kind, forced.parameters, forced.at, mode="retained")
            engine._bytes = 10**6
            engine.product(v)


def test_forward_mode_is_refused_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of()
    v = columns(problem, 1)
    true = engine_module.linearised
    monkeypatch.setattr(
        engine_module, "linearised", lambda *a, **k: tuple(1.01 * z for z in true(*a, **k))
    )
    with pytest.raises(errors.UnsupportedLayerError, match="differs from that of reverse mode"):
        cs.ggn(problem, engine="forward") @ v
    automatic = cs.ggn(problem)
    dense = automatic.dense()
    for _ in range(3):
        assert gap(automatic @ v, dense @ v) < 1e-12
    along = along_module.gradient_along
    monkeypatch.setattr(
        along_module,
        "gradient_along",
        lambda *a: [None if g is None else 1.01 * g for g in along(*a)],
    )
    with pytest.raises(errors.UnsupportedLayerError, match="H v differs"):
        cs.hessian(problem, engine="forward") @ v


@pytest.mark.parametrize("name", ["ggn", "sampled"])
def test_one_pass_gives_the_graph_and_the_first_direction(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of()
    op = MATRICES[name](problem, engine="forward")
    dense = MATRICES[name](problem).dense()
    passes: list[bool] = []
    true = engine_module.linearised

    def counted(*a: Any, graph: bool) -> tuple[Tensor, Tensor]:
        passes.append(graph)
        return true(*a, graph=graph)

    for count in (1, 3):
        V = columns(problem, count)
        op @ V
        monkeypatch.setattr(engine_module, "linearised", counted)
        assert gap(op @ V, dense @ V) < 1e-12
        assert passes == 3 * [True, *(count - 1) * [False]]  # three batches
        passes.clear()
        monkeypatch.setattr(engine_module, "linearised", true)
    limited = MATRICES[name](problem, engine="forward", memory=2**20)
    limited @ V  # checks
    monkeypatch.setattr(engine_module, "linearised", counted)
    assert gap(limited @ V, dense @ V) < 1e-12
    assert set(passes) == {False}  # the limit was measured without the graph of J v


class OnlyReverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnlyReverse.apply(x)  # type: ignore[no-any-return]


def test_models_without_forward_mode_or_batching_rule() -> None:
    layers = (nn.Flatten(), nn.Linear(16, 6), Squared(), nn.Linear(6, 4))
    model = seeded(lambda: nn.Sequential(*layers))
    problem = problem_of(model)
    v = columns(problem, 6)
    for name in ("hessian", "ggn"):
        dense = MATRICES[name](problem).dense()
        op = MATRICES[name](problem)
        for _ in range(3):
            assert gap(op @ v, dense @ v) < 1e-12
        with pytest.raises(errors.UnsupportedLayerError, match="forward-mode"):
            MATRICES[name](problem, engine="forward") @ v


@pytest.mark.parametrize(
    ("seconds", "vectorised"),
    [((9.0, 2.0, 1.0), False), ((9.0, 2.0, 8.0), True), ((1.0, 2.0), False)],
    ids=["slow by chance", "faster", "slower"],
)
def test_vectors_go_together_only_where_that_is_faster_twice(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], vectorised: bool
) -> None:
    """One slow pass on a busy machine decides nothing."""
    clock, left = [0.0], list(seconds)

    class Graph:
        def add(self, rows: Tensor, total: Tensor, scale: float, **_: bool) -> None:
            total += rows
            clock[0] += left.pop(0)

    monkeypatch.setattr(ways.time, "perf_counter", lambda: clock[0])
    assert vectorising_pays(Graph(), torch.randn(4, 3)) is vectorised  # type: ignore[arg-type]
    assert not left


def test_what_vectorised_passes_cannot_do_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4))
    problem = problem_of(seeded(lambda: nn.Sequential(*layers)))

    def fails(*_: Any) -> None:
        raise RuntimeError("no batching rule")  # GroupNorm's second derivative in torch 2.13

    monkeypatch.setattr("curvscope.curvature.graphs.HessianGraph._many", fails)
    with pytest.raises(errors.UnsupportedLayerError, match="Use engine='auto'"):
        cs.hessian(problem, engine="vmap") @ columns(problem, 5)
    assert torch.isfinite(cs.hessian(problem) @ columns(problem, 5)).all()


def test_tied_weights_and_forward_mode() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 4)
            self.second = nn.Linear(4, 16)
            self.second.weight = nn.Parameter(torch.zeros(16, 4))
            self.shared = self.first
            self.head = nn.Linear(4, 4)
            self.again = nn.Linear(4, 4)
            self.again.weight = self.head.weight

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x.flatten(1)))
            h = torch.tanh(self.shared(self.second(h)))
            return self.again(torch.tanh(self.head(h)))

    model = seeded(Tied)
    problem = problem_of(model)
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    v = columns(problem, 3)
    for name in ("hessian", "ggn"):
        dense = MATRICES[name](problem).dense()
        for mode in ENGINES:
            op = MATRICES[name](problem, engine=mode)
            for _ in range(2):
                assert gap(op @ v, dense @ v) < 1e-12
    assert before == {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_half_precision_accumulates_in_float32(name: str) -> None:
    data = [(x.bfloat16(), y) for x, y in batches(1, torch.float32) * 40]
    problem = cs.Problem(smooth(torch.bfloat16), nn.CrossEntropyLoss(), data)
    single = cs.Problem(smooth(torch.bfloat16), nn.CrossEntropyLoss(), data[:1])
    v = columns(single, 1).float()
    many, one = MATRICES[name](problem) @ v, MATRICES[name](single) @ v
    assert many.dtype == torch.float32
    # forty times the same batch: a sum in bfloat16 would be off by a percent
    assert gap(many, one) < 1e-5


def test_bad_options() -> None:
    problem = problem_of()
    with pytest.raises(errors.OptionError, match="retained"):
        cs.hessian(problem, engine="retain")
    for bad in (0, -5, True):
        with pytest.raises(errors.OptionError, match="memory"):
            cs.ggn(problem, memory=bad)
