"""``curvscope doctor``: what it finds, what it calls a problem, and how it exits."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from curvscope import doctor
from curvscope.cli import make_app

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found() -> doctor.Diagnosis:
    return doctor.examine()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(make_app(), ["doctor", *arguments])


def test_what_is_required_is_what_the_package_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = dict(re.split(">=", text) for text in project["dependencies"])
    assert declared == {name: least for name, (_, least) in doctor.REQUIRED.items()}
    extras = str(project["optional-dependencies"])
    for name in doctor.OPTIONAL:
        elsewhere = name in ("transformers", "lightning", "tensorboard", "wandb")
        assert elsewhere or name in extras, name


def test_this_machine_is_well(found: doctor.Diagnosis) -> None:
    assert found.healthy, found.problems
    assert found.cores >= 1 and found.threads >= 1 and found.disk > 0
    cpu = found.devices[0]
    assert cpu.name == "cpu" and 0 < cpu.free <= cpu.memory
    assert len(found.devices) == 1 + torch.cuda.device_count()
    versions = {one.name: one.version for one in found.packages}
    assert versions["torch"] and set(doctor.REQUIRED) <= set(versions)
    text = str(found)
    assert "All is well" in text and all(name in text for name in doctor.OPTIONAL)


def test_json_and_sentences(monkeypatch: pytest.MonkeyPatch, found: doctor.Diagnosis) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: found)
    result = run("--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["healthy"] and told["devices"][0]["name"] == "cpu"
    assert run().stdout.startswith("curvscope ")


def test_problems_are_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor,
        "REQUIRED",
        {
            "torch": ("torch", "2.11"),
            "numpy": ("numpy", "99.1"),
            "no-such-package-here": ("nothing", "1"),
            "scipy": ("scipy.no_such_module", "1.11"),
        },
    )
    result = run()
    assert result.exit_code == 1 and "All is well" not in result.output
    said = result.stdout
    assert "is too old; pip install --upgrade 'numpy>=99.1'" in said
    assert "not installed; pip install 'no-such-package-here>=1'" in said
    assert "importing it fails with ModuleNotFoundError" in said


def test_a_machine_that_computes_wrongly_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", {"torch": ("torch", "2.11")})
    monkeypatch.setattr(torch, "allclose", lambda *_, **__: False)
    found = doctor.examine()
    assert found.problems == ["cpu: a second derivative computed there is wrong"]
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "REQUIRED", {"torch": ("torch", "2.11")})

    class Bad:
        trusted = False

        def __str__(self) -> str:
            return "wrong by half"

    monkeypatch.setattr("curvscope.analysis.verify", lambda problem: Bad())
    assert "wrong here: wrong by half" in doctor.examine().problems[0]

    def failing(problem: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr("curvscope.analysis.verify", failing)
    assert "fails with RuntimeError: no kernel" in doctor.examine().problems[0]


def test_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", {"torch": ("torch", "2.11")})
    monkeypatch.setattr(doctor, "available_bytes", lambda: 2**20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    found = doctor.examine()
    assert found.healthy and len(found.advice) == 2
    assert "1.0 MiB of memory" in found.advice[0] and "OMP_NUM_THREADS" in found.advice[1]


@pytest.mark.parametrize(
    ("version", "parts"),
    [("2.13.0+cpu", (2, 13, 0)), ("3.9", (3, 9)), ("1.0.0a5", (1, 0)), ("2.15.0.dev1", (2, 15, 0))],
)
def test_versions(version: str, parts: tuple[int, ...]) -> None:
    assert doctor._parts(version) == parts
