"""Exact layer blocks against forming matrices column by column and against ``torch.func.hessian``.

Ratios are medians over interleaved rounds of one run; the column-by-column matrix, which takes
minutes, is formed once.
"""

from __future__ import annotations

import torch
from common import arguments, interleaved, ratio, seconds, write

import curvscope as cs


def all_blocks(op: cs.Operator) -> dict[str, torch.Tensor]:
    return {name: block.dense() for name, block in op.blocks.items()}


def full_matrix(rounds: int) -> list[list[object]]:
    """All layer blocks of digits-cnn against the whole matrix, column by column."""
    problem = cs.zoo.load("digits-cnn", dtype=torch.float64, samples=256)
    rows: list[list[object]] = []
    for name, make in (("GGN", cs.ggn), ("Hessian", cs.hessian)):
        columns = make(problem, route="autograd")
        slow = seconds(lambda op=columns: op.dense())
        whole = columns.dense()
        times = interleaved({"blocks": lambda f=make: all_blocks(f(problem))}, rounds)["blocks"]
        error = 0.0
        for block, dense in all_blocks(make(problem)).items():
            index = problem.layout.index(problem.blocks[block])
            part = whole[index][:, index]
            error = max(error, float((dense - part).norm() / part.norm()))
        fast = sorted(times)[len(times) // 2]
        rows.append(
            [
                f"digits-cnn (256 samples), all {name} blocks",
                f"{problem.layout.numel} columns by products, many at once",
                f"{slow:.2f} s",
                f"{fast:.3f} s",
                f"{slow / fast:.0f}",
                f"{error:.0e}",
            ]
        )
    return rows


def func_hessian(problem: cs.Problem, block: str):
    """``torch.func.hessian`` of the loss in one layer's parameters."""
    model = problem.user_model.eval()
    with problem.session():
        batches = list(problem.batches())
    scale = problem.scale
    names = problem.blocks[block]
    fixed = {n: p.detach() for n, p in model.named_parameters() if n not in names}
    live = {n: problem.params[n].detach() for n in names}

    def objective(values: dict[str, torch.Tensor]) -> torch.Tensor:
        total = 0.0
        for inputs, targets in batches:
            out = torch.func.functional_call(model, {**fixed, **values}, (inputs,))
            total = total + problem.loss.total(out, targets)
        return total * scale

    def run() -> torch.Tensor:
        nested = torch.func.hessian(objective)(live)
        rows = [
            torch.cat([nested[a][b].reshape(live[a].numel(), -1) for b in names], 1) for a in names
        ]
        return torch.cat(rows)

    return run


def smooth_blocks(rounds: int) -> list[list[object]]:
    """Hessian blocks of the Linear layers of digits-tanh against ``torch.func.hessian``."""
    problem = cs.zoo.load("digits-tanh", dtype=torch.float64)
    rows: list[list[object]] = []
    for block in problem.blocks:
        theirs = func_hessian(problem, block)
        ours = lambda b=block: cs.hessian(problem).blocks[b].dense()  # noqa: E731
        times = interleaved({"theirs": theirs, "ours": ours}, rounds)
        exact = ours()
        error = float((theirs() - exact).norm() / exact.norm())
        route = cs.hessian(problem).route_of(block)
        rows.append(
            [
                f"digits-tanh, Hessian block {block} [{len(exact)}] ({route})",
                "torch.func.hessian",
                f"{sorted(times['theirs'])[rounds // 2]:.3f} s",
                f"{sorted(times['ours'])[rounds // 2]:.4f} s",
                f"{ratio(times, 'theirs', 'ours'):.0f}",
                f"{error:.0e}",
            ]
        )
    return rows


def main() -> None:
    chosen = arguments(__doc__ or "")
    rows = smooth_blocks(chosen.rounds) + full_matrix(chosen.rounds)
    header = ["what", "against", "theirs", "curvscope", "times faster", "relative difference"]
    write("blocks", "Exact blocks", header, rows)


if __name__ == "__main__":
    main()
