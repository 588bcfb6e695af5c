"""Noise of minibatch gradients: its scale, and the batch sizes that follow from it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from ..curvature.products import EMPIRICAL, HESSIAN, RAW, Kind
from ..curvature.whole import WholeOperator
from ..errors import BatchNormError, DataError, OptionError, check_count, check_seed
from ..modes import plain_mode
from ..problem import Problem, require_problem
from ..problem.refusals import require_sample_gradients
from .displaced import value_and_gradient
from .result import Cost, Result, number


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GradientNoise(Result):
    """What :func:`gradient_noise` found.

    With ``g_n`` the gradient of sample n, scaled so that their mean is the gradient ``g`` of the
    objective, and ``Sigma`` their covariance:

    ``gradient_norm`` ``||g||``; ``variance`` ``tr Sigma``; ``noise_scale`` ``tr Sigma / ||g||^2``,
    the batch size at which noise and signal are equal; ``curvature_noise_scale``
    ``tr(H Sigma) / g^T H g`` with ``curvature_noise_scale_stderr`` (NaN unless asked for);
    ``norm_test``, ``inner_product_test`` and ``orthogonality_test``: the smallest batch sizes that
    pass these tests.
    """

    samples: int
    gradient_norm: float
    variance: float
    noise_scale: float
    curvature_noise_scale: float
    curvature_noise_scale_stderr: float
    norm_test: float
    inner_product_test: float
    orthogonality_test: float

    def summary(self) -> str:
        """Noise scale and batch sizes in a sentence."""
        return (
            f"Over {self.samples:,} samples the gradient has norm {number(self.gradient_norm)} and "
            f"its noise variance {number(self.variance)}: a noise scale of "
            f"{number(self.noise_scale)} samples. The norm test asks for batches of "
            f"{number(self.norm_test)}, the inner-product test for "
            f"{number(self.inner_product_test)} ({self.cost})."
        )


@plain_mode()
def gradient_noise(
    problem: Problem,
    *,
    theta: float = 0.9,
    nu: float = 5.84,
    probes: int = 0,
    seed: int = 0,
) -> GradientNoise:
    """Variance of single samples' gradients, the noise scale, and batch sizes by three tests.

    * noise scale ``tr Sigma / ||g||^2`` and, with ``probes > 0``, ``tr(H Sigma) / g^T H g`` by that
      many random probes, with its standard error (McCandlish et al. 2018, eq. 2.8 and 2.9),
    * norm test ``tr Sigma / B <= theta^2 ||g||^2`` (Byrd, Chin, Nocedal and Wu 2012, section 3),
    * inner-product test ``Var(g_n^T g) / B <= theta^2 ||g||^4`` and orthogonality test
      ``E||g_n - (g_n^T g / ||g||^2) g||^2 / B <= nu^2 ||g||^2`` (Bollapragada, Byrd and Nocedal
      2018, sections 2 and 3; their constants are the defaults).

    Covariances are over the samples of the problem, with ``n - 1``. Everything without ``probes``
    is exact. ``seed`` is that of the probes.

    Source: arXiv 1812.06162 for the noise scales; the papers above for the tests.

    Cost: two passes over the data and one product with the matrix of second moments
    (three products more per probe). Raises ``DataError`` for a single sample,
    ``BatchNormError`` where samples of a batch have no gradients of their own, and
    ``UnsupportedLossError`` where the loss uses parameters itself (a penalty).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> found = cs.gradient_noise(problem)
    >>> found.samples, found.variance > 0
    (3, True)
    """
    require_problem(problem)
    for name, value in (("theta", theta), ("nu", nu)):
        if not value > 0:
            raise OptionError(f"{name}={value!r} must be positive.")
    probes, seed = check_count("probes", probes, 0), check_seed(seed)
    start = time.perf_counter()
    facts = problem.check()
    require_sample_gradients(problem, "gradient noise")
    if problem.batchnorm == "batch" or facts.coupled:
        raise BatchNormError(
            "The gradient noise needs gradients of single samples, but here the samples of a batch "
            "influence each other. Use batchnorm='eval', or a model that treats them separately."
        )
    n = facts.samples
    if n < 2:
        raise DataError("The gradient noise needs at least two samples.")
    at = problem.snapshot()
    _, gradient = value_and_gradient(problem, at)
    g = gradient.double()
    square = float(g @ g)
    # (1/M) sum g_n g_n^T with plain gradients; n * scale of it is the second moment of those
    # that average to the objective's gradient
    moments = WholeOperator(problem, Kind(EMPIRICAL, per=RAW), "auto", at)
    factor = n * problem.scale
    second = factor * moments.trace()
    along = factor * float(g @ (moments @ gradient).double())  # E (g_n^T g)^2
    correct = n / (n - 1)
    variance = correct * max(second - square, 0.0)
    inner = correct * max(along - square**2, 0.0)
    across = correct * max(second - along / square, 0.0) if square else math.nan
    curvature, stderr = math.nan, math.nan
    if probes:
        curvature, stderr = _with_curvature(problem, moments, gradient, factor, n, probes, seed)
    return GradientNoise(
        samples=n,
        gradient_norm=math.sqrt(square),
        variance=variance,
        noise_scale=_over(variance, square),
        curvature_noise_scale=curvature,
        curvature_noise_scale_stderr=stderr,
        norm_test=_over(variance, theta**2 * square),
        inner_product_test=_over(inner, theta**2 * square**2),
        orthogonality_test=_over(across, nu**2 * square),
        cost=Cost(1 + 2 * probes + (probes > 0), time.perf_counter() - start),
        settings={"theta": theta, "nu": nu, "probes": probes, "seed": seed},
    )


def _over(x: float, y: float) -> float:
    return x / y if y else math.inf


def _with_curvature(
    problem: Problem,
    moments: WholeOperator,
    gradient: torch.Tensor,
    factor: float,
    n: int,
    probes: int,
    seed: int,
) -> tuple[float, float]:
    """``tr(H Sigma) / g^T H g`` and its standard error, by Rademacher probes."""
    hessian = WholeOperator(problem, Kind(HESSIAN), "auto", moments.at)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (gradient.numel(), probes), generator=generator)
    Z = (2 * signs - 1).to(gradient)
    Hg = (hessian @ gradient).double()
    bend = float(gradient.double() @ Hg)
    traces = factor * ((hessian @ Z).double() * (moments @ Z).double()).sum(0)
    values = n / (n - 1) * (traces - bend)
    error = float(values.std() / math.sqrt(probes)) if probes > 1 else math.nan
    return float(values.mean()) / bend, error / abs(bend)
