"""verify: passes on healthy problems; what it says, refuses and leaves out."""

from __future__ import annotations

import importlib
import json
import pickle

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.analysis.checks import (
    CHECKS,
    Case,
    Outcome,
    gaussnewton,
    register,
)
from curvscope.analysis.checks.base import Entry
from curvscope.errors import (
    MemoryLimitError,
    NonDeterministicError,
    NonFiniteError,
    OptionError,
    UnsupportedLossError,
)
from tests.analysis import verify_models as models
from tests.analysis.verifying import case, check, run, verifier

verified = pytest.fixture(verifier, scope="module")

NOT_ON = {  # healthy problem -> checks that do not apply, with a reason
    "huber": {
        "Fisher by enumerating labels",
        "sampled Fisher",
        "K-FAC on one sample",
        "positive semi-definiteness",
    },
}


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
    from curvscope.analysis.checks import derivatives

    monkeypatch.setattr(derivatives, "_SECONDS", 0.0)
    monkeypatch.setattr(derivatives, "_SHARED", 0.0)
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
