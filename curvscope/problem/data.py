"""The user's data as batches of ``(inputs, targets)``, iterated without leaving a trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import DataError

Batch = tuple[Any, Any]

_FORMS = (
    "Give one (inputs, targets) pair, a list of such pairs, or a DataLoader; "
    "other batches (dicts, larger tuples) with unpack=lambda batch: (inputs, targets)."
)


def _is_tensor_pair(value: Any) -> bool:
    """One pair, as against a list of pairs: two entries, the second a tensor (or no pair)."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    first, second = value
    if isinstance(second, Tensor):
        return True
    return not _looks_like_batch(first)


def _all_tensors(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) > 0
        and all(isinstance(entry, Tensor) for entry in value)
    )


def _looks_like_batch(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


class Batches:
    """Re-iterable batches.

    Iterating a ``DataLoader`` draws from the global generator and from its own. Whoever iterates
    does so within :meth:`preserved` and ``state.random_state``, which put both back afterwards,
    and seeds them first, so that every pass sees the same order.
    """

    def __init__(self, data: Any, unpack: Callable[[Any], Batch] | None) -> None:
        self.unpack = unpack
        self.loader: Any = None
        self.items: Sequence[Any] = ()
        if isinstance(data, Tensor):
            raise DataError(f"The data are a single tensor, without targets. {_FORMS}")
        if isinstance(data, Mapping):
            if unpack is None:
                raise DataError(f"The data are one dict batch. {_FORMS}")
            self.items = [data]
        elif unpack is None and _is_tensor_pair(data):
            self.items = [tuple(data)]
        elif unpack is not None and _all_tensors(data):
            self.items = [data]  # one batch of several tensors, for unpack to sort
        elif isinstance(data, tuple | list):
            self.items = list(data)
        elif hasattr(data, "__next__"):
            raise DataError(
                "The data are an iterator, which can be read only once, but curvature needs "
                f"several passes: give list(data) instead. {_FORMS}"
            )
        elif hasattr(data, "__iter__"):
            self.loader = data
        else:
            raise DataError(f"Data of type {type(data).__name__} cannot be read. {_FORMS}")
        if self.loader is None and not self.items:
            raise DataError(f"The data are empty: there is no batch. {_FORMS}")
        if self.loader is not None and hasattr(self.loader, "__len__"):
            try:
                length = len(self.loader)
            except TypeError:  # an iterable data set without a length
                length = 1
            if length == 0:
                raise DataError("The data are empty: the DataLoader gives no batch.")

    def _generators(self) -> list[torch.Generator]:
        holders = [self.loader]
        for name in ("sampler", "batch_sampler"):
            holders.append(getattr(self.loader, name, None))
            holders.append(getattr(holders[-1], "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
        return list(unique.values())

    def __iter__(self) -> Iterator[Batch]:
        if self.loader is None:
            for item in self.items:
                yield self._split(item)
            return
        for item in self.loader:
            yield self._split(item)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Put back the states of the loader's own generators afterwards."""
        generators = self._generators()
        states = [g.get_state() for g in generators]
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    def seed(self, seed: int) -> None:
        """Seed the global generators and the loader's own (within :meth:`preserved`)."""
        # torch.manual_seed would also queue a seed for a CUDA that is not initialised yet
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        for generator in self._generators():
            generator.manual_seed(seed)

    def _split(self, item: Any) -> Batch:
        if self.unpack is not None:
            try:
                item = self.unpack(item)
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                raise DataError(
                    f"unpack= failed on a batch of type {type(item).__name__} "
                    f"({type(error).__name__}: {error}). It must return (inputs, targets)."
                ) from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            kind = type(item).__name__
            size = f" of {len(item)}" if isinstance(item, tuple | list | Mapping) else ""
            raise DataError(f"A batch is a {kind}{size}, not a pair (inputs, targets). {_FORMS}")
        return item[0], item[1]


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of nested inputs (tuples, lists, dicts, ``BatchEncoding`` and the like)."""
    if isinstance(tree, Mapping) and not isinstance(tree, dict):
        tree = dict(tree)
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def sample_count(inputs: Any, targets: Any) -> int:
    """Number of samples of a batch: the first axis of the first tensor among the inputs."""
    for leaf in leaves(inputs) + leaves(targets):
        if leaf.ndim:
            return int(leaf.shape[0])
    raise DataError(
        "The batch has no tensor with a sample axis: curvscope counts samples along the "
        "first axis of the first tensor of the inputs."
    )


def move(tree: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Copy tensors to the device, floating ones to the dtype; other leaves stay."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_inference():
            leaf = leaf.clone()  # autograd refuses tensors made under inference_mode()
        if leaf.is_floating_point():
            return leaf.detach().to(device=device, dtype=dtype)
        return leaf.detach().to(device=device)

    if isinstance(tree, Mapping) and not isinstance(tree, dict):
        tree = dict(tree)
    return tree_map(one, tree)


def select(tree: Any, index: Tensor, samples: int) -> Any:
    """Rows ``index`` of every tensor whose first axis is the sample axis."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == samples:
            return leaf[index.to(leaf.device)]
        return leaf

    if isinstance(tree, Mapping) and not isinstance(tree, dict):
        tree = dict(tree)
    return tree_map(one, tree)
