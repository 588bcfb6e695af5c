"""Seeing what goes through a model's layers while it is trained.

A :class:`LayerTap` puts a forward hook on every layer that a method covers and hands each use of
the layer, a :class:`LayerCall`, to the optimizer. The gradient in the layer's output comes from a
hook on that tensor, not from a module's full backward hook, so that in-place activations do no
harm. ``layers.py`` does the row and patch work.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..layer_calls import LAYER_TYPES
from ..layers import Call, SampleAxis
from ..modes import is_apart, looks_away
from .layer import BATCH_NORMS, CONVOLUTIONS, Layer

_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: torch.conv1d,
    nn.Conv2d: torch.conv2d,
    nn.Conv3d: torch.conv3d,
}
_EVERY_ROW = SampleAxis(0)


@dataclass(eq=False)
class LayerCall:
    """One use of a layer: what went in, what came out, and in which pass through the model.

    ``inputs`` is detached. ``outputs`` is what the layer returned and part of the graph; later
    in-place operations may change its values, so read them at once. ``samples`` is the batch size
    of the pass: the first axis of the model's first input, or of this layer's where the model as
    a whole was not called. Uses of a layer with the same ``pass_index`` saw the same samples.
    """

    layer: Layer
    inputs: Tensor
    outputs: Tensor
    samples: int
    pass_index: int
    counted: bool = False  # by whoever keeps it for several losses

    @property
    def dtype(self) -> torch.dtype:
        """That of statistics: the weight's, float32 at least."""
        return torch.promote_types(self.layer.weight.dtype, torch.float32)

    @cached_property
    def call(self) -> Call:
        """The same as ``layers.Call``; for normalisations ``options["raw"]`` is the input."""
        module, x = self.layer.module, self.inputs
        bound = _bind(module, x)
        keys = ("kind", "input", "weight", "bias")
        return Call(
            kind=bound["kind"],
            inputs=bound["input"].detach(),
            outputs=self.outputs,
            weight=self.layer.weight,
            bias=self.layer.bias,
            options={k: v for k, v in bound.items() if k not in keys},
        )

    def input_rows(self, dtype: torch.dtype) -> Tensor:
        """``[groups, R, in]``: input rows (patches) of all samples and positions, without the 1."""
        call = self.call
        rows = call.kind.input_rows(call, _EVERY_ROW, call.inputs.shape[0])
        return _stack(rows, dtype)

    def output_rows(self, s: Tensor, dtype: torch.dtype) -> Tensor:
        """``[groups, R, out]``: rows of ``s``, a tensor of the outputs' shape."""
        s = _batched(self.layer.module, s)
        return _stack(self.call.kind.output_rows(self.call, s, _EVERY_ROW, s.shape[0]), dtype)

    def output_sum(self, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        """``[groups, out]`` and R: the sum of a tensor of the outputs' shape over its rows."""
        s = _batched(self.layer.module, s.detach())
        axis = 1 if isinstance(self.layer.module, CONVOLUTIONS) else s.ndim - 1
        others = [d for d in range(s.ndim) if d != axis]
        rows = s.numel() // max(s.shape[axis], 1)
        return s.sum(others, dtype=dtype).reshape(self.layer.groups, -1), rows

    def on_gradient(self, receive: Callable[[LayerCall, Tensor], None]) -> None:
        """Call ``receive(call, gradient in the output)`` when a backward pass gets here.

        The call that ``receive`` gets has its outputs outside the graph.
        """
        # a hook that held its own tensor would keep the graph alive for ever
        twin = replace(self, outputs=self.outputs.detach())

        def hook(gradient: Tensor) -> None:
            with measuring(gradient.device):
                receive(twin, gradient.detach())

        watch_gradient(self.outputs, hook, self.layer.weight)


class LayerTap:
    """Forward hooks that hand every use of some layers to ``receive(call)``.

    ``outputs(tensor)`` gets what the model as a whole returns, where that is one tensor, and may
    return a tensor that takes its place. Bound methods are held weakly, so a tap does not keep its
    optimizer alive. Nothing is seen while :attr:`active` is false, without gradients, in transforms
    of ``torch.func``, and while checkpointed segments are computed again.
    With :attr:`probing`, layers whose output has no graph (because no parameter requires a
    gradient) start one there; with :attr:`forward_only`, passes without gradients are seen as well.
    ``close()`` removes the hooks; so does the end of the tap itself.
    Copies of the model carry no live hook.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        receive: Callable[[LayerCall], None],
        outputs: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        self.active = False
        self.probing = False
        self.forward_only = False
        self.pass_index = 0
        self._samples: int | None = None
        self._receive, self._outputs = _weak(receive), _weak(outputs)
        self._handles = [
            model.register_forward_pre_hook(_Hook(self, "begin"), with_kwargs=True, prepend=True)
        ]
        for layer in layers.values():
            hook = _Hook(self, "use", layer)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        end = _Hook(self, "end")
        self._handles.append(model.register_forward_hook(end, with_kwargs=True, always_call=True))

    def close(self) -> None:
        """Remove all hooks; calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    __del__ = close

    @contextmanager
    def watching(self, *, probing: bool = False, forward_only: bool = False) -> Iterator[None]:
        """Active for the length of a block."""
        before = self.active, self.probing, self.forward_only
        self.active, self.probing, self.forward_only = True, probing, forward_only
        try:
            yield
        finally:
            self.active, self.probing, self.forward_only = before
            self._samples = None

    def begin(self, layer: None, args: Any, kwargs: Any) -> None:
        """The model is about to run."""
        self.pass_index += 1
        first = next(_tensors([args, kwargs]), None)
        self._samples = None if first is None else int(first.shape[0])

    def end(self, layer: None, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """The model has run; returns what takes the place of its output, if anything."""
        self._samples = None
        receive = self._outputs()
        if receive is not None and isinstance(output, Tensor) and not _in_backward():
            return receive(output)
        return None

    def use(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """A layer has run; returns what takes the place of its output, if anything."""
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return None
        replacement = None
        if not output.requires_grad and not self.forward_only:
            if not self.probing:
                return None
            output = output.detach().requires_grad_()
            replacement = output.clone()  # a leaf could not be changed in place
        receive = self._receive()
        if receive is None or _in_backward():
            return replacement
        if self._samples is None:  # the model was not called as a whole
            self.pass_index += 1
        single, x = x.ndim, _batched(layer.module, x.detach())
        if not x.numel():  # an expert that no sample was sent to, for example
            return replacement
        samples = x.shape[0] if self._samples is None or x.ndim > single else self._samples
        with measuring(output.device):
            receive(LayerCall(layer, x, output, samples, self.pass_index))
        return replacement


class _Hook:
    """A forward hook that calls one method of its tap, and dies with it."""

    def __init__(self, tap: LayerTap | None, event: str, layer: Layer | None = None) -> None:
        self.tap: Callable[[], LayerTap | None] = lambda: None
        if tap is not None:
            self.tap = weakref.ref(tap)
        self.event, self.layer = event, layer

    @torch._disable_dynamo  # a compiler would trace it anew for every layer, and find nothing
    def __call__(self, module: nn.Module, *args: Any) -> Any:
        tap = self.tap()
        if tap is None or not tap.active or looks_away(tap):
            return None
        if not torch.is_grad_enabled() and not tap.forward_only:
            return None
        if _in_transform():
            return None
        return getattr(tap, self.event)(self.layer, *args)

    def __reduce__(self) -> Any:  # deepcopy and pickle of the model
        return _Hook, (None, self.event)


def _weak(method: Callable[..., Any] | None) -> Callable[[], Any]:
    if method is not None and hasattr(method, "__self__"):
        return weakref.WeakMethod(method)
    return lambda: method


def _in_backward() -> bool:
    """Whether autograd runs: a forward pass now is a checkpointed segment computed again."""
    return torch._C._current_graph_task_id() != -1


def _in_transform() -> bool:
    """Whether a transform of ``torch.func`` runs, whose tensors must not leave it."""
    # while a model is compiled, the stack is the compiler's
    compiling = torch.compiler.is_compiling()
    return not compiling and torch._C._functorch.peek_interpreter_stack() is not None


def remove_dead_hooks(model: nn.Module) -> None:
    """Remove what copying has left of another tap's hooks."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Hook) and hook.tap() is None:
                    del hooks[key]
                    for flags in (
                        module._forward_pre_hooks_with_kwargs,
                        module._forward_hooks_with_kwargs,
                        module._forward_hooks_always_called,
                    ):
                        flags.pop(key, None)


def watch_gradient(output: Tensor, receive: Callable[[Tensor], None], weight: Tensor) -> None:
    """Call ``receive(gradient)`` when the gradient in ``output`` is there, for that in ``weight``.

    A view (a Linear layer on three axes returns one) drops its hooks when it is changed in place,
    so there the hook goes to the tensor that it views. Derivatives that an optimizer takes
    for itself (:func:`~curvscope.modes.apart`) are left out, and those of passes that do not get
    to the weight: the derivative in the inputs that a penalty or an equation is made of.
    """
    shape = output.shape
    leaf = get_gradient_edge(weight).node if weight.requires_grad else None

    def hook(gradient: Tensor) -> None:
        if not is_apart() and (leaf is None or _reached(leaf)):
            receive(gradient.reshape(shape))

    _origin(output).register_hook(hook)


def _reached(leaf: Any) -> bool:
    """Whether the backward pass under way gets to a leaf."""
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # torch.autograd.grad with the leaf itself among its inputs
        return True


def reaches(weight: Tensor) -> bool:
    """Whether the backward pass under way gets to a weight, for ``.grad`` or for its caller."""
    return _reached(get_gradient_edge(weight).node)


def accumulates(weight: Tensor) -> bool:
    """Whether the backward pass under way ends in ``weight.grad``, as ``backward()`` does."""
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(weight).node))
    except RuntimeError:  # torch.autograd.grad
        return False


def gradient_edge(output: Tensor) -> GradientEdge:
    """Where the gradient in ``output`` (up to its shape) can be asked for, also later on."""
    return get_gradient_edge(_origin(output))


def _origin(output: Tensor) -> Tensor:
    """``output``, or the tensor with the same numbers in the same order that it is a view of."""
    base = output._base
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """No gradients and no autocast: statistics are taken in full precision."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _batched(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` with a sample axis, where the layer was called without one."""
    if isinstance(module, CONVOLUTIONS):
        return x if x.ndim == module.weight.ndim else x.unsqueeze(0)
    return x if x.ndim > 1 or isinstance(module, nn.Embedding) else x.unsqueeze(0)


def _bind(module: Any, x: Tensor) -> dict[str, Any]:
    """The layer's function with its arguments, as ``layers.py`` reads them."""
    weight, bias = module.weight, getattr(module, "bias", None)
    if isinstance(module, nn.Linear):
        return LAYER_TYPES[F.linear]((x, weight, bias), {})
    if isinstance(module, CONVOLUTIONS):
        padding: Any = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        function = next(f for t, f in _FUNCTIONS.items() if isinstance(module, t))
        args = (x, weight, bias, module.stride, padding, module.dilation, module.groups)
        return LAYER_TYPES[function](args, {})
    if isinstance(module, BATCH_NORMS):
        batch = module.training or module.running_mean is None
        running = (module.running_mean, module.running_var)
        return LAYER_TYPES[F.batch_norm]((x, *running, weight, bias, batch, 0.0, module.eps), {})
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        return LAYER_TYPES[F.layer_norm]((x, shape, weight, bias, module.eps), {})
    if isinstance(module, nn.GroupNorm):
        return LAYER_TYPES[F.group_norm]((x, module.num_groups, weight, bias, module.eps), {})
    assert isinstance(module, nn.Embedding)
    return LAYER_TYPES[F.embedding]((x, weight, module.padding_idx), {})


def _stack(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N, T, g, d] -> [g, N * T, d]``."""
    return rows.reshape(-1, *rows.shape[2:]).movedim(1, 0).to(dtype)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors with at least one axis inside nested containers, in order."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
