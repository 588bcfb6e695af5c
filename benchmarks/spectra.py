"""Spectral densities against PyHessian and hessian-eigenthings.

    python benchmarks/spectra.py [--threads 2] [--rounds 2] [--parts density dataset distance]

*density*: 100 Lanczos steps from one probe on one batch of ResNet-20. *dataset*: two steps from
8 probes over 20 batches, per step and probe. *distance*: Kolmogorov distance to the exact spectrum
at equal products, on networks small enough to know it. PyHessian 0.1 ends its density in
``torch.eig``, which torch has removed; here it gets one that calls ``torch.linalg.eigh``. Times are
those of the same run, from the call that makes the operator on. Parts that are not asked for keep
what they gave before. Eigenpairs have a benchmark of their own: ``eigenpairs.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import cases
import common
import torch
from torch import Tensor

import curvscope as cs

STEPS = 100
SEEDS = 40
SHORT = 2  # Lanczos steps over the data set, whose times are given per step


@contextlib.contextmanager
def _removed_function() -> Iterator[None]:
    """``torch.eig`` of a symmetric matrix as it was, for as long as PyHessian runs."""

    def eig(T: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(T)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    before = getattr(torch, "eig", None)
    torch.eig = eig
    try:
        yield
    finally:
        if before is None:
            del torch.eig
        else:
            torch.eig = before


def pyhessian(case: cases.Case, **options: Any) -> Any:
    from pyhessian import hessian

    return hessian(case.model, case.loss, cuda=False, **options)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def density_once(rounds: int, steps: int = STEPS) -> list[list[str]]:
    case = cases.make("resnet20")
    problem = cs.Problem(case.model, case.loss, case.batches[0])

    def ours() -> object:
        return cs.density(cs.hessian(problem), method="slq", probes=1, steps=steps)

    def theirs() -> object:  # it makes the graph of its batch when it is constructed, as we do
        return pyhessian(case, data=case.batches[0]).density(iter=steps, n_v=1)

    task = f"{case.name}: density, {steps} steps, 1 probe, one batch"
    return [_row(task, *_interleaved(ours, theirs, rounds))]


def density_of_data(rounds: int, batches: int = 20) -> list[list[str]]:
    case = cases.make("resnet20", batches)
    problem = cs.Problem(case.model, case.loss, case.batches)

    def ours() -> object:
        return cs.density(cs.hessian(problem), method="slq", probes=8, steps=SHORT)

    def theirs() -> object:
        return pyhessian(case, dataloader=case.batches).density(iter=SHORT, n_v=1)

    mine, others = _interleaved(ours, theirs, max(1, rounds // 2))
    task = f"{case.name}: density, 8 probes, {batches} batches, per step and probe"
    return [_row(task, [t / (8 * SHORT) for t in mine], [t / SHORT for t in others])]


def _interleaved(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Times of both, one after the other in each round, in turns which goes first."""
    times: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    with _removed_function():
        for turn in range(rounds):
            for run in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
                times[run].append(timed(run))
                gc.collect()
    return times[ours], times[theirs]


def _row(task: str, ours: list[float], theirs: list[float]) -> list[str]:
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    seconds = (f"{statistics.median(times):.2f} s" for times in (theirs, ours))
    task = f"{task}, {torch.get_num_threads()} threads"
    return [task, "PyHessian", *seconds, f"{ratio:.2f}"]


def _digits(name: str, *, trained: bool = True) -> cases.Case:
    problem = cs.zoo.load(name, samples=256, trained=trained)
    batch = next(problem.subset(256).batches())
    return cases.Case(name, problem.model, torch.nn.CrossEntropyLoss(), [batch])


NETWORKS: dict[str, Callable[[], cases.Case]] = {
    "digits-mlp": lambda: _digits("digits-mlp"),
    "digits-tanh": lambda: _digits("digits-tanh"),
    "digits-cnn": lambda: _digits("digits-cnn"),
    "digits-mlp untrained": lambda: _digits("digits-mlp", trained=False),
}


