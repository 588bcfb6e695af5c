"""What every optimizer says of its curvature: blocks, exact inverses, damping, comparisons."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors
from curvscope.operators import BlockDiagonalOperator, Operator

from .every_method import IMAGES, METHODS, ROWS, Method, cnn, each_method, mlp
from .kronecker_cases import labels, normal, relative, seeded

NETS = {"cnn": (cnn, IMAGES), "mlp": (mlp, ROWS)}
each_net = pytest.mark.parametrize("net", NETS)


def trained(method: Method, net: str, steps: int = 5, **options: Any) -> tuple[nn.Module, Any]:
    make, shape = NETS[net]
    model = make()
    optimizer = method.build(model, **options)
    method.run(optimizer, model, shape, steps)
    return model, optimizer


def problem_of(model: nn.Module, net: str) -> cs.Problem:
    shape = NETS[net][1]
    return cs.Problem(model, nn.CrossEntropyLoss(), (normal(*shape, seed=50), labels(shape[0])))


def pieces(op: Operator) -> dict[str, Operator]:
    """Blocks of a block-diagonal matrix, or the whole one."""
    return dict(op.blocks) if isinstance(op, BlockDiagonalOperator) else {"(all)": op}


@each_method
@each_net
def test_curvature_is_exactly_the_inverse_of_the_preconditioner(method: Method, net: str) -> None:
    _, optimizer = trained(method, net)
    matrix, inverse = optimizer.curvature(), optimizer.preconditioner()
    assert matrix.uncovered == inverse.uncovered and matrix.layout == inverse.layout
    assert list(pieces(matrix)) == list(pieces(inverse)) and pieces(matrix)
    for name, block in pieces(matrix).items():
        B, H = block.dense(), pieces(inverse)[name].dense()
        assert float((B @ H - torch.eye(len(B), dtype=B.dtype)).abs().max()) < 1e-8, name
        assert torch.equal(B, B.mT) and torch.linalg.eigvalsh(B)[0] > 0
        v = normal(len(B), seed=1)
        assert relative(block @ (pieces(inverse)[name] @ v), v) < 1e-8


@each_method
@each_net
def test_blocks_are_those_of_the_problem(method: Method, net: str) -> None:
    model, optimizer = trained(method, net)
    problem = problem_of(model, net)
    assert optimizer.layout == problem.layout
    assert list(optimizer.blocks) == list(problem.blocks)
    for op in (
        optimizer.curvature(),
        optimizer.curvature(damped=False),
        optimizer.preconditioner(),
    ):
        assert op.layout == problem.layout and op.dtype == torch.float64
        assert op.shape == (problem.layout.numel,) * 2
        expected = [name for name in problem.blocks if name not in op.uncovered]
        assert list(op.blocks) == expected and set(op.uncovered) < set(problem.blocks)
        for name in expected:
            names = problem.blocks[name]
            assert op.blocks[name].layout == problem.layout.restrict(names)
            assert torch.equal(op.restrict(names).dense(), op.blocks[name].dense())
        with pytest.raises(errors.UnknownBlockError):
            op.blocks["nowhere"]


@each_method
@each_net
def test_the_operator_says_how_it_is_damped(method: Method, net: str) -> None:
    _, optimizer = trained(method, net)
    own = {**optimizer.param_groups[0], "memory": None}
    expected = own.get("damping", own.get("eps", getattr(optimizer, "damping", None)))
    for damped in (True, False):
        op = optimizer.curvature(damped=damped)
        for info in (op.info, *(b.info for b in op.blocks.values())):
            assert info.settings["damping"] == expected
            assert info.settings["damped"] is damped
            assert info.route == "optimizer" and not info.exact and method.make.__name__
        assert op.info.settings["steps"] == 5
    assert "damped" not in optimizer.preconditioner().info.settings
    assert "damping" not in optimizer.preconditioner().info.settings


@each_net
def test_all_of_them_compare_with_the_hessian(net: str) -> None:
    ops: dict[str, Operator] = {}
    for method in METHODS:
        model, optimizer = trained(method, net)
        ops[method.name] = optimizer.curvature()
    problem = problem_of(model, net)
    found = cs.compare(cs.hessian(problem), ops, gradient=problem)
    assert found.approximations == tuple(ops) and found.blocks == tuple(problem.blocks)
    for name, op in ops.items():
        for block in problem.blocks:
            row = found.row(block, name)
            if block in op.uncovered:
                assert row.status == "uncovered" and "BatchNorm" in row.note
                continue
            assert row.status == "compared" and math.isfinite(row.error)
            assert row.damping == op.info.settings["damping"]
            values = op.blocks[block].eigenvalues()
            # the damping is not added to it once more
            condition = float(values[-1] / values[0])
            assert row["condition_number"] == pytest.approx(condition, rel=1e-6)
        assert found.row("(all)", name).status == ("partial" if op.uncovered else "compared")
    assert any("contain their damping" in w for w in found.warnings)


@each_method
def test_steps_are_compared_under_the_damping_of_the_method(method: Method) -> None:
    """The reference is damped as the method is; the method's own step stays what it is."""
    model, optimizer = trained(method, "mlp")
    problem = problem_of(model, "mlp")
    g = problem.gradient()
    reference, op = cs.ggn(problem), optimizer.curvature()
    damping = op.info.settings["damping"]
    found = cs.compare(reference, {"it": op}, gradient=g)
    for name in op.blocks:
        index = problem.layout.index(problem.blocks[name])
        B = op.blocks[name].dense()
        R = reference.blocks[name].dense() + damping * torch.eye(len(B), dtype=B.dtype)
        ours, theirs = torch.linalg.solve(R, g[index]), torch.linalg.solve(B, g[index])
        cosine = float(ours @ theirs / (ours.norm() * theirs.norm()))
        angle = math.degrees(math.acos(min(1.0, cosine)))
        row = found.row(name, "it")
        assert row["step_angle"] == pytest.approx(angle, rel=1e-6, abs=1e-4)
        assert row["predicted_decrease"] == pytest.approx(float(g[index] @ theirs) / 2, rel=1e-8)


