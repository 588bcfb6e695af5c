"""A slow estimate with a checkpoint, run by the tests in a process of its own and killed.

python -m tests.analysis.estimators.killed JOB FILE SECONDS_PER_PRODUCT
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import curvscope as cs
from curvscope.analysis.estimators import checkpoint as files
from curvscope.operators import FunctionOperator

from .matrices import spectra, with_spectrum

MATRIX = with_spectrum(spectra(60)["indefinite"])
JOBS: dict[str, Callable[..., Any]] = {
    "trace": lambda op, **k: cs.trace(op, tol=0, budget=400, **k),
    "diagonal": lambda op, **k: cs.diagonal(op, tol=0, budget=400, **k),
    "eigsh": lambda op, **k: cs.eigsh(op, 8, tol=1e-9, method="lanczos", **k),
    "solve": lambda op, **k: cs.solve(op, torch.ones(60), damping=0.01, tol=1e-9, **k),
    "density": lambda op, **k: cs.density(op, probes=10, steps=40, **k),
}


def run(job: str, path: str, pause: float = 0.0) -> Any:
    def product(vectors: torch.Tensor) -> torch.Tensor:
        time.sleep(pause)
        return MATRIX @ vectors

    op = FunctionOperator(product, len(MATRIX), check=False)
    return JOBS[job](op, checkpoint=path)


if __name__ == "__main__":
    # a shell that runs tests in its background has them ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    files._SECONDS = 0.0  # a state after every block, instead of every twenty seconds
    torch.set_num_threads(1)
    print("started", flush=True)
    run(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    print("finished", flush=True)
