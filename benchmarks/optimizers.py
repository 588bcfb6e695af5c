"""Cost of a step and memory of the optimizers, against Adam and against ``pytorch_optimizer``.

    python benchmarks/optimizers.py [--threads 2] [--rounds 15] [--cases autoencoder gpt ...]

A step is timed with everything that it needs (forward and backward passes included) on random data
of the real shapes, in interleaved rounds; ratios are medians over rounds. Memory is what an
optimizer keeps between steps, beside what its method needs by counting. The rows of each network
are kept in ``results/optimizers.json``, so that networks can be measured one by one.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cases
import common
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvscope as cs
from curvscope.optim import CurvatureOptimizer

Make = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """``closure``: ``"backward"`` (the closure calls it), ``"loss"`` (it only returns the loss),
    ``"plain"`` (``step()`` after it), ``"graph"`` (after ``backward(create_graph=True)``)."""

    name: str
    make: Make
    closure: str = "backward"
    warm_up: int = 3


def ours(pairs: int) -> list[Method]:
    optim = cs.optim
    return [
        Method("K-BFGS", lambda m: optim.KBFGS(m, 1e-4, 0.3)),
        Method(
            f"K-BFGS(L), {pairs} pairs",
            lambda m: optim.KBFGS(m, 1e-4, 0.3, memory=pairs),
            "backward",
            pairs + 5,
        ),
        Method("K-FAC", lambda m: optim.KFAC(m, 1e-4, 0.3), "backward", 21),
        Method("AdaFisher", lambda m: optim.AdaFisher(m, 1e-5)),
        Method("AdaFisher, update_every=1", lambda m: optim.AdaFisher(m, 1e-5, update_every=1)),
        Method("AdaFisherW", lambda m: optim.AdaFisherW(m, 1e-5)),
        Method("AdaHessian", lambda m: optim.AdaHessian(m, 1e-4), "loss"),
        Method("M-FAC, 32 gradients", lambda m: optim.MFAC(m, 1e-5, memory=32), "backward", 34),
    ]


def torch_own() -> list[Method]:
    return [
        Method("SGD", lambda m: torch.optim.SGD(m.parameters(), 1e-4, momentum=0.9), "plain"),
        Method("Adam", lambda m: torch.optim.Adam(m.parameters(), 1e-5), "plain"),
    ]


def others() -> list[Method]:
    try:
        import pytorch_optimizer as p
    except ImportError:
        print("pytorch_optimizer is not installed: left out")
        return []
    return [
        Method(
            "AdaHessian (pytorch_optimizer)", lambda m: p.AdaHessian(m.parameters(), 1e-4), "graph"
        ),
        Method("SOAP (pytorch_optimizer)", lambda m: p.SOAP(m.parameters(), 1e-5), "plain"),
        Method("Shampoo (pytorch_optimizer)", lambda m: p.Shampoo(m.parameters(), 1e-5), "plain"),
    ]


def stepper(method: Method, case: cases.Case) -> tuple[Callable[[], object], Any, nn.Module]:
    model = copy.deepcopy(case.model).train()
    optimizer = method.make(model)
    (x, y), loss = case.batches[0], case.loss

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x), y)
        if method.closure != "loss":
            value.backward(create_graph=method.closure == "graph")
        return value

    if method.closure in ("plain", "graph"):

        def step() -> None:
            closure()
            optimizer.step()
            optimizer.zero_grad()  # with create_graph, what would hold itself otherwise

        return step, optimizer, model
    return lambda: optimizer.step(closure), optimizer, model


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in ``state``, each storage once."""
    storages: dict[int, int] = {}
    stack: list[Any] = [dict(optimizer.state), getattr(optimizer, "_window", None)]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            stack += list(value.values())
        elif isinstance(value, list | tuple):
            stack += list(value)
    return sum(storages.values())


