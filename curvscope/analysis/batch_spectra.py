"""Top eigenvalues of minibatch curvature against batch size, and what random matrices predict."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..curvature.products import GGN, HESSIAN, Kind
from ..curvature.whole import WholeOperator
from ..display import spark
from ..errors import BatchNormError, DataError, OptionError, check_count, check_option, check_seed
from ..modes import plain_mode
from ..operators import Operator
from ..problem import Problem, require_problem
from ..progress import track
from .estimators import Density, density, eigsh
from .result import Cost, Result, as_cpu, number

_KINDS = {"hessian": HESSIAN, "ggn": GGN}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BatchSpectra(Result):
    """What :func:`batch_spectra` found.

    ``sizes`` ``[s]`` are the batch sizes; ``values`` ``[s, draws, k]`` the largest eigenvalues of
    the matrices of single batches, ``full`` ``[k]`` those of all samples. ``noise`` is
    ``E ||(A_n - A) z||^2`` for a random direction z of length one and a single sample's matrix
    ``A_n``, with ``noise_stderr``; ``noise_along`` ``[k]`` the same along the eigenvectors of
    ``full``. ``predicted`` ``[s, k]`` is the spiked random-matrix prediction with ``noise``,
    ``predicted_along`` ``[s, k]`` the one of second-order perturbation with ``noise_along``.
    ``densities`` holds a spectral density per size where they were asked for.
    """

    of: str
    samples: int
    sizes: tuple[int, ...]
    values: Tensor = field(repr=False)
    full: Tensor = field(repr=False)
    noise: float
    noise_stderr: float
    noise_along: Tensor = field(repr=False)
    predicted: Tensor = field(repr=False)
    predicted_along: Tensor = field(repr=False)
    densities: tuple[Density, ...] = field(default=(), repr=False, metadata={"json": False})

    @property
    def largest(self) -> Tensor:
        """Mean over draws of the largest eigenvalue, ``[s]``."""
        return self.values[:, :, 0].mean(1)

    @property
    def learning_rates(self) -> Tensor:
        """``2 / lambda_max`` of a batch of each size, ``[s]``: gradient descent's stability limit
        (``inf`` where no eigenvalue is positive)."""
        return torch.where(self.largest > 0, 2 / self.largest, torch.inf)

    def summary(self) -> str:
        """The largest eigenvalue at both ends, and how good the predictions are."""
        first, last = float(self.largest[0]), float(self.largest[-1])
        text = (
            f"The largest eigenvalue of the {self.of} is {number(first)} on batches of "
            f"{self.sizes[0]:,} and {number(last)} on batches of {self.sizes[-1]:,}; on all "
            f"{self.samples:,} samples it is {number(float(self.full[0]))}. "
        )
        errors = [
            f"{name} is off by {100 * _worst(p[:, 0], self.largest):.0f} %"
            for name, p in (
                ("the random-matrix prediction", self.predicted),
                ("that with the noise along the eigenvector", self.predicted_along),
            )
        ]
        limits = [number(x) for x in self.learning_rates[[0, -1]].tolist()]
        return (
            f"{text}At worst {', '.join(errors)}. Gradient descent is stable up to a learning rate "
            f"of {limits[0]} and {limits[1]} ({self.cost})."
        )

    def _pictures(self) -> list[tuple[str, str]]:
        caption = "largest eigenvalue, by size of the batch"
        return [(caption, spark(self.largest.tolist(), caption))]

    def records(self) -> list[dict[str, Any]]:
        """A row per batch size; learning rates scaled from the smallest one's limit."""
        rows = []
        limits = self.learning_rates
        for i, size in enumerate(self.sizes):
            top = self.values[i, :, 0]
            growth = size / self.sizes[0]
            rows.append(
                {
                    "batch_size": size,
                    "largest": float(top.mean()),
                    "std": float(top.std()) if len(top) > 1 else math.nan,
                    "predicted": float(self.predicted[i, 0]),
                    "predicted_along": float(self.predicted_along[i, 0]),
                    "full": float(self.full[0]),
                    "lr_limit": float(limits[i]),
                    "lr_linear_scaling": float(limits[0]) * growth,
                    "lr_sqrt_scaling": float(limits[0]) * math.sqrt(growth),
                }
            )
        return rows


