"""How much of a matrix lies on its diagonal, always beside what a random eigenbasis would give."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError, OptionError, check_option
from ..operators import KroneckerOperator, Operator
from ..progress import track
from .coerce import as_operator, in_float64
from .concentrated import NOISE, Concentration
from .diagonality import (
    band_shares,
    count_above_one,
    diagonal_share,
    disjoint_discs,
    dominant_share,
    fourier_magnitude,
    off_diagonal_noise,
    signal_to_noise,
)
from .null_model import NullModel, null_model
from .result import Cost, as_cpu, listing, number

_LIMIT = 2000
_BUDGET = 100
_LEAST = 8  # products of an estimate at least


def concentration(
    matrix: Operator | Tensor | np.ndarray,
    *,
    noise: float = NOISE,
    samples: int = 16,
    seed: int = 0,
    limit: int = _LIMIT,
    method: str = "auto",
    budget: int = _BUDGET,
    blocks: bool = True,
) -> Concentration:
    """Diagonal concentration of a symmetric matrix, of Kronecker factors, or block by block.

    A Kronecker product is described with both of its factors; an operator with blocks block by
    block, the outer result then being that of its block-diagonal part.

    The analysis (Gershgorin discs, Kaiser rule under noise off the diagonal, Fourier spectrum,
    signal-to-noise ratio) is that of Martins Gomes et al., "AdaFisher: Adaptive second order
    optimization via Fisher information", ICLR 2025 (arXiv 2405.16397, section 3.1), with two
    differences: the Kaiser rule (count eigenvalues above one) depends on scale, so it is applied to
    the matrix divided by its mean diagonal, and ``noise``, the standard deviation of the symmetric
    normal noise, is in the same unit; and everything stands beside a null model, since a random
    positive-definite matrix concentrates on its diagonal as well.

    Parameters
    ----------
    matrix
        An Operator, or a symmetric tensor or array ``[d, d]``.
    noise
        Standard deviation of the noise relative to the mean diagonal; the paper's variance of
        1e-3 by default.
    samples
        Random eigenbases drawn for the null model's spread and counts; fewer or none for large
        matrices. The expected diagonal share is exact at any size.
    seed
        Seed of noise and null model.
    limit
        Operators with more rows are not formed: what their structure gives is exact, the rest is
        estimated from products, with standard errors.
    method
        ``"auto"`` decides by ``limit``; ``"exact"`` forms matrices of any size; ``"estimated"``
        forms nothing and uses products alone.
    budget
        Most products with a matrix that is not formed, for each estimate (at least 8); all together
        take about five times as many.
    blocks
        ``False`` describes an operator with blocks as one matrix, with what lies outside them.

    Cost: ``O(d^3)`` per matrix formed and per sample, or the products in ``.cost``.

    Raises ``OptionError`` for a matrix that is empty or not symmetric and for options that do not
    fit, ``ShapeError`` for one that is not square.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> found = cs.concentration(torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
    >>> round(found.diagonal_share, 3), found.disjoint
    (0.9, 0)
    """
    start = time.perf_counter()
    if noise < 0 or not math.isfinite(noise):
        raise OptionError(f"noise={noise!r} must be a finite number that is not negative.")
    check_option("method", method, ("auto", "exact", "estimated"))
    if budget < _LEAST:
        raise OptionError(f"budget={budget!r} is too small: an estimate takes {_LEAST} products.")
    settings: dict[str, Any] = {"noise": noise, "samples": samples, "seed": seed, "limit": limit}
    settings |= {"method": method, "budget": budget}
    given = isinstance(matrix, Operator)
    op = as_operator(matrix)
    if not op.shape[0]:
        raise OptionError("The matrix is empty.")
    options: dict[str, Any] = dict(settings)
    if op.blocks and blocks:
        names = track(list(op.blocks), "Concentration of blocks")
        parts = {name: concentration(op.blocks[name], **options) for name in names}
        return _joint(op, parts, settings, start)
    factors: dict[str, Concentration] = {}
    if isinstance(op, KroneckerOperator) and op.view.groups == 1 and blocks:
        options["method"] = "auto" if method == "estimated" else method
        for name, factor in op.factors.items():
            part = concentration(factor, **options)
            factors[name] = _renamed(part, f"factor {name} of the {op.info.what}")
    if method == "estimated" or (given and method == "auto" and op.shape[0] > limit):
        return _unformed(op, factors, settings, start)
    dense = as_cpu(in_float64(op).dense())
    if not bool(torch.isfinite(dense).all()):
        raise NonFiniteError(
            f"The {op.info.what} has NaN or infinite entries. Check the parameters and the data "
            "that it was computed from."
        )
    return _formed(dense, op.info.what, factors, settings, start)


def _formed(
    matrix: Tensor,
    of: str,
    factors: Mapping[str, Concentration],
    settings: dict[str, Any],
    start: float,
) -> Concentration:
    noise, seed = settings["noise"], settings["seed"]
    diagonal = matrix.diagonal()
    magnitudes = matrix.abs()
    radii = magnitudes.sum(1) - magnitudes.diagonal()
    values = torch.linalg.eigvalsh(matrix)
    warnings: list[str] = []
    scale = float(diagonal.mean())
    found: dict[str, Any] = {"scale": scale}
    if scale > 1e-12 * float(magnitudes.max()):
        noisy = off_diagonal_noise(matrix / scale, noise, seed)
        found["eigenvalues"] = values.flip(0) / scale
        found["noisy_eigenvalues"] = torch.linalg.eigvalsh(noisy).flip(0)
        found["kaiser"] = count_above_one(found["eigenvalues"])
        found["kaiser_noisy"] = count_above_one(found["noisy_eigenvalues"])
        found["noisy_snr"] = signal_to_noise(noisy)
    else:
        warnings.append(
            f"The mean diagonal of the {of} is {number(scale)}: the Kaiser rule needs a positive "
            "one, so it is left empty."
        )
    return Concentration(
        of=of,
        size=matrix.shape[0],
        diagonal_share=diagonal_share(matrix),
        null=null_model(values, samples=settings["samples"], seed=seed),
        band_shares=band_shares(matrix),
        centres=diagonal.clone(),
        radii=radii,
        disjoint=disjoint_discs(diagonal, radii),
        dominant=dominant_share(diagonal, radii),
        snr=signal_to_noise(matrix),
        energy=float(matrix.square().sum()),
        fourier=fourier_magnitude(matrix),
        noise=noise,
        factors=factors,
        cost=Cost(seconds=time.perf_counter() - start),
        settings=settings,
        warnings=tuple(warnings),
        **found,
    )


def _unformed(
    op: Operator, factors: Mapping[str, Concentration], settings: dict[str, Any], start: float
) -> Concentration:
    """What structure and products say of a matrix that is not formed."""
    from .unformed_concentration import estimates

    found = estimates(
        op,
        budget=settings["budget"],
        seed=settings["seed"],
        noise=settings["noise"],
        by_products=settings["method"] == "estimated",
    )
    return Concentration(
        of=op.info.what,
        size=op.shape[0],
        noise=settings["noise"],
        method="estimated",
        stderr=found.stderr,
        reasons=found.reasons,
        factors=factors,
        cost=Cost(found.products, time.perf_counter() - start),
        settings=settings,
        warnings=(
            f"The {op.info.what} ({op.shape[0]:,} rows) was not formed: dominance and bands are "
            "those of rows drawn at random, and the reasons say what is missing.",
        ),
        **found.values,
    )


def _joint(
    op: Operator, blocks: Mapping[str, Concentration], settings: dict[str, Any], start: float
) -> Concentration:
    """The block-diagonal part, from its blocks; eigenvectors of the null model stay within them."""
    energies = [block.energy for block in blocks.values()]
    energy, size = math.fsum(energies), sum(block.size for block in blocks.values())
    weights = [e / energy if energy else 0.0 for e in energies]

    def total(numbers: list[float]) -> float:
        return math.fsum(w * x for w, x in zip(weights, numbers) if w) if energy else math.nan

    nulls = [block.null for block in blocks.values()]
    spread = total([w * null.diagonal_share_std**2 for w, null in zip(weights, nulls)])
    null = NullModel(
        total([null.diagonal_share for null in nulls]),
        math.sqrt(spread),
        samples=min(null.samples for null in nulls),
    )
    share = total([block.diagonal_share for block in blocks.values()])
    error = _spread(blocks, weights, share)
    warnings = [text for block in blocks.values() for text in block.warnings]
    if op.uncovered:
        warnings.append(f"The {op.info.what} does not define {listing(op.uncovered)}.")
    return Concentration(
        of=f"block diagonal of the {op.info.what}",
        size=size,
        diagonal_share=share,
        null=null,
        noise=settings["noise"],
        energy=energy,
        method="estimated" if any(b.method == "estimated" for b in blocks.values()) else "exact",
        stderr={"diagonal_share": error, "excess": error} if error else {},
        blocks=blocks,
        cost=Cost(
            sum(block.cost.products for block in blocks.values()), time.perf_counter() - start
        ),
        settings=settings,
        warnings=tuple(warnings),
    )


def _spread(blocks: Mapping[str, Concentration], weights: list[float], share: float) -> float:
    """Standard error of the joint share, from those of the blocks' shares and energies."""
    terms = []
    for weight, block in zip(weights, blocks.values()):
        if not weight:
            continue
        terms.append(weight * block.stderr.get("diagonal_share", 0.0))
        relative = block.stderr.get("energy", 0.0) / block.energy
        terms.append(weight * relative * (block.diagonal_share - share))
    return math.hypot(*terms) if terms else 0.0


def _renamed(part: Concentration, of: str) -> Concentration:
    from dataclasses import replace

    return replace(part, of=of)
