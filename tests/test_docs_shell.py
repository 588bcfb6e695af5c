"""Shell blocks of README and docs are run by a shell, each page from top to bottom as by a reader.

``bash`` runs the blocks in one empty folder per page. ``curvscope`` in it is the command line of
this package, computed by the test's own process (which has imported PyTorch already): words,
working directory, output, redirections and exit statuses are those of the shell. What makes it
quick is not in the commands: problems have few samples and those of the zoo a small network,
trainings end after an epoch, and pictures of reports, which have tests of their own, stay empty.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from curvscope.cli import make_app
from curvscope.loading import load_problem
from curvscope.problem import Problem
from curvscope.report import figures
from curvscope.report.figure_plans import Plan
from curvscope.report.figures import Picture, draw_plan
from curvscope.training.trainings import Trainings
from curvscope.training.trainings import train as full_train
from curvscope.zoo.datasets import Dataset, Split
from curvscope.zoo.registry import ENTRIES

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELL = ("sh", "")  # of the docs' blocks, those without a language are commands, too
WITH = [name for name, text in PAGES.items() if any(b[1] in SHELL for b in BLOCK.finditer(text))]
SAMPLES = 64  # that a problem of the zoo keeps of its data

GIVEN = {
    "docs/how-to/command-line.md": ["one", "two", "before", "after"],
    "docs/how-to/read-a-report.md": ["mynet", "before", "after"],
}
"""Folders of reports that a page takes from its reader's earlier work."""
NOT_RUN = {
    "README.md": {"pip install -e .": "needs the network; whoever runs the tests has done it"},
}
"""Commands that are answered without being run, and why."""
PACKAGES = {
    "docs/how-to/compare-optimizers.md": {"runs/others": ["pytorch_optimizer", "bitsandbytes"]},
}
"""Blocks that need packages which curvscope does not bring: run where these are installed."""

# What this shell has in place of commands: a caller of this process, and make and pip without work.
PRELUDE = r"""
set -e
curvscope() {
    if [ "$1" = --install-completion ]; then "$PYTHON" -m curvscope "$@"; return; fi
    "$PYTHON" -S -E -c '
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as call:
    call.connect(os.environ["SERVER"])
    with call.makefile("rw") as line:
        print(json.dumps([os.getcwd(), sys.argv[1:]]), file=line, flush=True)
        code, out, err = json.loads(line.readline())
sys.stdout.write(out), sys.stderr.write(err), sys.exit(code)' "$@"
}
make() { command make --dry-run --directory "$ROOT" "$@"; }
pip() { echo "pip $*" >> "$HOME/not-run"; }
python3() { "$PYTHON" "$@"; }
"""


class Shell:
    """``bash`` in a folder; every ``curvscope`` in it is answered by this process."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home
        home.mkdir()
        self.environment = os.environ | {
            "HOME": str(home),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "ROOT": str(ROOT),
            "SERVER": str(home / "s"),
        }

    def run(self, text: str) -> str:
        """Runs ``text`` as a script, and returns what it printed; its status must be 0."""
        with socket.socket(socket.AF_UNIX) as server, open(self.home / "out", "w+") as out:
            here = os.open(self.home, os.O_RDONLY)  # a socket's whole path may be too long
            server.bind(f"/proc/self/fd/{here}/s")
            server.listen()
            server.settimeout(0.02)
            done = subprocess.Popen(
                ["bash", "-c", PRELUDE + text],
                cwd=self.folder,
                env=self.environment | {"SERVER": f"/proc/{os.getpid()}/fd/{here}/s"},
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
            while done.poll() is None:
                try:
                    self.answer(server.accept()[0])
                except TimeoutError:
                    continue
            os.close(here)
            (self.home / "s").unlink()
            out.seek(0)
            printed = out.read()
        assert done.returncode == 0, f"{text}\n{printed}"
        return printed

    def answer(self, call: socket.socket) -> None:
        """Does what one ``curvscope`` asks for, in its working directory."""
        call.settimeout(None)
        before, argv = Path.cwd(), sys.argv
        with call, call.makefile("rw") as line:
            folder, words = json.loads(line.readline())
            os.chdir(folder)
            sys.argv = ["curvscope", *words]
            try:
                done = CliRunner().invoke(make_app(), words)
            finally:
                os.chdir(before)
                sys.argv = argv
                sys.modules.pop("mynet", None)  # the next folder has its own
            failed = "".join(traceback.format_exception(done.exception)) if done.exception else ""
            answer = [done.exit_code, done.stdout, done.stderr + failed]
            print(json.dumps(answer), file=line, flush=True)


def few(data: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """The same data with few samples."""

    def take(split: Split) -> Split:
        return Split(split.raw[:SAMPLES], split.labels[:SAMPLES], split.prepare)

    def load(folder: Any) -> Dataset:
        found = data(folder)
        return dataclasses.replace(found, train=take(found.train), test=take(found.test))

    return load


def small(data: Dataset) -> nn.Module:
    """A network for digits, flat or not, with 310 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, data.classes))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(plan: Plan, name: str, folder: Path) -> Picture:
        return draw_plan(dataclasses.replace(plan, draw=lambda figure: None), name, folder)

    def train(*args: Any, epochs: int, monitor: dict[str, Any], **options: Any) -> Trainings:
        assert epochs > 0
        return full_train(*args, epochs=1, monitor=monitor | {"probe": 32}, **options)

    def load(name: str, *, samples: int | None = None, **options: Any) -> Problem:
        return load_problem(name, samples=min(samples or SAMPLES, SAMPLES), **options)

    monkeypatch.setattr(figures, "draw_plan", draw)
    monkeypatch.setattr("curvscope.loading.load_problem", load)
    monkeypatch.setattr("curvscope.training.trainings.train", train)
    for name, entry in ENTRIES.items():
        changed = dataclasses.replace(entry, data=few(entry.data), model=small)
        monkeypatch.setitem(ENTRIES, name, changed)