def _worst(predicted: Tensor, measured: Tensor) -> float:
    return float(((predicted - measured) / measured).abs().max())


@plain_mode()
def batch_spectra(
    problem: Problem,
    sizes: Sequence[int] | None = None,
    *,
    matrix: str = "hessian",
    k: int = 3,
    draws: int = 5,
    densities: bool = False,
    tol: float = 1e-3,
    seed: int = 0,
) -> BatchSpectra:
    """Largest eigenvalues of the matrix of a random batch, against its size B.

    ``matrix`` is ``"hessian"`` or ``"ggn"``; ``sizes`` (default: powers of four from 8 up to half
    of the samples N) are drawn ``draws`` times each without replacement; ``k`` eigenvalues each, to
    the relative residual ``tol``; ``densities=True`` adds the spectral density of one batch per
    size. ``seed`` is that of batches, probes and start vectors. A loss with ``reduction="sum"`` is
    divided by the batch's share of the samples, so that all sizes are on one scale.

    With ``b = B / (1 - B / N)`` and ``s^2 = noise / b`` (``noise`` as in :class:`BatchSpectra`,
    measured on the same batches), the matrix of a batch is that of all samples plus noise. If the
    noise were a symmetric matrix of independent entries, the i-th eigenvalue would be
    ``lambda_i + s^2 / lambda_i`` where ``lambda_i > s``, and at the edge ``2 s`` of its semicircle
    otherwise (Granziol, Zohren and Roberts 2022, theorem 1). Real noise is largest along the
    leading eigenvectors: ``predicted_along`` takes
    ``lambda_i + sum_j (u_j^T E u_i)^2 / (lambda_i - lambda_j)`` with the measured noise E instead
    (second-order perturbation theory), for all other eigenvalues taken as zero.

    Cost: ``k`` eigenpairs of the whole matrix and of ``draws`` batches per size, and ``k + 1``
    products with each. Raises ``OptionError`` for sizes that are not between 1 and N,
    ``DataError`` for a single sample and for a batch whose targets are all ignored,
    ``BatchNormError`` where the samples of a batch influence each other.

    Source: Granziol, Zohren and Roberts, "Learning rates as a function of batch size: a random
    matrix theory approach to neural network training" (JMLR 23, 2022; arXiv 2006.09092).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> found = cs.batch_spectra(problem, [1, 3], matrix="ggn", draws=2, k=1)
    >>> found.values.shape
    torch.Size([2, 2, 1])
    """
    require_problem(problem)
    check_option("matrix", matrix, _KINDS)
    facts = problem.check()
    if problem.batchnorm == "batch" or facts.coupled:
        raise BatchNormError(
            "Batches of another size are another problem here, since the samples of a batch "
            "influence each other. Use batchnorm='eval', or a model that treats them separately."
        )
    n = facts.samples
    if n < 2:
        raise DataError("Spectra by batch size need at least two samples.")
    chosen = _sizes(sizes, n)
    k, draws, seed = check_count("k", k), check_count("draws", draws), check_seed(seed)
    start = time.perf_counter()
    at = problem.snapshot()
    k = min(k, problem.layout.numel)
    whole = WholeOperator(problem, Kind(_KINDS[matrix]), "auto", at)
    pairs = eigsh(whole, k, which="LA", tol=tol, seed=seed)
    full, U = pairs.values.double(), pairs.vectors.double()
    products = pairs.products
    AU = as_cpu(whole @ U.to(whole.dtype).to(whole.device)).double()
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(len(chosen), draws, k, dtype=torch.float64)
    energies: list[float] = []
    mixing = torch.zeros(k, k, dtype=torch.float64)  # E (u_j^T E_n u_i)^2, per sample
    beyond = torch.zeros(k, dtype=torch.float64)  # and what leaves the span of U
    found: list[Density] = []
    cells = [(i, d) for i in range(len(chosen)) for d in range(draws)]
    for i, draw in track(cells, "Batches", total=len(cells)):
        size = chosen[i]
        part = problem.subset(size, seed=int(torch.randint(2**31, (), generator=generator)))
        try:
            part.check()
        except DataError as error:
            raise DataError(
                f"One of the random batches of {size} samples cannot be used: {error} Pass larger "
                "sizes=, so that every batch has terms of its own."
            ) from error
        op: Operator = WholeOperator(part, Kind(_KINDS[matrix]), "auto", part.snapshot())
        if problem.loss.reduction == "sum":
            op = (n / size) * op
        top = eigsh(op, k, which="LA", tol=tol, seed=seed)
        values[i, draw] = top.values
        products += top.products + k + 2
        if densities and draw == 0:
            found.append(density(op, seed=seed))
        if size == n:
            continue
        effective = size / (1 - size / n)
        z = torch.randn(len(U), 1, generator=generator, dtype=torch.float64)
        z = z / z.norm()
        V = torch.cat([U, z], 1).to(op.dtype).to(op.device)
        Az = as_cpu(whole @ V[:, -1:]).double()
        E = as_cpu(op @ V).double() - torch.cat([AU, Az], 1)
        energies.append(effective * float(E[:, -1].square().sum()))
        inside = U.mT @ E[:, :k]
        mixing += effective * inside.square() / len(cells)
        beyond += effective * (E[:, :k].square().sum(0) - inside.square().sum(0)) / len(cells)
    share = len(cells) / max(len(energies), 1)
    mixing, beyond = mixing * share, beyond * share
    noise = torch.tensor(energies or [0.0], dtype=torch.float64)
    predicted, along = _predictions(full, chosen, n, float(noise.mean()), mixing, beyond)
    return BatchSpectra(
        of=whole.info.what,
        samples=n,
        sizes=tuple(chosen),
        values=values,
        full=full,
        noise=float(noise.mean()),
        noise_stderr=float(noise.std() / math.sqrt(len(noise))) if len(noise) > 1 else math.nan,
        noise_along=mixing.sum(0) + beyond,
        predicted=predicted,
        predicted_along=along,
        densities=tuple(found),
        converged=pairs.converged,
        cost=Cost(products, time.perf_counter() - start),
        settings={"matrix": matrix, "k": k, "draws": draws, "tol": tol, "seed": seed},
    )


