"""What signals and kill -9 leave behind is enough to go on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from . import killed
from .test_checkpoint import same

ROOT = Path(__file__).parents[3]
SIGNALS = {
    "trace": "SIGKILL",
    "diagonal": "SIGTERM",
    "eigsh": "SIGKILL",
    "solve": "SIGTERM",
    "density": "SIGINT",
}


def started(job: str, path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.analysis.estimators.killed", job, str(path), "0.2"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checkpoints that killed processes have left; they start together, which saves time."""
    folder = tmp_path_factory.mktemp("killed")
    processes = {job: started(job, folder / f"{job}.pt") for job in SIGNALS}
    try:
        # each as soon as it has a state: on a busy machine one may finish before another begins
        waiting, deadline = dict(processes), time.monotonic() + 100
        while waiting and time.monotonic() < deadline:
            ready = [job for job in waiting if (folder / f"{job}.pt").exists()]
            time.sleep(0.3)  # some more states, and into the middle of one
            for job in ready:
                waiting.pop(job).send_signal(getattr(signal, SIGNALS[job]))
        for process in processes.values():
            assert process.wait(60) != 0
            assert process.stdout is not None and process.stdout.read() == "started\n"
    finally:
        for process in processes.values():
            process.kill()
    yield folder


@pytest.mark.parametrize("job", list(SIGNALS))
def test_killed_it_goes_on_to_the_same_bits(job: str, folder: Path, tmp_path: Path) -> None:
    path = folder / f"{job}.pt"
    state = torch.load(path, weights_only=True)
    assert set(state) == {"meta", "fingerprint", "numbers", "tensors"}
    whole = killed.run(job, str(tmp_path / "whole.pt"))
    calls: list[int] = []
    resumed = killed.JOBS[job](counting(calls), checkpoint=path)
    assert same(resumed, whole)
    assert 0 < sum(calls) < whole.products  # and not from the beginning


def counting(calls: list[int]) -> killed.FunctionOperator:
    def product(vectors: torch.Tensor) -> torch.Tensor:
        calls.append(vectors.shape[1])
        return killed.MATRIX @ vectors

    return killed.FunctionOperator(product, len(killed.MATRIX), check=False)
