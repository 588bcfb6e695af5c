"""The dense truth for small problems: plain ``torch.autograd`` in float64, one column at a time.

Slow on purpose. Nothing is shared with the rest of the package but the objective itself: no
``torch.func``, no vectorised backward passes, no recorded layers, and the label distributions are
enumerated from the loss's own values. :func:`curvscope.verify` holds the fast routes against it,
and so can anybody on a problem small enough:

    >>> import torch
    >>> import curvscope as cs
    >>> from curvscope.analysis import truth
    >>> data = torch.eye(3).double(), torch.tensor([0, 1, 0])
    >>> model = torch.nn.Linear(3, 2).double()
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> bool((cs.ggn(problem).dense() - truth.ggn(problem)).abs().max() < 1e-15)
    True

Every function takes a :class:`~curvscope.Problem` and returns CPU float64 tensors in the order of
``problem.layout``. Models in lower precision are copied to float64 first; ``dtype=`` computes in
another precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import memory
from ..errors import UnsupportedLayerError
from ..problem import Problem
from ..problem.data import select
from .labels import enumerated, own_terms, term_weights

__all__ = [
    "converted",
    "empirical_fisher",
    "fisher",
    "fisher_columns",
    "ggn",
    "ggn_columns",
    "gradient",
    "hessian",
    "hessian_columns",
    "hessian_product",
    "sample_gradients",
]


def converted(problem: Problem, dtype: torch.dtype = torch.float64) -> Problem:
    """The problem itself if it computes in ``dtype``, else a copy that does."""
    if problem.dtype == dtype:
        return problem
    return problem.with_data(materialised(problem), dtype=dtype)


def materialised(problem: Problem) -> list[tuple[Any, Any]]:
    """The problem's batches as a list of ``(inputs, targets)`` pairs."""
    with problem.session():
        return list(problem.batches())


