"""Approximations of the user's own: known to coverage, checks, reports and the monitor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import curvscope as cs
from curvscope.analysis.methods import METHODS
from curvscope.curvature.registered import _TAKEN, REGISTERED
from curvscope.errors import OptionError
from curvscope.operators import BlockDiagonalOperator, DenseOperator, DiagonalOperator, Operator
from curvscope.report.approximations import RECIPES
from curvscope.training.curvature_measures import FRESH, Fresh


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def problem(**options: object) -> cs.Problem:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    data = torch.randn(12, 4), torch.randint(2, (12,))
    return cs.Problem(model, torch.nn.CrossEntropyLoss(), data, **options)  # type: ignore[arg-type]


def squares(problem: cs.Problem, factor: float = 1.0, skip: str = "") -> Operator:
    """The squared gradient on the diagonal.

    Adam's view.
    """
    gradient = factor * problem.gradient() ** 2
    blocks = {
        name: DiagonalOperator(gradient[problem.layout.index(members)])
        for name, members in problem.blocks.items()
        if name != skip
    }
    return BlockDiagonalOperator(blocks, problem.layout, problem.blocks)


def test_names_of_curvscopes_own_are_taken() -> None:
    own = {recipe.name for recipe in RECIPES} | set(FRESH)
    own |= {name for name in METHODS if not name.startswith("BackPACK")}
    assert own <= _TAKEN
    for name in own:
        with pytest.raises(OptionError, match="own"):
            cs.register_approximation(name)
    with pytest.raises(OptionError, match="needs a name"):
        cs.register_approximation(" ")
    with pytest.raises(OptionError, match="must be a function"):
        cs.register_approximation("x")(3)  # type: ignore[arg-type]


def test_the_function_stays_and_its_first_sentence_is_what_it_is_about() -> None:
    assert cs.register_approximation("squares")(squares) is squares
    assert REGISTERED["squares"].about == "The squared gradient on the diagonal."
    cs.forget_approximation("squares")
    assert "squares" not in REGISTERED


def test_coverage_has_a_column_with_reasons() -> None:
    cs.register_approximation("squares")(lambda p: squares(p, skip="2"))
    found = cs.coverage(problem())
    assert found.methods[-1] == "squares"
    assert found.cell("0.weight", "squares").status == "covered"
    assert found.cell("2.weight", "squares").status == "uncovered"
    assert found.shares["squares"] == pytest.approx(15 / 23)


def test_what_is_no_operator_over_the_parameters_is_refused_with_what_to_do() -> None:
    cs.register_approximation("tensor")(lambda p: p.gradient())  # type: ignore[arg-type]
    cs.register_approximation("short")(lambda p: DenseOperator(torch.eye(2)))
    refused = cs.coverage(problem()).not_available
    assert "must return an Operator" in refused["tensor"]
    assert "layout=problem.layout" in refused["short"]


def test_checks_pass_for_what_is_right_and_name_what_is_wrong() -> None:
    cs.register_approximation("right")(squares)
    cs.register_approximation("sum, not mean")(lambda p: squares(p, float(p.n_samples)))
    cs.register_approximation("by batch")(lambda p: squares(p, float(p.check().batches)))
    skewed = torch.eye(23, dtype=torch.float64)

    def restless(p: cs.Problem) -> Operator:
        skewed[0, 0] += 1
        return DenseOperator(skewed.clone(), layout=p.layout)

    cs.register_approximation("restless")(restless)
    found = cs.verify(problem(), samples=6)
    assert found.trusted  # of the problem: somebody's approximation says nothing about it
    assert found.trust["right"] == "trust"
    assert [c.name for c in found.checks][-1] == "side effects"
    assert "every sample twice" in found.reasons["sum, not mean"]
    assert "cut into batches" in found.reasons["by batch"]
    assert "made again" in found.reasons["restless"]


def test_reports_show_it_and_name_its_reason_where_it_fails(tmp_path: Path) -> None:
    cs.register_approximation("squares")(squares)
    cs.register_approximation("tensor")(lambda p: p.gradient())  # type: ignore[arg-type]
    paths = cs.make_report(problem(params=["2"]), tmp_path / "r", hessian=False, verification=False)
    document = json.loads(paths.json.read_text())
    by_name = {entry["name"]: entry for entry in document["approximations"]}
    assert by_name["squares"]["about"] == "The squared gradient on the diagonal."
    assert by_name["squares"]["group"] == "your own"
    assert "must return an Operator" in by_name["tensor"]["reason"]
    assert "squares" in paths.html.read_text()


def test_the_monitor_takes_it_along() -> None:
    cs.register_approximation("squares")(squares)
    assert Fresh().names[-1] == "squares" and Fresh(["squares"]).names == ("squares",)
    with pytest.raises(OptionError, match="'squares'"):
        Fresh(["square"])


def test_forgetting_what_is_not_registered_names_the_nearest() -> None:
    cs.register_approximation("squares")(squares)
    with pytest.raises(OptionError, match=r"'sqares'.*'squares'\?"):
        cs.forget_approximation("sqares")
    cs.forget_approximation("squares")
    with pytest.raises(OptionError, match="Registered are: none"):
        cs.forget_approximation("squares")


def test_one_that_raises_is_named_and_costs_nothing_else(tmp_path: Path) -> None:
    @cs.register_approximation("crash")
    def crash(problem: cs.Problem) -> Operator:
        raise ValueError("boom")

    said = "The approximation 'crash' raised ValueError: boom (" + __file__
    found = cs.coverage(problem())
    assert found.not_available["crash"].startswith(said) and found.shares["crash"] == 0
    assert found.shares["K-FAC"] == 1
    paths = cs.make_report(problem(params=["2"]), tmp_path / "r", hessian=False, verification=False)
    entries = json.loads(paths.json.read_text())["approximations"]
    (reason,) = [e["reason"] for e in entries if e["name"] == "crash"]
    assert reason.startswith(said)


def test_what_an_approximation_changes_is_told_of_it_alone() -> None:
    cs.register_approximation("random")(lambda p: squares(p, float(torch.rand(()))))

    @cs.register_approximation("draws")
    def draws(problem: cs.Problem) -> Operator:
        torch.rand(3)
        return squares(problem)

    network = problem()
    state = torch.get_rng_state()
    found = cs.verify(network, samples=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.trust["leaving your objects unchanged"] == "trust"
    assert "draws changes what is not its own: torch's random state" in found.reasons["draws"]
    assert "made again" in found.reasons["random"]
    assert "torch's random state" in found.reasons["random"]


def test_an_error_in_an_approximation_is_placed_in_its_file() -> None:
    @cs.register_approximation("broken")
    def broken(problem: cs.Problem) -> Operator:
        return problem.no_such_thing  # type: ignore[attr-defined,no-any-return]

    try:
        found = cs.verify(problem(), samples=4)
    finally:
        cs.forget_approximation("broken")
    check = found.check("your approximation broken")
    line = broken.__code__.co_firstlineno + 2
    assert "AttributeError" in check.sentence
    assert f"test_registered.py, line {line}, in broken)" in check.sentence
    assert "differentiated" not in check.advice
    assert "1 failed (of other tools or approximations)" in str(found) or "of them of" in str(found)
