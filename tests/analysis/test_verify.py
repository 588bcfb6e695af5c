"""verify: passes on healthy problems, and every check fails on a fault made for it."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope.analysis import Verification
from curvscope.analysis.checks import (
    CHECKS,
    Case,
    Check,
    Marks,
    Outcome,
    gaussnewton,
    prepare,
    register,
)
from curvscope.analysis.checks.base import Entry
from curvscope.analysis.verify import run as run_check
from curvscope.curvature import exact, kronecker, products
from curvscope.errors import (
    MemoryLimitError,
    NonDeterministicError,
    NonFiniteError,
    OptionError,
    UnsupportedLossError,
)
from curvscope.problem import losses
from tests.analysis import verify_models as models
from tests.fixtures_side_effects import unchanged

NOT_ON = {  # healthy problem -> checks that do not apply, with a reason
    "huber": {
        "Fisher by enumerating labels",
        "sampled Fisher",
        "K-FAC on one sample",
        "positive semi-definiteness",
    },
}


def case(problem: cs.Problem, **options: int) -> Case:
    before = Marks.of(problem)
    with unchanged(problem):
        problem.check()
        return prepare(problem, options.get("samples"), 2, options.get("seed", 0), before)


def run(entry: Entry, at: Case) -> Check:
    """One check, watched as a whole: watching every call in it would take longer than it does."""
    with unchanged(at.problem):
        return run_check(entry, at)


def check(problem: cs.Problem, name: str, **options: int) -> Check:
    """One check alone."""
    return run(CHECKS[name], case(problem, **options))


@pytest.fixture(scope="module")
def verified() -> Callable[[str], Verification]:
    """Each healthy problem is verified once, in train mode and with gradients in place."""
    kept: dict[str, Verification] = {}

    def get(name: str) -> Verification:
        if name not in kept:
            problem = models.problem(name)
            model = problem.user_model.train()
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            before = Marks.of(problem)
            kept[name] = cs.verify(problem)
            assert before.changes(Marks.of(problem)) == []
        return kept[name]

    return get


# -- healthy problems -------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.HEALTHY)
def test_healthy_problems_are_trusted(verified, name: str) -> None:
    found = verified(name)
    failed = [c for c in found.failed if c.about != "other tools"]
    assert found.trusted, failed
    assert found.samples == models.N
    assert found.dtype == "float64"
    for c in found.checks:
        assert c.status != "skipped", c
        if c.about == "curvscope" and c.status == "not applicable":
            expected = NOT_ON.get(name, set()) | {"cs.backpack", "K-FAC on one sample"}
            assert c.name in expected, c
    for capability in ("gradient", "Hessian", "GGN", "empirical Fisher"):
        assert found.trust[capability] == "trust", found.reasons[capability]
    likelihood = name != "huber"
    assert found.trust["Fisher"] == ("trust" if likelihood else "unknown")


@pytest.mark.parametrize("name", ["mlp", "tied", "sum of squares", "class weights", "binary"])
def test_kfac_is_exact_on_one_sample(verified, name: str) -> None:
    found = verified(name).check("K-FAC on one sample")
    assert found.status == "passed"
    assert found.details


def test_same_seed_same_result() -> None:
    for name in ("Hessian blocks", "GGN by definition"):
        first, second = (check(models.problem("mlp"), name) for _ in range(2))
        assert (first.status, first.value) == (second.status, second.value)
    assert first.value != check(models.problem("mlp"), name, seed=1).value


# -- known errors of other tools --------------------------------------------------------------


def test_torch_func_is_wrong_for_layer_norm() -> None:
    model = lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731
    problem = models.problem_of(model, nn.CrossEntropyLoss(), models.inputs(4), models.classes())
    found = check(problem, "torch.func.hessian")
    assert found.status == "failed"
    assert 0.005 < found.value < 0.5
    assert "LayerNorm" in found.sentence and "%" in found.sentence
    assert check(problem, "torch.func.jvp of grad").status == "passed"


def test_torch_func_is_right_for_an_mlp(verified) -> None:
    found = verified("mlp")
    assert found.check("torch.func.hessian").status == "passed"
    assert found.trust["torch.func.hessian"] == "trust"


def test_torch_func_jvp_raises_on_squared_error() -> None:
    problem = models.problem_of(
        models.mlp, nn.MSELoss(), models.inputs(4), models.inputs(3, seed=2)
    )
    found = check(problem, "torch.func.jvp of grad")
    assert found.status == "failed"
    assert "raises" in found.sentence
    assert check(problem, "torch.func.hessian").status == "passed"


def test_functional_call_damages_modules_with_two_names() -> None:
    def build() -> nn.Module:
        shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 3))

    problem = models.problem_of(build, nn.CrossEntropyLoss(), models.inputs(4), models.classes())
    found = check(problem, "torch.func.functional_call")
    assert found.status == "failed"
    assert "0.weight" in found.sentence
    assert isinstance(problem.user_model[0].weight, nn.Parameter)
    assert problem.user_model[0] is problem.user_model[2]
    assert check(models.problem("tied"), "torch.func.functional_call").status == "passed"


@pytest.mark.parametrize("extension", ["DiagGGNExact", "DiagHessian"])
def test_backpack_is_wrong_for_tied_weights(extension: str) -> None:
    problem = models.problem_of(
        models.tied_sequential, nn.CrossEntropyLoss(), models.inputs(4), models.classes()
    )
    found = check(problem, f"plain BackPACK: {extension}")
    assert found.status == "failed"
    assert 0.01 < found.value < 0.6
    assert found.details["0.weight"] > 0.1 > 1e-8 > found.details["2.bias"]
    assert "tied" in found.sentence
    refused = check(problem, "cs.backpack")
    assert refused.status == "not applicable"
    assert "tied" in refused.sentence


def test_backpack_is_wrong_for_ignored_targets(verified) -> None:
    found = verified("ignored targets")
    for name in ("DiagGGNExact", "DiagHessian", "KFLR"):
        assert found.check(f"plain BackPACK: {name}").status == "failed"
    assert "ignore_index" in found.reasons["plain BackPACK DiagGGN"]
    assert found.check("plain BackPACK: BatchGrad").status == "passed"


def test_backpack_kronecker_factors_of_convolutions(verified) -> None:
    found = verified("cnn")
    for name in ("KFLR", "KFRA"):
        outcome = found.check(f"plain BackPACK: {name}")
        assert outcome.status == "failed"
        assert set(outcome.details) == {"0.weight", "4.weight"}
        assert outcome.details["0.weight"] > 1
        assert outcome.details["4.weight"] < 1e-6
        assert "factor" in outcome.sentence
    assert found.trust["plain BackPACK KFAC"] == "do not trust"
    assert found.trust["plain BackPACK DiagGGN"] == "trust"
    assert found.trusted


def test_backpack_is_right_on_a_plain_mlp(verified) -> None:
    found = verified("mlp")
    for name, verdict in found.trust.items():
        if "BackPACK" in name:
            assert verdict == "trust", found.reasons[name]


def test_backpack_leaves_out_layer_norm(verified) -> None:
    outcome = verified("transformer").check("plain BackPACK: BatchGrad")
    assert outcome.status == "failed"
    assert "norm.weight" in outcome.sentence


# -- faults in the user's model ---------------------------------------------------------------


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
    """A model that is sure of its answers: draws without the rare labels hardly vary."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(32, 6, generator=generator), torch.arange(32) % 4
    model = nn.Linear(6, 4)
    with torch.no_grad():
        model.weight.copy_(2.5 * torch.randn(4, 6, generator=generator))
    problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)

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
    monkeypatch.setattr(kronecker, "second_moment", scaled(kronecker.second_moment, 2.0))
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


