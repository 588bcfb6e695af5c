"""Results to draw, and a call per kind of picture."""

from __future__ import annotations

import functools
import math

import torch

import curvscope as cs
from curvscope import plot as cplot
from curvscope.analysis import concentration, spectrum
from curvscope.analysis.batch_spectra import BatchSpectra
from curvscope.analysis.checks import CURVSCOPE, OTHERS, Check
from curvscope.analysis.comparison import Comparison, ReferenceBlock, Row
from curvscope.analysis.coverage import Cell, Coverage, ParameterRow
from curvscope.analysis.extremes import Extremes
from curvscope.analysis.local import LocalModel
from curvscope.analysis.noise import GradientNoise
from curvscope.analysis.verify import Verification
from curvscope.operators import DenseOperator, KroneckerOperator

from .estimates import estimate_pictures
from .trainings import training_pictures


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (matrix + matrix.mT) / 2


def positive(size: int, seed: int = 0) -> torch.Tensor:
    matrix = symmetric(size, seed)
    return matrix @ matrix


def kronecker(seed: int = 0) -> KroneckerOperator:
    return KroneckerOperator(positive(3, seed), positive(4, seed + 1))


def comparison() -> Comparison:
    """Two blocks and the whole; one estimated row, one uncovered."""
    rows = []
    for block in ("first", "second", "(all)"):
        rows.append(
            Row(
                block,
                "K-FAC",
                size=4,
                family="Kronecker",
                best_class="Kronecker",
                values={"error": 0.5, "best_in_class": 0.25, "cosine": 0.75},
                stderr={"error": 0.05} if block == "(all)" else {},
            )
        )
        rows.append(
            Row(block, "diagonal", "uncovered", 4, note="not here")
            if block == "second"
            else Row(
                block,
                "diagonal",
                size=4,
                family="diagonal",
                best_class="diagonal",
                values={"error": 0.9, "best_in_class": 0.9, "cosine": 0.1},
            )
        )
    return Comparison(
        reference="GGN",
        approximations=("K-FAC", "diagonal"),
        blocks=("first", "second"),
        rows=tuple(rows),
        references=(ReferenceBlock("first", 4, "GGN", "gram", 1.0, 1.0),),
        metrics=("error", "cosine"),
    )


def coverage() -> Coverage:
    names = ("weight", "bias", "frozen")
    rows = tuple(
        ParameterRow(
            name=name,
            names=(name,),
            shape=(2,),
            size=2,
            block="0",
            layer="Linear",
            state="frozen" if name == "frozen" else "included",
        )
        for name in names
    )
    cells = tuple(
        Cell(parameter=name, method=method, status=status, route=route)
        for name, states in zip(
            names,
            (
                [("covered", "gram"), ("uncovered", "")],
                [("covered", "autograd"), ("covered", "Kronecker")],
                [("ignored", ""), ("ignored", "")],
            ),
            strict=True,
        )
        for method, (status, route) in zip(("Hessian", "K-FAC"), states, strict=True)
    )
    return Coverage(
        problem="p",
        methods=("Hessian", "K-FAC"),
        parameters=rows,
        cells=cells,
        shares={},
        not_available={},
        buffers={},
    )


def verification() -> Verification:
    """A check of every status and kind of number."""
    nan = math.nan
    checks = (
        Check(name="gradient", status="passed", sentence="s", value=1e-11, tolerance=1e-6),
        Check(name="determinism", status="passed", sentence="s", value=0.0, tolerance=1e-13),
        Check(name="precision", status="failed", sentence="s", value=0.5, tolerance=1e-4),
        Check(
            name="train and eval mode",
            status="not applicable",
            sentence="s",
            value=nan,
            tolerance=nan,
        ),
        Check(
            name="symmetry",
            status="skipped",
            sentence="s",
            about=CURVSCOPE,
            value=nan,
            tolerance=1e-8,
        ),
        Check(
            name="functional_call",
            status="passed",
            sentence="s",
            about=OTHERS,
            value=nan,
            tolerance=nan,
        ),
        Check(
            name="torch.func",
            status="failed",
            sentence="s",
            about=OTHERS,
            value=math.inf,
            tolerance=1e-8,
        ),
    )
    return Verification(
        problem="p", samples=4, dtype="float64", checks=checks, trust={}, reasons={}
    )


def noise() -> GradientNoise:
    return GradientNoise(
        samples=500,
        gradient_norm=0.3,
        variance=4.0,
        noise_scale=44.0,
        curvature_noise_scale=61.0,
        curvature_noise_scale_stderr=9.0,
        norm_test=55.0,
        inner_product_test=3.0,
        orthogonality_test=1.2,
    )


def local() -> LocalModel:
    """Ratios inside and outside of the picture, and one that is not defined."""
    lengths = torch.logspace(-3, 1, 9, dtype=torch.float64)
    predicted = lengths - lengths**2 / 4
    actual = lengths - 0.3 * lengths**2
    predicted[4] = 0
    return LocalModel(
        of="GGN",
        gradient_norm=1.0,
        slope=-1.0,
        curvature=0.5,
        radius=0.4,
        lengths=lengths,
        residuals=0.1 * lengths**2,
        actual=actual * torch.where(lengths > 5, 20, 1),
        predicted=predicted,
    )


def ends() -> Extremes:
    return Extremes(
        of="GGN",
        size=100,
        largest=(3.0, 2.5, 1.0),
        smallest=(-0.5, -0.2, 0.0),
        largest_residuals=(0.0, 0.01, 0.2),
        smallest_residuals=(0.0, 0.05, 0.1),
    )


@functools.cache
def batches() -> BatchSpectra:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    data = torch.randn(128, 4), torch.randint(3, (128,))
    problem = cs.Problem(model.double(), torch.nn.CrossEntropyLoss(), data, dtype=torch.float64)
    return cs.batch_spectra(problem, draws=2, k=1, densities=True)


@functools.cache
def pictures() -> dict[str, object]:
    """A call per picture, each returning axes."""
    block = concentration(positive(12), samples=4)
    factors = concentration(kronecker(), samples=4)
    curve = spectrum(symmetric(40))
    return {
        "bars": lambda **k: comparison().plot(**k),
        "bars of one block": lambda **k: comparison().plot(blocks=["first"], **k),
        "bars of another metric": lambda **k: comparison().plot(metric="cosine", **k),
        "spectrum": lambda **k: curve.plot(**k),
        "histogram": lambda **k: curve.plot(kind="histogram", **k),
        "discs": lambda **k: block.plot(**k),
        "intervals": lambda **k: cplot.plot_gershgorin(block, kind="intervals", **k),
        "diagonal": lambda **k: factors.plot(kind="diagonal", **k),
        "bands": lambda **k: block.plot(kind="bands", **k),
        "scree": lambda **k: block.plot(kind="scree", **k),
        "fourier": lambda **k: block.plot(kind="fourier", **k),
        "matrix": lambda **k: cplot.plot(DenseOperator(symmetric(6)), **k),
        "verification": lambda **k: verification().plot(**k),
        "coverage": lambda **k: coverage().plot(**k),
        "batch spectra": lambda **k: batches().plot(**k),
        "batch densities": lambda **k: batches().plot(kind="density", **k),
        "gradient noise": lambda **k: noise().plot(**k),
        "local model": lambda **k: local().plot(**k),
        "extremes": lambda **k: ends().plot(**k),
        "cost": lambda **k: cplot.plot_cost({"a": 0.004, "b": 12.0}, **k),
        **estimate_pictures(),
        **training_pictures(),
    }
