"""Problem: model, loss, data, and the blocks that the model's parameters fall into."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..display import Card, Shown
from ..errors import (
    DataError,
    ModelError,
    OptionError,
    TargetError,
    UnsupportedLossError,
    check_count,
    check_option,
    check_seed,
    counted,
    nearest,
)
from ..modes import plain_mode
from ..operators.base import Layout
from . import checks, state
from .blocks import make_blocks, select_parameters
from .calling import call
from .checks import Facts
from .data import Batches, move, sample_count, select
from .recognise import Reduction, recognise
from .refusals import check_data, check_model
from .survey import survey
from .wrappers import unwrapped


@dataclass(frozen=True)
class Snapshot:
    """Values of all parameters and buffers at one moment."""

    parameters: list[Tensor]
    buffers: list[Tensor]


class Problem(Shown):
    """A model, a loss and data: the objective whose curvature is asked for.

    The objective is ``f(theta) = (1/M) sum_m l_m``, where the ``l_m`` are the terms that the
    loss's own mean runs over (samples, tokens, pixels; weighted by class weights, without ignored
    targets) over the whole data, however cut into batches; ``reduction="sum"`` means no division.

    Parameters
    ----------
    model
        Any ``nn.Module``. It is never changed: everything is computed as under ``eval()``, and
        flags, buffers, gradients, hooks and attributes are as before afterwards. What training
        wraps around it (``torch.compile``, ``DistributedDataParallel``) is looked through, so that
        parameters have the names of the model within.
    loss
        A loss of ``torch.nn`` or ``torch.nn.functional``, or a callable
        ``loss(outputs, targets)`` together with ``reduction=``.
    data
        One ``(inputs, targets)`` pair, a list of such pairs, or a ``DataLoader`` whose order does
        not matter. Samples are counted along the first axis of the first input tensor.
    blocks
        ``"layer"`` (a block per module that owns parameters; those of the root module form
        ``"(root)"``), ``"parameter"``, ``"all"``, or a mapping from block names to parameter
        names, module names or patterns such as ``"encoder.*"``.
    params
        Which trainable parameters take part: names, module names or patterns; an entry that
        begins with ``"!"`` leaves out. ``None`` takes all.
    forward
        ``forward(model, inputs) -> outputs``; by default ``model(inputs)``.
    unpack
        ``unpack(batch) -> (inputs, targets)`` for batches that are no pairs.
    reduction
        Needed for a callable loss: ``"mean"`` (over samples), ``"sum"``, or
        ``(outputs, targets) -> count``, what the loss's mean divides by.
    batchnorm
        ``"eval"`` uses running statistics; ``"batch"`` those of each batch as given, which couples
        its samples.
    device, dtype
        Where to compute. If either differs from the model's, a private copy of the model is
        used, kept in step with the user's model.

    Raises errors of :mod:`curvscope.errors`: ``ModelError``, ``DataError``,
    ``UnsupportedLossError``, ``OptionError``, ``BatchNormError`` at once; ``TargetError``,
    ``NonFiniteError``, ``NonDeterministicError`` at the first computation, once.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> problem
    Problem('Sequential', 26 parameters, blocks=['0', '2'], loss='CrossEntropyLoss')
    >>> problem.blocks["2"]
    ('2.weight', '2.bias')
    >>> problem.gradient().shape
    torch.Size([26])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        data: Any,
        *,
        blocks: str | Mapping[str, str | Sequence[str]] = "layer",
        params: str | Sequence[str] | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        unpack: Callable[[Any], tuple[Any, Any]] | None = None,
        reduction: Reduction = None,
        batchnorm: str = "eval",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        name: str | None = None,
        check: bool = True,
    ) -> None:
        check_model(model, loss)
        check_option("batchnorm", batchnorm, ("eval", "batch"))
        model = unwrapped(model)
        self.user_model = model
        self.name = name or type(model).__name__
        self.user_loss = loss
        self.loss = recognise(loss, reduction)
        check_data(data, unpack)
        self.data = Batches(data, unpack)
        self.batchnorm = batchnorm
        self._forward = forward
        self._unchecked = not check
        self._facts: Facts | None = None
        chosen = select_parameters(model, params)
        if batchnorm == "batch":
            checks.no_active_dropout(model)
        first = next(iter(chosen.values()))
        self.device = torch.device(device) if device is not None else first.device
        self.dtype = dtype or first.dtype
        if dtype is not None and not dtype.is_floating_point:
            raise OptionError(f"dtype={dtype} is not a floating-point type.")
        self.model = self._evaluated_model(device, dtype)
        by_name = dict(self.model.named_parameters())
        self.params: dict[str, nn.Parameter] = {n: by_name[n] for n in chosen}
        self.layout = Layout.of(self.params.items())
        self.blocks: dict[str, tuple[str, ...]] = make_blocks(tuple(self.params), blocks)
        self._options = {
            "blocks": self.blocks,
            "params": tuple(self.params),
            "forward": forward,
            "reduction": reduction,
            "batchnorm": batchnorm,
            "device": device,
            "dtype": dtype,
            "check": check,
        }

    # -- model -----------------------------------------------------------------------------------

    def _evaluated_model(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> nn.Module:
        model = self.user_model
        same = all(
            (dtype is None or p.dtype == dtype) and (device is None or p.device == self.device)
            for p in model.parameters()
        )
        if same:
            return model
        try:
            return copy.deepcopy(model).to(device=self.device, dtype=self.dtype)
        except Exception as error:
            raise ModelError(
                f"The model cannot be copied for device={device}, dtype={dtype} ({error}). "
                "Convert it yourself with model.to(...) and leave these arguments out."
            ) from error

    def _synchronise(self) -> None:
        if self.model is self.user_model:
            return
        with torch.no_grad():
            for mine, theirs in (
                (self.model.named_parameters(), dict(self.user_model.named_parameters())),
                (self.model.named_buffers(), dict(self.user_model.named_buffers())),
            ):
                for name, target in mine:
                    source = theirs.get(name)
                    if source is None or source.shape != target.shape:
                        raise checks.replaced([name])
                    target.copy_(source)

    def fingerprint(self, at: Snapshot | None = None) -> str:
        """A short name of the parameters' values, now or at a snapshot."""
        return state.fingerprint(self.model.parameters() if at is None else at.parameters)

    def snapshot(self) -> Snapshot:
        """Copy the current values of parameters and buffers."""
        self._synchronise()
        with torch.inference_mode(False):
            return Snapshot(
                [p.detach().clone() for p in self.model.parameters()],
                [b.detach().clone() for b in self.model.buffers()],
            )

    @contextmanager
    def session(self, at: Snapshot | None = None, *, copy: bool = True) -> Iterator[state.Members]:
        """Evaluate inside: eval flags, states preserved, optionally at an earlier snapshot.

        Gives the modules, parameters and buffers of the model that is evaluated.
        ``copy=False`` spares a copy of the parameters where nothing inside changes their values.
        """
        if at is None:
            self._synchronise()
        with ExitStack() as stack:
            stack.enter_context(self.data.preserved())
            members = state.Members.of(self.model)
            checks.own_parameters(self.params, members.parameters)
            # a layer that has been frozen since is still one of the matrix's
            stack.enter_context(state.trainable(self.params.values()))
            stack.enter_context(state.evaluation(members, batchnorm=self.batchnorm))
            values = None if at is None else at.parameters
            stack.enter_context(state.values_at(members.parameters, values, copy=copy))
            if at is not None:
                with torch.no_grad():
                    for buffer, value in zip(members.buffers, at.buffers, strict=True):
                        if not torch.equal(buffer, value):
                            buffer.copy_(value)
            yield members

    # -- data ------------------------------------------------------------------------------------

    def batches(self, seed: int = 0) -> Iterator[tuple[Any, Any]]:
        """Batches on the problem's device and dtype, always in the same order for a ``seed``.

        To be iterated inside a :meth:`session`, which puts the random states back.
        """
        seen = 0
        self.data.seed(seed)
        for inputs, targets in self.data:
            if sample_count(inputs, targets) == 0:
                continue
            seen += 1
            yield move(inputs, self.device, self.dtype), move(targets, self.device, self.dtype)
        if not seen:
            raise DataError("The data are empty: iterating them gives no batch.")

    def outputs(self, inputs: Any) -> Tensor:
        """The model's outputs for one batch (inside a :meth:`session`)."""
        return call(self.model, self._forward, inputs, batchnorm=self.batchnorm)

    def count_samples(self, inputs: Any, targets: Any) -> int:
        return sample_count(inputs, targets)

    def sum_over_batches(
        self, function: Callable[[Any, Any], Any], *, at: Snapshot | None = None
    ) -> Any:
        """Sum ``function(inputs, targets)`` (a tensor or nested tuple of them) over the data.

        Every quantity that is additive over batches goes through here, unnormalised; the caller
        multiplies by :attr:`scale` once. A reduction over processes belongs at the end.
        """
        total: Any = None
        with self.session(at):
            for inputs, targets in self.batches():
                value = function(inputs, targets)
                total = value if total is None else _add(total, value)
        return total

    # -- facts -----------------------------------------------------------------------------------

    def check(self) -> Facts:
        """Evaluate twice, once per problem: sizes, finite values, determinism.

        Raises ``NonFiniteError`` (naming the first parameter or layer with NaN or infinity),
        ``TargetError``, ``DataError``, ``NonDeterministicError``.
        """
        checks.own_parameters(self.params, self.model.parameters())
        checks.finite_parameters(self.model)
        if self._facts is not None:
            return self._facts
        first = survey(self, 0, look=not self._unchecked)
        if not self._unchecked:
            checks.repeatable(first, survey(self, 1), self.dtype, self.batchnorm)
        if first.terms <= 0:
            raise DataError(
                "The data have no term: all targets are ignored or have weight zero, so the mean "
                "is not defined. Check ignore_index= and the class weights."
            )
        self._facts = first
        return first

    def batch_total(self, outputs: Tensor, targets: Any) -> Tensor:
        """Unnormalised loss of a batch; errors of the loss become ``TargetError``."""
        try:
            value = self.loss.total(outputs, targets)
        except UnsupportedLossError:  # which says better what is wrong
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise TargetError(
                f"The loss {self.loss.name} failed on outputs of shape {list(outputs.shape)}: "
                f"{error}. Check the targets, or say how to call the model with forward=."
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UnsupportedLossError(
                f"The loss {self.loss.name} returned {shape}, not one number: let it return "
                "the mean or the sum, and say which with reduction=."
            )
        return value.reshape(())

    @property
    def n_samples(self) -> int:
        return self.check().samples

    @property
    def n_terms(self) -> float:
        """``M``: what the loss's mean divides by over the whole data."""
        return self.check().terms

    @property
    def scale(self) -> float:
        """``1/M`` for a mean, 1 for a sum."""
        return 1.0 if self.loss.reduction == "sum" else 1.0 / self.check().terms

    def objective(self) -> float:
        """``f(theta)`` at the current parameters."""
        self.check()
        return survey(self, 0).total * self.scale

    @plain_mode()
    def gradient(self) -> Tensor:
        """Gradient of the objective, flat ``[P]``."""
        self.check()
        parameters = list(self.params.values())

        def one(inputs: Any, targets: Any) -> Tensor:
            total = self.batch_total(self.outputs(inputs), targets)
            return flat_gradient(total, parameters)

        return self.scale * self.sum_over_batches(one)

    # -- more ------------------------------------------------------------------------------------

    def subset(self, n: int, seed: int = 0) -> Problem:
        """The same problem on ``n`` samples drawn without replacement, in their batches.

        Raises ``OptionError`` unless ``1 <= n <= n_samples``.
        """
        samples, n = self.n_samples, check_count("n", n, 0)
        if not 1 <= n <= samples:
            raise OptionError(
                f"subset({n}): the problem has {samples} samples; take between 1 and {samples}."
            )
        generator = torch.Generator().manual_seed(check_seed(seed))
        chosen = torch.randperm(samples, generator=generator)[:n].sort().values
        parts, start = [], 0
        with state.random_state(), self.data.preserved():
            self.data.seed(0)
            for inputs, targets in self.data:
                size = sample_count(inputs, targets)
                mine = chosen[(chosen >= start) & (chosen < start + size)] - start
                if len(mine):
                    parts.append((select(inputs, mine, size), select(targets, mine, size)))
                start += size
        return self.with_data(parts)

    def with_data(self, data: Any, **changes: Any) -> Problem:
        """The same problem on other data, a list of ``(inputs, targets)`` pairs or a loader.

        ``changes`` replaces arguments that the problem was made with (``dtype=``, ``blocks=``,
        ``model=``, ...).
        """
        given = {"model": self.user_model, "loss": self.user_loss, "name": self.name}
        return Problem(data=data, **{**given, **self._options, **changes})  # type: ignore[arg-type]

    def describe(self) -> str:
        """One sentence: model, sizes, loss."""
        facts = self.check()
        return (
            f"{self.name}: {self.layout.numel:,} parameters in "
            f"{counted(len(self.blocks), 'block')}, {counted(facts.samples, 'sample')} in "
            f"{counted(facts.batches, 'batch')}, {self.loss.name} ("
            f"{self.loss.reduction} over {facts.terms:g} terms), {str(self.dtype)[6:]} on "
            f"{self.device}"
        )

    def block_names(self, wanted: Iterable[str] | None) -> list[str]:
        """Validate block names (``None``: all). Raises ``UnknownBlockError``."""
        from ..errors import UnknownBlockError

        names = list(self.blocks) if wanted is None else list(wanted)
        for entry in names:
            if entry not in self.blocks:
                raise UnknownBlockError(
                    f"There is no block {entry!r}.{nearest(entry, self.blocks)} "
                    f"Blocks: {', '.join(self.blocks)}."
                )
        return names

    def _card_(self) -> Card:
        from .card import problem_card

        return problem_card(self)

    def __repr__(self) -> str:
        return (
            f"Problem({self.name!r}, {self.layout.numel} parameters, blocks="
            f"{list(self.blocks)}, loss={self.loss.name!r})"
        )


def require_problem(problem: Any) -> None:
    """Raise ``OptionError`` for anything but a :class:`Problem`."""
    if not isinstance(problem, Problem):
        raise OptionError(
            f"A Problem is needed, not {type(problem).__name__}: make one with "
            "cs.Problem(model, loss, data)."
        )


def flat_gradient(
    value: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False
) -> Tensor:
    """``d value / d parameters`` as one vector; parameters without influence give zeros."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(p).reshape(-1) for p in parameters])
    gradients = torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(parameters, gradients, strict=True)
        ]
    )


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, tuple):
        return tuple(_add(a, b) for a, b in zip(left, right, strict=True))
    return left + right