@pytest.mark.parametrize("method", METHODS[:-1], ids=[m.name for m in METHODS[:-1]])
def test_damping_that_differs_between_blocks(method: Method) -> None:
    """M-FAC has one damping for all."""
    key = "eps" if method.name == "AdaHessian" else "damping"
    model = mlp()
    groups = [
        {"params": list(model[0].parameters()), key: 0.5},
        {"params": [*model[1].parameters(), *model[3].parameters()]},
    ]
    optimizer = method.build(model, params=groups)
    method.run(optimizer, model, ROWS, 3)
    op = optimizer.curvature()
    rest = optimizer.param_groups[1][key]
    expected = {name: 0.5 if name == "0" else rest for name in op.blocks}
    assert op.info.settings["damping"] == expected
    found = cs.compare(cs.ggn(problem_of(model, "mlp")), {"it": op})
    assert {n: found.row(n, "it").damping for n in op.blocks} == expected
    assert found.row("(all)", "it").damping is None
    assert any("differs between blocks" in w for w in found.warnings)
    for name, block in op.blocks.items():
        product = block.dense() @ optimizer.preconditioner().blocks[name].dense()
        assert float((product - torch.eye(len(product)).double()).abs().max()) < 1e-8


@each_method
def test_before_the_first_step(method: Method) -> None:
    model = mlp()
    optimizer = method.build(model)
    problem = problem_of(model, "mlp")
    for op in (
        optimizer.curvature(),
        optimizer.curvature(damped=False),
        optimizer.preconditioner(),
    ):
        assert op.uncovered == tuple(problem.blocks) and not op.blocks
        assert op.layout == problem.layout and op.dtype == torch.float64
        with pytest.raises(errors.UncoveredError, match="does not define '0', '1', '3'"):
            op @ torch.ones(op.shape[0], dtype=torch.float64)
        assert op.info.settings["uncovered"]["0"] == "no step has been taken"
    found = cs.compare(cs.ggn(problem), {"new": optimizer.curvature()})
    row = found.row("0", "new")
    assert row.status == "uncovered" and "no step has been taken" in row.note
    with pytest.raises(errors.UncoveredError, match="no step has been taken"):
        optimizer.factors("0")
    with pytest.raises(errors.UnknownBlockError, match="Blocks: 0, 1, 3"):
        optimizer.factors("2")


