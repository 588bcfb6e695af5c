"""verify: models and losses that cannot be trusted are told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.analysis.checks import (
    CHECKS,
    Marks,
)
from tests.analysis import verify_models as models
from tests.analysis.verifying import case, check, run


def test_wrong_backward() -> None:
    found = cs.verify(models.custom(models.WrongBackward))
    outcome = found.check("gradient")
    assert outcome.status == "failed"
    assert "in or after 2" in outcome.sentence
    assert outcome.details["4"] < 1e-6 < 0.01 < outcome.details["2"]
    assert not found.trusted
    for capability in ("gradient", "Hessian", "GGN", "K-FAC"):
        assert found.trust[capability] == "do not trust"


def test_gradient_that_is_constant_to_autograd() -> None:
    problem = models.custom(models.DetachedBackward)
    assert check(problem, "gradient").status == "passed"
    outcome = check(problem, "Hessian by finite differences")
    assert outcome.status == "failed"
    assert outcome.value > 1e-3
    # double backward agrees with double backward: only finite differences can tell
    assert check(problem, "Hessian by double backward").status == "passed"


def test_once_differentiable() -> None:
    problem = models.custom(models.OnceDifferentiable)
    assert check(problem, "gradient").status == "passed"
    assert check(problem, "Hessian by finite differences").status == "failed"
    outcome = check(problem, "Hessian by double backward")
    assert outcome.status == "failed"
    assert "once_differentiable" in outcome.sentence


def test_random_model() -> None:
    problem = models.problem_of(
        models.Noisy, nn.CrossEntropyLoss(), models.inputs(4), models.classes(), check=False
    )
    outcome = check(problem, "determinism")
    assert outcome.status == "failed"
    assert outcome.value > 0.01


def test_batch_statistics_couple_samples() -> None:
    def build() -> nn.Module:
        norm = nn.BatchNorm1d(5, track_running_stats=False)
        return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3))

    problem = models.problem_of(build, nn.CrossEntropyLoss(), models.inputs(4), models.classes())
    outcome = check(problem, "splitting into batches")
    assert outcome.status == "failed"
    assert outcome.details["one batch"] > 0.01
    assert "single samples raised" in outcome.sentence
    assert check(problem, "objective").status == "failed"


def test_lost_batch_axis() -> None:
    problem = models.problem_of(
        models.Squeezing, nn.CrossEntropyLoss(), models.inputs(4), models.classes()
    )
    outcome = check(problem, "splitting into batches")
    assert outcome.status == "failed"
    assert "single samples raised TargetError" in outcome.sentence
    assert outcome.details["thirds"] < 1e-12


def test_state_of_the_model() -> None:
    problem = models.problem_of(
        models.Stateful, nn.CrossEntropyLoss(), models.inputs(4), models.classes()
    )
    at = case(problem)
    outcome = run(CHECKS["state of the model"], at)
    assert outcome.status == "failed"
    assert "'steps'" in outcome.sentence
    for what in ("'steps'", "'mean'", "'calls'", "'history'"):
        assert any(what in place for place in outcome.details)
    # curvscope itself puts all of that back
    run(CHECKS["objective"], at)
    assert run(CHECKS["side effects"], at).status == "passed"
    assert (problem.user_model.calls, problem.user_model.history) == (0, [])
    assert float(problem.user_model.steps) == 0


def test_nested_state_is_a_side_effect() -> None:
    problem = models.problem_of(
        lambda: models.Stateful(nested=True),
        nn.CrossEntropyLoss(),
        models.inputs(4),
        models.classes(),
    )
    at = case(problem)
    run(CHECKS["objective"], at)
    outcome = run(CHECKS["side effects"], at)
    assert outcome.status == "failed"
    assert "'log'" in outcome.sentence
    assert "history" not in outcome.sentence


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.train(), "training flag"),
        (lambda m: m[0].register_forward_hook(lambda *_: None), "hooks"),
        (lambda m: setattr(m[0].weight, "grad", torch.ones_like(m[0].weight)), ".grad"),
        (lambda m: setattr(m[0], "extra", 1), "'extra'"),
        (lambda m: setattr(m[0].weight, "diag_h", 1), "list of attributes"),
        (lambda m: m[0].weight.data.mul_(2), "values of the parameter 'weight'"),
        (lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.data)), "identity"),
        (lambda m: m[0].weight.requires_grad_(False), "requires_grad"),
        (lambda m: torch.rand(1), "torch's random state"),
    ],
)
def test_side_effects_are_seen(change: Callable[[nn.Module], object], expected: str) -> None:
    problem = models.problem("mlp")
    problem.user_model.eval()
    before = Marks.of(problem)
    state = torch.get_rng_state()
    try:
        change(problem.user_model)
        found = before.changes(Marks.of(problem))
    finally:
        torch.set_rng_state(state)
    assert found and all(expected in place for place in found)


def test_precision() -> None:
    problem = models.problem_of(
        models.Cancelling, nn.CrossEntropyLoss(), models.inputs(4), models.classes()
    )
    outcome = check(problem, "precision")
    assert outcome.status == "failed"
    assert "float64" in outcome.advice
    healthy = check(models.problem("mlp"), "precision")
    assert healthy.status == "passed"
    assert 1e-9 < healthy.value < 1e-5


def test_model_that_cannot_run_in_float64() -> None:
    problem = models.problem_of(
        models.OnlySingle, nn.CrossEntropyLoss(), models.inputs(4), models.classes()
    )
    found = cs.verify(problem)
    assert found.dtype == "float32"
    assert any("float64" in text for text in found.warnings)
    assert found.trusted, found.failed
    assert found.check("precision").status == "skipped"
    assert found.trust["the problem's own precision"] == "unknown"


def test_kink_at_the_parameters() -> None:
    def build() -> nn.Module:
        model = models.mlp(nn.ReLU)
        nn.init.zeros_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        return model

    problem = models.problem_of(build, nn.CrossEntropyLoss(), models.inputs(4), models.classes())
    outcome = check(problem, "gradient")
    assert outcome.status != "failed"
    assert "kink" in outcome.sentence
    assert check(problem, "Hessian by finite differences").status == "skipped"
    assert check(problem, "GGN by definition").status == "skipped"


# -- faults in the loss -----------------------------------------------------------------------
