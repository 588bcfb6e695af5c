"""How the networks of the zoo are trained: a recipe, and one seeded loop that follows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, OptionError, check_option
from .datasets import Split

_OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, beside the network and its data.

    ``weight_decay`` is added to the gradient (``"sgd"``, ``"adam"``) or decoupled (``"adamw"``);
    it belongs to the training, not to the objective whose curvature is looked at.
    ``cosine`` lowers the learning rate to 0 along half a cosine over all steps.
    """

    optimizer: str
    lr: float
    epochs: int
    batch_size: int
    seed: int = 0
    weight_decay: float = 0.0
    momentum: float = 0.0
    cosine: bool = True
    description: str = ""

    def __post_init__(self) -> None:
        check_option("optimizer", self.optimizer, _OPTIMIZERS)
        if self.epochs < 0 or self.batch_size < 1 or not self.lr > 0:
            raise OptionError(
                f"A recipe needs epochs >= 0, batch_size >= 1 and lr > 0, not {self.epochs}, "
                f"{self.batch_size} and {self.lr}."
            )

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer on all parameters of ``model``."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, weight_decay=self.weight_decay)

    def __str__(self) -> str:
        parts = [f"{self.optimizer}, learning rate {self.lr:g}{' (cosine)' if self.cosine else ''}"]
        if self.momentum:
            parts.append(f"momentum {self.momentum:g}")
        if self.weight_decay:
            parts.append(f"weight decay {self.weight_decay:g}")
        parts.append(f"{self.epochs} epochs of batches of {self.batch_size}, seed {self.seed}")
        return ", ".join(parts)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with ``count`` threads (``None``: as many as before)."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


@contextmanager
def private_randomness(seed: int) -> Iterator[torch.Generator]:
    """Inside, models start from ``seed`` in float32 on the CPU; outside, nothing has changed.

    Yields a generator, also seeded, for the order of samples. The global CPU generator is saved
    and restored, and those of other devices are never touched; so are the default dtype and
    device, and gradients are enabled whatever the caller's mode.
    """
    state = torch.get_rng_state()
    dtype = torch.get_default_dtype()
    try:
        # torch.manual_seed would seed the CUDA generators as well.
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
            yield torch.Generator().manual_seed(seed)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)


def fit(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    split: Split,
    recipe: Recipe,
    generator: torch.Generator,
    *,
    progress: bool = False,
) -> list[float]:
    """Train ``model`` in place; returns the mean training loss of every epoch.

    Samples are permuted by ``generator`` before every epoch. The model ends in eval mode. Raises
    ``NonFiniteError`` when the loss stops being a number.
    """
    device = next(model.parameters()).device
    optimizer = recipe.make_optimizer(model)
    steps = recipe.epochs * math.ceil(len(split) / recipe.batch_size)
    history, step = [], 0
    model.train()
    epochs = range(1, recipe.epochs + 1)
    for epoch in _with_progress(epochs) if progress else epochs:
        total = torch.zeros((), device=device)
        for index in torch.randperm(len(split), generator=generator).split(recipe.batch_size):
            inputs, targets = (t.to(device) for t in split.take(index))
            if recipe.cosine:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            value = loss(model(inputs), targets)
            value.backward()
            optimizer.step()
            total += value.detach() * len(index)
            step += 1
        history.append(float(total) / len(split))
        if not math.isfinite(history[-1]):
            raise NonFiniteError(
                f"Training diverged: the mean loss of epoch {epoch} is {history[-1]}. "
                "Try another seed, or a smaller learning rate."
            )
    model.eval()
    return history


def _with_progress(epochs: range) -> Iterator[int]:
    from tqdm.auto import tqdm

    yield from tqdm(epochs, desc="training", unit="epoch")
