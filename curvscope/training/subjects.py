"""What is trained: a fresh network per seed, its minibatches, and what it is tested on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import DataError, OptionError
from ..loading import load_problem
from ..problem import Problem
from ..problem.data import Batches, move, sample_count, select
from ..zoo.datasets import Split
from ..zoo.problems import ZooProblem, load
from ..zoo.recipes import private_randomness
from ..zoo.registry import names

Batch = tuple[Any, Any]
_AT_A_TIME = 500


@dataclass
class Subject:
    """One network before its training.

    ``problem`` is what a monitor looks at (its ``user_model`` is trained), ``loss(outputs,
    targets)`` what is minimised, ``epoch(number)`` gives the minibatches of an epoch (from 1),
    always the same ones, and ``steps`` how many there are if that is known.
    """

    problem: Problem
    loss: Callable[[Any, Any], Tensor]
    epoch: Callable[[int], Iterator[Batch]]
    steps: int | None
    test: Callable[[], Iterator[Batch]] | None = None
    classifies: bool = False
    threads: int | None = None

    @property
    def model(self) -> nn.Module:
        """The network that is trained."""
        return self.problem.user_model

    def outputs(self, inputs: Any) -> Tensor:
        """What the network says, in the mode it is in."""
        forward = self.problem._forward
        return self.model(inputs) if forward is None else forward(self.model, inputs)

    def value(self, inputs: Any, targets: Any) -> Tensor:
        """The loss of one minibatch."""
        return self.loss(self.outputs(inputs), targets)

    @torch.no_grad()
    def tested(self) -> dict[str, float]:
        """``test_loss``, and ``test_accuracy`` of a network that classifies, in eval mode.

        Empty without test data. The mean is over samples: of the losses of batches by their size.
        """
        if self.test is None:
            return {}
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        total, samples, right, terms = 0.0, 0, 0, 0
        for inputs, targets in self.test():
            outputs = self.outputs(inputs)
            size = sample_count(inputs, targets)
            total += float(self.loss(outputs, targets)) * size
            samples += size
            if self.classifies:
                right += int((outputs.argmax(dim=1) == targets).sum())
                terms += targets.numel()
        for module, training in modes:
            module.training = training
        found = {"test_loss": total / samples}
        return {**found, "test_accuracy": right / terms} if self.classifies else found


class Source:
    """Makes a :class:`Subject` per seed from a name of the zoo, a function, or a Problem.

    ``batch_size`` of ``None`` is that of the zoo's recipe, all samples of a Problem, or the
    loader's. Raises ``OptionError``, ``DataError`` and what loading the problem raises.
    """

    def __init__(
        self,
        problem: str | Problem,
        *,
        batch_size: int | None = None,
        data: str | Path | None = None,
        device: str | None = None,
    ) -> None:
        self.given, self.batch_size, self.device, self.folder = problem, batch_size, device, data
        self._zoo: ZooProblem | None = None
        if isinstance(problem, ZooProblem):
            self._zoo = problem
        elif isinstance(problem, str) and problem in names():
            self._zoo = load(problem, data=data, trained=False)
        self.name = problem if isinstance(problem, str) else problem.name
        if self._zoo is not None and batch_size is None:
            self.batch_size = self._zoo.recipe.batch_size

    def subject(self, seed: int) -> Subject:
        """A network with initial weights of ``seed``, and minibatches whose order it decides.

        Networks of the zoo and of functions with a ``seed`` argument start elsewhere for each seed;
        a Problem's own weights are where every training of it starts.
        """
        return self._of_zoo(self._zoo, seed) if self._zoo is not None else self._of_problem(seed)

    def _of_zoo(self, zoo: ZooProblem, seed: int) -> Subject:
        origin, dataset = zoo._entry, zoo.dataset
        with private_randomness(seed):
            model = origin.model(dataset)
            loss = origin.loss()
        model, loss = model.to(self.device or "cpu"), loss.to(self.device or "cpu")
        problem = zoo.with_data(list(zoo.data.items), model=model)
        size = _size(self.batch_size, len(dataset.train))

        def epoch(number: int) -> Iterator[Batch]:
            for index in _order(seed, number, len(dataset.train)).split(size):
                yield _on(problem, dataset.train.take(index))

        def test() -> Iterator[Batch]:
            yield from (_on(problem, batch) for batch in _batches(dataset.test))

        return Subject(
            problem,
            loss,
            epoch,
            math.ceil(len(dataset.train) / size),
            test,
            origin.classifies,
            origin.threads,
        )

    def _of_problem(self, seed: int) -> Subject:
        if isinstance(self.given, str):
            with private_randomness(seed):
                made = load_problem(self.given, data=self.folder, seed=seed)
        else:
            made = self.given
        model = copy.deepcopy(made.user_model).to(self.device or made.device)
        data: Any = made.data.loader
        changes: dict[str, Any] = {"model": model, "device": None, "dtype": None}
        if data is None:
            data = list(made.data)
        else:
            changes["unpack"] = made.data.unpack
        problem = made.with_data(data, **changes)
        loss = made.user_loss
        if isinstance(loss, nn.Module):
            loss = copy.deepcopy(loss).to(problem.device)
        if made.data.loader is not None:
            if self.batch_size is not None:
                raise OptionError(
                    f"{self.name} gets its minibatches from a loader, which has a batch size of "
                    "its own: leave batch_size= (--batch-size) out."
                )
            return Subject(problem, loss, _from_loader(problem, problem.data, seed), None)
        inputs, targets, count = joined(data)
        size = _size(self.batch_size, count)

        def epoch(number: int) -> Iterator[Batch]:
            for index in _order(seed, number, count).split(size):
                yield _on(problem, (select(inputs, index, count), select(targets, index, count)))

        return Subject(problem, loss, epoch, math.ceil(count / size))


def joined(batches: list[Batch]) -> tuple[Any, Any, int]:
    """Inputs and targets of all batches in one, with the number of samples.

    Raises ``DataError`` where they do not fit together.
    """
    if len(batches) == 1:
        return *batches[0], sample_count(*batches[0])
    flat = [tree_flatten(batch) for batch in batches]
    try:
        leaves = [torch.cat(list(parts)) for parts in zip(*(leaf for leaf, _ in flat), strict=True)]
    except (TypeError, RuntimeError, ValueError) as error:
        raise DataError(
            f"The problem's batches cannot be joined and cut anew ({error}): give it one (inputs, "
            "targets) pair or a DataLoader."
        ) from error
    inputs, targets = tree_unflatten(leaves, flat[0][1])
    return inputs, targets, sample_count(inputs, targets)


def epoch_seed(seed: int, epoch: int) -> int:
    """Of everything random in one epoch, so that an epoch is the same after an interruption."""
    return 1_000_003 * (seed + 1) + epoch


def _order(seed: int, epoch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    return torch.randperm(count, generator=generator)


def _from_loader(problem: Problem, data: Batches, seed: int) -> Callable[[int], Iterator[Batch]]:
    def epoch(number: int) -> Iterator[Batch]:
        with data.preserved():
            data.seed(epoch_seed(seed, number))
            for batch in data:
                yield _on(problem, batch)

    return epoch


def _batches(split: Split) -> Iterator[Batch]:
    for index in torch.arange(len(split)).split(_AT_A_TIME):
        yield split.take(index)


def _on(problem: Problem, batch: Batch) -> Batch:
    inputs, targets = batch
    return (
        move(inputs, problem.device, problem.dtype),
        move(targets, problem.device, problem.dtype),
    )


def _size(wanted: int | None, available: int) -> int:
    if wanted is not None and (isinstance(wanted, bool) or wanted < 1):
        raise OptionError(f"batch_size={wanted!r} must be a whole number of at least 1.")
    return available if wanted is None else min(wanted, available)
