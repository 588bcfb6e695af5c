"""Shell and TOML blocks of README and docs: what they name exists, and what is quick is run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.main import get_command
from typer.testing import CliRunner

from curvscope import zoo
from curvscope.cli import make_app
from curvscope.loading import load_problem
from curvscope.report.config import read_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND: Any = get_command(make_app())
UsageError: Any = typer.BadParameter.__mro__[1]  # typer has its own click, or uses click's


def blocks(kind: str) -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for match in re.finditer(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.M):
            yield page, match[1]


def lines() -> list[str]:
    """Every command, without what the shell does with its output."""
    found: dict[str, None] = {}
    for _, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                ends = [k for k, word in enumerate(words) if word in (">", "||", "&&", "|")]
                end = ends[0] if ends else len(words)
                found[shlex.join(words[:end])] = None
                words = words[end + 2 :] if words[end : end + 1] == [">"] else words[end + 1 :]
                words = words[1:] if words[:1] and words[0] in ("||", "&&") else words
    return list(found)


def check_curvscope(words: list[str]) -> None:
    """The command parses: its name, its options, and their values; problems are in the zoo."""
    if words[0].startswith("-"):
        assert any(words[0] in option.opts for option in COMMAND.params), words
        return
    part = COMMAND.commands[words[0]]
    context = part.make_context(words[0], words[1:])
    problem = context.params.get("problem") or "mynet:make"
    assert problem in zoo.names() or problem == "mynet:make" or problem.startswith("runs/")


def check_make(words: list[str]) -> None:
    """The target is there, and so are the variables."""
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, given, _ = word.partition("=")
        assert re.search(rf"^{name}\s*\?=" if given else rf"^{name}:", text, re.MULTILINE), word


def check_pip(words: list[str]) -> None:
    """An editable install of this package, with extras that it has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert words[:2] == ["install", "-e"]
    named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
    assert named is not None and set(filter(None, (named[1] or "").split(","))) <= set(extras)


@pytest.mark.parametrize("line", lines(), ids=str)
def test_what_a_line_names_exists(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "curvscope":
        check_curvscope(words)
    elif program == "make":
        check_make(words)
    elif program == "pip":
        check_pip(words)
    else:  # the shell's own
        assert line in ("python3 -m venv .venv", ". .venv/bin/activate", "exit 1"), line


def test_wrong_lines_are_seen() -> None:
    for wrong in (["report", "x", "--sampels", "3"], ["report", "--seed", "much"]):
        with pytest.raises(UsageError):
            check_curvscope(wrong)
    with pytest.raises(KeyError):
        check_curvscope(["reprot"])
    with pytest.raises(AssertionError):
        check_curvscope(["report", "digits-mpl"])
    for words in (["reprot"], ["report", "PROBLEN=x"]):
        with pytest.raises(AssertionError):
            check_make(words)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["help", "report", "test", "docs", "bench"])
def test_make_knows_what_it_would_do(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_configurations_are_read(tmp_path: Path) -> None:
    found = [text for _, text in blocks("toml")]
    assert found
    for text in found:
        (tmp_path / "c.toml").write_text(text)
        assert read_config(tmp_path / "c.toml")["problem"]


@pytest.fixture
def mynet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """README's own network, in the working directory."""
    (code,) = (text for _, text in blocks("python") if text.startswith("# mynet.py\nimport torch"))
    (tmp_path / "mynet.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("mynet", None)


@pytest.mark.usefixtures("mynet")
def test_the_same_call_gives_the_same_network() -> None:
    """Its weights and data are drawn, and a report's file makes the report again."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (load_problem("mynet:make", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for one, second, third in zip(
        (first.gradient(), first.subset(8, 0).gradient()),
        (again.gradient(), load_problem("mynet:make", samples=8, seed=0).gradient()),
        (other.gradient(), load_problem("mynet:make", samples=8, seed=1).gradient()),
        strict=True,
    ):
        assert torch.equal(one, second) and not torch.equal(one, third)


@pytest.mark.usefixtures("mynet")
def test_the_path_of_a_newcomer(tmp_path: Path) -> None:
    """README's network is checked, reported, and its report compared."""

    def run(line: str) -> str:
        done = CliRunner().invoke(make_app(), shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "can be trusted" in run("curvscope verify mynet:make --samples 8")
    run("curvscope report mynet:make --out reports/mynet --quick --samples 8")
    assert read_config(tmp_path / "reports" / "mynet" / "report.toml")["samples"] == 8
    told = run("curvscope diff reports/mynet reports/mynet --out difference.html")
    assert "say the same" in told and (tmp_path / "difference.html").exists()
