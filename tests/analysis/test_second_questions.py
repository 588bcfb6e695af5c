"""What was computed is not computed again, is said once, and what is refused has another way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.curvature import gram
from curvscope.curvature.autograd import AutogradOperator
from curvscope.errors import MemoryLimitError


@pytest.fixture
def problem() -> cs.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2)).double()
    data = torch.randn(10, 4, dtype=torch.float64), torch.randint(2, (10,))
    return cs.Problem(model, nn.CrossEntropyLoss(), data)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    for name in ("gram_blocks", "row_blocks"):
        monkeypatch.setattr(f"curvscope.curvature.whole.{name}", fail)
    monkeypatch.setattr(AutogradOperator, "_columns", fail)
    monkeypatch.setattr(gram, "record_batch", fail)


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("make", [cs.hessian, cs.ggn], ids=["hessian", "ggn"])
def test_the_trace_after_the_spectrum_is_there(
    problem: cs.Problem, make: object, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = make(problem)  # type: ignore[operator]
    expected = make(problem).dense().diagonal()  # type: ignore[operator]
    before = cs.trace(op)
    assert before.method == "hutchinson"
    cs.spectrum(op, blocks=blocks)
    with monkeypatch.context() as patch:
        forbid(patch)
        found, diagonal = cs.trace(op), cs.diagonal(op)
    assert found.method == diagonal.method == "exact"
    torch.testing.assert_close(diagonal.value, expected, rtol=1e-10, atol=1e-12)
    assert found.value == pytest.approx(float(expected.sum()), rel=1e-10)


def test_some_blocks_are_not_all(problem: cs.Problem) -> None:
    op = cs.hessian(problem, route="autograd")
    op.blocks["0"].dense()
    assert not op.diagonal_is_known and cs.trace(op).method == "hutchinson"
    assert len(list(op.blocks.values())) == 3 and not op.diagonal_is_known
    for block in op.blocks.values():  # those by double backward are known when they are formed
        block.dense()
    assert op.diagonal_is_known


def test_a_mode_is_said_once(problem: cs.Problem) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.Linear(3, 2)).double().train()
    other = cs.Problem(model, nn.CrossEntropyLoss(), next(iter(problem.batches())))
    found = cs.compare(cs.ggn(other), {"K-FAC": cs.kfac(other), "EKFAC": cs.ekfac(other)})
    (said,) = [text for text in found.warnings if "train mode" in text]
    assert said.startswith("GGN, K-FAC (exact Fisher) and EKFAC (exact Fisher): computed as")


def test_who_is_refused_a_matrix_hears_of_the_way_that_works(
    problem: cs.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = cs.hessian(problem)
    names = {
        lambda: cs.spectrum(op): ["cs.spectrum(op, blocks=True)", "cs.density(op)", "cs.eigsh(op)"],
        lambda: op.plot(): ["op.blocks[...].plot()", "cs.density(op).plot()"],
        lambda: op.inner(cs.fisher(problem)): ["method='estimated'"],
        lambda: op.dense(): ["op @ v", "cs.compare"],
    }
    with monkeypatch.context() as patch:
        patch.setattr("curvscope.memory.available_bytes", lambda *_: 100)
        for call, ways in names.items():
            with pytest.raises(MemoryLimitError) as refused:
                call()
            assert all(way in str(refused.value) for way in ways), refused.value
    cs.compare(op, {"other": cs.fisher(problem)}, method="estimated")