def test_a_check_is_one_function(monkeypatch) -> None:
    registry: dict[str, Entry] = {}
    # importing by attribute would give the function of the same name
    for module in ("curvscope.analysis.verify", "curvscope.analysis.checks.base"):
        monkeypatch.setattr(importlib.import_module(module), "CHECKS", registry)

    @register("always", about="curvscope", decides=("everything",))
    def always(_: Case) -> Outcome:
        return Outcome("passed", "Fine.")

    found = cs.verify(models.problem("mlp"))
    assert [c.name for c in found.checks] == ["always"]
    assert found.trust == {"everything": "trust"}
    assert found.reasons == {"everything": "Fine."}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no derivative of frob\nand more"), "failed"),
        (MemoryLimitError("too large"), "skipped"),
        (UnsupportedLossError("no likelihood"), "not applicable"),
    ],
)
def test_errors_of_a_check_are_outcomes(error: Exception, status: str) -> None:
    def broken(_: Case) -> Outcome:
        raise error

    found = run(Entry("broken", "curvscope", ("a",), (), broken), case(models.problem("mlp")))
    assert found.status == status
    assert str(error).splitlines()[0] in found.sentence
    assert "and more" not in found.sentence


def test_errors_of_the_problem_are_raised() -> None:
    problem = models.problem("mlp")
    with torch.no_grad():
        problem.user_model[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        cs.verify(problem)
    noisy = models.problem_of(
        models.Noisy, nn.CrossEntropyLoss(), models.inputs(4), models.classes()
    )
    with pytest.raises(NonDeterministicError):
        cs.verify(noisy)


@pytest.mark.parametrize("options", [{"columns": 0}, {"samples": 0}, {"samples": 2.5}])
def test_bad_arguments(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        cs.verify(models.problem("mlp"), **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="Problem"):
        cs.verify("mlp")  # type: ignore[arg-type]


def test_unknown_check(verified) -> None:
    with pytest.raises(OptionError, match="gradient"):
        verified("mlp").check("gradeint")


def test_samples_are_bounded() -> None:
    x, y = models.inputs(4).repeat(10, 1), models.classes().repeat(10)
    batches = [(x[:150], y[:150]), (x[150:], y[150:])]
    problem = cs.Problem(models.seeded(models.mlp), nn.CrossEntropyLoss(), batches)
    assert case(problem).double.n_samples == 64
    small = case(problem, samples=12)
    assert small.double.n_samples == 12
    assert small.double.check().batches > 1
    assert small.few.n_samples == 8
    assert small.few.check().batches == 2


def test_less_is_looked_at_in_large_models(monkeypatch) -> None:
    from curvscope.analysis.checks import case as cases

    full = check(models.problem("transformer"), "Hessian blocks")
    monkeypatch.setattr(cases, "_LARGE", 10)
    monkeypatch.setattr(cases, "_LARGE_BLOCKS", 2)
    at = case(models.problem("transformer"))
    assert (at.double.n_samples, at.few.n_samples) == (16, 4)
    found = run(CHECKS["Hessian blocks"], at)
    assert (len(full.details), len(found.details)) == (4, 2)
    assert full.status == found.status == "passed"
    assert "2 of 4" in found.sentence


def test_what_is_too_expensive_is_left_out(monkeypatch) -> None:
    from curvscope.analysis.checks import derivatives, gaussnewton

    monkeypatch.setattr(derivatives, "_SECONDS", 0.0)
    monkeypatch.setattr(gaussnewton, "_SECONDS", 0.0)
    problem = models.problem("mlp")
    for name in ("Hessian blocks", "GGN blocks"):
        found = check(problem, name)
        assert found.status == "skipped"
        assert "0 (about 0 s by" in found.sentence
    assert check(problem, "K-FAC on one sample").status == "skipped"
    # one backward pass is never too expensive
    assert check(problem, "empirical Fisher by sample").status == "passed"


def test_one_sample() -> None:
    x, y = models.inputs(4)[:1], models.classes()[:1]
    problem = cs.Problem(models.seeded(models.mlp), nn.CrossEntropyLoss(), (x, y))
    found = cs.verify(problem)
    assert found.trusted, found.failed
    assert found.samples == 1


def test_batch_statistics_by_choice() -> None:
    problem = models.problem_of(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
        nn.CrossEntropyLoss(),
        models.inputs(4),
        models.classes(),
        batchnorm="batch",
    )
    found = cs.verify(problem)
    assert found.trusted, found.failed
    assert found.check("splitting into batches").status == "not applicable"
    assert found.trust["empirical Fisher"] == "unknown"
    assert found.trust["Hessian"] == "trust"
    assert any("batchnorm" in text for text in found.warnings)


def test_mode_is_told(verified) -> None:
    outcome = verified("batch norm").check("train and eval mode")
    assert outcome.status == "passed"
    assert "3 (p=0.3)" in outcome.sentence and "running statistics" in outcome.sentence
    assert verified("mlp").check("train and eval mode").status == "not applicable"


def test_result_protocol(verified) -> None:
    found = verified("cnn")
    frame = found.to_frame()
    assert list(frame["check"]) == [c.name for c in found.checks] == list(CHECKS)
    assert set(frame["status"]) <= {"passed", "failed", "skipped", "not applicable"}
    text = str(found)
    assert "the problem can be trusted" in text
    assert "Do not trust plain BackPACK KFLR and plain BackPACK KFAC" in text
    assert "<table" in found._repr_html_()
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["type"] == "Verification" and again["trusted"] is True
    assert again["checks"][0]["name"] == "objective"
    trust = found.trust_frame()
    assert dict(zip(trust["capability"], trust["verdict"], strict=True)) == dict(found.trust)
    assert pickle.loads(pickle.dumps(found)).trust == found.trust
    assert found.cost.seconds > 0
    for c in found.checks:
        assert c.sentence.endswith((".", ")")) or "raises" in c.sentence, c.sentence
        assert bool(c.advice) or c.status != "failed", c
