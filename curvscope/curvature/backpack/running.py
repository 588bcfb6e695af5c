"""Running an extension over the data of a problem, on a private copy, with everything undone."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BackpackError, CurvscopeError, check_seed
from ...problem import Problem, Snapshot
from ...problem.data import select
from ...problem.losses import BinaryCrossEntropy, CrossEntropy
from ...progress import track
from . import checks, verifying
from .copying import Twin, private_copy, release
from .table import SPECS, Spec, library, make_extension

_FEW = 3  # samples on which everything is tried before the real run


@dataclass(frozen=True)
class Batch:
    """What an extension left after one batch, of the unnormalised loss ``sum_m l_m``."""

    samples: int
    fields: Mapping[str, Any]  # parameter name -> BackPACK's quantity
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Job:
    """An extension with its options, to be run on a problem."""

    problem: Problem
    spec: Spec
    options: Mapping[str, Any]
    seed: int = 0
    unscaled: bool = False
    joined: bool = False  # all data as one batch


class Stream:
    """A stream of random numbers of its own: BackPACK draws from the global generators."""

    def __init__(self, seed: int, device: torch.device) -> None:
        seed = check_seed(seed)
        self.cpu = torch.Generator().manual_seed(seed).get_state()
        self.device = device
        if device.type == "cuda":
            self.cuda = torch.Generator(device).manual_seed(seed).get_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside, and go on where it stopped the next time."""
        cpu = torch.get_rng_state()
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        try:
            torch.set_rng_state(self.cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield
        finally:
            self.cpu = torch.get_rng_state()
            torch.set_rng_state(cpu)
            if cuda is not None:
                self.cuda = torch.cuda.get_rng_state(self.device)
                torch.cuda.set_rng_state(cuda, self.device)


def run(
    job: Job,
    visit: Callable[[Batch], None],
    *,
    at: Snapshot | None = None,
    checked: bool = False,
    batches: int | None = None,
) -> float:
    """Run the extension on every batch (or the first ``batches``); return the seconds it took.

    ``checked`` skips the trial on a few samples, for a job that has passed it before. Raises
    ``BackpackError`` for what BackPACK refuses and for what it is known to get wrong.
    """
    problem, spec = job.problem, job.spec
    start = time.perf_counter()
    stream = Stream(job.seed, problem.device)
    checks.refuse_problem(problem, spec)
    facts = problem.check()
    with problem.session(at), private_copy(problem, spec) as twin:
        todo = track(_data(job), f"BackPACK {spec.name}", total=facts.batches)
        for number, (inputs, targets) in enumerate(todo):
            checks.refuse_batch(problem, spec, inputs, targets)
            if number == 0 and not checked:
                _trial(job, twin, inputs, targets)
            if number == batches:
                break
            with stream.active():
                _backward(job, spec, twin, inputs, targets)
            visit(_collect(job, spec, twin, problem.count_samples(inputs, targets)))
            release(twin)
    return time.perf_counter() - start


def _data(job: Job) -> Iterator[tuple[Any, Any]]:
    if not job.joined:
        yield from job.problem.batches()
        return
    pairs = list(job.problem.batches())
    for inputs, targets in pairs:
        checks.refuse_batch(job.problem, job.spec, inputs, targets)
    try:
        yield torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    except RuntimeError as error:
        raise BackpackError(
            f"{job.spec.name} averages over all samples at every layer and needs the data as one "
            f"batch, but the batches cannot be joined ({error}). Use {job.spec.instead}."
        ) from error


def _trial(job: Job, twin: Twin, inputs: Tensor, targets: Any) -> None:
    """Every check that needs a forward or backward pass, on a few samples."""
    problem, spec = job.problem, job.spec
    count = problem.count_samples(inputs, targets)
    samples = min(count, _FEW)
    few = torch.arange(samples)
    inputs, targets = select(inputs, few, count), select(targets, few, count)
    with torch.no_grad():
        wanted = problem.outputs(inputs)
    with _translated(spec):
        outputs, seen = checks.monitored(twin, inputs)
    checks.refuse_outputs(problem, spec, outputs, wanted, samples)
    checks.refuse_layers(spec, twin, seen, samples, job.unscaled)
    checks.refuse_uses(spec, twin, outputs)
    with Stream(0, problem.device).active():
        _backward(job, spec, twin, inputs, targets)
    batch = _collect(job, spec, twin, samples)
    for name, value in batch.fields.items():
        if callable(value):  # it computes, and refuses, only when it is called
            value(torch.ones_like(twin.parameters[name]).unsqueeze(0))
    release(twin)
    if twin.plain:
        return
    proxy = SPECS[spec.proxy]
    _backward(job, proxy, twin, inputs, targets)
    found = _collect(job, proxy, twin, samples).fields
    if proxy.curved:
        hessian = proxy.name in ("DiagHessian", "HMP")
        verifying.check_diagonal(problem, spec, found, inputs, targets, hessian)
    else:
        verifying.check_sample_gradients(problem, spec, found, inputs, targets, samples)
    release(twin)


def _backward(job: Job, spec: Spec, twin: Twin, inputs: Tensor, targets: Any) -> None:
    """One forward and one backward pass of the copy with the extension active."""
    backpack = library()
    grouped = any(getattr(m, "groups", 1) != 1 for _, m in twin.layers())
    options = job.options if spec is job.spec else {}
    extension = _located(make_extension(spec, grouped=grouped, **options), twin)
    with _translated(spec, extension=extension):
        outputs = twin.module(inputs)
        if spec.curved:
            loss = backpack.extend(_loss_module(job.problem))
            if isinstance(loss, nn.MSELoss) and outputs.ndim > 2:
                # squared error does not care for the shape, but BackPACK wants [N, D]
                outputs = backpack.extend(nn.Flatten())(outputs)
                targets = targets.reshape(outputs.shape)
            total = loss(outputs, targets)
        else:
            total = job.problem.batch_total(outputs, targets)
        with _default_dtype(job.problem.dtype), backpack.backpack(extension):
            total.backward()


def _loss_module(problem: Problem) -> nn.Module:
    """The problem's loss as a module that sums, whatever the problem's reduction."""
    loss = problem.loss
    if isinstance(loss, CrossEntropy):
        # no target is ignored (checked), and BackPACK refuses any other index than the default
        return nn.CrossEntropyLoss(label_smoothing=loss.label_smoothing, reduction="sum")
    if isinstance(loss, BinaryCrossEntropy):
        return nn.BCEWithLogitsLoss(reduction="sum")
    return nn.MSELoss(reduction="sum")


def _collect(job: Job, spec: Spec, twin: Twin, samples: int) -> Batch:
    fields: dict[str, Any] = {}
    gradients: dict[str, Tensor] = {}
    for name, parameter in twin.parameters.items():
        value = vars(parameter).get(spec.field)
        if value is None:
            owner = name.rpartition(".")[0] or "(root)"
            kind = next(
                (type(m).__name__ for n, m in job.problem.model.named_modules() if n == owner),
                type(job.problem.model).__name__,
            )
            raise BackpackError(
                f"BackPACK's {spec.name} leaves nothing on parameter {name!r}: it does not "
                f"support layer {owner!r} ({kind}). Leave it out with params=['!{owner}'], or use "
                f"{spec.instead}."
            )
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                raise BackpackError(
                    f"BackPACK's {spec.name} of parameter {name!r} is NaN or infinite, although "
                    f"the loss is finite: its formulas overflow. Use {spec.instead}."
                )
        fields[name] = _guarded(job, name, value) if callable(value) else value
        gradients[name] = parameter.grad  # type: ignore[assignment]
    return Batch(samples, fields, gradients)


def _guarded(job: Job, name: str, product: Callable[[Tensor], Tensor]) -> Any:
    """A product function of BackPACK, which computes only when it is called."""

    place = f" in the product for parameter {name!r}"

    def guarded(vectors: Tensor) -> Tensor:
        with _default_dtype(job.problem.dtype), _translated(job.spec, place):
            return product(vectors).detach()

    return guarded


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """BackPACK creates tensors of the default type, which fail or round in float64 models."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _located(extension: Any, twin: Twin) -> Any:
    """The extension, which from now on notes the layer that it is working on."""
    kind = type(extension)

    def call(self: Any, module: nn.Module, g_inp: Any, g_out: Any) -> None:
        self.current = twin.names.get(module, f"the loss ({type(module).__name__})")
        kind.__call__(self, module, g_inp, g_out)
        self.current = None

    extension.current = None
    extension.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return extension


@contextmanager
def _translated(spec: Spec, where: str = "", extension: Any = None) -> Iterator[None]:
    """Errors of BackPACK as ``BackpackError``, with the layer's name; its warnings silent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (CurvscopeError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        place = getattr(extension, "current", None)
        at = where or (f" at layer {place!r}" if place else "")
        # the address of an extension says nothing
        detail = re.sub(r"<\S+ object at 0x\w+>", spec.name, str(error))
        detail = detail.strip().partition("\n")[0].rstrip(".")
        raise BackpackError(
            f"BackPACK's {spec.name} failed{at}: {type(error).__name__}"
            f"{': ' + detail if detail else ''}. Use {spec.instead}."
        ) from error
