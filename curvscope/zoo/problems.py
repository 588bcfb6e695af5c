"""From an entry of the zoo to a :class:`~curvscope.problem.Problem` with its training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import NotDefinedError, OptionError, check_option
from ..problem import Problem
from .datasets import Dataset
from .recipes import Recipe, fit, private_randomness, threads
from .registry import Entry, entry

Batch = tuple[Tensor, Tensor]


class ZooProblem(Problem):
    """A :class:`~curvscope.problem.Problem` of the zoo; get one with :func:`curvscope.zoo.load`.

    Attributes:
        recipe: how :meth:`train` trains, with the seed that was asked for.
        description: the network and its data in one line.
        dataset: all training and test samples; the curvature is taken over the first
            ``n_samples`` of the training split.
        history: mean training loss of every epoch of the last training; empty if untrained.
    """

    recipe: Recipe
    description: str
    dataset: Dataset
    history: list[float]
    _entry: Entry

    @classmethod
    def _build(
        cls,
        name: str,
        model: nn.Module,
        loss: nn.Module,
        data: list[Batch],
        *,
        origin: Entry,
        dataset: Dataset,
        recipe: Recipe,
    ) -> ZooProblem:
        problem = cls(model, loss, data, name=name)
        problem._entry, problem.dataset, problem.recipe = origin, dataset, recipe
        problem.description, problem.history = origin.description, []
        return problem

    def train(
        self, epochs: int | None = None, seed: int | None = None, *, progress: bool = False
    ) -> list[float]:
        """Train from fresh initial weights by the recipe; returns the mean loss of every epoch.

        The weights of ``self.user_model`` are replaced in place and depend only on the recipe,
        ``epochs`` and ``seed`` (default: the recipe's), not on what they were before: the same
        call gives the same bits (beyond the digits: with the same number of threads). Training
        is in float32, on the model's device; the global random state is left alone. Raises
        ``NonFiniteError``, with the weights as they were, when it diverges.
        """
        recipe = dataclasses.replace(
            self.recipe,
            epochs=self.recipe.epochs if epochs is None else epochs,
            seed=self.recipe.seed if seed is None else seed,
        )
        device = next(self.user_model.parameters()).device
        with threads(self._entry.threads), private_randomness(recipe.seed) as generator:
            fresh = self._entry.model(self.dataset).to(device)
            loss = self._entry.loss().to(device)
            history = fit(fresh, loss, self.dataset.train, recipe, generator, progress=progress)
        self.user_model.load_state_dict(fresh.state_dict())
        self.history = history
        return list(history)

    def accuracy(self, split: str = "test") -> float:
        """Share of right predictions, in [0, 1], on the ``"test"`` or ``"train"`` split.

        Every sample of the split counts, whatever ``samples=`` was; for text, every character.
        Raises ``NotDefinedError`` for a network that does not classify.
        """
        check_option("split", split, ("train", "test"))
        if not self._entry.classifies:
            raise NotDefinedError(
                f"{self.name} does not classify and has no accuracy; see problem.objective()."
            )
        samples = self.dataset.train if split == "train" else self.dataset.test
        first = next(self.model.parameters())
        right = terms = 0
        with self.session(), torch.no_grad():
            for index in torch.arange(len(samples)).split(500):
                inputs, targets = samples.take(index)
                inputs = inputs.to(first if inputs.is_floating_point() else first.device)
                found = self.model(inputs).argmax(dim=1).cpu()
                right += int((found == targets).sum())
                terms += targets.numel()
        return right / terms


def load(
    name: str,
    *,
    data: str | Path | None = None,
    trained: bool = True,
    seed: int = 0,
    samples: int | None = None,
    dtype: torch.dtype | None = None,
) -> ZooProblem:
    """A ready problem: network, data, loss, trained by its recipe.

    The digits problems take one to five seconds on two cores. The others read files from the
    folder ``data`` (nothing is ever downloaded) and train for one to a few minutes, CIFAR-10 for
    some fifteen; ``trained=False`` gives the initial weights at once, and
    ``problem.train(epochs=..., progress=True)`` trains later.

    Args:
        name: one of :func:`curvscope.zoo.names`.
        data: the folder (or file) with the data, for the problems that need one.
        trained: whether to train; otherwise the weights are the initial ones.
        seed: of the initial weights and of the order of samples in training.
        samples: how many training samples the curvature is taken over, the first ones of the
            split. Default: all for the digits, 1,000 images or 256 windows of text otherwise.
            Training always uses the whole split.
        dtype: cast the network and the data to this floating type after training (float32).

    Returns:
        A :class:`ZooProblem`. The global random state is as it was before.

    Raises:
        UnknownProblemError: no such name; the message has the nearest ones.
        DataError: the files are missing or damaged; the message says what was looked for.
        OptionError: ``samples`` or ``dtype`` cannot be used.

    Examples:
        >>> import curvscope as cs
        >>> problem = cs.zoo.load("digits-cnn", trained=False)
        >>> problem.layout.numel, problem.n_samples
        (1898, 1541)
    """
    origin = entry(name)
    if dtype is not None and not dtype.is_floating_point:
        raise OptionError(f"dtype={dtype} is not a floating type; use torch.float64.")
    recipe = dataclasses.replace(origin.recipe, seed=seed)
    with private_randomness(seed):
        dataset = origin.data(data)
        batches = _batches(dataset, origin, samples)
        model = origin.model(dataset).to(dtype or torch.float32).eval()
        batches = [(_cast(inputs, dtype), _cast(targets, dtype)) for inputs, targets in batches]
        loss = origin.loss()
        problem = ZooProblem._build(
            name, model, loss, batches, origin=origin, dataset=dataset, recipe=recipe
        )
    if trained:
        problem.train()
    return problem


def _batches(dataset: Dataset, origin: Entry, samples: int | None) -> list[Batch]:
    """The first samples of the training split in batches, the last one shorter."""
    available = len(dataset.train)
    count = min(available, origin.samples or available) if samples is None else samples
    if not 1 <= count <= available:
        raise OptionError(
            f"samples={samples}: there are {available:,} training samples; take between 1 and "
            f"{available:,}."
        )
    cuts = range(0, count, origin.chunk)
    return [dataset.train.take(slice(start, min(start + origin.chunk, count))) for start in cuts]


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
