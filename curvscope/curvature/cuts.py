"""Second derivatives in places of a graph, by way of places that all later effects pass.

Let ``u`` be a place that ``z`` influences the loss ``l`` through alone, such as the sum behind a
residual branch. Then ``d^2 l / dz^2 = J^T (d^2 l / du^2) J + sum_k (dl/du_k) d^2 u_k / dz^2`` with
``J = du/dz``: with the Hessian in ``u`` at hand, a row of the one in ``z`` takes passes through
what lies between the two only. The Hessian in ``u`` comes from the next such place in turn, and
serves all layers before it (for chains of layers cf. Dangel, Harmeling and Hennig 2020, section 3).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .. import memory
from ..errors import UnsupportedLayerError
from ..layers import SampleAxis, sample_axes
from ..problem.cotangents import require_differentiable
from .along import agree
from .dominators import Place, dominators
from .products import symmetrised, twice_differentiable
from .recording import Recording, masked_cotangents

_SHARE = 0.05  # of the available memory that the Hessian in one place may take
_ENTRY = 0.03  # time to read one number of such a Hessian, of that to compute a number
_WORTH = 0.85  # part of the time that must be left for a way by other places to be taken
_CHUNK = 8
_WORTH_A_TRIAL = 16  # rows below which a trial of vectorising costs more than it can save
_TRIED = 4  # so many are vectorised at first: with convolutions that may take long
_WORTH_A_CUT = 32  # rows below which the graph is not looked through


class SecondDerivative:
    """``vectors [k, *z] -> [k, *z]``: products with the second derivative of ``total`` in ``z``.

    Vectors go one by one or, if it ``tries`` that, vectorised, whichever a trial finds faster.
    ``cut`` is a place with its Hessian; without one everything is differentiated.
    """

    def __init__(
        self,
        total: Tensor,
        z: Any,  # a tensor or the edge of one
        shape: Sequence[int],
        tries: bool,
        cut: Place | None = None,
    ) -> None:
        self.z, self.shape, self.cut = z, tuple(shape), cut
        self.vectorised: bool | None = None if tries else False
        self.weight: Tensor | None = None
        with twice_differentiable():
            if cut is None:
                found = torch.autograd.grad(total, [self.z], create_graph=True, allow_unused=True)
                require_differentiable(found)
            else:
                assert cut.gradient is not None
                self.weight = cut.gradient.detach().clone().requires_grad_()
                found = torch.autograd.grad(
                    [cut.edge], [self.z], [self.weight], create_graph=True, allow_unused=True
                )
        self.gradient = found[0]
        self._zero = total.new_zeros(())

    def __call__(self, vectors: Tensor) -> Tensor:
        with twice_differentiable():
            if self.vectorised is None and len(vectors) >= _TRIED:
                parts = [self._trial(vectors[:_TRIED])]
                if len(vectors) > _TRIED:
                    parts.append(self(vectors[_TRIED:]))
                return torch.cat(parts)
            if self.vectorised:
                return torch.cat([self._products(v, True) for v in vectors.split(_CHUNK)])
            return torch.stack([self._products(v, False) for v in vectors])

    def _products(self, vectors: Tensor, many: bool) -> Tensor:
        zeros = self._zero.expand(vectors.shape)
        if self.gradient is None or not self.gradient.requires_grad:
            return zeros
        options: Any = {"retain_graph": True, "allow_unused": True, "is_grads_batched": many}
        at = [self.z] if self.weight is None else [self.z, self.weight]
        found = torch.autograd.grad([self.gradient], at, [vectors], **options)
        h = zeros if found[0] is None else found[0]
        if self.cut is None or found[1] is None:
            return h
        along = _times_hessian(self.cut, found[1], many)
        (more,) = torch.autograd.grad([self.cut.edge], [self.z], [along], **options)
        return h if more is None else h + more

    def _trial(self, vectors: Tensor) -> Tensor:
        """The products, and whether it is faster to vectorise them."""
        first, slow = zip(*(self._timed(v, False) for v in vectors[:2]), strict=True)
        self.vectorised = False
        try:
            found, fast = self._timed(vectors, True)
        except Exception:  # operations without a batching rule: many error types
            return torch.cat([torch.stack(first), self(vectors[2:])])
        single = torch.stack(first)
        if not agree(single, found[:2]):
            return torch.cat([single, self(vectors[2:])])
        self.vectorised = fast < 0.9 * len(vectors) * min(slow)
        return found

    def _timed(self, vectors: Tensor, many: bool) -> tuple[Tensor, float]:
        start = time.perf_counter()
        found = self._products(vectors, many)
        if found.is_cuda:
            torch.cuda.synchronize()
        return found, time.perf_counter() - start


def positions(shape: Sequence[int], axis: SampleAxis, samples: int, device: Any) -> Tensor:
    """Where in a flat tensor the entries of each sample lie: ``[N, k]``."""
    flat = torch.arange(math.prod(shape), device=device).reshape(*shape)
    return axis.first(flat, samples).reshape(samples, -1)


def _times_hessian(cut: Place, vectors: Tensor, many: bool) -> Tensor:
    assert cut.hessian is not None and cut.axis is not None
    rows = vectors if many else vectors.unsqueeze(0)
    samples = len(cut.hessian)
    flat = rows.reshape(len(rows), -1)
    where = positions(rows.shape[1:], cut.axis, samples, rows.device).reshape(-1)
    product = cut.hessian @ flat[:, where].reshape(len(rows), samples, -1).permute(1, 2, 0)
    found = torch.empty_like(flat)
    found[:, where] = product.permute(2, 0, 1).reshape(len(rows), -1)
    return found.reshape(vectors.shape)


class Cuts:
    """Second derivatives of one batch's ``total`` in several ``targets``, outputs of layers.

    Samples must not couple. What is worth a Hessian of its own depends on all targets together:
    a place that many of them come before is used by many.
    """

    def __init__(self, total: Tensor, recording: Recording, targets: Sequence[Tensor]) -> None:
        self.total, self.recording, self.samples = total, recording, recording.samples
        convolves = any("Conv" in call.kind.name for call in recording.calls)
        self.trial_from = _WORTH_A_TRIAL * (4 if convolves else 1)
        self.targets = list(targets)
        self.users: dict[Place, int] = {}
        self.widths: dict[Place, int] = {}

    @functools.cached_property
    def _places(self) -> dict[Any, Place]:
        """The graph, looked through when it is first needed: which places could be of use."""
        total, outputs = self.total, self.recording.outputs
        if total.grad_fn is None or outputs.grad_fn is None:
            return {}
        places = dominators(total.grad_fn)
        last = places.get(get_gradient_edge(outputs).node)
        for target in self.targets:
            place = places.get(get_gradient_edge(target).node)
            chain = place.chain() if place is not None else []
            for cut in chain[: chain.index(last) + 1] if last in chain else ():
                self.users[cut] = self.users.get(cut, 0) + 1
        limit = _SHARE * memory.available_bytes(total.device)
        for place in self.users:
            width = self._width(place)
            if width and self.samples * width**2 * total.element_size() <= limit:
                self.widths[place] = width
        self._find_samples(list(self.widths))
        return places

    def _width(self, place: Place) -> int:
        """Numbers per sample; 0 where the place is of no use."""
        about = place.described()
        if about is None or about[1] != self.total.dtype:
            return 0
        return math.prod(about[0]) // self.samples if sample_axes(about[0], self.samples) else 0

    def _find_samples(self, places: list[Place]) -> None:
        """Along which axis the samples lie, decided as for the outputs of layers."""
        if not places:
            return
        axes = [sample_axes(place.described()[0], self.samples) for place in places]  # type: ignore[index]
        for outside, cotangent in masked_cotangents(self.recording):
            found = torch.autograd.grad(
                [self.recording.outputs],
                [place.edge for place in places],
                [cotangent],
                retain_graph=True,
                allow_unused=True,
            )
            for k, gradient in enumerate(found):
                if type(gradient) is not Tensor or gradient.layout != torch.strided:
                    axes[k] = []
                axes[k] = [a for a in axes[k] if not a.first(gradient, self.samples)[outside].any()]
        for place, left in zip(places, axes, strict=True):
            place.axis = left[0] if left else None
            if not left:
                del self.widths[place]

    # -- which way -------------------------------------------------------------------------------

    def _best(
        self, place: Place, width: int, known: dict[Place, float]
    ) -> tuple[float, Place | None]:
        """Expected time of a place's Hessian of so many rows, and the cut to take (or none)."""
        best: tuple[float, Place | None] = (width * place.behind, None)
        for cut in place.chain():
            size = self.widths.get(cut)
            if size is None or cut is place:
                continue
            if cut not in known:
                share = self._best(cut, size, known)[0] / self.users[cut]
                known[cut] = 0.0 if cut.hessian is not None else share
            between = place.behind - cut.behind + _ENTRY * self.samples * size**2
            best = min(best, (known[cut] + 1.5 * width * between, cut), key=lambda way: way[0])
        return best

    def second(self, z: Tensor, rows: int) -> SecondDerivative:
        """The second derivative in the output ``z`` of a layer, of which so many rows are wanted.

        By way of another place only where a random product is the same as without.
        """
        tries = rows >= self.trial_from
        plain = SecondDerivative(self.total, z, z.shape, tries)
        if rows < _WORTH_A_CUT:
            return plain
        place = self._places.get(get_gradient_edge(z).node)
        if place is None or not self.widths:
            return plain
        expected, cut = self._best(place, rows, {})
        if cut is None or expected > _WORTH * rows * place.behind:
            return plain
        try:
            self._solve(cut)
            other = SecondDerivative(self.total, z, z.shape, tries, cut)
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
            want, got = plain(noise.unsqueeze(0)), other(noise.unsqueeze(0))
        except (RuntimeError, UnsupportedLayerError):  # then the plain way says what is wrong
            return plain
        return other if agree(want, got) else plain

    def _solve(self, place: Place) -> None:
        """Compute the Hessian in a place, by way of others where that is faster."""
        if place.hessian is not None:
            return
        about, width, n = place.described(), self.widths[place], self.samples
        assert about is not None and place.axis is not None
        cut = self._best(place, width, {})[1]
        if cut is not None:
            self._solve(cut)
        shape, device = about[0], self.total.device
        (gradient,) = torch.autograd.grad([self.total], [place.edge], retain_graph=True)
        place.gradient = gradient
        tries = width >= self.trial_from
        second = SecondDerivative(self.total, place.edge, shape, tries, cut)
        where = positions(shape, place.axis, n, device)
        hessian = gradient.new_empty(n, width, width)
        for start in range(0, width, _CHUNK):
            chosen = range(start, min(start + _CHUNK, width))
            found = second(units(where, chosen, shape, gradient)).reshape(len(chosen), -1)
            hessian[:, chosen.start : chosen.stop] = found[:, where].movedim(0, 1)
        place.hessian = symmetrised(hessian, "The Hessian behind a layer", gradient.dtype)


def units(where: Tensor, chosen: range, shape: Sequence[int], like: Tensor) -> Tensor:
    """A vector ``[k, *shape]`` for each of the chosen entries, 1 there in every sample."""
    found = like.new_zeros(len(chosen), math.prod(shape))
    for row, entry in enumerate(chosen):
        found[row, where[:, entry]] = 1.0
    return found.reshape(len(chosen), *shape)
