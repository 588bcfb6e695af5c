"""Products that the top ten eigenpairs take, beside those of SciPy's eigsh.

    python benchmarks/eigenpairs.py

Both reach the same relative residuals from the same start. SciPy does not look for copies of
multiple eigenvalues: without that look (``copies=False``) both answer the same question. The number
in parentheses is what the default takes, which looks for them.
"""

from __future__ import annotations

import torch
from common import arguments, write

import curvscope as cs
from curvscope.operators import FunctionOperator, Operator

SIZE, K = 1000, 10
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-6)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def prescribed() -> dict[str, Operator]:
    """Matrices with spectra that those of networks resemble, and harder ones."""
    basis = torch.linalg.qr(normal(SIZE, SIZE, seed=0)).Q
    ranks = torch.arange(1, SIZE + 1, dtype=torch.float64)
    bulk, wide = normal(SIZE, seed=1), normal(SIZE - 9, 2 * SIZE, seed=2)
    square = normal(SIZE, SIZE, seed=3)
    top = torch.tensor([50.0, 40, 30, 25, 20, 15, 10, 8, 6, 5], dtype=torch.float64)
    copies = torch.tensor([5.0, 5, 5, 4, 4, 3], dtype=torch.float64)
    spread = torch.linspace(3, 10, 9, dtype=torch.float64)
    spectra = {
        "rank^-1.5": ranks**-1.5,
        "rank^-1": 1 / ranks,
        "exp(-rank / 10)": torch.exp(-ranks / 10),
        "10 outliers, normal bulk": torch.cat([top, bulk[10:] / 2]),
        "9 outliers, Marchenko-Pastur bulk": torch.cat(
            [spread, torch.linalg.eigvalsh(wide @ wide.mT / (2 * SIZE))]
        ),
        "cluster of 10": torch.cat([10 + ranks[:10] / 1000, ranks[10:] / SIZE]),
        "5, 5, 5, 4, 4, 3 over a bulk": torch.cat([copies, ranks[6:] / SIZE]),
        "both signs, cubic": torch.linspace(-1, 1, SIZE, dtype=torch.float64) ** 3,
        "Wigner": torch.linalg.eigvalsh((square + square.mT) / 2),
        "rank 15": torch.cat([ranks[:15], torch.zeros(SIZE - 15, dtype=torch.float64)]),
    }
    return {name: by_products((basis * values) @ basis.mT) for name, values in spectra.items()}


def by_products(matrix: torch.Tensor) -> Operator:
    return FunctionOperator(lambda vectors: matrix @ vectors, len(matrix))


def networks() -> dict[str, Operator]:
    found: dict[str, Operator] = {}
    for name in ("digits-mlp", "digits-cnn"):
        problem = cs.zoo.load(name)
        found[f"{name}, Hessian"] = cs.hessian(problem)
        found[f"{name}, GGN"] = cs.ggn(problem)
        found[f"{name} untrained, Hessian"] = cs.hessian(cs.zoo.load(name, trained=False))
    return found


def main() -> None:
    arguments(__doc__ or "")
    wins = with_copies = cases = 0
    rows: list[list[str]] = []
    for name, op in {**prescribed(), **networks()}.items():
        cells = [name]
        for tol in TOLERANCES:
            if op.dtype == torch.float32 and tol < 1e-5:
                cells.append("below rounding")
                continue
            own = cs.eigsh(op, K, tol=tol, method="lanczos", copies=False)
            sure = cs.eigsh(op, K, tol=tol, method="lanczos")
            other = cs.eigsh(op, K, tol=tol, method="scipy", budget=3000)
            products = other.products - K  # those are for the true residuals
            missed = [
                word
                for word, found in (("own", own), ("with copies", sure), ("SciPy", other))
                if not found.converged
            ]
            mark = f" (not converged: {', '.join(missed)})" if missed else ""
            cells.append(f"{own.products} ({sure.products}) / {products}{mark}")
            wins += own.products < products
            with_copies += sure.products < products
            cases += 1
        rows.append(cells)
    write(
        "eigenpairs",
        f"Products for the {K} eigenpairs of largest magnitude",
        ["matrix", *(f"tol {tol:g}" for tol in TOLERANCES)],
        rows,
        f"`cs.eigsh` with `copies=False` (and by default) / `scipy.sparse.linalg.eigsh`, the same "
        f"start and residuals.\nFewer products than SciPy in {wins} of {cases} cases, and in "
        f"{with_copies} by default, with the look for copies of multiple eigenvalues that SciPy "
        f"has not.",
    )


if __name__ == "__main__":
    main()
