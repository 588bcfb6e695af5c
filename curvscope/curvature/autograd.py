"""A matrix known through products by double backward, exact for all that autograd can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..modes import plain_mode
from ..operators import Operator, Provenance
from ..problem import Problem, Snapshot, flat_gradient
from ..problem.cotangents import require_differentiable
from ..problem.state import trains_differently
from ..progress import track
from .engine import Engine
from .gram import cotangents, pass_count
from .products import (
    EMPIRICAL,
    HESSIAN,
    Kind,
    VectorJacobian,
    symmetrised,
    twice_differentiable,
)
from .recording import Recording

_CACHED = 4096


def is_convex(problem: Problem, kind: Kind) -> bool | None:
    """``True`` where the matrix is positive semi-definite by construction, else ``None``."""
    return True if problem.loss.likelihood is not None or kind.needs_samples else None


def provenance(problem: Problem, kind: Kind, route: str, at: Snapshot | None = None) -> Provenance:
    """What is known of a matrix of this problem before it is computed."""
    facts = problem.check()
    settings: dict[str, Any] = {
        "loss": problem.loss.name,
        "reduction": problem.loss.reduction,
        "samples": facts.samples,
        "terms": facts.terms,
        "batchnorm": problem.batchnorm,
        "parameters": problem.fingerprint(at),
    }
    if kind.samples is not None:
        settings |= {"sampled_labels": kind.samples, "seed": kind.seed}
    if kind.matrix == EMPIRICAL:
        settings["per"] = kind.per
    notes = []
    if trains_differently(problem.user_model) and problem.batchnorm == "eval":
        notes.append("computed as under eval(), although the model is in train mode")
    if facts.coupled and facts.batches > 1 and problem.batchnorm == "eval":
        notes.append(
            "samples of a batch influence each other, so it is a quantity of the batches as given"
        )
    if problem.batchnorm == "batch":
        notes.append("BatchNorm by batch statistics: a quantity of the batches as given")
    if facts.direct and kind.matrix != HESSIAN:
        notes.append(
            f"without what the loss itself takes from {', '.join(facts.direct[:3])}"
            f"{', ...' if len(facts.direct) > 3 else ''}, besides the outputs"
        )
    return Provenance(kind.title, route, kind.exact, settings, tuple(notes))


class AutogradOperator(Operator):
    """A matrix over some parameters, known through products by double backward.

    Exact for every model that autograd can differentiate twice. :meth:`dense` takes one product
    per column and is kept for up to 4,096 rows. The parameters' values are those at the time the
    operator was made, even if the model is trained on meanwhile.
    """

    def __init__(
        self,
        problem: Problem,
        kind: Kind,
        names: Sequence[str],
        at: Snapshot,
        *,
        engine: str = "auto",
        memory: int | None = None,
    ) -> None:
        self.problem, self.kind, self.at = problem, kind, at
        self.engine, self.memory = engine, memory
        self.layout = problem.layout.restrict(names)
        self.parameters = [problem.params[n] for n in self.layout.names]
        size = self.layout.numel
        self.shape = (size, size)
        self.dtype = torch.promote_types(problem.dtype, torch.float32)
        self.device = problem.device
        self.positive_semidefinite = None if kind.matrix == HESSIAN else is_convex(problem, kind)
        self.info = provenance(problem, kind, "autograd", at)
        self._kept: Tensor | None = None
        self._engine: Engine | None = None

    @plain_mode()
    def _matmat(self, vectors: Tensor) -> Tensor:
        if self._kept is not None:
            return self._kept @ vectors
        if self._engine is None:
            self._engine = Engine(
                self.problem,
                self.kind,
                self.parameters,
                self.at,
                mode=self.engine,
                limit=self.memory,
            )
        product = self._engine.product(vectors)
        self.info = self.info.with_(settings={**self.info.settings, "engine": self._engine.used})
        return product

    def release(self) -> None:
        """Forget the graphs that products have kept."""
        self._engine = None

    def _dense(self) -> Tensor:
        if self._kept is None:
            assert self.layout is not None
            what = f"The {self.kind.title} of {', '.join(self.layout.names[:3])}, ..."
            matrix = symmetrised(self._columns(), what, self.problem.dtype)
            if self.shape[0] > _CACHED:
                return matrix
            self._kept = matrix
        return self._kept.clone()

    def _columns(self) -> Tensor:
        size = self.shape[0]
        if self.kind.matrix != HESSIAN:
            by_rows = self._outer_products()
            if by_rows is not None:
                return by_rows
            eye = torch.eye(size, dtype=self.dtype, device=self.device)
            parts = [self._matmat(part.mT) for part in track(eye.split(64), self._label())]
            return torch.cat(parts, 1)
        with self.problem.session(self.at):
            result = torch.zeros(size, size, dtype=self.dtype, device=self.device)
            for inputs, targets in self.problem.batches():
                total = self.problem.batch_total(self.problem.outputs(inputs), targets)
                if total.requires_grad:
                    with twice_differentiable():
                        self._add_hessian(total, result)
        return result * self.problem.scale

    def _outer_products(self) -> Tensor | None:
        """``V^T V`` with a backward pass per sample and output, where that is the cheaper way.

        A product costs three passes, a vector one. ``None`` where there are too many vectors.
        """
        problem, size = self.problem, self.shape[0]
        result = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        generator = self.kind.generator()
        with problem.session(self.at):
            for inputs, targets in problem.batches():
                outputs = problem.outputs(inputs)
                n = problem.count_samples(inputs, targets)
                if not outputs.requires_grad or outputs.ndim == 0 or outputs.shape[0] % n:
                    return None
                recording = Recording(outputs, targets, n, [])
                if n * pass_count(problem, self.kind, recording) > 3 * size:
                    return None
                back = VectorJacobian(outputs, self.parameters)
                fold = outputs.shape[0] // n
                shape = (n, fold, *[1] * (outputs.ndim - 1))
                eye = torch.eye(n, dtype=outputs.dtype, device=outputs.device)
                masks = eye.repeat_interleave(fold, 1).reshape(n, n * fold, *shape[2:])
                for u, sign in cotangents(problem, self.kind, recording, generator):
                    v = back(masks * u).to(self.dtype)
                    result.addmm_((v if sign is None else v * sign.to(v).unsqueeze(1)).mT, v)
        return result * problem.scale

    def _add_hessian(self, total: Tensor, result: Tensor) -> None:
        """Add one batch's Hessian, row by row."""
        size = self.shape[0]
        flat = flat_gradient(total, self.parameters, create_graph=True)
        require_differentiable([flat])
        second = VectorJacobian(flat, self.parameters)
        for start in track(range(0, size, 64), self._label()):
            stop = min(start + 64, size)
            units = torch.zeros(stop - start, size, dtype=flat.dtype, device=self.device)
            units[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
            result[start:stop] += second(units).to(self.dtype)

    def _label(self) -> str:
        return f"{self.kind.title} of {self.shape[0]} parameters"

    def diagonal(self) -> Tensor:
        return self.dense().diagonal().clone()