def kolmogorov(nodes: Tensor, weights: Tensor, exact: Any, width: float) -> float:
    """Largest difference of distribution functions, both broadened alike."""
    points = torch.linspace(float(exact.smallest) - width, float(exact.largest) + width, 4000)
    points = points.double()

    def cdf(at: Tensor, w: Tensor) -> Tensor:
        z = (points.unsqueeze(1) - at.double()) / (width * 2**0.5)
        return (0.5 * (1 + torch.erf(z)) * w.double()).sum(1)

    share = torch.full_like(exact.eigenvalues, 1 / len(exact.eigenvalues))
    return float((cdf(nodes, weights) - cdf(exact.eigenvalues, share)).abs().max())


def distances() -> list[list[str]]:
    rows = []
    for name, make in NETWORKS.items():
        case = make()
        one = cs.Problem(case.model, case.loss, case.batches[0])
        exact = cs.spectrum(cs.hessian(one))
        width = (exact.largest - exact.smallest) / 200
        found: dict[str, list[float]] = {
            "curvscope": [],
            "PyHessian": [],
            "hessian-eigenthings": [],
        }
        peer = pyhessian(case, data=case.batches[0])
        for seed in range(SEEDS):
            ours = cs.density(cs.hessian(one), method="slq", probes=2, steps=40, seed=seed)
            weights = ours.weights / len(ours.weights)
            distance = kolmogorov(ours.nodes.flatten(), weights.flatten(), exact, width)
            found["curvscope"].append(distance)
            torch.manual_seed(seed)
            with _removed_function():
                nodes, mass = (torch.tensor(x) for x in peer.density(iter=40, n_v=2))
            distance = kolmogorov(nodes.flatten(), mass.flatten() / 2, exact, width)
            found["PyHessian"].append(distance)
            found["hessian-eigenthings"].append(_eigenthings_density(case, seed, exact, width))
        mine = found.pop("curvscope")
        for peer_name, values in found.items():
            rows.append(
                [
                    f"{name}: Kolmogorov distance, 2 probes of 40 steps, mean of {SEEDS} seeds",
                    peer_name,
                    _with_error(values),
                    _with_error(mine),
                    f"{statistics.mean(values) / statistics.mean(mine):.2f}",
                ]
            )
            print(rows[-1], flush=True)
    return rows


def _with_error(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def _eigenthings_density(case: cases.Case, seed: int, exact: Any, width: float) -> float:
    from hessian_eigenthings import HessianOperator, spectral_density
    from hessian_eigenthings import loss_fns as losses

    op = HessianOperator(
        case.model, loss_fn=losses.supervised_loss(case.loss), dataloader=case.batches
    )
    found = spectral_density(op, num_runs=2, lanczos_steps=40, seed=seed, num_grid_points=10)
    weights = found.raw_weights / found.raw_weights.sum()
    return kolmogorov(found.raw_eigenvalues.flatten(), weights.flatten(), exact, width)


PARTS = ("density", "dataset", "distance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    store = common.RESULTS / "spectra.json"
    kept = json.loads(store.read_text()) if store.exists() else {}
    runs: dict[str, Callable[[], list[list[str]]]] = {
        "density": lambda: density_once(chosen.rounds),
        "dataset": lambda: density_of_data(chosen.rounds),
        "distance": distances,
    }
    for part in chosen.parts:
        kept[part] = runs[part]()
        store.write_text(json.dumps(kept, indent=1) + "\n")
    rows = [row for part in PARTS if part in kept for row in kept[part]]
    common.write(
        "spectra",
        "Spectra against other libraries",
        ["task", "peer", "peer's", "curvscope's", "peer / curvscope"],
        rows,
        "Above 1 in the last column curvscope is faster or nearer to the truth.\nThe probes of the "
        "libraries differ, so their distances agree within the errors where their methods do.",
    )


if __name__ == "__main__":
    main()
