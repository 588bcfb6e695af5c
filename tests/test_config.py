"""Reports from TOML files: what is read, what is refused, and that a report repeats its own."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

import curvscope as cs
from curvscope.cli import make_app
from curvscope.errors import OptionError
from curvscope.report.config import OPTIONS, check_keys, read_config, toml


def small(samples: int = 12) -> cs.Problem:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    data = torch.randn(samples, 3, generator=generator), torch.arange(samples) % 2
    return cs.Problem(model, nn.CrossEntropyLoss(), data)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the command asked to be computed, instead of computing it."""
    asked: list[dict[str, Any]] = []

    def load(name: str, **options: Any) -> cs.Problem:
        asked.append({"name": name, **options})
        return small()

    def make_report(problem: cs.Problem, out: Path, **options: Any) -> SimpleNamespace:
        asked[-1] |= {"out": out, "n": problem.n_samples, **options}
        return SimpleNamespace(folder=out, html=out / "report.html", json=out / "report.json")

    monkeypatch.setattr("curvscope.loading.load_problem", load)
    monkeypatch.setattr("curvscope.report.make_report", make_report)
    monkeypatch.chdir(tmp_path)
    return asked


def run(*arguments: str) -> Any:
    return CliRunner().invoke(make_app(), list(arguments))


def test_every_option_of_the_command_is_a_key_and_nothing_else() -> None:
    command: Any = get_command(make_app())
    names = {p.name for p in command.commands["report"].params}
    assert names - {"config", "browse", "json", "debug", "help"} == set(OPTIONS)


def test_a_file_gives_everything(calls: list[dict[str, Any]]) -> None:
    Path("mine.toml").write_text(
        'problem = "digits-mlp"\nout = "there"\nsamples = 9\nseed = 3\ndtype = "float64"\n'
        "hessian = false\nverify = false\nprobes = 4\ndamping = 1\n"
    )
    result = run("report", "--config", "mine.toml")
    assert result.exit_code == 0, result.output
    (call,) = calls
    assert (call["name"], call["out"]) == ("digits-mlp", Path("there"))
    assert (call["samples"], call["seed"], call["dtype"]) == (9, 3, torch.float64)
    assert not call["hessian"] and not call["verification"]
    assert (call["probes"], call["damping"]) == (4, 1.0)


def test_the_command_line_comes_before_the_file(calls: list[dict[str, Any]]) -> None:
    Path("mine.toml").write_text('problem = "digits-mlp"\nout = "there"\nprobes = 4\nseed = 5\n')
    run("report", "digits-cnn", "--config", "mine.toml", "--probes", "16", "-o", "here")
    (call,) = calls  # also where the command line says what is the default anyway
    assert (call["name"], call["out"], call["probes"], call["seed"]) == (
        "digits-cnn",
        Path("here"),
        16,
        5,
    )


def test_quick_leaves_out_what_nobody_asked_for(calls: list[dict[str, Any]]) -> None:
    Path("mine.toml").write_text("quick = true\nverify = true\n")
    run("report", "x", "-o", "r", "--config", "mine.toml", "--hessian")
    assert calls[0]["hessian"] and calls[0]["verification"] and calls[0]["probes"] == 8
    run("report", "x", "-o", "r", "--quick")
    assert not calls[1]["hessian"] and not calls[1]["verification"]


def test_running_again_from_what_a_report_wrote_is_the_same(calls: list[dict[str, Any]]) -> None:
    run("report", "x", "-o", "r", "--quick", "--samples", "7", "--damping", "0.25", "--data", "a b")
    Path("report.toml").write_text(toml(calls[0]["config"]))
    again = run("report", "--config", "report.toml")
    assert again.exit_code == 0, again.output
    assert str(calls[0].pop("data")) == calls[1].pop("data") == "a b"
    del calls[0]["command"], calls[1]["command"]
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("probse = 4", r"unknown key 'probse'\. Did you mean 'probes'"),
        ("[report]\nprobes = 4", "unknown key 'report'"),
        ("probes = 1", "must be at least 2"),
        ("probes = true", "must be a whole number"),
        ("probes = 4.5", "must be a whole number"),
        ("hessian = 1", "must be true or false"),
        ("problem = 3", "must be a string in quotes"),
        ("damping = nan", "must be at least 0"),
        ("damping = inf", "must be at least 0"),
        ("probes 4", "is no TOML file"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_a_file_may_not_hold(
    tmp_path: Path, text: str | bytes | None, match: str, calls: list[dict[str, Any]]
) -> None:
    path = tmp_path / "bad.toml"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(OptionError, match=match):
        read_config(path)
    result = run("report", "x", "-o", "r", "--config", str(path))
    assert result.exit_code == 2 and "Traceback" not in result.output and not calls


@pytest.mark.parametrize(("arguments", "match"), [([], "Which PROBLEM?"), (["x"], "--out FOLDER")])
def test_what_is_missing_is_named(arguments: list[str], match: str) -> None:
    result = run("report", *arguments)
    assert result.exit_code == 2 and match in result.stderr


def test_strings_survive_whatever_is_in_them() -> None:
    odd = 'C:\\data "new"\n\tä\x7f\x01'
    assert tomllib.loads(toml({"data": odd, "damping": 1e-05, "hessian": True})) == {
        "data": odd,
        "damping": 1e-05,
        "hessian": True,
    }
    with pytest.raises(OptionError, match="unknown key 'prbes'"):
        check_keys({"prbes": 3}, "config=")


def test_a_report_holds_its_configuration(tmp_path: Path) -> None:
    paths = cs.make_report(small(), tmp_path / "r", hessian=False, verification=False, probes=3)
    wanted = {"seed": 0, "hessian": False, "verify": False, "probes": 3}
    assert read_config(paths.folder / "report.toml") == wanted
    document = json.loads(paths.json.read_text())
    assert document["config"] == wanted and "report.toml" in document["files"]
    assert "curvscope report PROBLEM" in (paths.folder / "report.toml").read_text()


def test_the_paths_as_json(calls: list[dict[str, Any]]) -> None:
    result = run("report", "x", "-o", "r", "--json")
    assert json.loads(result.stdout) == {
        "folder": "r",
        "html": "r/report.html",
        "json": "r/report.json",
    }


def test_the_page_is_opened_if_asked(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)))
    assert run("report", "x", "-o", "r").exit_code == 0 and not opened
    result = run("report", "x", "-o", "r", "--open")
    assert opened == [(tmp_path / "r" / "report.html").as_uri()]
    # a machine without a browser: the page was made all the same
    assert result.exit_code == 0 and "open r/report.html in one" in result.stderr
    assert result.stdout.strip() == "r/report.html" and len(calls) == 2
