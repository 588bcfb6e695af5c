"""K-BFGS and K-BFGS(L): Kronecker-factored BFGS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, NonFiniteError, OptionError, check_count
from ..modes import aside
from ..operators import KroneckerOperator, Operator
from . import checks, kbfgs_block
from .base import CurvatureOptimizer
from .layer import CONVOLUTIONS, Layer
from .passes import (
    Buffers,
    Closure,
    Leftovers,
    RandomState,
    call_closure,
    check_closure,
    replaying,
    run_batch,
    undisturbed,
)
from .rows import Rows
from .statistics import InputMoments, OutputMeans
from .tap import LayerCall, LayerTap


@dataclass
class _Seen:
    """What the two passes of one step have seen of a layer."""

    inputs: InputMoments = field(default_factory=InputMoments)
    first: OutputMeans = field(default_factory=OutputMeans)
    second: OutputMeans = field(default_factory=OutputMeans)


class KBFGS(CurvatureOptimizer):
    """K-BFGS, and with ``memory=m`` K-BFGS(L).

    Goldfarb, Ren, Bahamou, "Practical quasi-Newton methods for training deep neural networks",
    NeurIPS 2020 (arXiv 2006.08877), algorithms 1 to 3; for convolutions Ren, Bahamou, Goldfarb,
    arXiv 2102.06737. A layer ``z = W a``, ``W = [W b]``, ``a = (a, 1)`` has the block
    ``G (x) A`` of the Hessian approximated, by its inverse factors ``H_g``, ``H_a``. With
    ``eps = sqrt(damping)``, one step on one minibatch is

    1. ``M <- 0.9 M + 0.1 (gradient + weight_decay W)``                            (momentum)
    2. ``A <- 0.9 A + 0.1 E_n[sum_t a a^T]``; at first ``H_a = (A + eps I)^-1``, ``H_g = I``
    3. ``W <- W - lr H_g M H_a``                                                     (eq. 4)
    4. a second pass over the same minibatch: ``s = mean z_new - mean z_old``,
       ``y = mean g_new - mean g_old`` with ``g`` the gradient of a sample's own loss in ``z``, both
       smoothed, ``s <- 0.9 s + 0.1 s_new`` and ``y`` likewise
    5. double damping: ``s^T y >= 0.2 y^T H_g y``, then ``s^T y >= eps s^T s``     (algorithm 2)
    6. BFGS update of ``H_g`` with the pair, or the pair joins the last ``memory`` ones, from which
       L-BFGS makes ``H_g`` in compact form
    7. BFGS update of ``H_a`` with ``s = H_a mean a``, ``y = (A + eps I) s``          (section 3.2)

    Steps 6 and 7 skip a pair with ``s^T y <= 1e-4 s^T s ||mean g||`` (``||mean a||``), and one that
    is not finite. Means and sums run over samples n and positions t. Samples are the first axis of
    the model's first input, and the loss is taken for the mean over them of their own losses; with
    another axis in front ``A`` and ``G`` have other scales, and ``damping`` with them.

    ``step(closure)`` calls the closure twice: ``optimizer.zero_grad()``, loss, ``loss.backward()``,
    return the loss. The second call sees the random numbers of the first, no parameter requires a
    gradient in it, BatchNorm's buffers advance once, and ``.grad`` is the first call's afterwards.
    Call :meth:`warm_start` before training, as the authors do; otherwise ``A`` starts as the first
    minibatch's. ``full_batch=True`` is for data that are one batch: no smoothing of the pairs, and
    ``A`` starts at zero.

    An exception in the first call (an interrupt, lack of memory) leaves everything as it was. One
    in the second call is passed on when steps 1 to 3 are done: parameters, momentum and ``A`` have
    moved, and the step counts, as one whose pairs were skipped (``H_g``, ``H_a`` and the smoothed
    ``s``, ``y`` stay as they were). Training can go on from there.

    It covers Linear (any number of axes) and Conv1d, 2d, 3d (stride, padding, dilation, groups);
    other parameters follow ``fallback``. Against the release: any batch size, layers and losses,
    no update of a pair that would put NaN into a factor, and ``H_g`` of K-BFGS(L) in compact form
    instead of two loops. For ``damping >= 1`` the second damping adds ``s`` to ``y`` instead of
    mixing them.

    ``max_update_norm`` (off by default) is a safeguard that is not in the paper: an update
    ``lr H_g M H_a`` of all layers together that is longer is shortened to this norm.

    Cost of a step in gradients: 1 + 0.67 for the passes, about 0.9 for factors and direction.
    Memory: ``M``, and ``2 in^2 + out^2`` numbers per layer (with a memory ``2 m out`` for
    ``out^2``).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> inputs, targets = torch.eye(3), torch.ones(3, 2)
    >>> optimizer = cs.optim.KBFGS(model, lr=0.1, damping=0.3)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(model(inputs), targets)
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(3):
    ...     loss = optimizer.step(closure)
    >>> list(optimizer.curvature().blocks)
    ['0', '2']
    """

    layer_types = (nn.Linear, *CONVOLUTIONS)

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        damping: float,
        *,
        memory: int | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        full_batch: bool = False,
        decay: float = 0.9,
        max_update_norm: float | None = None,
        params: Any = None,
        fallback: str = "adam",
        process_group: Any = None,
    ) -> None:
        checks.flag("full_batch", full_batch)
        self.method = "K-BFGS" if memory is None else "K-BFGS(L)"  # type: ignore[misc]
        self.memory = None if memory is None else check_count("memory", memory)
        self.full_batch = full_batch
        self.decay = checks.non_negative("decay", decay, below=1)
        if max_update_norm is not None:
            checks.non_negative("max_update_norm", max_update_norm, positive=True)
        self.max_update_norm = checks.plain(max_update_norm)
        self._seen: dict[str, _Seen] = {}
        self._phase = "first"
        self._last: dict[str, dict[str, Tensor]] = {}
        self._eigenvalues = True
        defaults = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(model, params, defaults, fallback=fallback, process_group=process_group)

    def _forget_factors(self, block: str) -> None:
        self._drop_block_state(block)
        self._last.pop(block, None)

    def _check_group(self, group: dict[str, Any]) -> None:
        checks.non_negative("damping", group["damping"], positive=True)
        checks.non_negative("momentum", group["momentum"], below=1)

    def _eps(self, layer: Layer) -> float:
        return math.sqrt(float(self.group_of(layer.weight)["damping"]))

    # -- what the hooks see ----------------------------------------------------------------------

    def _receive(self, call: LayerCall) -> None:
        seen = self._seen.setdefault(call.layer.block, _Seen())
        dtype = self.factor_dtype
        if self._phase != "second":
            seen.inputs.add(call, dtype)
        if self._phase == "warm":
            return
        means = seen.first if self._phase == "first" else seen.second
        means.add_outputs(call, dtype)
        call.on_gradient(lambda call, g: means.add_gradients(call, g, dtype))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; what a backward pass has shown of the layers goes too."""
        super().zero_grad(set_to_none)
        for block, seen in list(self._seen.items()):
            if self._phase == "second" and seen.second.gradients is not None:
                seen.second = OutputMeans()
            elif self._phase == "first" and seen.first.gradients is not None:
                del self._seen[block]

    def _culprit(self) -> str | None:
        """The first layer, in order of use, that has seen or made NaN or infinity."""
        for block, seen in self._seen.items():
            assert seen.inputs.first is not None and seen.first.outputs is not None
            if not checks.finite(seen.inputs.first):
                return f"the input of layer {block!r}"
            if not checks.finite(seen.first.outputs):
                return f"the output of layer {block!r}"
        return None

    def _check_moments(self, active: list[str]) -> None:
        """Refuse inputs whose squares overflow: ``A`` would stay infinite for ever."""
        largest = [torch.zeros((), device=self.device)]  # no entry is larger than a diagonal one
        for block in active:
            second = self._seen[block].inputs.second
            assert second is not None
            largest.append(second.diagonal(dim1=-2, dim2=-1).amax())
        values = torch.stack([v.double() for v in largest])
        if checks.finite(self.average([values])[0]):
            return
        names = [b for b, v in zip(active, values[1:].tolist()) if not math.isfinite(v)]
        where = f"layer {names[0]!r}" if names else "a layer on another rank"
        raise NonFiniteError(
            f"{self.method} did not take step {self.steps + 1}: squares of the inputs of {where} "
            "overflow, while loss and gradients are finite. Parameters and state are unchanged. "
            "Scale the inputs."
        )

    # -- training --------------------------------------------------------------------------------

    def warm_start(
        self, loader: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None
    ) -> None:
        """Let every ``A`` be its mean over the minibatches of ``loader``, at the present weights.

        ``forward(model, batch)`` calls the model; by default on the first entry of a batch that is
        a list or tuple, or on the batch itself. Buffers and random states are left as they are.
        Raises ``OptionError`` after the first step and with ``full_batch=True``,
        ``ModelError`` where a layer ran on some ranks only.
        """
        if self.full_batch or self.steps:
            when = "with full_batch=True" if self.full_batch else "after the first step"
            raise OptionError(f"{self.method} has no warm start {when}.")
        self._check_ready()
        sums: dict[str, Tensor] = {}
        batches: dict[str, int] = {}
        self._phase = "warm"
        with undisturbed(self.model, self.device), self._attached() as tap, aside(tap):
            for batch in checks.batches(loader):
                self._seen = {}
                with tap.watching(forward_only=True), torch.no_grad():
                    run_batch(self._wrapper, batch, self.device, forward)
                for block, seen in self._seen.items():
                    moment = seen.inputs.moment()
                    sums[block] = sums[block] + moment if block in sums else moment
                    batches[block] = batches.get(block, 0) + 1
        self._seen = {}
        blocks = self._on_all_ranks(sums, refuse="make its warm start")
        if not blocks:
            raise DataError("The loader gave no batch, or none in which a covered layer ran.")
        means = self.average([sums[block] / batches[block] for block in blocks])
        for block, mean in zip(blocks, means, strict=True):
            if not checks.finite(mean):
                raise NonFiniteError(f"The inputs of layer {block!r} are NaN or infinite.")
        for block, mean in zip(blocks, means, strict=True):
            self.block_state(block).update(A=mean.clone(), warm=True)  # not a view of one buffer

    def step(self, closure: Closure | None = None, *, scaler: Any = None) -> Tensor:  # type: ignore[override]
        """Take one step; returns the loss of the first call of ``closure``.

        With a ``GradScaler`` pass it as ``scaler`` and let the closure call
        ``scaler.scale(loss).backward()`` and nothing else of it; call ``scaler.update()`` after the
        step, which is left out where gradients overflow.
        """
        closure = check_closure(closure, self.method)
        self._check_ready()
        buffers, start = Buffers(self.model), RandomState(self.device)
        self._seen, self._phase = {}, "first"
        leftovers = Leftovers(self.params.values())
        with self._attached() as tap:
            try:
                with tap.watching():
                    loss = call_closure(closure, self.method)
                leftovers.warn_if_added_to(self.method)
                self._check_gradients()
                scale, overflow = self._unscale(scaler)
                if overflow:
                    return loss
                self._check_loss(loss, self._culprit)
                active = [b for b in self._seen if self.layers[b].weight.grad is not None]
                active = self._on_all_ranks(active, refuse=f"take step {self.steps + 1}")
                self._check_moments(active)
                found = self._first_means(active, scale)
                begun = self._first_states(active, found)
            except BaseException:
                buffers.restore()
                raise
            self._descend(active, found, begun)
            self._fallback_step(n for b in self.blocks if b not in active for n in self.blocks[b])
            try:
                if active:
                    self._phase = "second"
                    self._call_again(closure, active, start, tap)
                    self._learn(active, scale)
            finally:  # the parameters have moved: the step counts, whatever happens to its pairs
                self._seen = {}
                self.steps += 1
                self._seen_to_run(active)
        return loss

    def _call_again(
        self, closure: Closure, active: list[str], start: RandomState, tap: LayerTap
    ) -> None:
        """The second pass; where it fails, the layers' pairs count as skipped."""
        try:
            with (
                replaying(self.model, self._wrapper, start, self.device),
                tap.watching(probing=True),
                aside(tap),
            ):
                call_closure(closure, self.method)
        except BaseException:
            for block in active:
                kbfgs_block.skip(self.block_state(block))
            raise

    def _first_means(self, active: list[str], scale: float) -> list[Tensor]:
        """``E_n[sum_t a a^T]`` and the means of ``a``, ``z``, ``g`` of every block in turn."""
        found: list[Tensor] = []
        for block in active:
            seen = self._seen[block]
            means = seen.first.means(seen.inputs.samples, scale)
            found += [seen.inputs.moment(), seen.inputs.mean(), *means]
        return self.average(found)

    @torch.no_grad()
    def _first_states(self, active: list[str], found: list[Tensor]) -> dict[str, dict[str, Any]]:
        """The states of blocks in their first step; all of them, before anything changes."""
        begun: dict[str, dict[str, Any]] = {}
        for block, moment in zip(active, found[::4], strict=True):
            old, layer = self.state.get(self._first(block), {}), self.layers[block]
            if "M" in old:
                continue
            if self.full_batch:
                A = (1 - self.decay) * moment
            else:
                A = old["A"] if "warm" in old else moment.clone()
            begun[block] = {"A": A}
            kbfgs_block.begin(begun[block], layer, self.memory, self._eps(layer))
        return begun

    @torch.no_grad()
    def _descend(
        self, active: list[str], found: list[Tensor], begun: dict[str, dict[str, Any]]
    ) -> None:
        """Steps 1 to 3: momentum, input factors, new weights."""
        updates: dict[str, Tensor] = {}
        self._last = {}
        for k, block in enumerate(active):
            moment, a, z, g = found[4 * k : 4 * k + 4]
            state, layer = self.block_state(block), self.layers[block]
            if block in begun:
                state.pop("warm", None)
                state.update(begun[block])
            else:
                state["A"].lerp_(moment, 1 - self.decay)
            state["refreshed"] = self.steps
            gradient = self._gradient(layer)
            state["M"].lerp_(gradient, 1 - self.group_of(layer.weight)["momentum"])
            update = updates[block] = kbfgs_block.direction(state)
            inner = torch.dot(update.reshape(-1), gradient.reshape(-1))
            length = update.norm()
            last = {"cosine": inner / (length * gradient.norm()), "update_norm": length}
            self._last[block] = {"a": a, "z": z, "g": g, **last}
        factor = self._shortening(updates)
        for block, update in updates.items():
            if factor < 1:
                kbfgs_block.shorten(update, factor)
                kbfgs_block.shorten(self._last[block]["update_norm"], factor)
            self._move(self.layers[block], update)

    @torch.no_grad()
    def _learn(self, active: list[str], scale: float) -> None:
        """Steps 4 to 7: pairs, output factors, input factors."""
        again = [b for b in active if self._seen[b].second.outputs is not None]
        again = self._on_all_ranks(again)
        found: list[Tensor] = []
        for block in again:
            seen = self._seen[block]
            found += seen.second.means(seen.inputs.samples, scale)
        found = self.average(found)
        smoothing = 0.0 if self.full_batch else self.decay
        for k, block in enumerate(again):
            state, last = self.block_state(block), self._last[block]
            eps = self._eps(self.layers[block])
            s, y = found[2 * k] - last["z"], found[2 * k + 1] - last["g"]
            if not (checks.finite(s) and checks.finite(y)):
                state["counts"][-1] += 1
                continue
            norm = last["g"].norm(dim=-1, keepdim=True)
            last |= kbfgs_block.learn_pair(state, s, y, norm, eps, smoothing)
            last |= kbfgs_block.learn_input(state, last["a"], eps)
            kbfgs_block.count(state, last)

    def _shortening(self, updates: dict[str, Tensor]) -> float:
        """By what ``max_update_norm`` multiplies the update; 0 for one that is not finite."""
        if self.max_update_norm is None or not updates:
            return 1.0
        moves = [m for block, u in updates.items() for m in self._lengths(self.layers[block], u)]
        norms = torch.stack([norm for _, norm in moves]).tolist()
        length = math.hypot(*(lr * norm for (lr, _), norm in zip(moves, norms, strict=True)))
        if not math.isfinite(length):
            return 0.0
        return min(1.0, self.max_update_norm / length) if length else 1.0

    def _load_extra_state(self, extra: Mapping[str, Any]) -> None:
        self._last = {}  # of steps that are not those of the state

    # -- inspection ------------------------------------------------------------------------------

    def _operator(self, block: str, kind: str) -> Operator | None:
        if block not in self.layers or "A" not in self.state.get(self._first(block), {}):
            return None
        layer, state = self.layers[block], self.block_state(block)
        if "M" not in state:  # warm, but before the first step
            state = {"A": state["A"]}
            kbfgs_block.begin(state, layer, self.memory, self._eps(layer))
        H_g, H_a = kbfgs_block.output_inverse(state), state["H_a"]
        if kind == "preconditioner":  # copies: later steps change the state in place
            H_g, H_a = H_g.clone(), H_a.clone()
            return KroneckerOperator(H_g, H_a, layer.view, positive_semidefinite=True)
        A = state["A"].clone() if kind == "raw" else kbfgs_block.exact_inverse(H_a, block)
        return KroneckerOperator(
            kbfgs_block.exact_inverse(H_g, block), A, layer.view, positive_semidefinite=True
        )

    def curvature_work(self, block: str) -> float:
        """Both factors are inverted in float64, which takes the time of twice the operations."""
        if block not in self.layers:
            return 0.0
        groups, out, inp = self.layers[block].view.shape
        return 4.0 * groups * (float(out) ** 3 + float(inp) ** 3)

    def _damping(self, block: str) -> float:
        return float(self.group_of(self.layers[block].weight)["damping"])

    def _factors(self, block: str) -> dict[str, Tensor]:
        preconditioner, raw = self._operator(block, "preconditioner"), self._operator(block, "raw")
        assert isinstance(preconditioner, KroneckerOperator) and isinstance(raw, KroneckerOperator)
        return {"A": raw.A, "G": raw.G, "H_a": preconditioner.A, "H_g": preconditioner.G}

    def _diagnose(self, block: str) -> dict[str, Any]:
        state = self.state.get(self._first(block), {})  # reading must not begin an entry
        if "M" not in state:
            return {}
        age = {"age": self.steps - 1 - state["refreshed"]}
        return age | kbfgs_block.diagnose(state, self._last.get(block, {}), self._eigenvalues)

    def diagnostics(self, *, eigenvalues: bool = True) -> Rows:
        """One row per block: the ``age`` of the factors in steps; counts since the beginning
        (``updates``, ``skipped``, ``damped_on_inverse`` for step 5a, ``damped_on_identity`` for 5b,
        ``skipped_input`` for ``H_a``, ``not_finite`` pairs; of a convolution with groups, each
        group's); and of the last step, where the layer took part in it, ``sy_ss_before``
        and ``sy_ss_after`` damping, ``secant_residual`` ``||H_g y - s||`` and
        ``secant_residual_input``, the ``angle`` between update and gradient in degrees,
        ``update_norm`` (without ``lr``); with ``eigenvalues`` (O(n^3)) the extreme ones of ``H_g``
        and ``H_a`` and the preconditioner's ``condition``.
        """
        self._eigenvalues = eigenvalues
        return super().diagnostics()
