"""Averages over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..problem.wrappers import distributed


def choose_group(model: nn.Module, process_group: Any) -> Any:
    """The process group to average over, or ``None``."""
    if process_group is False or not (dist.is_available() and dist.is_initialized()):
        return None
    parallel = distributed(model)
    if process_group is None and parallel is not None:
        process_group = parallel.process_group
    group = process_group if process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def average(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """The mean of every tensor over the ranks, by one all-reduce per dtype."""
    if group is None or not tensors:
        return list(tensors)
    result: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        chosen = [k for k, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([tensors[k].reshape(-1) for k in chosen])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=group)
        flat /= dist.get_world_size(group)
        start = 0
        for k in chosen:
            size = tensors[k].numel()
            result[k] = flat[start : start + size].reshape(tensors[k].shape)
            start += size
    return result
