"""Hessian blocks by way of the Hessians in places that all later effects pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.curvature import cuts
from curvscope.curvature.cuts import Cuts, SecondDerivative
from curvscope.curvature.dominators import Place, dominators

from .cases import CASES
from .test_table import close, prepared


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Every layer goes by way of the closest place there is; which of them could."""
    found: list[bool] = []
    second = Cuts.second

    def nearest(self: Cuts, place: Place, *_: Any) -> tuple[float, Place | None]:
        return 0.0, next((cut for cut in place.chain() if cut in self.widths), None)

    def noted(self: Cuts, z: Tensor, rows: int) -> SecondDerivative:
        result = second(self, z, rows)
        found.append(result.cut is not None)
        return result

    monkeypatch.setattr(cuts, "_WORTH_A_CUT", 1)
    monkeypatch.setattr(Cuts, "_best", nearest)
    monkeypatch.setattr(Cuts, "second", noted)
    yield found


@pytest.mark.parametrize("index", range(0, len(CASES), 2), ids=[c.name for c in CASES[::2]])
def test_cases_case(index: int, taken: list[bool]) -> None:
    problem, truth = prepared(index)
    op = cs.hessian(problem, route="rows")
    names = [name for name, plan in op.plans.items() if "rows" in plan.routes]
    for name in names:
        part = op.layout.index(op.members[name])
        close(op.blocks[name].dense(), truth.hessian[part][:, part], name)
    assert len(taken) >= len(names)
    if problem.loss.likelihood is not None:  # the outputs at least are such a place
        assert all(taken)


def test_graph_with_a_detour() -> None:
    x = torch.ones(3, requires_grad=True)
    trunk = x.exp()
    joined = trunk + trunk.sin().cos()
    total = joined.square().sum()
    places = dominators(total.grad_fn)
    at = {type(p.node).__name__: p for p in places.values()}
    chain = [type(p.node).__name__ for p in at["ExpBackward0"].chain()]
    assert chain == ["AddBackward0", "PowBackward0"]
    assert at["CosBackward0"].above is at["AddBackward0"]
    assert at["AddBackward0"].behind < at["CosBackward0"].behind < at["ExpBackward0"].behind
    assert at["AddBackward0"].described() == ((3,), torch.float32)


class _Token(nn.Module):
    """A residual branch with attention-like coupling of positions, then another branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix = nn.Linear(3, 4), nn.Linear(4, 4)
        self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        z = self.mix(x)
        x = x + (z @ z.mT).softmax(-1) @ z
        x = x + self.down(self.up(x).tanh())
        return self.head(x.tanh().mean(1))


def _tokens(samples: int) -> cs.Problem:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 9, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (samples,), generator=generator)
    cut = samples // 2 + 1
    batches = [(inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:])]
    return cs.Problem(_Token().double(), nn.CrossEntropyLoss(), batches)


def test_shared_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _tokens(5)
    names = ["first", "mix", "up", "down"]
    monkeypatch.setattr(
        Cuts, "second", lambda s, z, r: SecondDerivative(s.total, z, z.shape, r > 16)
    )
    plain = {n: cs.hessian(problem, route="rows").blocks[n].dense() for n in names}
    monkeypatch.undo()
    chosen: list[Any] = []
    second = Cuts.second

    def noted(self: Cuts, z: Tensor, rows: int) -> SecondDerivative:
        chosen.append(second(self, z, rows))
        return chosen[-1]

    monkeypatch.setattr(Cuts, "second", noted)
    op = cs.hessian(problem)
    monkeypatch.setattr(op, "_valid", lambda name: ["rows"] if name in names else ["autograd"])
    op.compute_rows(op.members)
    assert set(op._blocks) == set(names)
    assert any(one.cut is not None for one in chosen)
    for name in names:
        close(op._blocks[name].dense(), plain[name], name)
        alone = cs.hessian(problem, route="rows").blocks[name]
        close(alone.dense(), plain[name], name)
        plan = op.plans[name]
        assert op._blocks[name].info.passes == alone.info.passes
        assert alone.info.passes == 2 * plan.positions * plan.outputs
    whole = cs.hessian(problem).dense()
    index = problem.layout.index(problem.blocks["mix"])
    close(op._blocks["mix"].dense(), whole[index][:, index])


def test_what_disagrees_is_not_used(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _tokens(4)
    solve = Cuts._solve

    def wrong(self: Cuts, place: Place) -> None:
        solve(self, place)
        assert place.hessian is not None
        place.hessian = place.hessian * 1.01

    reference = cs.hessian(problem, route="rows").blocks["up"].dense()
    assert taken == [True, True]
    monkeypatch.setattr(Cuts, "_solve", wrong)
    close(cs.hessian(problem, route="rows").blocks["up"].dense(), reference)
    assert taken[2:] == [False, False]