def counted_bytes(name: str, optimizer: CurvatureOptimizer) -> int | None:
    """What a method has to keep, by its description, in float32; None where it is not written."""
    covered = {n for b in optimizer.layers for n in optimizer.blocks[b]}
    rest = 2 * sum(p.numel() for n, p in optimizer.params.items() if n not in covered)  # Adam
    own = 0
    for block, layer in optimizer.layers.items():
        size = sum(optimizer.params[n].numel() for n in optimizer.blocks[block])
        if name.startswith("AdaFisher"):
            own += size + _sides(layer)
            continue
        groups, out, inp = layer.view.shape
        own += size
        if name == "K-FAC":
            own += groups * 2 * (inp**2 + out**2)
        elif name == "K-BFGS":
            own += groups * (2 * inp**2 + out**2)
        elif name.startswith("K-BFGS(L)"):
            own += groups * (2 * inp**2 + 2 * optimizer.memory * out)
    if name == "AdaHessian":
        return 4 * 2 * optimizer.layout.numel
    if name.startswith("M-FAC"):
        return 4 * (32 * optimizer.layout.numel)
    return 4 * (own + rest) if own else None


def _sides(layer: Any) -> int:
    weight = layer.weight
    return weight.shape[0] + (math.prod(weight.shape[1:]) + 1 if weight.ndim > 1 else 2)


def measure(case: cases.Case, rounds: int, pairs: int) -> list[list[str]]:
    methods = [*torch_own(), *ours(pairs), *others()]
    runs: dict[str, Callable[[], object]] = {}
    kept: dict[str, Any] = {}
    failed: dict[str, str] = {}

    model = copy.deepcopy(case.model).train()  # as in every step; BatchNorm costs more than in eval
    parameters = list(model.parameters())

    def gradient() -> None:
        value = case.loss(model(case.batches[0][0]), case.batches[0][1])
        torch.autograd.grad(value, parameters)

    runs["one gradient"] = gradient
    for method in methods:
        try:
            step, optimizer, _ = stepper(method, case)
            for _ in range(method.warm_up):
                step()
            runs[method.name], kept[method.name] = step, optimizer
        except Exception as error:
            failed[method.name] = f"{type(error).__name__}: {str(error)[:60]}"
    times = common.interleaved(runs, rounds)
    rows = []
    for name in runs:
        if name == "one gradient":
            continue
        mine = kept[name]
        held = state_bytes(mine)
        counted = counted_bytes(name, mine) if isinstance(mine, CurvatureOptimizer) else None
        rows.append(
            [
                case.name,
                name,
                f"{common.ratio(times, name, 'one gradient'):.2f}",
                f"{common.ratio(times, name, 'SGD'):.2f}",
                f"{common.ratio(times, name, 'Adam'):.2f}",
                f"{1e3 * statistics.median(times[name]):.0f}",
                f"{held / 2**20:.1f}",
                f"{held / counted:.2f}" if counted else "",
            ]
        )
    rows += [[case.name, name, "fails", "", "", "", "", why] for name, why in failed.items()]
    return rows


def autoencoder_1000() -> cases.Case:
    case = cases.make("autoencoder")
    images = torch.rand(1000, 784)
    return cases.Case("MNIST autoencoder, batch 1000", case.model, case.loss, [(images, images)])


# name -> network, and the pairs that K-BFGS(L) remembers
CASES: dict[str, tuple[Callable[[], cases.Case], int]] = {
    "autoencoder": (autoencoder_1000, 100),
    "resnet20": (lambda: cases.make("resnet20"), 20),
    "gpt": (lambda: cases.make("gpt"), 20),
}
HEADER = [
    "network",
    "optimizer",
    "gradients",
    "SGD steps",
    "Adam steps",
    "ms",
    "MiB kept",
    "of counted",
]
NOTES = (
    "*gradients*: time of a step over that of one gradient (forward and backward pass) of the same "
    "batch; *SGD steps* and *Adam steps*: over a step of these. AdaFisher updates its factors in "
    "every hundredth step by default; its row is the median step, which does not. K-FAC's and "
    "K-BFGS's first steps, which make inverses, are left out; K-FAC makes them again every 20 "
    "steps."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    store = common.RESULTS / "optimizers.json"
    kept = json.loads(store.read_text()) if store.exists() else {}
    for name in chosen.cases:
        make, pairs = CASES[name]
        with sdpa_kernel(SDPBackend.MATH):
            kept[name] = measure(make(), max(chosen.rounds, 3), pairs)
        store.write_text(json.dumps(kept, indent=1) + "\n")
    rows = [row for name in CASES if name in kept for row in kept[name]]
    common.write("optimizers", "A step of every optimizer", HEADER, rows, NOTES)


if __name__ == "__main__":
    main()
