"""The command line: what it runs, what it says, and how it exits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner, Result

import curvscope as cs
from curvscope import zoo
from curvscope.cli import make_app
from curvscope.errors import OptionError, UnknownProblemError
from curvscope.loading import load_problem

ROOT = Path(__file__).parent.parent

SOURCE = """
import torch
from torch import nn
import curvscope as cs

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))

def make(samples=20):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, 4, generator=g), torch.randint(3, (samples,), generator=g)
    return cs.Problem(net(), nn.CrossEntropyLoss(), (x, y), name="mine")

def fixed():
    return make()

def options(*, data=None, samples=20, seed=None, **rest):
    problem = make(samples)
    problem.name = f"{data} {samples} {seed} {sorted(rest)}"
    return problem

def nothing():
    pass

def failing():
    raise ZeroDivisionError("one over zero")

def slow():
    import time
    print("ready", flush=True)
    time.sleep(60)

def slow_to_compute():
    import time

    def loss(outputs, targets):
        if not torch.is_inference_mode_enabled():
            print("ready", flush=True)
            time.sleep(30)
        return outputs.square().mean()

    problem = make()
    return cs.Problem(net(), loss, (torch.randn(5, 4), torch.randn(5, 3)), reduction="mean")

problem = make()
number = 3
class Holder:
    inner = staticmethod(make)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's in the working directory; its name."""
    name = f"mine_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_package_at_all\n")
    (tmp_path / f"{name}_raising.py").write_text("raise ValueError('bad day')\n")
    monkeypatch.chdir(tmp_path)
    yield name
    for known in [m for m in sys.modules if m.startswith(name)]:
        del sys.modules[known]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(make_app(), list(arguments))


def message(result: Result) -> str:
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


# -- finding the problem -------------------------------------------------------------------------


def test_a_function_gets_the_options_that_it_has_arguments_for(mine: str) -> None:
    problem = load_problem(f"{mine}:options", data="there", samples=9, seed=4, device="cpu")
    assert problem.name == "there 9 4 ['device']" and problem.n_samples == 9
    assert load_problem(f"{mine}:options").name == "None 20 None []"
    assert load_problem(f"{mine}:make", samples=7).n_samples == 7
    assert load_problem(f"{mine}:Holder.inner", samples=6).n_samples == 6


def test_what_a_function_does_not_take_is_done_to_its_problem(mine: str) -> None:
    problem = load_problem(f"{mine}:fixed", samples=5, dtype=torch.float64, device="cpu", seed=1)
    assert problem.n_samples == 5 and problem.dtype == torch.float64
    original = load_problem(f"{mine}:fixed")
    assert load_problem(f"{mine}:problem").n_samples == original.n_samples == 20
    double = load_problem(f"{mine}:fixed", dtype=torch.float64)
    assert double.objective() == pytest.approx(original.objective(), rel=1e-5)
    with pytest.raises(OptionError, match="takes no data="):
        load_problem(f"{mine}:fixed", data="there")


