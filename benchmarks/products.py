"""Matrix-vector products with Hessian and GGN against hand-written code and other libraries.

    python benchmarks/products.py [--threads 2] [--rounds 7] [--device cpu]

Without ``--device`` on the CPU and, where there is one, on the GPU, a table each. Peers that are
not installed are left out.

Times are medians of interleaved rounds, as multiples of one gradient (forward plus backward pass of
the same batch) of the same round, all with the same attention kernel. *fastest peer*: a median of
ratios, too, to the run outside curvscope that has the smallest median for the same matrix; *by
hand*: to the double backward of the same kind, fresh or retained. The error is that against the
product in float64; the memory what a product takes at its height beyond what is kept before it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import cases
import common
import peers
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvscope as cs

COLUMNS, BATCHES = 8, 20
LONG = ("resnet20",)  # whose block takes minutes on a CPU
# for the block: room for the graph of a batch, not for those of all
MEMORY = {"resnet20": 2**29, "autoencoder": 2**28, "gpt": 2**28}
NOTE = """*gradients*: medians of interleaved rounds over one gradient of the same batch and round,
all with the same attention kernel. *by hand*: over a double backward written by hand, with a fresh
or a retained graph; *fastest peer*: over the fastest other library for this matrix. *MiB*: what a
product allocates at its height. *error*: relative, against the product in float64."""


def by_hand(case: cases.Case, vector: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Double backward as one writes it oneself, with a fresh and with a retained graph."""
    p, (x, y) = case.parameters, case.batches[0]
    v = [part.reshape(q.shape) for part, q in zip(vector.split([q.numel() for q in p]), p)]

    def flat(parts: Any) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts])

    def gradient(create: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(case.loss(case.model(x), y), p, create_graph=create)

    kept = gradient(True)
    return {
        "one gradient": lambda: flat(gradient(False)),
        "Hessian by hand, fresh": lambda: flat(torch.autograd.grad(gradient(True), p, v)),
        "Hessian by hand, retained": lambda: flat(
            torch.autograd.grad(kept, p, v, retain_graph=True)
        ),
    }


def ours(case: cases.Case, vector: Tensor) -> dict[str, Callable[[], Tensor]]:
    problem = cs.Problem(case.model, case.loss, case.batches[0])
    runs = {}
    for title, make in (("Hessian", cs.hessian), ("GGN", cs.ggn)):
        for engine in ("fresh", "retained", "auto"):
            # forward mode belongs to the automatic choice; with a fresh graph only where the
            # graphs of one batch may not be kept
            options = {"memory": None} if engine != "fresh" else {}
            operator = make(problem, engine=engine, **options)
            runs[f"{title}, curvscope {engine}"] = lambda op=operator: op @ vector
    return runs


def rounds_of(runs: dict[str, Callable[[], Tensor]], rounds: int, sync: Callable[[], None]) -> Any:
    """Times by run, and what each run returned; runs that fail give their error instead."""
    values: dict[str, Any] = {}
    for name, run in list(runs.items()):
        try:
            run()
            values[name] = run()
        except Exception as error:
            values[name] = error
            del runs[name]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            sync()
            start = time.perf_counter()
            run()
            sync()
            times[name].append(time.perf_counter() - start)
    return times, values


def median_ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


def truth(case: cases.Case, vector: Tensor, matrix: str) -> Tensor:
    exact = case.double()
    problem = cs.Problem(exact.model, exact.loss, exact.batches[0])
    op = cs.hessian(problem, engine="fresh") if matrix == "Hessian" else cs.ggn(problem)
    return op @ vector.double()


def single(case: cases.Case, rounds: int, sync: Callable[[], None]) -> list[list[str]]:
    vector = torch.randn(case.size, generator=torch.Generator().manual_seed(1))
    vector = vector.to(case.parameters[0])
    runs = {**by_hand(case, vector), **ours(case, vector), **peers.products(case, vector)}
    times, values = rounds_of(runs, rounds, sync)
    exact = {m: truth(case, vector, m) for m in ("Hessian", "GGN")}
    rows = []
    for name, value in values.items():
        matrix = name.split(",")[0].split()[0]
        if isinstance(value, Exception):
            rows.append([case.name, name, "fails", "", "", "", type(value).__name__])
            continue
        error = ""
        if matrix in exact:
            gap = (value.detach().double() - exact[matrix]).norm() / exact[matrix].norm()
            error = f"{float(gap):.1e}"
        hand = peer = ""
        if "curvscope" in name:
            fastest = _fastest_peer(times, matrix, "fresh" in name)
            if fastest is not None:
                peer = f"{median_ratio(times, name, fastest):.2f} ({fastest.partition(', ')[2]})"
            if matrix == "Hessian" and "auto" not in name:
                kind = "fresh" if "fresh" in name else "retained"
                hand = f"{median_ratio(times, name, f'Hessian by hand, {kind}'):.2f}"
        ratio = f"{median_ratio(times, name, 'one gradient'):.2f}"
        mebibytes = f"{common.peak_bytes(runs[name]) / 2**20:.0f}"
        rows.append([case.name, name, ratio, hand, peer, mebibytes, error])
    return rows


def _fastest_peer(times: dict[str, list[float]], matrix: str, fresh: bool) -> str | None:
    """Of the other libraries, ``None`` where none is installed that gives this matrix.

    One that keeps its graph is no peer of a product that does not.
    """
    peers = [n for n in times if n.startswith(f"{matrix}, ") and "curvscope" not in n]
    peers = [n for n in peers if not (fresh and "retained" in n)]
    return min(peers, key=lambda name: statistics.median(times[name]), default=None)


def block(name: str, rounds: int, sync: Callable[[], None], device: str) -> list[list[str]]:
    """A block of vectors over a data set, per vector and batch."""
    case = to(cases.make(name, BATCHES), device)
    problem = cs.Problem(case.model, case.loss, case.batches)
    V = torch.randn(case.size, COLUMNS, generator=torch.Generator().manual_seed(2))
    V = V.to(case.parameters[0])

    def gradient() -> None:
        for x, y in case.batches:
            torch.autograd.grad(case.loss(case.model(x), y), case.parameters)
        sync()

    def product(operator: cs.Operator) -> None:
        operator @ V
        sync()

    runs: dict[str, Any] = {"one gradient": gradient}
    for title, make in (("Hessian", cs.hessian), ("GGN", cs.ggn)):
        operator = make(problem, memory=MEMORY[name])
        label = f"{title}, curvscope, {COLUMNS} vectors, {BATCHES} batches"
        runs[label] = functools.partial(product, operator)
    gradient()
    # runs of minutes need no warming up, and two rounds of them are enough
    long = name in LONG
    times = common.interleaved(runs, 2 if long else rounds, warmup=0 if long else 1)
    return [
        [
            case.name,
            run,
            f"{common.ratio(times, run, 'one gradient') / COLUMNS:.2f}",
            "",
            "",
            "",
            "",
        ]
        for run in list(runs)[1:]
    ]


def to(case: cases.Case, device: str) -> cases.Case:
    moved = [(x.to(device), y.to(device)) for x, y in case.batches]
    return cases.Case(case.name, case.model.to(device), case.loss, moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--device", help="cpu or cuda (default: what there is of them)")
    parser.add_argument("--cases", nargs="*", default=list(cases.CASES))
    parser.add_argument("--data", help="not used: the data are random, of the real shapes")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in [chosen.device] if chosen.device else available:
        table(device, chosen.cases, chosen.rounds)


def table(device: str, names: list[str], rounds: int) -> None:
    """Measure some of the networks on a device; rows of the others stay as they are on disk."""
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    found = {}
    with sdpa_kernel(SDPBackend.MATH):
        for name in names:
            rows = single(to(cases.make(name), device), rounds, sync)
            found[name] = rows + block(name, max(2, rounds // 3), sync, device)
    suffix = "" if device == "cpu" else f"_{device}"
    header = ["network", "product", "gradients", "by hand", "fastest peer", "MiB", "error"]
    store = common.RESULTS / f"products{suffix}.json"
    kept = json.loads(store.read_text()) if store.exists() else {}
    kept.update(found)
    store.write_text(json.dumps(kept, indent=1) + "\n")
    rows = [row for name in cases.CASES if name in kept for row in kept[name]]
    common.write(f"products{suffix}", "Matrix-vector products", header, rows, NOTE)


if __name__ == "__main__":
    main()