class Gated(nn.Module):
    """A layer that runs only sometimes, one that never runs as a module, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.inner = nn.Linear(5, 4)
        self.never = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x * self.scale))
        return self.head(torch.tanh(nn.functional.linear(x, self.never.weight, self.never.bias)))


@each_method
def test_partial_coverage_keeps_the_names_of_the_problem(method: Method) -> None:
    model = seeded(Gated)
    optimizer = method.build(model)
    method.run(optimizer, model, ROWS, 3)
    problem = problem_of(model, "mlp")
    op = optimizer.curvature()
    assert op.layout == problem.layout == optimizer.layout
    assert list(optimizer.blocks) == list(problem.blocks) == ["(root)", "inner", "never", "head"]
    by_layers = method.name not in ("AdaHessian", "M-FAC")
    assert op.uncovered == (("(root)", "never") if by_layers else ())
    rules = {row["block"]: row["rule"] for row in optimizer.coverage()}
    assert {b for b, rule in rules.items() if rule == optimizer.method} == set(op.blocks)
    found = cs.compare(cs.hessian(problem), {"it": op})
    assert found.row("inner", "it").status == "compared"
    if by_layers:
        assert "never fired" in found.row("never", "it").note
        assert "not defined for Gated" in found.row("(root)", "it").note
        assert found.row("(all)", "it").status == "partial"
        v = normal(op.shape[0])
        filled = op.with_uncovered("zero") @ v
        index = problem.layout.index(["scale", "never.weight", "never.bias"])
        assert float(filled[index].abs().max()) == 0
        index = problem.layout.index(problem.blocks["head"])
        assert relative(filled[index], op.blocks["head"] @ v[index]) < 1e-14


@each_method
def test_an_optimizer_of_some_parameters_compares_with_their_problem(method: Method) -> None:
    model = mlp()
    optimizer = method.build(model, params=["3"])
    method.run(optimizer, model, ROWS, 2)
    x, y = normal(*ROWS), labels(ROWS[0])
    problem = cs.Problem(model, nn.CrossEntropyLoss(), (x, y), params=["3"])
    found = cs.compare(cs.hessian(problem), {"it": optimizer.curvature()})
    assert found.row("3", "it").status == "compared" and found.row("(all)", "it").error > 0
    whole = cs.Problem(model, nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(errors.ParameterMismatchError, match="restrict"):
        cs.compare(cs.hessian(whole), {"it": optimizer.curvature()})


@each_method
def test_what_was_read_does_not_change_with_the_next_step(method: Method) -> None:
    make, shape = NETS["cnn"]
    model = make()
    optimizer = method.build(model)
    method.run(optimizer, model, shape, 2)
    ops = [optimizer.curvature(), optimizer.curvature(damped=False), optimizer.preconditioner()]
    before = [{n: b.dense() for n, b in op.blocks.items()} for op in ops]
    method.run(optimizer, model, shape, 4, start=2)
    for op, old in zip(ops, before, strict=True):
        for name, block in op.blocks.items():
            assert torch.equal(block.dense(), old[name]), name


@each_method
def test_reading_changes_nothing(method: Method) -> None:
    def train(look: bool) -> Tensor:
        model = cnn()
        optimizer = method.build(model)
        for k in range(4):
            if look:
                optimizer.curvature(), optimizer.preconditioner(), optimizer.curvature(damped=False)
                optimizer.diagnostics(), optimizer.coverage()
                if k:
                    optimizer.factors("0")
            method.run(optimizer, model, IMAGES, 1, start=k)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    assert torch.equal(train(True), train(False))


@each_method
def test_diagnostics_have_what_every_method_can_say(method: Method) -> None:
    _, optimizer = trained(method, "cnn", steps=3)
    op = optimizer.preconditioner()
    for row in optimizer.diagnostics():
        assert row["step"] == 3
        if row["block"] in op.uncovered:
            assert row["rule"] == "adam" and len(row) == 3
            continue
        assert row["rule"] == optimizer.method
        assert 0 <= row["age"] < 3 and 0 <= row["angle"] <= 180
        if method.name != "M-FAC":  # whose numbers are those of the whole matrix
            values = op.blocks[row["block"]].eigenvalues()
            assert row["condition"] == pytest.approx(float(values[-1] / values[0]), rel=1e-5)
    assert "condition" in optimizer.diagnostics().to_frame().columns
