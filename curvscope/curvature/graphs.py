"""Products with the matrix of one batch, from a graph that multiplies any number of vectors.

Vectors are rows: ``[k, d]`` over the parameters asked for. A graph costs one forward and one
backward pass; each product after that a backward pass through both (Hessian), or one through the
linearised model and one through the model (``J^T M J``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from ..problem.cotangents import require_differentiable
from .products import NotLinear, by_rows, has_no_derivative, twice_differentiable

Product = Callable[[Tensor], Tensor]
_CHUNK = 16  # cotangents in one vectorised backward pass


def split(rows: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``[..., d]`` in the shapes of the parameters, ``[..., *shape]``."""
    if rows.ndim == 1 and rows.is_contiguous():
        return list(_unflatten_dense_tensors(rows, parameters))  # one call for all parameters
    parts = rows.split([p.numel() for p in parameters], -1)
    return [x.reshape((*rows.shape[:-1], *p.shape)) for x, p in zip(parts, parameters, strict=True)]


def add_to(
    total: Tensor, parts: Sequence[Tensor | None], parameters: Sequence[Tensor], scale: float
) -> None:
    """``total += scale * parts`` with one part per parameter; ``None`` is zero."""
    pairs = zip(split(total, parameters), parts, strict=True)
    there = [(slot, part) for slot, part in pairs if part is not None]
    if there:
        torch._foreach_add_([slot for slot, _ in there], [part for _, part in there], alpha=scale)


class BatchGraph(ABC):
    """One batch's matrix: :meth:`add` multiplies, :meth:`roots` are the ends of its graph."""

    parameters: list[Tensor]

    @abstractmethod
    def roots(self) -> list[Tensor]:
        """Tensors from which the whole graph can be reached."""

    @abstractmethod
    def _one(self, parts: list[Tensor], retain: bool) -> Sequence[Tensor | None]:
        """The product with one vector, in the shapes of the parameters."""

    @abstractmethod
    def _many(self, parts: list[Tensor]) -> Sequence[Tensor | None]:
        """Products with several vectors at once (first axis)."""

    def add(
        self, rows: Tensor, total: Tensor, scale: float, *, vectorised: bool, retain: bool
    ) -> None:
        """``total += scale * matrix @ rows``, row by row; ``retain``: there is more to come."""
        if vectorised:
            for k in range(0, len(rows), _CHUNK):
                part = slice(k, k + _CHUNK)
                found = self._many(self._cast(rows[part]))
                add_to(total[part], found, self.parameters, scale)
            return
        for k in range(len(rows)):
            more = retain or k + 1 < len(rows)
            add_to(total[k], self._one(self._cast(rows[k]), more), self.parameters, scale)

    def _cast(self, rows: Tensor) -> list[Tensor]:
        parts = split(rows, self.parameters)
        return [
            v if v.dtype == p.dtype else v.to(p.dtype)
            for v, p in zip(parts, self.parameters, strict=True)
        ]


class Nothing(BatchGraph):
    """The matrix of a batch that no parameter has an influence on: zero."""

    def __init__(self) -> None:
        self.parameters = []

    def roots(self) -> list[Tensor]:
        return []

    def add(self, rows: Tensor, total: Tensor, scale: float, **_: bool) -> None:
        """Zero."""

    def _one(self, parts: list[Tensor], retain: bool) -> Sequence[Tensor | None]:
        return []

    def _many(self, parts: list[Tensor]) -> Sequence[Tensor | None]:
        return []


class HessianGraph(BatchGraph):
    """``v -> d (g^T v) / d theta`` with the gradient ``g`` of a loss, kept with its graph."""

    def __init__(self, total: Tensor, parameters: Sequence[Tensor], *, check: bool = True) -> None:
        self.parameters = list(parameters)
        with twice_differentiable():
            gradients = torch.autograd.grad(
                total, self.parameters, create_graph=True, allow_unused=True
            )
            if check:
                require_differentiable(gradients)
        self.used = [(k, g) for k, g in enumerate(gradients) if g is not None and g.requires_grad]

    def roots(self) -> list[Tensor]:
        return [g for _, g in self.used]

    def _grad(self, parts: list[Tensor], **options: Any) -> Sequence[Tensor | None]:
        if not self.used:
            return [None for _ in self.parameters]
        with twice_differentiable():
            return torch.autograd.grad(
                self.roots(),
                self.parameters,
                [parts[k] for k, _ in self.used],
                allow_unused=True,
                **options,
            )

    def _one(self, parts: list[Tensor], retain: bool) -> Sequence[Tensor | None]:
        return self._grad(parts, retain_graph=retain)

    def _many(self, parts: list[Tensor]) -> Sequence[Tensor | None]:
        return self._grad(parts, retain_graph=True, is_grads_batched=True)


