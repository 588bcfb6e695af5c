"""The study: its page says what its JSON file says, and its measurements are right."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import curvscope as cs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import study as command  # noqa: E402
from studies import (  # noqa: E402
    factors,
    figures,
    identity,
    nets,
    numbers,
    page,
    plan,
    preactivation,
    spatial,
)

NOWHERE = Path()  # the digits need no folder


@pytest.fixture(scope="module")
def study():
    return json.loads((ROOT / "benchmarks" / "results" / "study.json").read_text())


# -- page and numbers -----------------------------------------------------------------------------


def test_every_part_is_there_with_the_settings_of_the_plan(study):
    assert list(study) == list(plan.QUESTIONS)
    for name, question in plan.QUESTIONS.items():
        assert list(study[name]["parts"]) == list(question.parts)
        assert study[name]["settings"] == json.loads(json.dumps(question.settings))
        assert all("torch" in machine for machine in study[name]["machine"])


def test_page_and_tables_are_those_of_the_numbers(study):
    assert page.PAGE.read_text() == page.render(study)
    assert page.TABLES_PAGE.read_text() == page.tables(study)


def test_no_measured_number_is_written_by_hand():
    text = (page.HERE / "study.md.j2").read_text()
    for pattern in (
        r"\{\{.*?\}\}",
        r"\{%.*?%\}",
        r"```.*?```",
        r"\$\$?.*?\$\$?",
        r"\[[^\]]*\]\([^)]*\)",
    ):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    settings = {
        "0.3",
        "0.55",
        "0.13",
        "0.001",
        "0.06",
        "0.18",
        "3.1",
        "3.2",
    }  # of methods; sections of papers
    assert set(re.findall(r"\d*\.\d+", text)) <= settings


def test_the_page_depends_on_the_numbers(study):
    other = json.loads(json.dumps(study))
    name = next(iter(other["identity"]["parts"]))
    for layer in other["identity"]["parts"][name]["steps"][-1]["layers"]:
        layer["inverse"] = 0.987
    assert page.render(other) != page.render(study)


def test_figures_are_there_and_small(study, tmp_path):
    drawn = {path.name for path in figures.draw(study, tmp_path)}
    assert drawn == {path.name for path in page.ASSETS.glob("*.svg")}
    text = page.PAGE.read_text()
    for path in page.ASSETS.glob("*.svg"):
        assert f"assets/study/{path.name}" in text
        assert path.stat().st_size < 200_000


def test_numbers_are_written_with_their_errors():
    def spread(values: list[float]) -> str:
        return numbers.spread(values).replace("\u00a0", " ")

    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 0.6"
    assert spread([0.5, 0.5, 0.5]) == "0.500"
    assert spread([0.1234]) == "0.123"
    assert spread([0.05740, 0.05744, 0.05742]) == "0.0574 ± 1e-05"
    assert spread([0.0004, -0.0002, 0.0001]) == "0.0001 ± 0.0002"
    assert spread([1.0, math.nan]) == "–"
    assert numbers.stderr([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))


def test_interrupted_work_goes_on(tmp_path):
    calls = []

    def part(data):
        calls.append(data)
        return {"value": [1.23456789, math.inf]}

    for _ in range(2):
        kept = command.kept(tmp_path, "a/b", part, NOWHERE)
    assert calls == [NOWHERE] and kept["result"] == {"value": [1.23457, None]}
    question = plan.Question("a", {"a/b": part, "a/c": part}, {})
    collected = command.collect(question, tmp_path, None)
    assert list(collected["parts"]) == ["a/b"] and len(calls) == 1
    assert json.loads(command.dumped({"a": collected})) == {"a": collected}


# -- the measurements ----------------------------------------------------------------------------


def test_factors_against_the_definition():
    found = factors.run("digits-mlp", 0, NOWHERE, samples=60, steps=3, batch=32, compared=16)
    rows = {(r["layer"], r["factor"]): r for r in found["init"]["rows"]}
    data = nets.digits(NOWHERE)
    a = data.inputs[:60].flatten(1).double()
    ones = torch.cat([a, torch.ones(60, 1, dtype=a.dtype)], 1)
    for key, moment in (("A", ones.mT @ ones / 60), ("A centred", torch.cov(a.mT, correction=0))):
        energy = moment.square().sum()
        share = float(moment.diagonal().square().sum() / energy)
        d = len(moment)
        null = float((moment.trace() ** 2 + 2 * energy) / ((d + 2) * energy))
        assert rows["fc1", key]["share"] == pytest.approx(share, rel=1e-5)
        assert rows["fc1", key]["null"] == pytest.approx(null, rel=1e-5)
    lost = 1 - rows["fc1", "A"]["share"] * rows["fc1", "G"]["share"]
    assert rows["fc1", "G"]["lost"] == pytest.approx(math.sqrt(lost))
    errors = {(r["layer"], r["method"]): r for r in found["trained"]["errors"]}
    for layer in ("fc1", "fc2"):
        exact, both = errors[layer, "exact diagonal"], errors[layer, "diagonal factors"]
        assert exact["error"] <= both["error"] + 1e-9  # the exact diagonal is the nearest one
        assert errors[layer, "K-FAC"]["best"] <= errors[layer, "K-FAC"]["error"] + 1e-9


@pytest.mark.parametrize("averaging", ["paper", "release"])
def test_distance_from_the_identity(averaging):
    found = identity.run("digits-cnn", averaging, 0, NOWHERE, steps=2, batch=32)
    (entry,) = found["steps"]
    model, data = nets.initial("digits-cnn", 0), nets.digits(NOWHERE)
    optimizer = cs.optim.AdaFisher(model, averaging=averaging)
    nets.train(model, data, optimizer, steps=1, batch=32, seed=0)
    for row in entry["layers"]:
        F = optimizer.curvature().blocks[row["layer"]].diagonal().double()
        for key, values in (("F", F), ("inverse", 1 / F)):
            far = float((values - values.mean()).norm() / values.norm())
            assert row[key] == pytest.approx(far, rel=1e-4)
        assert row["rate"] == pytest.approx(1e-3 * float((1 / F).mean()), rel=1e-5)
        assert row["damping_share"] == pytest.approx(1e-3 / float(F.mean()), rel=1e-5)
    assert (entry["distance"] < 0.05) == (averaging == "release")


def test_released_averages_settle_below_the_bound():
    """Whatever the statistics, ``F`` stays within the bound that the page gives."""
    from curvscope.optim.adafisher import averaged_diagonal

    x, v = torch.rand(7, dtype=torch.float64), None
    for _ in range(20):
        v = averaged_diagonal(v, x, 0.8, "release")
    largest = float(v.max()) ** 2
    assert largest <= page.facts._largest() + 1e-12
    assert largest == pytest.approx(page.facts._largest(), rel=1e-3)
    assert page.facts.bound({}) == "7.6"
    low, high = 1.0, 1.0 + page.facts._largest() / identity.DAMPING
    u = torch.tensor([math.sqrt(low), math.sqrt(high)])  # the worst vector (Kantorovich)
    turned = identity.degrees(u / torch.tensor([low, high]), u)
    assert page.facts.bound_angle({}) == f"{turned:.1f}"


def test_the_twin_takes_the_step_of_a_multiple_of_the_identity():
    model, data = nets.initial("digits-mlp", 0), nets.digits(NOWHERE)
    other = nets.initial("digits-mlp", 0)
    rates = {"fc1": 0.3, "fc2": 0.1}
    nets.train(model, data, identity.Scaled(model, lambda _: rates), steps=5, batch=32, seed=1)
    m = {name: torch.zeros_like(p) for name, p in other.named_parameters()}
    for step, (x, y) in zip(range(1, 6), nets.batches(data, 32, 1)):
        other.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        with torch.no_grad():
            for name, p in other.named_parameters():
                m[name] = 0.9 * m[name] + 0.1 * p.grad
                p -= rates[name.split(".")[0]] * m[name] / (1 - 0.9**step)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.allclose(p, q, atol=1e-6)


def test_error_of_one_probe_is_the_rest_of_the_row():
    """Dense truth in float64: one probe's squared error, and the mean square AdaHessian keeps."""
    model, data = nets.initial("digits-cnn", 0).double(), nets.digits(NOWHERE)
    x, y = data.inputs[:40].double(), data.labels[:40]
    problem = cs.Problem(model.eval(), nn.CrossEntropyLoss(), (x, y))
    H = cs.hessian(problem).dense()
    d, off = H.diagonal(), H - H.diagonal().diag()
    where, shape = spatial.weights(model)["conv2"]
    drawn = torch.stack(
        [cs.hutchinson_diagonal(problem, probes=1, seed=k).diagonal() for k in range(128)]
    )[:, where]
    for found, expected in (
        ((drawn - d[where]).square().sum(1), off[where].square().sum()),
        (drawn.square().sum(1), H[where].square().sum()),
    ):
        z = (found.mean() - expected) / (found.std() / math.sqrt(len(found)))
        assert abs(float(z)) < 4
    exact = cs.exact_diagonal(problem, "ggn").diagonal()[where]
    assert torch.allclose(exact, d[where], atol=1e-10)  # a piecewise linear network
    row = spatial.layer(d[where].reshape(shape), drawn.reshape(-1, *shape), [1, 64])
    assert row["plain"][0] / row["plain"][1] == pytest.approx(8, rel=0.25)
    assert row["rms_energy_plain"] == pytest.approx(
        float(H[where].norm() / d[where].norm()), rel=0.1
    )
    kernel = d[where].reshape(-1, 9)
    far = float((kernel - kernel.mean(1, keepdim=True)).norm() / kernel.norm())
    assert row["bias"] == pytest.approx(far)