def test_the_working_directory_is_importable_only_meanwhile(mine: str) -> None:
    before = list(sys.path)
    load_problem(f"{mine}:make")
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("digits-cmn", r"no problem 'digits-cmn'\. Did you mean 'digits-cnn'"),
        ("my.module", r"write 'my:module' with a colon"),
        ("{mine}:mkae", r"has no function 'mkae'\. Did you mean 'make'"),
        ("nets/my.py:make", r"is a file, not a module: write my:make, in the directory of my\.py"),
        ("my.py:make", "write my:make"),
        ("{mine}:", "names no function"),
        (":make", "names no function"),
        ("no_such_module_here:make", r"no module 'no_such_module_here' \(looked in"),
        ("no_such_module_here.sub:make", "no module 'no_such_module_here'"),
        ("{mine}_broken:make", "needs 'no_such_package_at_all'; install that"),
        ("{mine}_raising:make", r"failed with ValueError: bad day\. Run with --debug"),
    ],
)
def test_what_cannot_be_found_is_named_with_the_nearest(mine: str, name: str, match: str) -> None:
    with pytest.raises(UnknownProblemError, match=match):
        load_problem(name.format(mine=mine))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("nothing", "returned None, not a curvscope.Problem"),
        ("net", "returned an object of type Sequential"),
        ("number", "is an object of type int, not a function"),
        ("failing", "raised ZeroDivisionError: one over zero"),
    ],
)
def test_a_function_that_gives_no_problem_is_refused(mine: str, name: str, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        load_problem(f"{mine}:{name}")


def test_zoo_problems_are_loaded_with_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(name: str, **options: Any) -> cs.Problem:
        seen.update(options, name=name)
        model, pair = nn.Linear(2, 2), (torch.ones(3, 2), torch.zeros(3, dtype=torch.long))
        return cs.Problem(model, nn.CrossEntropyLoss(), pair)

    monkeypatch.setattr(zoo, "load", load)
    load_problem("digits-cnn", samples=3, seed=5, dtype=torch.float64, data="d", device="cpu")
    assert seen == {
        "name": "digits-cnn",
        "samples": 3,
        "seed": 5,
        "dtype": torch.float64,
        "data": "d",
    }


# -- commands ------------------------------------------------------------------------------------


def test_version_help_and_list() -> None:
    assert run("--version").output.strip() == f"curvscope {cs.__version__}"
    for arguments in (["--help"], ["-h"], ["report", "-h"], ["verify", "-h"], ["doctor", "-h"]):
        result = run(*arguments)
        assert result.exit_code == 0 and "Usage" in result.output
        assert "xample" in result.output
    shown = [line.strip() for line in run("train", "-h").output.splitlines()]
    assert "curvscope report runs/digits" in shown  # an example is a line, to copy
    text = " ".join(shown)
    assert "finished ones are left alone. curvscope report FOLDER makes a page of them." in text
    listed = run("problems")
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == zoo.names()
    assert list(json.loads(run("problems", "--json").stdout)) == zoo.names()


def test_report_passes_its_options_on(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple] = []

    def make_report(problem: cs.Problem, out: Path, **options: Any) -> SimpleNamespace:
        calls.append((problem, out, options))
        return SimpleNamespace(html=out / "report.html")

    monkeypatch.setattr("curvscope.report.make_report", make_report)
    out = str(tmp_path / "r")
    result = run("report", f"{mine}:make", "--out", out, "--samples", "8", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "r" / "report.html")
    problem, where, options = calls[0]
    assert (problem.n_samples, where) == (8, tmp_path / "r")
    assert options["seed"] == 3 and options["hessian"] and options["verification"]
    assert options["command"].split()[0] == "curvscope"
    run("report", f"{mine}:make", "-o", out, "--no-hessian", "--no-verify", "--probes", "5")
    assert not calls[1][2]["hessian"] and not calls[1][2]["verification"]
    assert calls[1][2]["probes"] == 5
    run("report", f"{mine}:make", "-o", out, "--quick", "--samples", "300", "--damping", "0.1")
    assert calls[2][2]["quick"] and not calls[2][2]["hessian"]
    assert calls[2][2]["probes"] == 8 and calls[2][2]["damping"] == 0.1
    run("report", f"{mine}:make", "-o", out, "--dtype", "float64", "--device", "cpu")
    assert calls[3][0].dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["report", "digits-cmn", "--out", "{out}"], "Did you mean 'digits-cnn'"),
        (["report", "{mine}:nothing", "--out", "{out}"], "returned None"),
        (["report", "{mine}:make", "--out", "{file}"], "is a file"),
        (["report", "{mine}:make", "--out", "{out}", "--dtype", "float16"], "--dtype='float16'"),
        (["report", "{mine}:make", "--out", "{out}", "--device", "nowhere"], "--device nowhere"),
        (["report", "{mine}:make"], "--out"),
        (["report", "{mine}:make", "--out", "{out}", "--probes", "1"], "probes"),
        (["verify", "mnist-autoencoder"], "--data FOLDER"),
        (["verify", "digits-mlp", "--samples", "5000"], "there are 1,541 training samples"),
        (["verify", "{mine}:fixed", "--samples", "21"], "mine has 20 samples; take at most 20"),
        (["verify", "digits-cmn"], "Did you mean 'digits-cnn'"),
        (["raport"], "raport"),
    ],
)
def test_errors_are_one_message_and_exit_code_two(
    mine: str, tmp_path: Path, arguments: list[str], match: str
) -> None:
    (tmp_path / "file").write_text("x")
    places = {"mine": mine, "out": str(tmp_path / "r"), "file": str(tmp_path / "file")}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert match in message(result)
    assert not (tmp_path / "r").exists()


