"""Spectral densities and leading eigenpairs against PyHessian, hessian-eigenthings and SciPy.

    python benchmarks/spectra.py [--threads 2] [--parts density dataset distance eigenpairs]

*density*: 100 Lanczos steps from one probe on one batch of ResNet-20. *dataset*: a few steps from
8 probes over 20 batches, per step and probe. *distance*: Kolmogorov distance to the exact spectrum
at equal products, on networks small enough to know it. *eigenpairs*: products for the ten leading
pairs at equal tolerance. PyHessian 0.1 ends its density in ``torch.eig``, which torch has removed;
here it gets one that calls ``torch.linalg.eigh``. Times are ratios of the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import cases
import common
import scipy.sparse.linalg
import torch
from torch import Tensor

import curvscope as cs

STEPS = 100
SEEDS = 40
SHORT = 4  # Lanczos steps over the data set, whose times are given per step


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


def density_once(rounds: int) -> list[list[str]]:
    case = cases.make("resnet20")
    problem = cs.Problem(case.model, case.loss, case.batches[0])
    peer = pyhessian(case, data=case.batches[0])

    def ours() -> object:
        return cs.density(cs.hessian(problem), method="slq", probes=1, steps=STEPS)

    with _removed_function():
        ours_times, peer_times = [], []
        for _ in range(rounds):
            ours_times.append(timed(ours))
            peer_times.append(timed(lambda: peer.density(iter=STEPS, n_v=1)))
    ratio = statistics.median(p / o for o, p in zip(ours_times, peer_times, strict=True))
    return [
        [
            f"{case.name}: density, {STEPS} steps, 1 probe, one batch",
            "PyHessian",
            f"{statistics.median(peer_times):.1f} s",
            f"{statistics.median(ours_times):.1f} s",
            f"{ratio:.2f}",
        ]
    ]


def density_of_data(rounds: int) -> list[list[str]]:
    case = cases.make("resnet20", 20)
    problem = cs.Problem(case.model, case.loss, case.batches)
    peer = pyhessian(case, dataloader=case.batches)

    def ours(steps: int) -> object:
        return cs.density(cs.hessian(problem), method="slq", probes=8, steps=steps)

    times, others = [], []
    with _removed_function():
        for _ in range(max(1, rounds // 3)):
            times.append(timed(lambda: ours(SHORT)) / (8 * SHORT))
            others.append(timed(lambda: peer.density(iter=SHORT, n_v=1)) / SHORT)
    return [
        [
            f"{case.name}: density, 8 probes, 20 batches, per step and probe",
            "PyHessian",
            f"{statistics.median(others):.1f} s",
            f"{statistics.median(times):.1f} s",
            f"{statistics.median(p / o for o, p in zip(times, others, strict=True)):.2f}",
        ]
    ]


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
    for name in ("digits-mlp", "digits-tanh"):
        problem = cs.zoo.load(name, samples=256)
        loss = torch.nn.CrossEntropyLoss()
        inputs, targets = next(problem.subset(256).batches())
        one = cs.Problem(problem.model, loss, (inputs, targets))
        case = cases.Case(name, one.model, loss, [(inputs, targets)])
        exact = cs.spectrum(cs.hessian(one))
        width = (exact.largest - exact.smallest) / 200
        ours, theirs, things = [], [], []
        peer = pyhessian(case, data=case.batches[0])
        for seed in range(SEEDS):
            found = cs.density(cs.hessian(one), method="slq", probes=2, steps=40, seed=seed)
            weights = found.weights / len(found.weights)
            ours.append(kolmogorov(found.nodes.flatten(), weights.flatten(), exact, width))
            torch.manual_seed(seed)
            with _removed_function():
                nodes, mass = (torch.tensor(x) for x in peer.density(iter=40, n_v=2))
            theirs.append(kolmogorov(nodes.flatten(), mass.flatten() / 2, exact, width))
            things.append(_eigenthings_density(case, seed, exact, width))
        for peer_name, values in (("PyHessian", theirs), ("hessian-eigenthings", things)):
            rows.append(
                [
                    f"{name}: Kolmogorov distance, 2 probes of 40 steps, mean of {SEEDS} seeds",
                    peer_name,
                    _with_error(values),
                    _with_error(ours),
                    f"{statistics.mean(values) / statistics.mean(ours):.2f}",
                ]
            )
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


class Counted:
    """A matrix for SciPy that counts its products."""

    def __init__(self, op: Any) -> None:
        self.op, self.products = op, 0
        n = op.shape[0]
        self.linear = scipy.sparse.linalg.LinearOperator((n, n), self.multiply, dtype="float32")

    def multiply(self, v: Any) -> Any:
        self.products += 1
        return (self.op @ torch.from_numpy(v).reshape(-1).to(self.op.dtype)).numpy()


EIGEN = {
    "digits-mlp": ("hessian", "ggn"),
    "digits-tanh": ("hessian", "ggn"),
    "digits-cnn": ("hessian", "ggn"),
    "digits-resnet": ("hessian", "ggn"),
    "digits-transformer": ("hessian", "ggn"),
    "autoencoder": ("ggn",),
    "gpt": ("hessian",),
}


def eigenpairs(tol: float = 1e-4) -> list[list[str]]:
    """Products until the ten largest in magnitude have residuals below ``tol |lambda|``."""
    rows = []
    for name, matrices in EIGEN.items():
        if name.startswith("digits"):
            problem = cs.zoo.load(name, samples=256)
        else:
            case = cases.make(name)
            problem = cs.Problem(case.model, case.loss, case.batches[0])
        for matrix in matrices:
            op = getattr(cs, matrix)(problem)
            counted = Counted(op)
            ours = cs.eigsh(op, 10, method="lanczos", tol=tol)
            try:
                values, vectors = scipy.sparse.linalg.eigsh(counted.linear, 10, tol=tol)
                V, w = torch.from_numpy(vectors), torch.from_numpy(values)
                worst = float(((op @ V.to(op.dtype) - V * w).norm(dim=0) / w.abs()).max())
                scipy_says = f"{counted.products} products, residual {worst:.0e}"
            except scipy.sparse.linalg.ArpackNoConvergence:
                scipy_says = f"{counted.products} products, not converged"
            residual = float((ours.residuals / ours.values.abs()).max())
            rows.append(
                [
                    f"{name}, {matrix}: ten leading eigenpairs, tolerance {tol:g}",
                    "scipy.sparse.linalg.eigsh",
                    scipy_says,
                    f"{ours.products} products, residual {residual:.0e}"
                    + ("" if ours.converged else ", not converged"),
                    f"{counted.products / ours.products:.2f}",
                ]
            )
            print(rows[-1], flush=True)
    return rows


PARTS = ("density", "dataset", "distance", "eigenpairs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    store = common.RESULTS / "spectra.json"
    kept = json.loads(store.read_text()) if store.exists() else {}
    runs: dict[str, Callable[[], list[list[str]]]] = {
        "density": lambda: density_once(chosen.rounds),
        "dataset": lambda: density_of_data(chosen.rounds),
        "distance": distances,
        "eigenpairs": eigenpairs,
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
        "Above 1 in the last column curvscope is faster, nearer to the truth, or needs fewer "
        "products.",
    )


if __name__ == "__main__":
    main()
