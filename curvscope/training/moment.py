"""One moment of a training: what measures ask for, computed at most once per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..analysis.displaced import value_and_gradient
from ..curvature import ggn, hessian
from ..errors import ModelError
from ..modes import plain_mode
from ..operators import Operator
from ..problem import Problem, Snapshot, flat_gradient
from ..problem.data import sample_count, select
from ..problem.state import random_state
from .adapters import curvature_of, preconditioner_of
from .losses import learning_rate, value_of

REFERENCES = {"ggn": ggn, "hessian": hessian}


class Moment:
    """The parameters, the optimizer and the probe after some step.

    ``step`` counts from 1; ``loss`` is what the loop handed over (a number, NaN if nothing);
    ``problem`` is the probe, a :class:`~curvscope.Problem`; ``optimizer`` as given; ``seed`` for
    whatever a measure draws; ``memo`` a dictionary that outlives the moment (small things only);
    ``previous`` the moment before, for measures that ask for it by ``needs_before``; ``only`` the
    names of the blocks to be measured now, of measures that are taken by block.
    """

    def __init__(
        self,
        step: int,
        loss: Any,
        problem: Problem,
        optimizer: Any,
        *,
        reference: str = "ggn",
        seed: int = 0,
        memo: dict[str, Any] | None = None,
        previous: Moment | None = None,
    ) -> None:
        self.step = step
        self._loss = loss
        self.problem = problem
        self.optimizer = optimizer
        self.reference_name = reference
        self.seed = seed
        self.memo = {} if memo is None else memo
        self.previous = previous
        self.only: list[str] | None = None

    @property
    def given(self) -> bool:
        """Whether the loop handed over a loss."""
        return self._loss is not None

    @cached_property
    def loss(self) -> float:
        """The training loss of this step."""
        return value_of(self._loss)

    @property
    def lr(self) -> float:
        """The learning rate; the largest where parameter groups differ, NaN without one."""
        return learning_rate(self.optimizer)

    @property
    def method(self) -> str:
        """What the optimizer is called in tables."""
        return str(getattr(self.optimizer, "method", type(self.optimizer).__name__))

    # -- on the probe ----------------------------------------------------------------------------

    @cached_property
    def at(self) -> Snapshot:
        """Copies of the parameters and buffers."""
        return self.problem.snapshot()

    @cached_property
    def _value_and_gradient(self) -> tuple[float, Tensor]:
        self.problem.check()
        return value_and_gradient(self.problem, self.at)

    @property
    def objective(self) -> float:
        """The objective on the probe."""
        return self._value_and_gradient[0]

    @property
    def gradient(self) -> Tensor:
        """The gradient on the probe, flat ``[P]``."""
        return self._value_and_gradient[1]

    @cached_property
    def reference(self) -> Operator:
        """The exact matrix on the probe: that which the monitor was asked to compare with."""
        return REFERENCES[self.reference_name](self.problem)

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks to be measured: all of the problem, or ``only`` some."""
        return list(self.problem.blocks) if self.only is None else self.only

    def focused(self, *, by_products: bool = False) -> Operator:
        """The reference with these blocks alone, which spares the work for the others.

        ``by_products`` gives blocks that are known by their products.
        """
        whole: Any = self._by_products if by_products else self.reference
        return whole if self.only is None else whole.focused(self.only)

    @cached_property
    def _by_products(self) -> Operator:
        return REFERENCES[self.reference_name](self.problem, route="autograd")

    @cached_property
    def hessian(self) -> Operator:
        """The exact Hessian on the probe."""
        return self.reference if self.reference_name == "hessian" else hessian(self.problem)

    # -- of the optimizer ------------------------------------------------------------------------

    @cached_property
    def curvature(self) -> Operator | None:
        """``optimizer.curvature()``, or what an adapter reads from its state, or ``None``."""
        return curvature_of(self.optimizer, self.problem)

    def believed(self, *, damped: bool = True) -> Operator | None:
        """:attr:`curvature` of these blocks alone, where the optimizer can make them alone.

        ``damped=False``: from the raw factors of optimizers that have them.
        """
        own = getattr(self.optimizer, "curvature", None)
        if not callable(own):
            return self.curvature
        known = getattr(self.optimizer, "blocks", {})
        alone = self.only is not None and all(name in known for name in self.only)
        if alone and self.optimizer.steps and "blocks" in signature(own).parameters:
            op: Operator = own(damped=damped, blocks=self.only)
            return op
        return self.curvature if damped or self.curvature is None else own(damped=False)

    @cached_property
    def preconditioner(self) -> Operator | None:
        """The inverse of :attr:`curvature` as the optimizer applies it, or ``None``."""
        return preconditioner_of(self.optimizer, self.problem)

    # -- cost ------------------------------------------------------------------------------------

    @property
    def outputs_per_sample(self) -> int:
        """Entries of the model's output for one sample."""
        if "outputs" not in self.memo:
            with self.problem.session(), torch.no_grad():
                for inputs, targets in self.problem.batches():
                    outputs = self.problem.outputs(inputs)
                    samples = self.problem.count_samples(inputs, targets)
                    self.memo["outputs"] = max(1, outputs.numel() // samples)
                    break
        return int(self.memo["outputs"])


def gradient_seconds(problem: Problem, clock: Callable[[], float]) -> float:
    """About how long one gradient over a problem takes, from a few of its samples.

    Two small batches tell what a sample costs and what a batch costs however small it is.
    """
    with problem.session():
        inputs, targets = next(problem.batches())
        available = sample_count(inputs, targets)
        few, many = min(4, available), min(32, available)

        def seconds(samples: int) -> float:
            index = torch.arange(samples)
            part = select(inputs, index, available), select(targets, index, available)
            start = clock()
            total = problem.batch_total(problem.outputs(part[0]), part[1])
            flat_gradient(total, list(problem.params.values()))
            if problem.device.type == "cuda":
                torch.cuda.synchronize(problem.device)
            return clock() - start

        seconds(few), seconds(many)  # first calls prepare what later ones find ready
        low, high = seconds(few), seconds(many)
    sizes = [sample_count(*item) for item in problem.data.items]
    each = max(0.0, high - low) / max(1, many - few)
    return max(1, len(sizes)) * low + each * max(sum(sizes), available)


@contextmanager
def undisturbed(optimizer: Any, device: torch.device) -> Iterator[None]:
    """Inside, curvature can be computed; afterwards the training sees no trace of it.

    The global random states are put back, the optimizer's hooks on the model are asleep, gradients
    are enabled whatever the caller's mode, and autocast is off.
    """
    tap: Any = getattr(optimizer, "_tap", None)
    active = getattr(tap, "active", None)
    with ExitStack() as stack:
        stack.enter_context(random_state())
        stack.enter_context(plain_mode(device.type))
        stack.enter_context(torch.enable_grad())
        if active is not None:
            tap.active = False
        try:
            yield
        finally:
            if active is not None:
                tap.active = active


def check_shapes(problem: Problem, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``ModelError`` if parameters are not those that the monitor began with."""
    now = {name: tuple(p.shape) for name, p in problem.user_model.named_parameters()}
    for name, shape in shapes.items():
        if now.get(name) != shape:
            found = f"has shape {list(now[name])}" if name in now else "is gone"
            raise ModelError(
                f"Parameter {name!r} {found}, but had shape {list(shape)} when the monitor began: "
                "nothing but the loss is recorded from here on. End this monitor and begin another "
                "with a new Problem and a new path."
            )