def _sizes(sizes: Sequence[int] | None, n: int) -> list[int]:
    if sizes is None:
        return sorted({min(8 * 4**i, n) for i in range(20) if 8 * 4**i <= max(n // 2, 8)})
    chosen = [int(size) for size in sizes]
    bad = [size for size in sizes if int(size) != size or not 1 <= size <= n]
    if bad or not chosen:
        raise OptionError(
            f"sizes={list(sizes)!r} must be batch sizes between 1 and the {n:,} samples."
        )
    return sorted(set(chosen))


def _predictions(
    full: Tensor, sizes: Sequence[int], n: int, noise: float, mixing: Tensor, beyond: Tensor
) -> tuple[Tensor, Tensor]:
    """``[s, k]`` each: with noise alike in all directions, and with the measured one."""
    spiked, along = [], []
    gaps = full.unsqueeze(0) - full.unsqueeze(1)  # [j, i] = lambda_i - lambda_j
    apart = gaps.abs() > 1e-6 * full.abs().max()
    second = torch.where(apart, mixing / torch.where(apart, gaps, 1.0), 0.0).sum(0)
    second = second + torch.where(full > 0, beyond / full, 0.0)
    for size in sizes:
        inverse = 1 / size - 1 / n  # 1 / b
        spread = math.sqrt(noise * inverse)
        inner = full + noise * inverse / full
        spiked.append(torch.where(full > spread, inner, 2 * spread))
        along.append(full + second * inverse)
    return torch.stack(spiked), torch.stack(along)
