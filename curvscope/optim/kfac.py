"""K-FAC: natural gradient descent with Kronecker-factored Fisher blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, NonFiniteError, OptionError, check_count, check_option, check_seed
from ..modes import aside
from ..operators import KroneckerOperator, Operator
from . import checks
from .base import CurvatureOptimizer
from .bfgs import matmul, symmetric_inverse
from .diagnosing import first_bad_layer
from .fisher import FisherStatistics
from .kbfgs_block import degrees, exact_inverse, extremes
from .labels import BackwardWatch
from .layer import CONVOLUTIONS
from .loss_scale import take_scale
from .passes import (
    Buffers,
    Closure,
    call_closure,
    check_closure,
    run_batch,
    to_device,
    undisturbed,
    without_weight_gradients,
)
from .rows import Rows
from .tap import LayerCall, LayerTap

_ALWAYS = 20  # inverses are made in each of the first steps


def damped_inverses(G: Tensor, A: Tensor, damping: float, how: str) -> tuple[Tensor, Tensor]:
    """``(G + sqrt(damping) / pi I)^-1`` and ``(A + pi sqrt(damping) I)^-1`` per group.

    ``how="plain"``: ``pi = 1``; ``how="trace"``: ``pi^2 = (tr A / in) / (tr G / out)`` (Martens and
    Grosse 2015, section 6.3), 1 where a trace vanishes.
    """
    root = G.new_full((G.shape[0], 1), math.sqrt(damping))
    pi = torch.ones_like(root)
    if how == "trace":
        inner, outer = (
            m.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(0) for m in (A, G)
        )
        pi = torch.where((inner > 0) & (outer > 0), (inner / outer).sqrt(), pi)
    return symmetric_inverse(G, root / pi), symmetric_inverse(A, root * pi)


def averaged(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """``decay old + (1 - decay) new``, or a copy of ``new`` where there is nothing yet."""
    return new.clone() if old is None else old.lerp(new, 1 - decay)


class KFAC(CurvatureOptimizer):
    """K-FAC (Martens and Grosse 2015; for convolutions Grosse and Martens 2016).

    A layer's block of the Fisher matrix is approximated by ``G (x) A``. One step:

    1. ``A <- 0.9 A + 0.1 (1/(N T)) sum_{n,t} a a^T``, ``G <- 0.9 G + 0.1 sum_{n,t} w g g^T``
       (2015, section 5: running averages; w = 1/M for a mean over M terms)
    2. every ``inverse_every`` steps and in each of the first 20: ``H_a = (A + pi eps I)^-1``,
       ``H_g = (G + eps/pi I)^-1`` with ``eps = sqrt(damping)``             (2015, section 6.3)
    3. ``M <- 0.9 M + 0.1 (gradient + weight_decay W)``, ``W <- W - lr H_g M H_a``

    ``g`` is the gradient of a term's negative log-likelihood in the layer's output, by ``fisher``:

    * ``"mc"``: at labels drawn from the model (``seed``), one extra backward pass without weight
      gradients,
    * ``"exact"``: the expectation, one such pass per output of a sample,
    * ``"empirical"``: the observed labels, no extra pass; the loss is regarded as a mean over
      samples, ``G = (1/N) sum (N g)(N g)^T``, or over the terms of ``loss=``.

    For ``"mc"`` and ``"exact"`` the distribution and the terms' weights are read from the graph of
    the loss on which the closure calls ``backward()``, or given by ``loss=``: a loss of torch
    (``reduction="mean"`` over terms or ``"sum"``), or ``"categorical"``, ``"bernoulli"``,
    ``"normal"`` for the negative log-likelihood summed over a sample and averaged over samples
    (``"normal"``: half the squared error). With ``loss=`` the outputs of the model are caught by a
    hook.

    ``step(closure)``: ``optimizer.zero_grad()``, loss, ``loss.backward()``, return the loss.
    ``step()`` after ``backward()`` works with ``loss=`` or ``fisher="empirical"``.
    :meth:`warm_start` sets the factors to their means over a pass, as in the comparisons of
    Goldfarb, Ren and Bahamou (2020), whose momentum and damping (``split="plain"``) are the
    defaults here; the original takes step size and momentum from an exact quadratic model, and
    adapts its damping. Factors are those of ``cs.kfac(..., sharing="expand")``.

    It covers Linear and Conv1d, 2d, 3d; other parameters follow ``fallback``. Memory: ``M``, and
    ``2 in^2 + 2 out^2`` numbers per layer.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> inputs, targets = torch.eye(3), torch.ones(3, 2)
    >>> optimizer = cs.optim.KFAC(model, lr=0.1, damping=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(model(inputs), targets)
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(3):
    ...     loss = optimizer.step(closure)
    >>> optimizer.curvature().blocks["2"].G.shape
    torch.Size([2, 2])
    """

    method = "K-FAC"
    layer_types = (nn.Linear, *CONVOLUTIONS)
    _step_supports_amp_scaling = True  # else a scaler's step says nothing of its scale

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        damping: float,
        *,
        fisher: str = "mc",
        loss: Any = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay: float = 0.9,
        inverse_every: int = 20,
        split: str = "plain",
        seed: int = 0,
        params: Any = None,
        fallback: str = "adam",
        process_group: Any = None,
    ) -> None:
        check_option("fisher", fisher, ("mc", "exact", "empirical"))
        check_option("split", split, ("plain", "trace"))
        self.fisher, self.split = fisher, split
        self.decay = checks.non_negative("decay", decay, below=1)
        self.inverse_every = check_count("inverse_every", inverse_every)
        self._statistics = FisherStatistics(fisher, loss, check_seed(seed))
        self._last: dict[str, dict[str, Tensor]] = {}
        self._eigenvalues = True
        defaults = {"lr": lr, "damping": damping, "momentum": momentum}
        defaults["weight_decay"] = weight_decay
        super().__init__(model, params, defaults, fallback=fallback, process_group=process_group)
        self._open()

    def _forget_factors(self, block: str) -> None:
        self._drop_block_state(block)
        self._last.pop(block, None)

    def _check_group(self, group: dict[str, Any]) -> None:
        checks.non_negative("damping", group["damping"], positive=True)
        checks.non_negative("momentum", group["momentum"], below=1)

    def _open(self) -> None:
        """Hooks that stay: only where ``step()`` is possible without a closure."""
        if self._statistics.without_closure:
            self._tap_layers(self._receive, self._statistics.outputs).active = True

    # -- training --------------------------------------------------------------------------------

    def _receive(self, call: LayerCall) -> None:
        self._statistics.receive(call)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and what was seen of backward passes that no step followed."""
        super().zero_grad(set_to_none)
        self._statistics.forget_seen()

    def step(self, closure: Closure | None = None, *, scaler: Any = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; returns the closure's loss.

        With a ``GradScaler`` and a closure pass it as ``scaler``, let the closure call
        ``scaler.scale(loss).backward()``, and call ``scaler.update()`` after the step, which is
        left out where gradients overflow. Without a closure use ``scaler.step(optimizer)``.
        """
        self._check_ready()
        buffers = Buffers(self.model) if closure is not None else None
        drawn = self._statistics.generator.get_state()
        loss = None
        try:
            if closure is not None:
                loss = self._evaluate(check_closure(closure, self.method))
            self._check_gradients()
            scale, overflow = take_scale(self, None) if scaler is None else self._unscale(scaler)
            if overflow:
                return loss
            self._check_loss(loss, lambda: self._culprit(closure))
            active = self._on_all_ranks(self._active(closure), refuse=f"take step {self.steps + 1}")
            self._update_factors(active, scale)
        except BaseException:
            if buffers is not None:
                buffers.restore()
                self._statistics.generator.set_state(drawn)
            raise
        finally:
            self._statistics.reset()
        self._descend(active)
        self._fallback_step(n for b in self.blocks if b not in active for n in self.blocks[b])
        self.steps += 1
        self._seen_to_run(active)
        return loss

    def _evaluate(self, closure: Closure) -> Tensor:
        """Call the closure under the hooks, reading the loss's distribution where that is asked."""
        self._statistics.reset()
        if self._tap is not None:
            return call_closure(closure, self.method)
        with self._attached() as tap, tap.watching(), BackwardWatch(self._statistics.read) as watch:
            loss = call_closure(closure, self.method)
        if not watch.calls:
            raise OptionError(
                f"The closure did not call backward() on its loss, which {self.method} reads: "
                "write loss.backward() in the closure, or name the distribution with loss=."
            )
        return loss

    def _culprit(self, closure: Closure | None) -> str | None:
        if closure is None:
            return None
        self._statistics.reset()
        return first_bad_layer(self.model, closure, self.device)

    def _active(self, closure: Closure | None) -> list[str]:
        """Blocks whose factors and gradient this step has."""
        if self._tap is None and closure is None:
            raise OptionError(
                f"{self.method}.step needs a closure, or loss= from which to sample labels, or "
                "fisher='empirical'."
            )
        seen = self._statistics.seen
        if self._statistics.loss is not None and not seen and self.layers:
            raise OptionError(
                f"{self.method} with loss= has seen no output of the model: call the model as a "
                "whole, let it return one tensor, and call backward() before step()."
            )
        return [
            block
            for block, moments in seen.items()
            if moments.complete and self.layers[block].weight.grad is not None
        ]

    @torch.no_grad()
    def _update_factors(self, active: Sequence[str], scale: float) -> None:
        """Steps 1 and 2: running averages, and inverses where they are due."""
        found = self.average(self._statistics.moments(active, scale))
        for moment in found:
            if not checks.finite(moment):
                raise NonFiniteError(
                    f"A factor of {self.method} is NaN or infinite at step {self.steps + 1}, while "
                    "loss and gradients are not. Lower lr, or compute in higher precision."
                )
        due = self.steps < _ALWAYS or self.steps % self.inverse_every == 0
        new: dict[str, dict[str, Any]] = {}
        for k, block in enumerate(active):  # nothing changes before all inverses exist
            old = self.state.get(self._first(block), {})
            if due or "H_a" not in old:
                A = averaged(old.get("A"), found[2 * k], self.decay)
                G = averaged(old.get("G"), found[2 * k + 1], self.decay)
                new[block] = self._inverted(block, A, G)
        for k, block in enumerate(active):
            state, layer = self.block_state(block), self.layers[block]
            if block in new:
                state.update(new.pop(block))
            else:
                state["A"].lerp_(found[2 * k], 1 - self.decay)
                state["G"].lerp_(found[2 * k + 1], 1 - self.decay)
                state["age"] += 1
            state.setdefault("M", state["A"].new_zeros(layer.view.shape))
        for block in self.layers:  # a layer that has not run has older inverses too
            old = self.state.get(self._first(block), {})
            if "age" in old and block not in active:
                old["age"] += 1

    def _inverted(self, block: str, A: Tensor, G: Tensor) -> dict[str, Any]:
        """The factors with their inverses, as a layer's state keeps them."""
        damping = float(self.group_of(self.layers[block].weight)["damping"])
        H_g, H_a = damped_inverses(G, A, damping, self.split)
        return {"A": A, "G": G, "H_g": H_g, "H_a": H_a, "age": 0, "damping": damping}

    @torch.no_grad()
    def _descend(self, active: Sequence[str]) -> None:
        """Step 3: momentum and new weights."""
        self._last = {}
        for block in active:
            state, layer = self.block_state(block), self.layers[block]
            gradient = self._gradient(layer)
            state["M"].lerp_(gradient, 1 - self.group_of(layer.weight)["momentum"])
            update = matmul(state["H_g"], matmul(state["M"], state["H_a"]))
            inner = torch.dot(update.reshape(-1), gradient.reshape(-1))
            cosine = inner / (update.norm() * gradient.norm())
            self._last[block] = {"cosine": cosine, "update_norm": update.norm()}
            self._move(layer, update)

    def warm_start(
        self,
        loader: Iterable[Any],
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        """Let ``A`` and ``G`` be means over the minibatches of ``loader``, at the present weights.

        ``loss(outputs, targets)`` is the training loss, with targets the second entry of a batch;
        not needed if the optimizer was built with ``loss=``. ``forward(model, batch)`` calls the
        model; by default on the first entry of a batch. Buffers and random states are left as they
        are. Raises ``OptionError`` after the first step,
        ``ModelError`` where a layer ran on some ranks only.
        """
        if self.steps:
            raise OptionError(f"{self.method} has no warm start after the first step.")
        statistics = self._statistics
        if loss is None and (statistics.loss is None or self.fisher == "empirical"):
            raise OptionError(
                f"{self.method}.warm_start needs the loss: pass loss=lambda outputs, targets: ..."
            )
        self._check_ready()
        sums: dict[str, list[Tensor]] = {}
        batches: dict[str, int] = {}
        for batch in checks.batches(loader):
            with undisturbed(self.model, self.device), without_weight_gradients(self.model):
                self._pass(batch, loss, forward)
            blocks = [b for b, moments in statistics.seen.items() if moments.complete]
            found = statistics.moments(blocks, 1.0)
            for k, block in enumerate(blocks):
                pair = found[2 * k : 2 * k + 2]
                sums[block] = [x + y for x, y in zip(sums[block], pair)] if block in sums else pair
                batches[block] = batches.get(block, 0) + 1
        statistics.reset()
        blocks = self._on_all_ranks(sums, refuse="make its warm start")
        if not blocks:
            raise DataError("The loader gave no batch, or none in which a covered layer ran.")
        means = self.average([total / batches[b] for b in blocks for total in sums[b]])
        for block, A, G in zip(blocks, means[::2], means[1::2], strict=True):
            if not (checks.finite(A) and checks.finite(G)):
                raise NonFiniteError(f"The factors of layer {block!r} are NaN or infinite.")
        for block, A, G in zip(blocks, means[::2], means[1::2], strict=True):
            self.block_state(block).update(A=A.clone(), G=G.clone())  # not views of one buffer

    @contextmanager
    def _alone(self) -> Iterator[LayerTap]:
        """Hooks of its own for the length of a block, while those that stay see nothing."""
        active = self._tap is not None and self._tap.active
        if self._tap is not None:
            self._tap.active = False
        try:
            with self._attached() as tap, aside(tap):
                yield tap
        finally:
            if self._tap is not None:
                self._tap.active = active

    def _pass(self, batch: Any, loss: Any, forward: Any) -> None:
        """One batch of the warm start: a forward pass, and the backward passes of the factors."""
        statistics = self._statistics
        statistics.reset()
        with torch.enable_grad(), self._alone() as tap, tap.watching(probing=True):
            outputs = run_batch(self._wrapper, batch, self.device, forward)
            if statistics.loss is not None and self.fisher != "empirical":
                statistics.read_outputs(outputs)
                return
            value = loss(outputs, to_device(batch[1], self.device))
            if self.fisher == "empirical":
                statistics.count_terms(outputs)
                value.backward()
            else:
                statistics.read(value)

    # -- inspection ------------------------------------------------------------------------------

    def _operator(self, block: str, kind: str) -> Operator | None:
        if block not in self.layers or "A" not in self.state.get(self._first(block), {}):
            return None
        layer, state = self.layers[block], self.block_state(block)
        if "H_a" not in state:  # warm, but before the first step
            state = self._inverted(block, state["A"], state["G"])
        if kind == "raw":  # copies: later steps change the state in place
            G, A = state["G"].clone(), state["A"].clone()
        elif kind == "preconditioner":
            G, A = state["H_g"].clone(), state["H_a"].clone()
        else:
            G, A = exact_inverse(state["H_g"], block), exact_inverse(state["H_a"], block)
        return KroneckerOperator(G, A, layer.view, positive_semidefinite=True)

    def _damping(self, block: str) -> float:
        """That of the inverses, which a schedule may have changed since."""
        now = self.group_of(self.layers[block].weight)["damping"]
        return float(self.state.get(self._first(block), {}).get("damping", now))

    def _factors(self, block: str) -> dict[str, Tensor]:
        raw, inverse = self._operator(block, "raw"), self._operator(block, "preconditioner")
        assert isinstance(raw, KroneckerOperator) and isinstance(inverse, KroneckerOperator)
        return {"A": raw.A, "G": raw.G, "H_a": inverse.A, "H_g": inverse.G}

    def _diagnose(self, block: str) -> dict[str, Any]:
        state, last = self.state.get(self._first(block), {}), self._last.get(block, {})
        if "H_a" not in state:
            return {}
        found: dict[str, Any] = {"age": state["age"]}
        if last:
            found["angle"] = degrees(last["cosine"])
            found["update_norm"] = float(last["update_norm"])
        if self._eigenvalues:
            found |= extremes(H_g=state["H_g"], H_a=state["H_a"])
        return found

    def diagnostics(self, *, eigenvalues: bool = True) -> Rows:
        """One row per block: ``age`` of the inverses in steps; of the last step, where the layer
        took part in it, the ``angle`` between update and gradient in degrees and
        ``update_norm`` without ``lr``; with ``eigenvalues`` (O(n^3)) the extreme ones of
        ``H_g`` and ``H_a`` and the preconditioner's ``condition``.
        """
        self._eigenvalues = eigenvalues
        return super().diagnostics()

    # -- saving ----------------------------------------------------------------------------------

    def _extra_state(self) -> dict[str, Any]:
        return {"generator": self._statistics.generator.get_state()}

    def _load_extra_state(self, extra: Mapping[str, Any]) -> None:
        self._statistics.generator.set_state(extra["generator"].cpu())
        self._last = {}  # of steps that are not those of the state
