"""Joining batches and cutting them otherwise: the same samples in another arrangement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..problem.data import sample_count, select

Batch = tuple[Any, Any]


def merge(batches: Sequence[Batch]) -> Batch | None:
    """One batch with the samples of all, or ``None`` where shapes or other entries differ."""
    if len(batches) == 1:
        return batches[0]
    flat = [tree_flatten(_plain(batch)) for batch in batches]
    sizes = [sample_count(*batch) for batch in batches]
    if any(spec != flat[0][1] for _, spec in flat):
        return None
    merged = []
    for entries in zip(*(values for values, _ in flat), strict=True):
        first = entries[0]
        if not isinstance(first, Tensor):
            if any(e is not first and e != first for e in entries):
                return None
            merged.append(first)
        elif all(e.ndim and e.shape[0] == n for e, n in zip(entries, sizes, strict=True)):
            if any(e.shape[1:] != first.shape[1:] for e in entries):
                return None
            merged.append(torch.cat(entries))
        elif all(e.shape == first.shape and torch.equal(e, first) for e in entries):
            merged.append(first)
        else:
            return None
    return tuple(tree_unflatten(merged, flat[0][1]))  # type: ignore[return-value]


def _plain(batch: Batch) -> Batch:
    """Dictionaries of other classes (``BatchEncoding``) as plain ones, so that they flatten."""
    inputs, targets = (
        dict(part) if isinstance(part, Mapping) and not isinstance(part, dict) else part
        for part in batch
    )
    return inputs, targets


def cut(batch: Batch, sizes: Sequence[int], order: Tensor | None = None) -> list[Batch]:
    """The samples of one batch, in ``order``, as batches of the given sizes."""
    total = sample_count(*batch)
    order = torch.arange(total) if order is None else order
    return [
        (select(batch[0], part, total), select(batch[1], part, total))
        for part in order.split(list(sizes))
    ]
