"""Every exact quantity of every case against dense truth, in float64, to 1e-10."""

from __future__ import annotations

import functools

import pytest
import torch

import curvscope as cs
from tests.truth import relative

from .cases import CASES
from .reference import Case, Reference, likelihood

TOLERANCE = 1e-10


def problem_of(case: Case) -> cs.Problem:
    batches = case.batches()
    data = batches if case.load is None else case.load(batches)
    return cs.Problem(case.model(), case.loss, data, **case.options)


@functools.cache
def prepared(case_index: int) -> tuple[cs.Problem, Reference]:
    case = CASES[case_index]
    problem = problem_of(case)
    return problem, Reference(case, list(problem.params))


@pytest.fixture(params=range(len(CASES)), ids=[c.name for c in CASES])
def setting(request: pytest.FixtureRequest) -> tuple[Case, cs.Problem, Reference]:
    return CASES[request.param], *prepared(request.param)


def close(value: torch.Tensor, truth: torch.Tensor, what: str = "") -> None:
    assert value.shape == truth.shape, what
    error = float((value - truth).norm())
    assert error <= TOLERANCE * max(float(truth.norm()), 1e-8), f"{what}: {error:.3g}"


def check_matrix(op: cs.Operator, truth: torch.Tensor, routes: tuple[str, ...]) -> None:
    """Whole matrix, products, diagonal, trace, and every block by the automatic route."""
    close(op.dense(), truth, "dense")
    # a fresh operator: the one above remembers its dense matrix
    fresh = routes_of(op, "auto")
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(len(truth), 3, generator=generator, dtype=torch.float64)
    close(fresh @ vectors, truth @ vectors, "product with columns")
    close(fresh @ vectors[:, 0], truth @ vectors[:, 0], "product with a vector")
    close(fresh.diagonal(), truth.diagonal(), "diagonal")
    assert fresh.trace() == pytest.approx(float(truth.trace()), rel=1e-9, abs=1e-12)
    forced = {
        route: routes_of(op, "gram" if route == "piecewise-linear" else route) for route in routes
    }
    for name, members in fresh.members.items():
        index = fresh.layout.index(members)
        part = truth[index][:, index]
        close(fresh.blocks[name].dense(), part, f"block {name} by {fresh.route_of(name)}")
        close(fresh.blocks[name] @ vectors[index], part @ vectors[index], f"block {name} @")
        close(fresh.blocks[name].diagonal(), part.diagonal(), f"block {name} diagonal")
        for route in routes:
            if route not in fresh.plans[name].routes:
                continue
            assert forced[route].route_of(name) == route
            block, what = forced[route].blocks[name], f"block {name} by forced {route}"
            if route == "autograd":  # one column at a time: two are enough
                close(block @ vectors[index][:, :2], part @ vectors[index][:, :2], what)
            else:
                close(block.dense(), part, what)


def routes_of(op: cs.Operator, route: str) -> cs.Operator:
    """The same matrix again, by another route."""
    kind = op.kind
    if kind.matrix == "hessian":
        return cs.hessian(op.problem, route=route)
    if kind.matrix == "ggn":
        return cs.ggn(op.problem, route=route)
    if kind.matrix == "fisher":
        return cs.fisher(op.problem, route=route)
    return cs.empirical_fisher(op.problem, per=kind.per, route=route)


def test_enough_cases() -> None:
    assert len(CASES) >= 60
    assert len({c.name for c in CASES}) == len(CASES)


def test_objective_and_gradient(setting) -> None:
    _, problem, truth = setting
    assert problem.objective() == pytest.approx(float(truth.value.detach()), rel=1e-12)
    assert problem.scale == pytest.approx(truth.scale, rel=1e-12)
    close(problem.gradient(), truth.gradient, "gradient")


def test_hessian(setting) -> None:
    _, problem, truth = setting
    check_matrix(cs.hessian(problem), truth.hessian, ("piecewise-linear", "rows", "autograd"))


def test_ggn(setting) -> None:
    _, problem, truth = setting
    check_matrix(cs.ggn(problem), truth.ggn, ("gram", "autograd"))


def test_fisher(setting) -> None:
    case, problem, truth = setting
    if likelihood(case.loss) is None:
        with pytest.raises(cs.errors.UnsupportedLossError, match=r"cs\.ggn or cs\.hessian"):
            cs.fisher(problem)
        return
    check_matrix(cs.fisher(problem), truth.ggn, ())  # the routes are those of the GGN
    assert relative(truth.enumerated_fisher(), truth.ggn) < 1e-10


@pytest.mark.parametrize("per", ["sample", "term"])
def test_empirical_fisher(setting, per: str) -> None:
    case, problem, truth = setting
    if per == "term" and (case.terms is not None or truth.owner.numel() == truth.term_count):
        return  # a plain callable does not say what its terms are; or terms are samples
    op = cs.empirical_fisher(problem, per=per)
    routes = ("gram", "autograd") if per == "sample" else ()
    check_matrix(op, truth.empirical_fisher(per), routes)
