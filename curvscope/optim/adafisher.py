"""AdaFisher and AdaFisherW: Adam with the diagonals of K-FAC's factors as its denominator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import NonFiniteError, OptionError, check_count, check_option
from ..operators import DiagonalKroneckerOperator, DiagonalOperator, MatrixView, Operator
from .base import CurvatureOptimizer
from .checks import finite, non_negative
from .diagnosing import angle, first_bad_layer, spread
from .factor_diagonals import NORMS, DiagonalCollector, min_max
from .layer import CONVOLUTIONS, Layer
from .loss_scale import LossScale, take_scale
from .passes import call_closure
from .rows import Rows
from .tap import LayerCall

AVERAGING = ("paper", "release")
_FACTORS = ("H_D", "S_D", "H", "S", "refreshed", "refreshes")


def averaged_diagonal(
    old: Tensor | None, new: Tensor, decay: float, averaging: str, divisor: float = 1.0
) -> Tensor:
    """The running average of one diagonal.

    ``"paper"``: ``decay old + (1 - decay) new``, the first one as it is. ``"release"``:
    ``0.1 decay old + 0.01 decay minmax(new / divisor)``, from ones.
    """
    if averaging == "release":
        old = torch.ones_like(new) if old is None else old
        return 0.1 * decay * old + 0.01 * decay * min_max(new / divisor)
    return new if old is None else decay * old + (1 - decay) * new


def fisher_diagonal(S: Tensor, H: Tensor, damping: float) -> Tensor:
    """``F~ = S (x) H + damping`` ``[g, o, i]`` from ``S`` ``[g, o]`` and ``H`` ``[g, i]``."""
    return (S.unsqueeze(-1) * H.unsqueeze(-2)).add_(damping)


def adafisher_update(
    theta: Tensor,
    gradient: Tensor,
    m: Tensor,
    F: Tensor,
    step: int,
    *,
    lr: float,
    beta: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> None:
    """One step for one parameter, in place; ``step`` counts from 1.

    ``m <- beta m + (1 - beta) g``; ``theta <- theta - lr (m / (1 - beta^step)) / F``. Weight decay
    is added to ``g``, or with ``decoupled`` ``lr weight_decay theta`` is taken off ``theta``.
    """
    gradient = gradient.to(m.dtype)
    if weight_decay and not decoupled:
        gradient = gradient.add(theta, alpha=weight_decay)
    m.lerp_(gradient, 1 - beta)
    target = theta if theta.dtype == m.dtype else theta.to(m.dtype)
    if weight_decay and decoupled:
        target.mul_(1 - lr * weight_decay)
    target.addcdiv_(m, F, value=-lr / (1 - beta**step))
    if target is not theta:
        theta.copy_(target)


class AdaFisher(CurvatureOptimizer):
    r"""AdaFisher (Martins Gomes, Zhang, Belilovsky, Wolf, Hosseini, ICLR 2025, arXiv 2405.16397).

    Every ``update_every`` steps, layer by layer, from the minibatch's input rows ``a`` (a 1
    appended where there is a bias) and the gradients ``s`` of its mean loss in the output rows:

    (1) ``H_D = mean a^2``, ``S_D = mean s^2`` over rows: samples, and tokens, patches or positions
        (the diagonals of K-FAC's factors). Normalisations have one pair of numbers on the input
        side: with ``q_c = sum a / T^2`` over samples and their T positions,
        ``H_D = (sum_c q_c^2, C) / B^2`` for scale and shift, and ``S_D = (sum s)^2 / B``;
    (2) running averages ``H_D <- decay H_D + (1 - decay) new``, the same for ``S_D``;
    (3) min-max normalisation ``x' = (x - min x) / (max x - min x + 1e-6)``;

    and in every step (section 3 of the paper)

    (4) ``F~ = S_D' (x) H_D' + damping``, in the shape of weight and bias;
    (5) ``m <- beta m + (1 - beta) g``, ``theta <- theta - lr (m / (1 - beta^t)) / F~``.

    Weight decay is added to ``g`` (:class:`AdaFisherW` decouples it). ``curvature()`` is ``F~``,
    ``damped=False`` the product ``S_D (x) H_D`` of the running averages, not normalised.

    ``averaging="release"`` follows the authors' released code instead: the normalised vectors are
    averaged, by ``0.1 decay old + 0.01 decay new`` from ones. The weights do not sum to one, so
    ``F~`` shrinks until ``damping`` dominates and the method is close to SGD with learning rate
    ``lr / damping`` (``diagnostics()`` shows it). A convolution's ``H_D`` is divided once more by
    the length of a patch, and a LayerNorm's input side takes axis 1 for the features. Parameters
    are matched to layers by identity in both; the release matches them by position and shape.

    Layers: Linear with any number of axes, Conv1d/2d/3d with stride, padding, dilation and groups
    (normalised over all groups together), BatchNorm, LayerNorm, GroupNorm. Several uses of a layer,
    and several backward passes before a step, count as one larger batch. A layer with a single
    output has ``S_D' = 0`` by (3), so that it takes steps of SGD with ``lr / damping``. All
    other parameters follow ``fallback``; ``coverage()`` says which and why.

    ``step()`` comes after ``backward()`` (the statistics are taken on the way), or
    ``step(closure)`` with a closure that calls it. Under a ``GradScaler`` the statistics are
    divided by its scale; set ``loss_scale`` (a number or a function) if the loss is scaled by other
    means. The statistics of half-precision layers are float32.

    Cost: one pass over inputs and output gradients of each layer per statistics step, and no
    patches; otherwise that of SGD with momentum. State: one number per parameter and the factors.

    >>> import torch
    >>> import curvscope as cs
    >>> optimizer = cs.optim.AdaFisher(torch.nn.Linear(3, 2), lr=1e-3)
    """

    method: ClassVar[str] = "AdaFisher"
    layer_types = (nn.Linear, *CONVOLUTIONS, *NORMS)
    decoupled: ClassVar[bool] = False
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        beta: float = 0.9,
        damping: float = 1e-3,
        decay: float = 0.8,
        update_every: int = 100,
        weight_decay: float = 0.0,
        averaging: str = "paper",
        *,
        params: Any = None,
        fallback: str = "adam",
        maximize: bool = False,
        process_group: Any = None,
    ) -> None:
        check_option("averaging", averaging, AVERAGING)
        self.averaging = averaging
        self.update_every = check_count("update_every", update_every)
        self.loss_scale: LossScale = None
        self._fresh = False  # whether parameters came that have no statistics yet
        self._collector = DiagonalCollector(second_axis=averaging == "release")
        defaults = {
            "lr": lr,
            "beta": beta,
            "damping": damping,
            "decay": decay,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(model, params, defaults, fallback=fallback, process_group=process_group)
        self._open()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, with options of their own."""
        super().add_param_group(param_group)
        if self._bound:
            self._fresh = True
            if self._tap is not None:
                self._tap.active = True

    def _check_group(self, group: dict[str, Any]) -> None:
        non_negative("beta", group["beta"], below=1.0)
        non_negative("damping", group["damping"], positive=True)
        non_negative("decay", group["decay"], below=1.0)

    def _forget_factors(self, block: str) -> None:
        self._fired.discard(block)
        for name in self.blocks[block]:
            for key in _FACTORS:
                self.state[self.params[name]].pop(key, None)

    # -- statistics ------------------------------------------------------------------------------

    def _open(self) -> None:
        self._tap_layers(self._receive).active = self._watching()

    def _receive(self, call: LayerCall) -> None:
        if self._due() or call.layer.block not in self._fired:
            self._collector.use(call)

    def _extra_state(self) -> dict[str, Any]:
        return {"fresh": self._fresh}

    def _load_extra_state(self, extra: Mapping[str, Any]) -> None:
        self._fresh = extra["fresh"]
        assert self._tap is not None
        self._tap.active = self._watching()

    def _due(self) -> bool:
        """Whether the next step takes statistics: by the clock, or since a layer has none yet."""
        return self.steps % self.update_every == 0 or self._fresh

    def _watching(self) -> bool:
        """Whether the next step may take statistics: also of layers that did not run before.

        Those that have not run by the next regular step may never do, and are left to such steps:
        watching has its price.
        """
        early = self.steps < self.update_every and len(self._fired) < len(self.layers)
        alone = self._process_group is None  # ranks meet at statistics steps only
        return self._due() or (alone and early)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; the statistics of the backward passes since the last step go too."""
        super().zero_grad(set_to_none)
        self._collector.sums.clear()

    def _refresh(self, scale: float) -> None:
        """Average the new diagonals in: (1) to (3)."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        collected = self._collector.sums
        found: dict[str, tuple[Tensor, Tensor]] = {}
        seen = [
            self.layers[b] for b in self._on_all_ranks([b for b in self.layers if b in collected])
        ]
        sums = [collected[layer.block].unscaled(scale) for layer in seen]
        if self._process_group is not None:
            ranks = dist.get_world_size(self._process_group)
            means = self.average([t for one in sums for t in (one.h, one.s)])
            sums = [o.over_ranks(h, s, ranks) for o, h, s in zip(sums, means[::2], means[1::2])]
        for layer, one in zip(seen, sums):
            h, s = (t.to(dtype) for t in one.diagonals(layer.bias is not None))
            found[layer.block] = h, s
        self._check_diagonals(found)
        for layer in seen:
            state, decay = self.block_state(layer.block), self.group_of(layer.weight)["decay"]
            h, s = found[layer.block]
            length = layer.weight[0].numel() if isinstance(layer.module, CONVOLUTIONS) else 1
            for name, new, divisor in (("H", h, length), ("S", s, 1)):
                old = state.get(name + "_D")
                mean = averaged_diagonal(old, new, decay, self.averaging, divisor)
                state[name + "_D"] = mean
                state[name] = mean if self.averaging == "release" else min_max(mean)
            state["refreshed"] = self.steps
            state["refreshes"] = state.get("refreshes", 0) + 1
            self._fired.add(layer.block)

    def _check_diagonals(self, found: Mapping[str, Sequence[Tensor]]) -> None:
        """Refuse squares that overflow, which min-max would turn into parameters of NaN."""
        largest = [t.abs().amax() for pair in found.values() for t in pair]
        if not largest or finite(torch.stack(largest)):
            return
        block = next(b for b, pair in found.items() if not all(finite(t) for t in pair))
        raise NonFiniteError(
            f"{self.method} did not take step {self.steps + 1}: squares of the inputs or output "
            f"gradients of layer {block!r} overflow, while loss and gradients are finite. "
            "Parameters and state are unchanged. Scale the inputs or the loss."
        )

    # -- the step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a step with the gradients in ``.grad``, or those that ``closure`` computes.

        Returns the closure's loss. Raises ``NonFiniteError``, with parameters and state unchanged,
        if the loss or a gradient is NaN or infinite.
        """
        self._check_open()
        self._check_ready()
        loss = None
        try:
            with self._or_back(closure):
                if closure is not None:
                    loss = call_closure(closure, self.method)
                scale, skip = take_scale(self, self.loss_scale)
                if skip:
                    return loss
                self._check_gradients()
                self._check_loss(loss, self._culprit(loss, closure))
                if self._watching():
                    self._refresh(scale)
        finally:
            self._collector.sums.clear()
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        rest = set(self.params)
        for block, layer in self.layers.items():
            if block in self._fired:
                rest -= set(self.blocks[block])
                for p in (layer.weight, layer.bias):
                    if p is not None and p.grad is not None:
                        self._update(layer, p, groups[id(p)])
        self._fallback_step(name for name in self.params if name in rest)
        self.steps += 1
        self._fresh = False
        assert self._tap is not None
        self._tap.active = self._watching()
        self._seen_to_run(())
        return loss

    def _update(self, layer: Layer, p: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "m" not in state:
            state["m"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            state["step"] = 0
        state["step"] += 1
        assert p.grad is not None
        adafisher_update(
            p,
            -p.grad if group["maximize"] else p.grad,
            state["m"],
            self._denominator(layer, p, group["damping"]),
            state["step"],
            lr=float(group["lr"]),
            beta=group["beta"],
            weight_decay=group["weight_decay"],
            decoupled=self.decoupled,
        )

    def _denominator(self, layer: Layer, p: nn.Parameter, damping: float) -> Tensor:
        """``F~`` of one parameter, in its shape."""
        state = self.block_state(layer.block)
        H = state["H"]
        if isinstance(layer.module, NORMS):
            H = H[:, :1] if p is layer.weight else H[:, 1:]
        elif layer.bias is not None:
            H = H[:, :-1] if p is layer.weight else H[:, -1:]
        return fisher_diagonal(state["S"], H, damping).reshape(p.shape)

    def _culprit(self, loss: Tensor | None, closure: Any) -> str | None:
        """Where a loss that is not finite went wrong."""
        if loss is None or finite(loss):
            return None
        found = self._collector.overflow(self.layers)
        if found is None and closure is not None and self._process_group is None:
            found = first_bad_layer(self.model, closure, self.device)
        return found

    def _check_open(self) -> None:
        if self._tap is None or not self._tap._handles:
            raise OptionError(
                f"This {self.method} was closed and no longer sees the layers. Build a new one; "
                "load_state_dict can carry the state over."
            )

    # -- inspection ------------------------------------------------------------------------------

    def _operator(self, block: str, kind: str) -> Operator | None:
        if block not in self._fired:
            return None
        layer, state = self.layers[block], self.block_state(block)
        if kind == "raw":
            H, view = state["H_D"], layer.view
            if isinstance(layer.module, NORMS):
                H = H if layer.bias is not None else H[:, :1]
                view = MatrixView.for_weight_and_bias(
                    layer.weight.numel(), 1, layer.bias is not None
                )
            return DiagonalKroneckerOperator(state["S_D"].clone(), H.clone(), view)
        F = self._vector(block, lambda p: self._block_denominator(layer, p))
        return DiagonalOperator(F if kind == "damped" else 1 / F)

    def _damping(self, block: str) -> float | None:
        return self._common(block, "damping")

    def _block_denominator(self, layer: Layer, p: nn.Parameter) -> Tensor:
        return self._denominator(layer, p, self.group_of(p)["damping"])

    def _vector(self, block: str, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        return torch.cat([of(self.params[name]).reshape(-1) for name in self.blocks[block]])

    def _factors(self, block: str) -> dict[str, Tensor]:
        """``H_D``, ``S_D``: the running averages; ``H``, ``S``: as they enter ``F~``."""
        state = self.block_state(block)
        return {name: state[name].squeeze(0) for name in ("H_D", "S_D", "H", "S")}

    def _diagnose(self, block: str) -> dict[str, Any]:
        if block not in self._fired:
            return {}
        layer, state = self.layers[block], self.block_state(block)
        F = self._vector(block, lambda p: self._block_denominator(layer, p))
        row: dict[str, Any] = {
            "age": self.steps - 1 - state["refreshed"],
            "refreshes": state["refreshes"],
            **spread(F, self.group_of(layer.weight)["damping"]),
        }
        if all("m" in self.state[self.params[name]] for name in self.blocks[block]):
            m = self._vector(block, lambda p: self.state[p]["m"])
            row["angle"] = angle(m / F, m)
        return row

    def diagnostics(self) -> Rows:
        """One row per block: ``age`` of the statistics in steps and how many ``refreshes`` there
        were, the extremes ``F_min`` and ``F_max`` of ``F~`` and their quotient ``condition``,
        ``damping`` over the median of ``F~`` (``damping_share``: 1 where it is all damping), and
        the ``angle`` between ``m / F~`` and the averaged gradient ``m`` in degrees.
        """
        return super().diagnostics()


class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay.

    ``theta <- theta - lr (m^ / F~ + weight_decay theta)``; all else is as in :class:`AdaFisher`.

    >>> import torch
    >>> import curvscope as cs
    >>> optimizer = cs.optim.AdaFisherW(torch.nn.Linear(3, 2), lr=1e-3, weight_decay=1e-2)
    """

    method: ClassVar[str] = "AdaFisherW"
    decoupled: ClassVar[bool] = True
