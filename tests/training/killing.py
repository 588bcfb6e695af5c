"""Monitored trainings in a process of their own, which can be killed at any moment.

``python -m tests.training.killing KIND`` reads lines ``FOLDER SECONDS`` and, for each, forks a
training that continues what the folder has, and kills it with signal 9 after so many seconds
(``-1``: never). It answers ``done`` or ``killed``. Importing once and forking make it quick.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import curvscope as cs
from curvscope.training import Every, Snapshots
from tests.training.loops import OPTIMIZERS, batches, data, one_step, plain_net, problem_of

STEPS, SAVE = 16, 4
MEASURES: dict[Any, Any] = {
    "loss": 1,
    "gradient": 3,
    "error": 4,
    cs.training.Spectrum(count=3, steps=6): Every(5),
    "diagnostics": 2,
}


def train(folder: Path) -> None:
    """Continue from the checkpoint, if there is one, to step 16."""
    folder.mkdir(parents=True, exist_ok=True)
    model = plain_net()
    optimizer = OPTIMIZERS["K-BFGS"](model)
    monitor = cs.Monitor(
        problem_of(model),
        optimizer,
        folder / "run",
        measures=MEASURES,
        budget=None,
        snapshots=Snapshots("full", schedule=2),
    )
    first, file = 1, folder / "checkpoint"
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        monitor.load_state_dict(state["monitor"])
        first = state["step"] + 1
    x, y = data()
    with monitor:
        for step, index in enumerate(batches(STEPS), 1):
            if step < first:
                continue
            monitor.step(one_step(model, optimizer, x[index], y[index]))
            if step % SAVE == 0:
                parts = {"model": model, "optimizer": optimizer, "monitor": monitor}
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save({**state, "step": step}, folder / "part")
                os.replace(folder / "part", file)


EPOCHS = 4


def compare(folder: Path) -> None:
    """A comparison of two optimizers; continued if the folder has one."""
    cs.training.train(
        problem_of(plain_net()),
        ["kbfgs", "adam"],
        epochs=EPOCHS,
        batch_size=8,
        out=folder,
        monitor={"measures": ["loss", "gradient"], "every": 4},
    )


class Broken(torch.optim.SGD):
    """Fails at its third step."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """As SGD, twice."""
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken == 3:
            raise RuntimeError("on purpose")
        return super().step(closure)


KINDS: dict[str, Callable[[Path], None]] = {"training": train, "comparison": compare}


@contextmanager
def served(kind: str) -> Iterator[Callable[[Path, float], str]]:
    """A function of folder and seconds that trains in a process of its own; see the module."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.training.killing", kind]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=root, **pipes) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None
        assert stdout.readline() == "ready\n"

        def run(folder: Path, seconds: float) -> str:
            stdin.write(f"{folder} {seconds}\n")
            stdin.flush()
            return stdout.readline().strip()

        try:
            yield run
        finally:
            stdin.close()


def serve(work: Callable[[Path], None]) -> None:
    """See the module."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        work(Path(folder) / "first")  # what is imported late is there for all of them
    print("ready", flush=True)
    for line in sys.stdin:
        folder, seconds = line.rsplit(maxsplit=1)
        child = os.fork()
        if child == 0:
            try:
                work(Path(folder))
                os._exit(0)
            finally:
                os._exit(1)
        if float(seconds) >= 0:
            time.sleep(float(seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        print("killed" if killed else f"done {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    serve(KINDS[sys.argv[1]])