def test_output_is_refused_before_the_problem_is_loaded(mine: str, tmp_path: Path) -> None:
    """A problem of the zoo may take minutes to train."""
    (tmp_path / "file").write_text("x")
    result = run("report", f"{mine}:failing", "--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and "is a file" in message(result)


def test_debug_shows_where_an_error_comes_from(mine: str, tmp_path: Path) -> None:
    result = run("report", f"{mine}:failing", "--out", str(tmp_path / "r"), "--debug")
    assert isinstance(result.exception, OptionError)
    assert isinstance(result.exception.__cause__, ZeroDivisionError)


def test_verify_prints_the_verdict_and_exits_by_it(
    mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("verify", f"{mine}:make", "--samples", "8")
    assert result.exit_code == 0, result.output
    assert "can be trusted" in result.output
    told = json.loads(run("verify", f"{mine}:make", "--samples", "8", "--json").stdout)
    assert told["trusted"] and told["type"] == "Verification"
    assert told["samples"] == told["settings"]["samples"] == 8

    class Bad:
        trusted = False

        def __str__(self) -> str:
            return "not to be trusted"

    monkeypatch.setattr("curvscope.analysis.verify", lambda problem, **options: Bad())
    result = run("verify", f"{mine}:make")
    assert result.exit_code == 1 and "not to be trusted" in result.output


def test_train_needs_no_option_for_a_small_problem(mine: str, tmp_path: Path) -> None:
    arguments = ("train", f"{mine}:make", "--epochs", "1", "--out", str(tmp_path / "t"))
    result = run(*arguments, "--optimizer", "adam:lr=0.01")
    assert result.exit_code == 0, result.output
    assert "finished" in result.output
    result = run(*arguments, "--optimizer", "sgd:lr=0.1", "--probe", "21")
    assert result.exit_code == 1 and "the problem has 20 samples" in message(result)


# -- as a process --------------------------------------------------------------------------------


@pytest.fixture
def process(mine: str, tmp_path: Path) -> Callable[..., subprocess.Popen]:
    def start(*arguments: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "curvscope", *(a.format(mine=mine) for a in arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
            preexec_fn=heed_signals,
        )

    return start


def heed_signals() -> None:
    """Undo what ``nohup`` and background jobs hand down: signals that are ignored."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def test_ctrl_c_leaves_nothing_and_exits_with_130(
    process: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    running = process("report", "{mine}:slow", "--out", "out/report")
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Interrupted" in err and "Traceback" not in err and not out
    after = {path.name for path in tmp_path.iterdir()}
    assert after - before <= {"__pycache__"}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_ended_from_outside_leaves_no_draft(
    process: Callable[..., subprocess.Popen], tmp_path: Path, name: str
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    running = process("report", "{mine}:slow_to_compute", "--out", "report")
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    # the problem is checked while the draft lies beside the place of the report
    assert any(p.name.startswith(".report.") for p in tmp_path.iterdir())
    running.send_signal(getattr(signal, name))
    _, err = running.communicate(timeout=60)
    assert running.returncode == 128 + getattr(signal, name)
    assert f"Ended by {name}" in err and "Traceback" not in err
    after = {path.name for path in tmp_path.iterdir()}
    assert after - before <= {"__pycache__"}


def test_without_a_terminal_stages_are_lines_on_stderr(
    process: Callable[..., subprocess.Popen],
) -> None:
    running = process("report", "{mine}:make", "--out", "report", "--quick")
    out, err = running.communicate(timeout=100)
    assert running.returncode == 0, err
    assert out.strip().endswith("report.html")
    lines = [line for line in err.splitlines() if line.startswith("[")]
    assert all(re.fullmatch(r"\[ *\d+\.\d s\] \S.*", line) for line in lines), lines
    titles = [line.partition("] ")[2] for line in lines]
    assert titles[0].startswith("Loading ") and titles[-1] == "Figures"
    assert {"Exact GGN", "K-FAC", "Coverage"} <= set(titles)


def test_completion_knows_commands_and_problems() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_CURVSCOPE_COMPLETE": "complete_bash",
        "COMP_WORDS": "curvscope report digits-t",
        "COMP_CWORD": "2",
    }
    code = "import sys; sys.argv[0] = 'curvscope'; from curvscope.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert set(done.stdout.split()) == {"digits-tanh", "digits-transformer"}


def test_an_option_is_called_the_same_in_every_command() -> None:
    """``-o`` is the place to write to, wherever there is one."""
    command: Any = get_command(make_app())
    shorts: dict[str, set[str]] = {}
    for part in command.commands.values():
        for option in part.params:
            for long in (name for name in option.opts if name.startswith("--")):
                shorts.setdefault(long, set()).add(
                    ",".join(n for n in option.opts if not n.startswith("--"))
                )
    assert {long: found for long, found in shorts.items() if len(found) > 1} == {}
    assert shorts["--out"] == {"-o"} and shorts["--json"] == {""}
    used = [short for (short,) in shorts.values() if short]
    assert len(used) == len(set(used))
