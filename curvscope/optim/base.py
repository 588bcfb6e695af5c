"""What all optimizers of curvscope have in common.

A subclass sets ``method`` and ``layer_types``, asks for its :class:`~.tap.LayerTap` with
:meth:`CurvatureOptimizer._tap_layers`, keeps what belongs to a block in :meth:`block_state`, and
defines :meth:`step`, :meth:`_operator`, :meth:`_factors` and :meth:`_diagnose`. Everything else
is here: parameters and blocks, the fallback rule, saving and loading, checks, operators and tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import CurvscopeError, ModelError, NonFiniteError, OptionError, check_option
from ..operators import Layout
from ..problem.blocks import ROOT, make_blocks
from ..problem.wrappers import unwrapped
from . import checks, saving
from .averaging import average, choose_group
from .fallback import FALLBACK_LR, fallback_update
from .inspection import Inspection
from .layer import Layer, find_layers
from .passes import Buffers
from .tap import LayerCall, LayerTap, remove_dead_hooks


class CurvatureOptimizer(Inspection, torch.optim.Optimizer):
    """Base class; see the module for what a subclass provides.

    ``params`` is ``None`` (every trainable parameter of the model), parameters, names and patterns
    as in ``cs.Problem``, or a list of torch's parameter-group dictionaries. Every group has its own
    ``lr`` and other options. What the method does not define is updated by ``fallback`` (``"adam"``
    or ``"sgd"``) with the group's ``fallback_lr`` (1e-3 or 1e-2 unless given), which follows the
    schedule of ``lr``.

    With ``torch.distributed`` initialised, statistics are averaged over the process group:
    ``process_group=None`` takes that of a ``DistributedDataParallel`` model or the default group,
    ``False`` none. Give every rank an equal share of the batch.

    Attributes: ``model`` (without ``DistributedDataParallel`` or ``torch.compile`` around it),
    ``params`` (name -> Parameter, in the model's order), ``layout``, ``blocks`` (name -> parameter
    names, as in ``cs.Problem``), ``layers`` (block -> Layer the method defines), ``steps`` (steps
    taken).
    """

    method: ClassVar[str] = "curvature optimizer"
    layer_types: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A compiled training step leaves the optimizer's alone; models in its closure are free."""
        super().__init_subclass__(**kwargs)
        if "step" in cls.__dict__:
            cls.step = torch._disable_dynamo(cls.step)  # type: ignore[method-assign, assignment]

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        defaults: dict[str, Any],
        *,
        fallback: str = "adam",
        process_group: Any = None,
    ) -> None:
        check_option("fallback", fallback, FALLBACK_LR)
        checks.check_model(model, self.method)
        self.fallback = fallback
        self.steps = 0
        self._wrapper = model
        self.model = unwrapped(model)
        self._explicit = params is not None
        self._ungrouped = process_group is False
        self._process_group = choose_group(model, process_group)
        self._tap: LayerTap | None = None
        self._fired: set[str] = set()  # blocks whose layer has been seen to run
        self._bound = self._closed = False
        groups = checks.parameter_groups(self.model, params, self.method)
        super().__init__(groups, {**defaults, "fallback_lr": None})
        self._bind()

    def _bind(self) -> None:
        """Find names, blocks and layers of the parameters in the groups."""
        mine = {id(p): g for g in self.param_groups for p in g["params"]}
        self.params: dict[str, nn.Parameter] = {
            n: p for n, p in self.model.named_parameters() if id(p) in mine
        }
        if len(self.params) < len(mine):
            raise ModelError(
                f"{len(mine) - len(self.params)} of the parameters given to {self.method} do not "
                "belong to the model; pass parameters of this model, or params=None for all."
            )
        self.device, self.dtype = checks.one_kind(self.params, self.method)
        self.layout = Layout.of(self.params.items())
        before = self.blocks if self._bound else {}
        self.blocks = make_blocks(list(self.params), "layer")
        self.layers, self._reasons = find_layers(
            self.model, self.blocks, self.params, self.layer_types
        )
        self._facts = checks.Facts(self.params, self._explicit)
        # positions, not the groups themselves, which loading a state replaces
        self._positions = {id(p): k for k, g in enumerate(self.param_groups) for p in g["params"]}
        self._bound = True
        for block in before:
            if self.blocks.get(block) != before[block]:  # its factors are of another shape now
                self._forget_factors(block)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, for example those of layers that are no longer frozen.

        A layer that gets a bias in this way has factors of another shape, which begin anew.
        """
        try:
            super().add_param_group(param_group)
        except (TypeError, ValueError) as error:  # no dictionary, or parameters of another group
            raise OptionError(f"{self.method} cannot take these parameters: {error}.") from error
        group, params = self.param_groups[-1], getattr(self, "params", None)
        group.update({k: checks.plain(v) for k, v in group.items() if k != "params"})
        try:
            checks.check_group(group)
            self._check_group(group)
            if group["fallback_lr"] is None:
                group["fallback_lr"] = FALLBACK_LR[self.fallback]
            group.setdefault("base_lr", float(group["lr"]))  # not a tensor that a schedule changes
            if self._bound:
                self._bind()
        except CurvscopeError:
            if params is not None:
                self.param_groups.pop()
                self.params = params
            raise
        if self._bound and self._tap is not None:
            self._tap.close()
            self._open()

    # -- for subclasses --------------------------------------------------------------------------

    def _open(self) -> None:
        """Put hooks on the model: called by the subclass, after copying and unpickling."""

    def _check_group(self, group: dict[str, Any]) -> None:
        """Check the subclass's own options of a parameter group."""

    def _forget_factors(self, block: str) -> None:
        """Parameters have joined a block: drop what belongs to its former shape."""

    def _tap_layers(
        self,
        receive: Callable[[LayerCall], None],
        outputs: Callable[[Tensor], Tensor | None] | None = None,
    ) -> LayerTap:
        """Watch :attr:`layers` from now on; ``receive`` should be a bound method."""
        self._tap = LayerTap(self.model, self.layers, receive, outputs)
        return self._tap

    @contextmanager
    def _or_back(self, closure: Any) -> Iterator[None]:
        """Put the model's buffers back if the step of this closure is refused."""
        buffers = Buffers(self.model) if closure is not None else None
        try:
            yield
        except BaseException:
            if buffers is not None:
                buffers.restore()
            raise

    @contextmanager
    def _attached(self) -> Iterator[LayerTap]:
        """Hooks for the length of a block, for methods that need them during a step only."""
        tap = LayerTap(self.model, self.layers, self._receive)
        try:
            yield tap
        finally:
            tap.close()

    def _receive(self, call: LayerCall) -> None:
        """What a hook hands over; see :class:`~.tap.LayerTap`."""

    def _first(self, block: str) -> nn.Parameter:
        return self.params[self.blocks[block][0]]

    def _drop_block_state(self, block: str) -> None:
        """Let the method begin anew with a block; the fallback rule's state stays."""
        state = self.block_state(block)
        for key in [k for k in state if not k.startswith("fallback_")]:
            del state[key]
        self._fired.discard(block)

    def block_state(self, block: str) -> dict[str, Any]:
        """What is kept for a block: it lives in ``state`` under the block's first parameter."""
        return self.state[self._first(block)]

    def group_of(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter group of a parameter."""
        return self.param_groups[self._positions[id(parameter)]]

    def _common(self, block: str, option: str) -> float | None:
        """An option of the groups of a block's parameters, where it is the same for all."""
        found = {float(self.group_of(self.params[n])[option]) for n in self.blocks[block]}
        return found.pop() if len(found) == 1 else None

    @property
    def factor_dtype(self) -> torch.dtype:
        """That of the parameters, float32 at least."""
        return torch.promote_types(self.dtype, torch.float32)

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Means over the process group; the tensors themselves where there is none."""
        return average(tensors, self._process_group)

    def _on_all_ranks(self, blocks: Iterable[str], *, refuse: str = "") -> list[str]:
        """Those of the blocks that all ranks have; otherwise they would average unlike things.

        ``refuse``: what is not done, in words; raises ``ModelError`` on all ranks if only some of
        them have a block.
        """
        blocks = list(blocks)
        if self._process_group is None:
            return blocks
        have = torch.tensor([float(b in blocks) for b in self.layers], device=self.device)
        share = dict(zip(self.layers, self.average([have])[0].tolist(), strict=True))
        some = [b for b, value in share.items() if 0 < value < 1]
        if some and refuse:
            raise ModelError(
                f"{self.method} did not {refuse}: the layer {some[0]!r} ran on some ranks only. "
                "Send samples through it on every rank, or leave its parameters to another "
                "optimizer with params=."
            )
        return [b for b in self.layers if b in blocks and b not in some]

    # -- parts of a step -------------------------------------------------------------------------

    def _check_ready(self) -> None:
        if self._closed:
            raise OptionError(f"This {self.method} was closed; build a new one to go on.")
        for group in self.param_groups:  # schedules and users may have changed them
            checks.check_group(group)
            self._check_group(group)
        self._facts.check(self.model, self.params, self.method)
        modules = {name or ROOT: module for name, module in self.model.named_modules()}
        for block, layer in self.layers.items():
            if modules.get(block) is not layer.module:  # with the old one's parameters
                raise ModelError(
                    f"The model has changed since {self.method} was built: the layer {block!r} was "
                    "replaced, or is gone. Build a new optimizer after changing the model "
                    "(load_state_dict can carry the state over)."
                )

    def _unscale(self, scaler: Any) -> tuple[float, bool]:
        """Divide gradients by a ``GradScaler``'s factor; returns it, and whether they overflow."""
        if scaler is None:
            return 1.0, False
        scale = float(scaler.get_scale())
        scaler.unscale_(self)
        overflow = checks.not_finite(None, self.params) is not None
        flag = torch.tensor(float(overflow), device=self.device)
        return scale, float(self.average([flag])[0]) > 0

    def _check_loss(
        self, loss: Tensor | None, culprit: str | Callable[[], str | None] | None = None
    ) -> None:
        """Refuse a loss or gradients that are not finite, on all ranks together.

        ``culprit`` may name the layer where it began; a function is called only in that case.
        """
        bad = checks.not_finite(loss, self.params)
        flag = torch.tensor(float(bad is not None), device=self.device)
        if float(self.average([flag])[0]) == 0:
            return
        where = bad or "another rank"
        if "parameters" not in where:
            where = (culprit() if callable(culprit) else culprit) or where
        what = "gradient" if loss is None or checks.finite(loss) else "loss"
        raise NonFiniteError(
            f"{self.method} did not take step {self.steps + 1}: the {what} is NaN or infinite; "
            f"first seen in {where}. Parameters and state are unchanged. {self._advice(where)}"
        )

    def _advice(self, where: str) -> str:
        """What to do about NaN or infinity that began in ``where``."""
        modules = [(name or ROOT, m) for name, m in self.model.named_modules()]
        leaves = [(name, m) for name, m in modules if next(m.children(), None) is None]
        first = [name for name, _ in leaves[:1]]  # what it is fed comes from no other layer
        first += [name for name, m in leaves if any(True for _ in m.parameters())][:1]
        if where in [f"the input of layer {name!r}" for name in first]:
            return (
                "It is the first layer, so look for NaN and infinity in the data, and at what is "
                "done to them before it."
            )
        damped = hasattr(self, "damping") or any("damping" in g for g in self.param_groups)
        return (
            f"Lower lr{' or raise damping' * damped}, and go back to an earlier checkpoint if the "
            "parameters are already too large."
        )

    def _check_gradients(self) -> None:
        if all(p.grad is None for p in self.params.values()):
            raise OptionError(
                f"No parameter has a gradient after the closure, so {self.method} cannot take a "
                "step: call loss.backward() in the closure (or before step())."
            )

    def _gradient(self, layer: Layer) -> Tensor:
        """``[gradient of W, of b]`` with weight decay added, in the layer's matrix view."""
        matrix = layer.weight.new_empty(layer.view.shape, dtype=self.factor_dtype)
        for p, part in zip((layer.weight, layer.bias), layer.split(matrix), strict=True):
            if p is None or part is None:
                continue
            if p.grad is None:
                part.zero_()
                continue
            decay = self.group_of(p).get("weight_decay", 0.0)
            gradient = p.grad.to(self.factor_dtype)
            if decay:
                torch.add(gradient, p.to(self.factor_dtype), alpha=decay, out=part)
            else:
                part.copy_(gradient)
        return matrix

    def _move(self, layer: Layer, update: Tensor) -> None:
        """``W <- W - lr update`` for an update in the layer's matrix view."""
        for p, part in zip((layer.weight, layer.bias), layer.split(update)):
            if p is not None and part is not None:
                lr = float(self.group_of(p)["lr"])
                if p.dtype == part.dtype:
                    p.sub_(part, alpha=lr)
                else:
                    p.sub_((lr * part).to(p.dtype))

    def _lengths(self, layer: Layer, update: Tensor) -> list[tuple[float, Tensor]]:
        """Learning rate and norm of an update: in parts, where they have rates of their own."""
        lr = self._common(layer.block, "lr")
        if lr is not None:
            return [(lr, update.norm())]
        pairs = zip((layer.weight, layer.bias), layer.split(update), strict=True)
        own = [(self.group_of(p), part) for p, part in pairs if p is not None and part is not None]
        return [(float(group["lr"]), part.norm()) for group, part in own]

    def _seen_to_run(self, blocks: Iterable[str]) -> None:
        """The layers of these blocks ran in a step; warns if in the first one no layer did.

        All of a method would otherwise be its fallback without a word.
        """
        self._fired.update(blocks)
        if self.steps == 1 and not self.layers:
            warnings.warn(
                f"{self.method} covers none of the model's layers, so {self.fallback} moves all "
                "parameters: see coverage().",
                stacklevel=checks.outside(),
            )
        elif self.steps == 1 and not self._fired:
            warnings.warn(
                f"None of the layers that {self.method} covers was seen to run, so {self.fallback} "
                "moves their parameters: see coverage(). A model that was compiled and has run "
                "before has its code without hooks: call torch.compiler.reset() after building the "
                "optimizer. Under torch.func.vmap layers are not seen.",
                stacklevel=checks.outside(),
            )

    @torch.no_grad()
    def _fallback_step(self, names: Iterable[str]) -> None:
        """Update parameters by the fallback rule; those without a gradient stay as they are."""
        for name in names:
            p = self.params[name]
            if p.grad is None:
                continue
            group = self.group_of(p)
            lr, whole = float(group["lr"]), float(group.get("max_lr", group["base_lr"]))
            factor = lr / whole if whole else float(lr > 0)
            fallback_update(
                self.fallback,
                p,
                -p.grad if group.get("maximize") else p.grad,
                self.state[p],
                lr=float(group["fallback_lr"] * factor),
                weight_decay=group.get("weight_decay", 0.0),
            )

    # -- saving, copying, end --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with names and shapes of the parameters and the number of steps."""
        state = super().state_dict()
        for group in state["param_groups"]:  # schedulers may have put NumPy's numbers there
            group.update({name: checks.plain(value) for name, value in group.items()})
        return saving.pack(self, state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state, bit for bit.

        Raises ``ParameterMismatchError`` for the state of another model, ``OptionError`` for that
        of another optimizer.
        """
        saving.check(self, state_dict)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != saving.KEY})
        saving.unpack(self, state_dict)

    def _extra_state(self) -> dict[str, Any]:
        """What a subclass saves besides ``state``: numbers, strings, tensors."""
        return {}

    def _load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """Inverse of :meth:`_extra_state`."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not saving.is_transient(k)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state:  # a copy or an unpickled optimizer, not load_state_dict
            self._tap = None
            self._process_group = choose_group(self._wrapper, False if self._ungrouped else None)
            remove_dead_hooks(self.model)
            self._bind()
            self._open()

    def close(self) -> None:
        """Remove the hooks from the model; the optimizer takes no further steps."""
        self._closed = True
        if self._tap is not None:
            self._tap.close()