def mynet() -> str:
    """README's network of one's own."""
    (code,) = (b[2] for b in BLOCK.finditer(PAGES["README.md"]) if b[2].startswith("# mynet.py\n"))
    return code


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A report that was made before, once."""

    @functools.cache
    def make() -> Path:
        folder = tmp_path_factory.mktemp("before")
        (folder / "mynet.py").write_text(mynet())
        shell = Shell(folder, folder / "home")
        shell.run("curvscope report mynet:make --out reports/mynet --quick --samples 8")
        return folder / "reports" / "mynet"

    return make


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("page", WITH, ids=WITH)
def test_shell_blocks_run(page: str, tmp_path: Path, report: Callable[[], Path]) -> None:
    text = PAGES[page]
    folder = tmp_path / "work"
    folder.mkdir()
    if "mynet" in text:
        (folder / "mynet.py").write_text(mynet())
    for name in GIVEN.get(page, []):
        shutil.copytree(report(), folder / "reports" / name)
    shell = Shell(folder, tmp_path / "home")
    for block in BLOCK.finditer(text):
        if file := re.match(r"# (\w+\.(?:py|toml))\n", block[2]):
            (folder / file[1]).write_text(block[2])
        if block[1] not in SHELL:
            continue
        needed = [names for part, names in PACKAGES.get(page, {}).items() if part in block[2]]
        if any(importlib.util.find_spec(name) is None for names in needed for name in names):
            continue
        shell.run(block[2])
        for made in re.findall(r"(?:--out|>) (\S+)", block[2]):
            assert (folder / made).exists(), made
    asked = (tmp_path / "home" / "not-run").read_text() if NOT_RUN.get(page) else ""
    assert asked.split("\n")[:-1] == list(NOT_RUN.get(page, {}))


def test_what_is_set_aside_is_in_the_docs() -> None:
    for page, names in GIVEN.items():
        for name in names:
            assert f"reports/{name}" in "".join(b[2] for b in BLOCK.finditer(PAGES[page]))
    for page, parts in (*NOT_RUN.items(), *PACKAGES.items()):
        for part in parts:
            assert any(part in b[2] for b in BLOCK.finditer(PAGES[page]) if b[1] in SHELL), part


def test_failures_are_seen(tmp_path: Path) -> None:
    """The shell stops at a command that fails, and tells what it said."""
    (tmp_path / "work").mkdir()
    shell = Shell(tmp_path / "work", tmp_path / "home")
    for wrong in ("curvscope report digits-mpl --out x", "make reprot", "curvscope doctor --jsn"):
        with pytest.raises(AssertionError, match=r"digits-mlp|reprot|--json"):
            shell.run(wrong + "\ntouch done")
    assert not (tmp_path / "work" / "done").exists()
    assert "0.1" in shell.run("curvscope --version > v || exit 1\ncat v")
    assert "failed" in shell.run("curvscope verify nobody:make || echo failed")
