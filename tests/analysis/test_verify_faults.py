"""verify: every check fails on a fault made for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope.analysis.checks import (
    gaussnewton,
)
from curvscope.curvature import exact, factors, products
from curvscope.problem import losses
from tests.analysis import verify_models as models
from tests.analysis.verifying import check


def over_valid(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, ignore_index=2)


def test_mean_over_something_else_than_said() -> None:
    options = {"reduction": "mean", "check": False}
    data = models.inputs(4), models.classes()
    problem = models.problem_of(models.mlp, over_valid, *data, **options)
    outcome = check(problem, "objective")
    assert outcome.status == "failed"
    assert "reduction" in outcome.advice

    def counted(outputs: Tensor, targets: Tensor) -> float:
        return float((targets != 2).sum())

    right = models.problem_of(models.mlp, over_valid, *data, reduction=counted)
    assert check(right, "objective").status == "passed"
    assert check(right, "duplication").status == "passed"


def test_wrong_count_of_terms() -> None:
    def count(outputs: Tensor, targets: Tensor) -> float:
        return float(len(outputs)) ** 2

    data = models.inputs(4), models.classes()
    problem = models.problem_of(models.mlp, F.cross_entropy, *data, reduction=count, check=False)
    outcome = check(problem, "splitting into batches")
    assert outcome.status == "failed"
    assert check(problem, "objective").status == "failed"


def test_duplication_of_what_is_not_divided(monkeypatch) -> None:
    assert check(models.problem("sum of squares"), "duplication").status == "passed"
    assert check(models.problem("mlp"), "duplication").status == "passed"
    monkeypatch.setattr(cs.Problem, "scale", property(lambda self: 1.0))
    assert check(models.problem("sum of squares"), "duplication").status == "passed"
    assert check(models.problem("mlp"), "duplication").status == "failed"


# -- faults in curvscope ----------------------------------------------------------------------


def scaled(function: Callable[..., Tensor], factor: float) -> Callable[..., Tensor]:
    return lambda *args, **options: factor * function(*args, **options)


def test_wrong_hessian_products(monkeypatch) -> None:
    problem = models.problem("mlp")
    wrong = scaled(exact.WholeOperator._matmat, 1.001)
    monkeypatch.setattr(exact.WholeOperator, "_matmat", wrong)
    outcome = check(problem, "Hessian by double backward")
    assert outcome.status == "failed"
    assert outcome.value == pytest.approx(1e-3, rel=1e-4)
    assert check(problem, "Hessian by finite differences").status == "failed"
    assert check(problem, "GGN by definition").status == "failed"


def test_wrong_route_of_a_hessian_block(monkeypatch) -> None:
    from curvscope.curvature import plan

    problem = models.problem("mlp")
    assert check(problem, "Hessian blocks").status == "passed"
    monkeypatch.setattr(plan, "is_piecewise_linear", lambda *args, **options: True)
    outcome = check(problem, "Hessian blocks")
    assert outcome.status == "failed"
    assert "piecewise-linear" in outcome.sentence
    # the last layer is followed by nothing, so its route is right all the same
    assert outcome.details["0"] > 1e-3 > 1e-8 > outcome.details["2"]


def test_wrong_rows_of_a_hessian_block(monkeypatch) -> None:
    from curvscope.curvature import rowhessian

    wrong = scaled(rowhessian.input_rows, 1.01)
    monkeypatch.setattr(rowhessian, "input_rows", wrong)
    outcome = check(models.problem("mlp"), "Hessian blocks")
    assert outcome.status == "failed"
    assert "'rows'" in outcome.sentence


def test_wrong_scale_of_ggn_blocks(monkeypatch) -> None:
    monkeypatch.setattr(
        losses.CrossEntropy, "term_roots", scaled(losses.CrossEntropy.term_roots, 1.1)
    )
    problem = models.problem("mlp")
    outcome = check(problem, "GGN blocks")
    assert outcome.status == "failed"
    assert outcome.value == pytest.approx(0.21, rel=1e-6)
    assert check(problem, "GGN by definition").status == "passed"  # products do not use the roots


def test_wrong_scale_of_ggn_products(monkeypatch) -> None:
    wrong = scaled(products.output_hessian_product, 1.1)
    monkeypatch.setattr(products, "output_hessian_product", wrong)
    problem = models.problem("mlp")
    outcome = check(problem, "GGN by definition")
    assert outcome.status == "failed"
    assert outcome.value == pytest.approx(0.1, rel=1e-4)
    outcome = check(problem, "Fisher by enumerating labels")
    assert outcome.status == "failed"
    assert outcome.value == pytest.approx(0.1, rel=1e-6)
    assert check(models.problem("tokens"), "Fisher by enumerating labels").status == "failed"


def test_fisher_without_room_for_every_label(monkeypatch) -> None:
    from curvscope.analysis.checks import gaussnewton

    monkeypatch.setattr(gaussnewton, "_PASSES", 0)
    for name in ("class weights", "binary", "sum of squares", "tokens"):
        outcome = check(models.problem(name), "Fisher by enumerating labels")
        assert outcome.status == "passed", outcome
        assert "finite differences" in outcome.sentence
    assert check(models.problem("binary"), "GGN blocks").status == "passed"
    monkeypatch.setattr(
        products, "output_hessian_product", scaled(products.output_hessian_product, 1.1)
    )
    assert check(models.problem("binary"), "Fisher by enumerating labels").status == "failed"


def test_wrong_class_weights(monkeypatch) -> None:
    """Weights that reach the Fisher twice."""
    problem = models.problem("class weights")

    def twice(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weight = self.weight.to(outputs) ** 2
        return F.cross_entropy(outputs, targets, weight=weight, reduction="sum")

    assert check(problem, "objective").status == "passed"
    monkeypatch.setattr(losses.CrossEntropy, "total", twice)
    assert check(problem, "objective").status == "failed"


def test_wrong_sampled_labels(monkeypatch) -> None:
    wrong = scaled(losses.CrossEntropy.term_scores, 1.5)
    monkeypatch.setattr(losses.CrossEntropy, "term_scores", wrong)
    outcome = check(models.problem("mlp"), "sampled Fisher")
    assert outcome.status == "failed"
    assert outcome.value > 5


def test_rare_labels_accuse_nobody(monkeypatch) -> None:
    """Of one sample the model is sure, and its rare label carries the Fisher: others hide it."""
    generator = torch.Generator().manual_seed(0)
    inputs = 0.2 * torch.randn(16, 1, generator=generator)
    inputs[3] = 30.0
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]) * 8 / 60)  # log-odds of 8 at the sample
    problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), (inputs, torch.arange(16) % 2))

    def statuses() -> set[str]:
        return {check(problem, "sampled Fisher", seed=seed).status for seed in range(4)}

    assert statuses() <= {"passed", "skipped"}
    monkeypatch.setattr(gaussnewton, "_label_spread", lambda case: 0.0)
    assert "failed" in statuses()


def test_wrong_empirical_fisher(monkeypatch) -> None:
    original = products.scaled_terms

    def wrong(*args, **options):
        return [1.1 * u for u in original(*args, **options)]

    monkeypatch.setattr(products, "scaled_terms", wrong)
    outcome = check(models.problem("class weights"), "empirical Fisher by sample")
    assert outcome.status == "failed"
    assert outcome.value == pytest.approx(0.21, rel=1e-6)


def test_wrong_kronecker_factors(monkeypatch) -> None:
    monkeypatch.setattr(factors, "second_moment", scaled(factors.second_moment, 2.0))
    outcome = check(models.problem("mlp"), "K-FAC on one sample")
    assert outcome.status == "failed"
    assert outcome.value == pytest.approx(3.0)


def test_asymmetric_products(monkeypatch) -> None:
    original = exact.WholeOperator._matmat

    def skewed(self, vectors: Tensor) -> Tensor:
        return original(self, vectors) + 1e-3 * vectors.roll(1, 0)

    problem = models.problem("mlp")
    assert check(problem, "symmetry").status == "passed"
    monkeypatch.setattr(exact.WholeOperator, "_matmat", skewed)
    outcome = check(problem, "symmetry")
    assert outcome.status == "failed"
    assert set(outcome.details) == {"Hessian", "GGN"}


def test_negative_products(monkeypatch) -> None:
    monkeypatch.setattr(exact.WholeOperator, "_matmat", scaled(exact.WholeOperator._matmat, -1.0))
    outcome = check(models.problem("mlp"), "positive semi-definiteness")
    assert outcome.status == "failed"


def test_wrong_backpack_adapter(monkeypatch) -> None:
    from curvscope.curvature import backpack

    original = backpack.diag_ggn
    monkeypatch.setattr(backpack, "diag_ggn", lambda problem: original(problem).scaled(1.1))
    outcome = check(models.problem("mlp"), "cs.backpack")
    assert outcome.status == "failed"
    assert outcome.details["DiagGGNExact"] == pytest.approx(0.1)
    assert outcome.details["DiagHessian"] < 1e-10
    assert "DiagGGNExact" in outcome.sentence


# -- the machinery ----------------------------------------------------------------------------
