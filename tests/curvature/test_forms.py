"""The forms in which large blocks are kept, forced on the small ones of the table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.curvature import accumulate
from curvscope.operators import (
    DenseOperator,
    LowRankOperator,
    Operator,
    RowGramOperator,
    RowHessianOperator,
)

from .cases import CASES, CE
from .draws import data, labels, lengths, real
from .nets import Apply, mlp, seeded, tokens_last
from .reference import Case, Reference
from .test_table import close, prepared


@pytest.fixture(params=range(len(CASES)), ids=[c.name for c in CASES])
def large(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[cs.Problem, Reference]:
    """A case whose blocks all count as too large for a dense matrix."""
    monkeypatch.setattr(accumulate, "_DENSE_SIZE", 1)
    return prepared(request.param)


def test_factored_blocks(large: tuple[cs.Problem, Reference]) -> None:
    problem, truth = large
    generator = torch.Generator().manual_seed(1)
    matrices = [(cs.ggn(problem), truth.ggn)]
    matrices += [(cs.empirical_fisher(problem), truth.empirical_fisher("sample"))]
    for op, matrix in matrices:
        for name, members in op.members.items():
            index = op.layout.index(members)
            part, block = matrix[index][:, index], op.blocks[name]
            vectors = torch.randn(len(index), 2, generator=generator, dtype=torch.float64)
            close(block.dense(), part, name)
            close(block @ vectors, part @ vectors, name)
            close(block.diagonal(), part.diagonal(), name)
            scale = max(float(part.norm()), 1e-8)
            assert abs(block.trace() - float(part.trace())) < 1e-10 * scale
            assert abs(block.frobenius_norm() - float(part.norm())) < 1e-10 * scale
        whole = op.vectors()
        if whole is not None:
            close(whole.dense(), matrix, "vectors")


@pytest.mark.parametrize(
    ("name", "block", "form"),
    [
        ("tanh-ce", "0", RowGramOperator),
        ("conv2d-circular-groups", "0", LowRankOperator),
        ("tied-language", "embed", DenseOperator),
        ("layernorm", "1", DenseOperator),
    ],
)
def test_which_form(
    name: str, block: str, form: type[Operator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulate, "_DENSE_SIZE", 1)
    problem, _ = prepared([c.name for c in CASES].index(name))
    assert isinstance(cs.ggn(problem).blocks[block], form)


def test_rows_of_several_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide layer on few tokens: kept as rows, with every position of a sample in one vector."""
    monkeypatch.setattr(accumulate, "_DENSE_SIZE", 1)
    case = Case(
        "wide tokens",
        lambda: seeded(
            lambda: nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 2), Apply(tokens_last))
        ),
        CE(),
        lengths(((2, 2), (1, 3)), lambda t: real(t, 9), lambda t: labels(2, t)),
    )
    problem = cs.Problem(case.model(), case.loss, case.batches())
    truth = Reference(case, list(problem.params))
    for op, matrix in ((cs.ggn(problem), truth.ggn), (cs.hessian(problem), truth.hessian)):
        close(op.blocks["0"].dense(), matrix[:60, :60], op.info.what)
    assert isinstance(cs.ggn(problem).blocks["0"], RowGramOperator)


def test_hessian_rows_with_and_without_factors() -> None:
    """Many samples and few parameters: the sum over samples is the smaller form."""
    case = Case(
        "wide",
        lambda: seeded(lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 2))),
        CE(),
        data((20, 21), real(1), labels(2)),
    )
    model = case.model()
    problem = cs.Problem(model, case.loss, case.batches())
    truth = Reference(case, list(problem.params)).hessian
    op = cs.hessian(problem, route="rows")
    assert isinstance(op.blocks["0"], DenseOperator)
    close(op.blocks["0"].dense(), truth[:6, :6], "summed over samples")
    few = cs.Problem(seeded(lambda: mlp(nn.Tanh, 3, 4, 3)), CE(), data((4,), real(3), labels(3))())
    assert isinstance(cs.hessian(few).blocks["0"], RowHessianOperator)


def test_lengths_that_switch_between_forms() -> None:
    """Batches of one and of several positions, in either order."""
    for sizes in (((3, 1), (2, 3)), ((2, 3), (3, 1)), ((1, 2), (2, 1), (1, 4))):
        case = Case(
            "lengths",
            lambda: seeded(
                lambda: nn.Sequential(
                    nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), Apply(tokens_last)
                )
            ),
            CE(),
            lengths(sizes, lambda t: real(t, 2), lambda t: labels(3, t)),
        )
        problem = cs.Problem(case.model(), case.loss, case.batches())
        truth = Reference(case, list(problem.params))
        for route in ("auto", "rows"):
            op = cs.hessian(problem, route=route)
            for name, members in op.members.items():
                index = op.layout.index(members)
                close(op.blocks[name].dense(), truth.hessian[index][:, index], route)
        close(cs.ggn(problem).blocks["0"].dense(), truth.ggn[:9, :9], "ggn")
