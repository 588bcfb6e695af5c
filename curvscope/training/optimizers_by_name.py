"""Optimizers by name, and how each of them is stepped.

``kbfgs``, ``kbfgs-l``, ``kfac``, ``adafisher``, ``adafisherw``, ``adahessian`` and ``mfac`` are
curvscope's; the names of torch's are those of its classes in small letters; any other is
``package.module:Class``. To add a name of our own, add an entry to :data:`OURS`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import optim
from ..errors import CurvscopeError, MissingPackageError, OptionError, nearest

BACKWARD = "backward"  # zero_grad, loss, backward, step()
CLOSURE = "closure"  # step(closure) with backward inside: called once or several times
VALUE = "value"  # step(closure) without backward: the optimizer differentiates the loss itself
GRAPH = "graph"  # as BACKWARD with create_graph=True: the optimizer differentiates the gradients

OURS: dict[str, tuple[type, dict[str, Any], str]] = {
    "kbfgs": (optim.KBFGS, {"lr": 0.3, "damping": 0.01}, CLOSURE),
    "kbfgs-l": (optim.KBFGS, {"lr": 0.3, "damping": 0.01, "memory": 100}, CLOSURE),
    "kfac": (optim.KFAC, {"lr": 0.1, "damping": 0.03}, CLOSURE),
    "adafisher": (optim.AdaFisher, {"lr": 0.03, "damping": 0.01, "update_every": 10}, CLOSURE),
    "adafisherw": (optim.AdaFisherW, {"lr": 0.03, "damping": 0.01, "update_every": 10}, CLOSURE),
    "adahessian": (optim.AdaHessian, {"lr": 0.1}, VALUE),
    "mfac": (optim.MFAC, {"lr": 0.1, "damping": 0.03}, CLOSURE),
}
"""Name -> class, options that train the digits problems in a few epochs, how it is stepped."""

_TORCH_OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "rmsprop": {"lr": 0.003},
    **{name: {"lr": 0.01} for name in ("adam", "adamw", "nadam", "radam")},
}
_STYLES = {"LBFGS": CLOSURE, "AdaHessian": GRAPH, "Adahessian": GRAPH, "SophiaH": GRAPH}
_INSTALL = {
    "pytorch_optimizer": "pytorch_optimizer",
    "bitsandbytes": "bitsandbytes",
    "torch_optimizer": "torch-optimizer",
    "timm": "timm",
}
_FORM = (
    "An optimizer is one of {names}, or package.module:Class; options as name:lr=0.1,damping=0.3."
)


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer's name and options as somebody wrote them: ``"adam:lr=0.01,eps=1e-7"``."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | OptimizerSpec) -> OptimizerSpec:
        """From ``name``, ``name:option=value,...`` or ``package.module:Class:option=value,...``.

        Values are Python literals, else texts; ``lr=[0.1,0.3]`` is a grid. Raises ``OptionError``.
        """
        if isinstance(text, OptimizerSpec):
            return text
        name, rest = str(text).strip(), ""
        if "=" in name:
            split = name[: name.index("=")].rfind(":")
            name, rest = name[: max(split, 0)], name[split + 1 :]
        if not name:
            raise OptionError(f"{text!r} names no optimizer. {form()}")
        options = {}
        for part in _split(rest):
            key, equals, value = part.partition("=")
            if not equals or not key.strip().isidentifier():
                raise OptionError(f"{part!r} in {text!r} is not of the form option=value. {form()}")
            options[key.strip()] = _literal(value.strip())
        return cls(name, options)

    @property
    def label(self) -> str:
        """The name and the options other than ``lr``: what tells it from others in a picture."""
        short = self.name.rpartition(":")[2]
        rest = ", ".join(f"{k}={v}" for k, v in self.options.items() if k != "lr")
        return f"{short} ({rest})" if rest else short

    def with_lr(self, lr: float | None) -> OptimizerSpec:
        """The same with one learning rate."""
        rest = {k: v for k, v in self.options.items() if k != "lr"}
        return OptimizerSpec(self.name, rest if lr is None else {"lr": lr, **rest})

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}:{options}" if options else self.name


class NamedOptimizer:
    """An optimizer together with how it is stepped.

    ``optimizer`` is the ``torch.optim.Optimizer``, ``spec`` what it was made from, ``style`` one of
    ``"backward"``, ``"closure"``, ``"value"``, ``"graph"`` (see :meth:`step`).
    """

    def __init__(self, optimizer: Any, spec: OptimizerSpec, style: str) -> None:
        self.optimizer, self.spec, self.style = optimizer, spec, style

    @property
    def lr(self) -> float | None:
        """The learning rate of the first parameter group; ``None`` without one."""
        lr = self.optimizer.param_groups[0].get("lr")
        return None if lr is None else float(lr)

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """One step; ``loss()`` computes the loss of the minibatch. Returns it, before the step.

        ``"backward"``: ``loss().backward()``, ``step()``; ``"graph"``: the same with
        ``create_graph=True``; ``"closure"``: ``step(closure)``, whose closure calls ``backward``
        and may be called several times (K-BFGS: twice); ``"value"``: a closure that only returns
        the loss (AdaHessian).
        """
        values: list[Tensor] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            value = loss()
            if self.style != VALUE:
                value.backward(create_graph=self.style == GRAPH)
            values.append(value.detach())
            return value

        if self.style in (CLOSURE, VALUE):
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()
            if self.style == GRAPH:  # gradients with a graph hold on to themselves
                self.optimizer.zero_grad(set_to_none=True)
        return values[0]

    def warm_start(
        self,
        batches: Iterable[Any],
        loss: Callable[[Any, Any], Tensor],
        outputs: Callable[[Any], Tensor],
    ) -> None:
        """Factors from one pass over the data, where the optimizer has a ``warm_start``.

        As the authors of K-BFGS begin it and K-FAC beside it; ``warm_start=False`` among the
        options leaves it out.
        """
        start = getattr(self.optimizer, "warm_start", None)
        if not callable(start) or self.spec.options.get("warm_start") is False:
            return
        options: dict[str, Any] = {"forward": lambda model, batch: outputs(batch[0])}
        if "loss" in inspect.signature(start).parameters:
            options["loss"] = loss
        start(batches, **options)

    def training(self, on: bool) -> None:
        """For methods that evaluate at other weights than they train (schedule-free ones)."""
        change = getattr(self.optimizer, "train" if on else "eval", None)
        if callable(change):
            change()


def build_optimizer(name: str | OptimizerSpec, model: nn.Module, **options: Any) -> NamedOptimizer:
    """The optimizer called ``name`` on the trainable parameters of ``model``.

    ``name`` is one of curvscope's (``kbfgs``, ``kbfgs-l``, ``kfac``, ``adafisher``, ``adafisherw``,
    ``adahessian``, ``mfac``), the name of a class of ``torch.optim`` in small letters, or
    ``package.module:Class``, each with options behind a colon if wanted:
    ``"kbfgs:lr=0.1,damping=0.3"``. ``options`` go to the class as well and win over those.
    Unless given, curvscope's, ``sgd``, ``adam``, ``adamw``, ``nadam``, ``radam`` and ``rmsprop``
    have options that train the digits problems in a few epochs, the others those of their classes.

    Raises ``OptionError`` (with the nearest names) for unknown names and options that the class
    refuses, ``MissingPackageError`` for a package that is not installed, and what curvscope's own
    optimizers raise. Cost: none to speak of.
    """
    spec = OptimizerSpec.parse(name)
    spec = OptimizerSpec(spec.name, {**spec.options, **options})
    own = spec.name.lower().replace("_", "-")
    if own in OURS:
        kind, defaults, style = OURS[own]
        chosen = {k: v for k, v in {**defaults, **spec.options}.items() if k != "warm_start"}
        return NamedOptimizer(_made(kind, spec, model, chosen), spec, style)
    if ":" in spec.name:
        kind, defaults = _imported(spec.name), {}
    else:
        found = torch_optimizers()
        if spec.name.lower() not in found:
            known = [*OURS, *found]
            hint = nearest(spec.name.lower(), known)
            raise OptionError(f"There is no optimizer {spec.name!r}.{hint} {form()}")
        kind, defaults = found[spec.name.lower()], _TORCH_OPTIONS.get(spec.name.lower(), {})
    optimizer = _made(kind, spec, model, {**defaults, **spec.options})
    return NamedOptimizer(optimizer, spec, style_of(optimizer))


def style_of(optimizer: Any) -> str:
    """How an optimizer is stepped, from its class and the signature of its ``step``."""
    for kind, _, style in OURS.values():
        if isinstance(optimizer, kind):
            return style
    for base in type(optimizer).__mro__:
        if base.__name__ in _STYLES:
            return _STYLES[base.__name__]
    try:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
    except (TypeError, ValueError):
        return BACKWARD
    needed = closure is not None and closure.default is inspect.Parameter.empty
    return CLOSURE if needed else BACKWARD


def torch_optimizers() -> dict[str, type]:
    """The classes of ``torch.optim`` by their names in small letters."""
    found = vars(torch.optim).items()
    return {
        name.lower(): kind
        for name, kind in sorted(found)
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    }


def form() -> str:
    """What names of optimizers look like, for messages."""
    return _FORM.format(names=", ".join([*OURS, *torch_optimizers()]))


def _made(kind: Any, spec: OptimizerSpec, model: nn.Module, options: dict[str, Any]) -> Any:
    names = [n for n in inspect.signature(kind).parameters if n != "self"]
    wants_model = names[:1] in (["model"], ["target"])
    target = model if wants_model else [p for p in model.parameters() if p.requires_grad]
    try:
        return kind(target, **options)
    except CurvscopeError:
        raise
    except Exception as error:
        unknown = [key for key in options if key not in names]
        hint = "".join(nearest(key, names) for key in unknown) if names else ""
        raise OptionError(
            f"{spec} cannot be made ({type(error).__name__}: {error}).{hint} {kind.__name__} has "
            f"the options {', '.join(names[1:])}."
        ) from error


def _imported(name: str) -> Any:
    """The class called ``package.module:Class``."""
    path, _, title = name.partition(":")
    if path.lower() in {*OURS, *torch_optimizers()}:
        raise OptionError(f"{title!r} in {name!r} is not of the form option=value. {form()}")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = str(error.name or path)
        top = path.partition(".")[0]
        if missing == top or not (path + ".").startswith(missing + "."):
            package = _INSTALL.get(missing.partition(".")[0], missing.partition(".")[0])
            raise MissingPackageError(
                f"The optimizer {name} needs the package {missing!r}, which is not installed: "
                f"pip install {package}."
            ) from error
        raise OptionError(f"There is no module {path!r} for the optimizer {name}.") from error
    except Exception as error:
        raise OptionError(
            f"Importing {path!r} for the optimizer {name} failed with {type(error).__name__}: "
            f"{error}."
        ) from error
    kind = getattr(module, title, None)
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
        members = [n for n in dir(module) if isinstance(getattr(module, n, None), type)]
        what = "has no class" if kind is None else "has something else than an optimizer called"
        raise OptionError(f"{path} {what} {title!r}.{nearest(title, members)} {form()}")
    return kind


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    return [part.strip() for part in [*parts, current] if part.strip()]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