def test_spatial_parts_run():
    found = spatial.estimates("digits-cnn", 0, NOWHERE, samples=32, probes=2, steps=2, batch=32)
    assert found["trained"]["gap"] < 1e-6 and set(found["init"]["layers"]) == {"conv1", "conv2"}
    options = {"averaging": "none", "lr": 0.01, "steps": 3, "batch": 32}
    assert math.isfinite(spatial.training("digits-cnn", 0, NOWHERE, **options)["train"])


def test_rank_correction_is_the_best_of_its_class():
    values = torch.tensor([0.1, 0.5, 0.6, 0.7, 3.0], dtype=torch.float64)
    norm = float(values.norm())
    for rank in range(6):
        best = min(
            float((values[kept] - values[kept].mean()).norm()) if len(kept) else 0.0
            for kept in map(list, _subsets(5, 5 - rank))
        )
        found = preactivation.rank_correction_error(values, rank)
        assert found == pytest.approx(best / norm, abs=1e-12)


def _subsets(n: int, size: int):
    from itertools import combinations

    return combinations(range(n), size)


def test_preactivation_inverse_against_autograd():
    """``T`` from per-sample Hessians in the layer's output, by double differentiation."""
    images = nets.digits(NOWHERE).inputs[:64].flatten(1)
    found = preactivation.follow(images, seed=0, at=[1, 3], samples=12, hidden=(12, 6, 12))
    assert found["gap"] < 1e-5
    first = {r["layer"]: r for r in found["steps"][0]["layers"]}
    assert list(first) == ["fc1", "fc2", "fc3", "fc4"]
    for row in first.values():
        assert row["best_rank"] <= row["best_identity"] + 1e-9
        assert row["best_rank"] <= row["H_g"]["rescaled"] + 1e-6  # one pair: rank two
        assert row["best_identity"] == pytest.approx(row["identity"]["rescaled"], abs=1e-6)
        assert row["best_diagonal"] <= row["best_identity"] + 1e-9