class LinearisedGraph(BatchGraph):
    """``v -> J^T M J v`` with the Jacobian ``J`` of the outputs and a matrix ``M`` between.

    ``J v`` comes from ``J^T w``, which is linear in ``w``, by another backward pass; or from
    ``forward``, a function of the vector's parts, where the engine found that faster; ``first`` are
    rows that will be multiplied and ``J v`` of the first of them, if that is known already. Where
    the model cannot be differentiated that way, the rows of ``J`` are computed.
    """

    def __init__(
        self,
        outputs: Tensor,
        parameters: Sequence[Tensor],
        middle: Product,
        *,
        forward: Callable[[list[Tensor]], Tensor] | None = None,
        first: tuple[Tensor, Tensor] | None = None,
        check: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.outputs, self.middle, self.forward = outputs, middle, forward
        self.by_rows = False
        self.first = first
        self._known: Tensor | None = None
        self.w: Tensor | None = None
        self.back: list[tuple[int, Tensor]] = []
        if forward is None:
            self._linearise(check)

    def _linearise(self, check: bool) -> None:
        try:
            self.w = torch.zeros_like(self.outputs, requires_grad=True)
            back = torch.autograd.grad(
                self.outputs, self.parameters, self.w, create_graph=True, allow_unused=True
            )
            self.back = [(k, g) for k, g in enumerate(back) if g is not None and g.requires_grad]
            if check:
                require_differentiable(back)
                self._compare_with_adjoint()
        except NotLinear:
            self.by_rows = True
        except RuntimeError as error:
            if not has_no_derivative(error):
                raise
            self.by_rows = True

    def roots(self) -> list[Tensor]:
        return [self.outputs, *(g for _, g in self.back)]

    def times_jacobian(self, parts: list[Tensor], **options: Any) -> Tensor:
        """``J v`` for one vector, in the outputs' shape (with ``is_grads_batched`` for several)."""
        found = None
        if self.back and self.w is not None:
            (found,) = torch.autograd.grad(
                [g for _, g in self.back],
                self.w,
                [parts[k] for k, _ in self.back],
                retain_graph=True,
                allow_unused=True,
                **options,
            )
        if found is None:
            shape = (len(parts[0]), *self.outputs.shape) if options else self.outputs.shape
            return self.outputs.new_zeros(shape)
        return found

    def _transposed(self, cotangent: Tensor, **options: Any) -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            self.outputs, self.parameters, cotangent, allow_unused=True, **options
        )

    def add(
        self, rows: Tensor, total: Tensor, scale: float, *, vectorised: bool, retain: bool
    ) -> None:
        if self.first is not None and self.first[0] is rows and not vectorised:
            self._known = self.first[1]
        self.first = None
        if not self.by_rows:
            try:
                super().add(rows, total, scale, vectorised=vectorised, retain=retain)
                return
            except RuntimeError as error:
                if not has_no_derivative(error):
                    raise
                self.by_rows = True
        columns = by_rows(self.outputs, self.parameters, self.middle, rows.mT)
        total.add_(columns.mT, alpha=scale)

    def _one(self, parts: list[Tensor], retain: bool) -> Sequence[Tensor | None]:
        jv, self._known = self._known, None
        if jv is None:
            jv = self.times_jacobian(parts) if self.forward is None else self.forward(parts)
        return self._transposed(self.middle(jv), retain_graph=retain)

    def _many(self, parts: list[Tensor]) -> Sequence[Tensor | None]:
        if self.forward is None:
            jvs: Iterable[Tensor] = self.times_jacobian(parts, is_grads_batched=True)
        else:
            jvs = [self.forward([p[k] for p in parts]) for k in range(len(parts[0]))]
        cotangents = torch.stack([self.middle(jv) for jv in jvs])
        return self._transposed(cotangents, retain_graph=True, is_grads_batched=True)

    def _compare_with_adjoint(self) -> None:
        """Raise :class:`NotLinear` unless ``<u, J v> = <J^T u, v>`` for random ``u`` and ``v``."""
        z, generator = self.outputs, torch.Generator().manual_seed(0)
        u = torch.randn(z.shape, generator=generator).to(z)
        size = sum(p.numel() for p in self.parameters)
        v = torch.randn(size, generator=generator).to(z)
        jv = self.times_jacobian(split(v, self.parameters))
        jtu = torch.zeros_like(v, dtype=torch.float64)
        add_to(jtu, self._transposed(u, retain_graph=True), self.parameters, 1.0)
        left, right = float((u.double() * jv).sum()), float((jtu * v).sum())
        scale = float(u.norm() * jv.norm() + jtu.norm() * v.norm())
        if abs(left - right) > 10 * torch.finfo(z.dtype).eps ** 0.5 * scale:
            raise NotLinear


def graph_bytes(roots: Sequence[Tensor], parameters: Sequence[Tensor]) -> int:
    """Bytes that a graph keeps alive, besides the parameters: its roots and saved tensors."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, int] = {}

    def note(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, list | tuple):
            for entry in value:
                note(entry)

    for root in roots:
        note(root)
    stack = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(stack)
    while stack:
        node: Any = stack.pop()
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                try:
                    note(getattr(node, name))
                except RuntimeError:  # freed, or changed since
                    continue
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    return sum(found.values())