def gradient(problem: Problem, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """``df / d theta`` ``[P]``."""
    problem = converted(problem, dtype)
    total = _zeros(problem, problem.layout.numel)
    with problem.session():
        for inputs, targets in problem.batches():
            value = problem.batch_total(problem.outputs(inputs), targets)
            total += _flat_gradient(value, problem)
    return problem.scale * total.cpu()


def hessian(problem: Problem, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Hessian ``[P, P]``. Cost: P double backward passes over the data."""
    _require(problem, problem.layout.numel)
    return hessian_columns(problem, range(problem.layout.numel), dtype=dtype)


def hessian_columns(
    problem: Problem, index: Sequence[int], *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Columns ``index`` of the Hessian, ``[P, k]``. Cost: one double backward pass each."""
    problem = converted(problem, dtype)
    columns = _zeros(problem, problem.layout.numel, len(index))
    with problem.session():
        for inputs, targets in problem.batches():
            value = problem.batch_total(problem.outputs(inputs), targets)
            first = _flat_gradient(value, problem, create_graph=True)
            if not first.requires_grad:
                continue
            _differentiable(first)
            for k, i in enumerate(index):
                columns[:, k] += _flat_gradient(first[i], problem, retain_graph=True)
    return problem.scale * columns.cpu()


def hessian_product(
    problem: Problem, vector: Tensor, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The Hessian times a flat vector ``[P]``: the gradient of ``gradient . vector``."""
    problem = converted(problem, dtype)
    product = _zeros(problem, problem.layout.numel)
    vector = vector.to(problem.device, problem.dtype)
    with problem.session():
        for inputs, targets in problem.batches():
            value = problem.batch_total(problem.outputs(inputs), targets)
            first = _flat_gradient(value, problem, create_graph=True)
            _differentiable(first)
            product += _flat_gradient(first @ vector, problem)
    return problem.scale * product.cpu()


def ggn(problem: Problem, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The generalised Gauss-Newton matrix ``(1/M) J^T (d^2 l / dz^2) J`` ``[P, P]``.

    Cost: one backward pass per output of every sample, and the Hessian of the loss in the outputs
    of a whole batch, entry by entry.
    """
    problem = converted(problem, dtype)
    _require(problem, problem.layout.numel)
    matrix = _zeros(problem, problem.layout.numel, problem.layout.numel)
    with problem.session():
        for jacobian, middle in _output_pieces(problem):
            matrix += jacobian.T @ middle @ jacobian
    return problem.scale * matrix.cpu()


def ggn_columns(
    problem: Problem, index: Sequence[int], *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Columns ``index`` of the GGN, ``[P, k]``; the Jacobian is formed, the matrix is not."""
    problem = converted(problem, dtype)
    columns = _zeros(problem, problem.layout.numel, len(index))
    with problem.session():
        for jacobian, middle in _output_pieces(problem):
            columns += jacobian.T @ (middle @ jacobian[:, list(index)])
    return problem.scale * columns.cpu()


def fisher(problem: Problem, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Fisher ``(1/M) sum_m c_m E_{y~p}[grad log p(y) grad log p(y)^T]`` ``[P, P]``.

    Labels are enumerated: for softmax and Bernoulli likelihoods one gradient of ``-log p(y)`` per
    term and label, weighted by ``p(y)``; for the normal the expectation is taken in closed form.
    Raises ``UnsupportedLossError`` for a loss that is no log-likelihood.
    """
    problem = converted(problem, dtype)
    _require(problem, problem.layout.numel)
    return fisher_columns(problem, range(problem.layout.numel), dtype=dtype)


def fisher_columns(
    problem: Problem, index: Sequence[int], *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Columns ``index`` of the Fisher, ``[P, k]``; the matrix is not formed."""
    problem = converted(problem, dtype)
    columns = _zeros(problem, problem.layout.numel, len(index))
    with problem.session():
        for inputs, targets in problem.batches():
            outputs = problem.outputs(inputs)
            for weight, value in enumerated(problem, outputs, targets):
                g = _flat_gradient(value, problem, retain_graph=True)
                columns += weight * torch.outer(g, g[list(index)])
    return problem.scale * columns.cpu()


def empirical_fisher(problem: Problem, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """``(1/M) sum_n g_n g_n^T`` ``[P, P]``, every sample in a forward pass of its own.

    ``g_n`` is the gradient of sample n's terms, each divided by the root of its weight.
    """
    problem = converted(problem, dtype)
    _require(problem, problem.layout.numel)
    rows = sample_gradients(problem, dtype=dtype)
    return problem.scale * (rows.T @ rows)


def sample_gradients(problem: Problem, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[N, P]``: the gradients whose outer products make up the empirical Fisher."""
    problem = converted(problem, dtype)
    found = []
    with problem.session():
        for inputs, targets in problem.batches():
            size = problem.count_samples(inputs, targets)
            for n in range(size):
                one = torch.tensor([n])
                x, y = select(inputs, one, size), select(targets, one, size)
                outputs = problem.outputs(x)
                if problem.loss.likelihood is None:
                    value = problem.batch_total(outputs, y)
                else:
                    c = term_weights(problem, outputs, y)
                    root = torch.where(c > 0, c, torch.ones_like(c)).rsqrt()
                    value = (own_terms(problem.user_loss, outputs, y) * root).sum()
                found.append(_flat_gradient(value, problem))
    return torch.stack(found).cpu()


def _output_pieces(problem: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """Per batch: the outputs' Jacobian ``[K, P]`` and the loss's Hessian in them ``[K, K]``."""
    for inputs, targets in problem.batches():
        outputs = problem.outputs(inputs)
        flat = outputs.reshape(-1)
        needed = flat.numel() * (flat.numel() + problem.layout.numel) * flat.dtype.itemsize
        memory.require(needed, "The Jacobian of a batch", "Take problem.subset(n, seed).")
        jacobian = torch.stack([_flat_gradient(z, problem, retain_graph=True) for z in flat])
        z = outputs.detach().requires_grad_()
        (first,) = torch.autograd.grad(problem.batch_total(z, targets), z, create_graph=True)
        rows = []
        for entry in first.reshape(-1):
            row = None
            if entry.requires_grad:
                (row,) = torch.autograd.grad(entry, z, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(z) if row is None else row)
        yield jacobian, torch.stack(rows).reshape(flat.numel(), -1).detach()


def _flat_gradient(value: Tensor, problem: Problem, **options: Any) -> Tensor:
    parameters = list(problem.params.values())
    found: Sequence[Tensor | None] = [None] * len(parameters)
    if value.requires_grad:
        found = torch.autograd.grad(value, parameters, allow_unused=True, **options)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for g, p in zip(found, parameters, strict=True)
        ]
    )


def _differentiable(first: Tensor) -> None:
    """Refuse a gradient that autograd would silently take for constant somewhere."""
    seen: set[Any] = set()
    stack = [first.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # the mark once_differentiable raises only if the way to it leads on to a parameter
        if node.name() == "torch::autograd::Error":
            raise UnsupportedLayerError(
                "A custom torch.autograd.Function of the model is marked once_differentiable: "
                "autograd takes its second derivatives for zero, without a word. Write its "
                "backward with differentiable operations and leave out the mark."
            )
        stack.extend(follower for follower, _ in node.next_functions)


def _zeros(problem: Problem, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=problem.device)


def _require(problem: Problem, size: int) -> None:
    memory.require(
        3 * size * size * 8,
        f"The dense matrix of {size} parameters",
        "The truth is meant for small problems; take fewer parameters with params=.",
    )
