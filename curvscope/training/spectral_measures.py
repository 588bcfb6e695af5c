"""Measures of the exact matrix by itself: its largest eigenvalues, trace and density."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..analysis.estimators.density import density
from ..analysis.lanczos import leading_by_products
from .curvature_measures import passes
from .measures import Measure, Rows, register
from .moment import Moment
from .sharpness import preconditioned_sharpness


def roots_of_rates(moment: Moment) -> Tensor | None:
    """Square roots of every entry's learning rate ``[P]``; ``None`` where all are the same."""
    groups = moment.optimizer.param_groups
    rates = {id(p): float(g["lr"]) for g in groups if "lr" in g for p in g["params"]}
    problem = moment.problem
    named = dict(problem.user_model.named_parameters())
    mine = [rates.get(id(named[name])) for name in problem.layout.names]
    if len({rate for rate in mine if rate is not None}) <= 1:
        return None
    sizes = [problem.params[name].numel() for name in problem.layout.names]
    parts = [
        torch.full((n,), math.sqrt(r or 0.0), dtype=torch.float64)
        for n, r in zip(sizes, mine, strict=True)
    ]
    return torch.cat(parts).to(problem.device)


@register
class Sharpness(Measure):
    """``lambda_max`` of the Hessian on the probe, and ``product``, it times the learning rate.

    Gradient descent is stable on a quadratic below ``product = 2`` (Cohen et al. 2021). Of an
    optimizer with a preconditioner ``P`` that covers all parameters, ``preconditioned`` is the
    largest eigenvalue of ``P H`` and ``preconditioned_product`` that times the learning rate, whose
    limit is 2 as well (Cohen et al. 2022). Where learning rates differ between parameters, ``D``
    being the diagonal matrix of them, both products are largest eigenvalues, of ``D H`` and of
    ``P D^1/2 H D^1/2``, and ``lr`` is the largest rate. Lanczos with ``steps`` products at most,
    fewer once the residual is below ``tol`` of the value; ``residual`` bounds the error of
    ``lambda_max``.
    """

    name = "sharpness"
    about = "largest eigenvalue of the Hessian"
    weight = 4.0

    def __init__(self, steps: int = 12, tol: float = 0.01) -> None:
        self.steps, self.tol = steps, tol

    def take(self, moment: Moment) -> Rows:
        """One row."""
        H, lr = moment.hessian, moment.lr

        def product(vector: Tensor) -> Tensor:
            return (H @ vector.to(H.dtype)).double()

        size, steps = H.shape[0], min(self.steps, H.shape[0])
        # the largest in magnitude may be negative
        values, _, residuals = leading_by_products(
            product,
            size,
            device=H.device,
            steps=steps,
            tol=self.tol,
            positive=True,
            dtype=H.dtype,
        )
        top = float(values[0])
        row = {"lambda_max": top, "residual": float(residuals[0]), "lr": lr, "product": top * lr}
        roots = roots_of_rates(moment)

        def scaled(vector: Tensor) -> Tensor:
            return product(vector) if roots is None else roots * product(roots * vector)

        if roots is not None:
            values, _, _ = leading_by_products(
                scaled, size, device=H.device, steps=steps, tol=self.tol, positive=True
            )
            row["product"] = float(values[0])
        P = moment.preconditioner
        row["covered"] = P is None or not P.uncovered
        if P is not None and not P.uncovered:
            inner = preconditioned_sharpness(
                product, P, steps=self.steps, seed=moment.seed, tol=self.tol
            )
            row |= {"preconditioned": inner, "preconditioned_product": inner * lr}
            if roots is not None:
                row["preconditioned_product"] = preconditioned_sharpness(
                    scaled, P, steps=self.steps, seed=moment.seed, tol=self.tol
                )
        return [row]

    def price(self, moment: Moment) -> float:
        """Two runs of products, not all of them taken, with the graph at hand."""
        return (2.0 if roots_of_rates(moment) is None else 4.0) * self.steps + 5


@register
class Trace(Measure):
    """``trace`` of the exact reference, by block and in all (block ``"(all)"``)."""

    name = "trace"
    about = "trace of the exact curvature"

    def take(self, moment: Moment) -> Rows:
        """A row per block and one for the whole."""
        op = moment.reference
        rows: Rows = [{"block": n, "trace": block.trace()} for n, block in op.blocks.items()]
        total = math.fsum(row["trace"] for row in rows)
        return [
            {**r, "reference": op.info.what} for r in [*rows, {"block": "(all)", "trace": total}]
        ]

    def price(self, moment: Moment) -> float:
        """That of the reference's blocks."""
        return 5.0 + passes(moment)


@register
class Spectrum(Measure):
    """The ``count`` leading eigenvalues of the reference over all parameters.

    ``largest`` and ``smallest`` of them, and as tensors ``eigenvalues`` (by magnitude) and
    ``residuals``, each bounding the distance to an eigenvalue (the rounding of the reference's
    type at least). Lanczos with ``steps`` products.
    """

    name = "spectrum"
    about = "leading eigenvalues of the exact curvature"
    weight = 2.0

    def __init__(self, count: int = 10, steps: int = 40) -> None:
        self.count, self.steps = count, steps

    def take(self, moment: Moment) -> Rows:
        """One row with tensors."""
        op = moment.reference
        count = min(self.count, op.shape[0])
        values, _, residuals = leading_by_products(
            lambda v: (op @ v.to(op.dtype)).double(),
            op.shape[0],
            count,
            device=op.device,
            steps=max(self.steps, count),
            dtype=op.dtype,
        )
        tensors = {"eigenvalues": values.cpu(), "residuals": residuals.cpu()}
        return [
            {
                "reference": op.info.what,
                "count": len(values),
                "largest": float(values.max()),
                "smallest": float(values.min()),
                "worst_residual": float(residuals.max()),
                "tensors": tensors,
            }
        ]

    def price(self, moment: Moment) -> float:
        """Products at three gradients each."""
        return 3.0 * self.steps + 10


@register
class Density(Measure):
    """The density of all eigenvalues of the reference, by ``cs.density``.

    ``largest`` and ``smallest`` end of its quadrature, ``mean`` of all eigenvalues with
    ``mean_stderr``, ``width`` by which every eigenvalue is broadened; as tensors ``grid``,
    ``density`` and its band ``low``, ``high``. ``probes`` times ``steps`` products.
    """

    name = "density"
    about = "density of the eigenvalues"
    weight = 2.0

    def __init__(self, probes: int = 4, steps: int = 30, points: int = 200) -> None:
        self.probes, self.steps, self.points = probes, steps, points

    def take(self, moment: Moment) -> Rows:
        """One row with tensors."""
        found = density(
            moment.reference,
            probes=self.probes,
            steps=self.steps,
            points=self.points,
            seed=moment.seed,
        )
        nodes = found.nodes[found.weights > 0]
        names = ("grid", "density", "low", "high")
        return [
            {
                "reference": moment.reference.info.what,
                "largest": float(nodes.max()),
                "smallest": float(nodes.min()),
                "mean": float(found.moments[0]),
                "mean_stderr": float(found.moments_stderr[0]),
                "width": found.width,
                "tensors": {name: getattr(found, name).float().cpu() for name in names},
            }
        ]

    def price(self, moment: Moment) -> float:
        """Products at three gradients each."""
        return 3.0 * self.probes * self.steps + 10
