"""Entries of what BackPACK computed, against autograd on the user's own model.

Used where the forward pass is not a plain chain of layers, so that no list of rules can say
whether BackPACK follows it: on a few samples, one entry per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import BackpackError
from ...problem import Problem
from ...problem.cotangents import output_hessian_product
from ...problem.data import select
from .table import Spec


def check_sample_gradients(
    problem: Problem, spec: Spec, found: Mapping[str, Any], inputs: Any, targets: Any, samples: int
) -> None:
    """Rows of ``BatchGrad`` against the gradient of every single sample."""
    for n in range(samples):
        row = torch.tensor([n])
        total = problem.batch_total(
            problem.outputs(select(inputs, row, samples)), select(targets, row, samples)
        )
        truth = torch.autograd.grad(total, list(problem.params.values()), allow_unused=True)
        for (name, p), t in zip(problem.params.items(), truth, strict=True):
            value = found[name][n] if len(found[name]) == samples else None
            t = torch.zeros_like(p) if t is None else t
            if value is None or not _close(value, t, found[name].abs().max()):
                raise _mismatch(problem, spec, name, f"the gradient of sample {n}")


def check_diagonal(
    problem: Problem, spec: Spec, found: Mapping[str, Any], inputs: Any, targets: Any, hessian: bool
) -> None:
    """One diagonal entry per parameter of the Hessian or Gauss-Newton matrix."""
    outputs = problem.outputs(inputs)
    parameters = list(problem.params.values())
    # J^T u is linear in u, so that its derivative in u is a column of J
    cotangent = torch.zeros_like(outputs, requires_grad=True)
    if hessian:
        inner = problem.batch_total(outputs, targets)
    else:
        inner = (outputs * cotangent).sum()
    first = torch.autograd.grad(inner, parameters, create_graph=True, allow_unused=True)
    for (name, p), slope in zip(problem.params.items(), first, strict=True):
        index, value, size = _entry(found[name], p)
        if slope is None or not slope.requires_grad:
            truth = p.new_zeros(())
        elif hessian:
            (row,) = torch.autograd.grad(
                slope.reshape(-1)[index], p, retain_graph=True, allow_unused=True
            )
            truth = p.new_zeros(()) if row is None else row.reshape(-1)[index]
        else:
            (column,) = torch.autograd.grad(slope.reshape(-1)[index], cotangent, retain_graph=True)
            product = output_hessian_product(problem.loss, outputs, targets, column)
            truth = (column * product).sum()
        if not _close(value, truth, size):
            raise _mismatch(problem, spec, name, f"diagonal entry {index}")


def _entry(found: Any, parameter: Tensor) -> tuple[int, Tensor, Tensor]:
    """Index, value and typical size of one entry of the diagonal."""
    if callable(found):
        index = parameter.numel() // 2
        unit = torch.zeros_like(parameter).reshape(-1)
        unit[index] = 1.0
        column = found(unit.reshape(1, *parameter.shape)).reshape(-1)
        return index, column[index], column.abs().max()
    flat = found.reshape(-1)
    index = int(flat.abs().argmax())
    return index, flat[index], flat.abs().max()


def _close(value: Tensor, truth: Tensor, size: Tensor) -> bool:
    tolerance = torch.finfo(truth.dtype).eps ** 0.5 * float(max(size, truth.abs().max()))
    return value.shape == truth.shape and bool(((value - truth).abs() <= tolerance).all())


def _mismatch(problem: Problem, spec: Spec, name: str, what: str) -> BackpackError:
    return BackpackError(
        f"BackPACK is silently wrong for this model: {what} of parameter {name!r} differs from "
        f"autograd's. The forward pass of {type(problem.model).__name__} does something that its "
        f"rules do not follow. Use {spec.instead}."
    )
