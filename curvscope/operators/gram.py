"""The Gram matrix of a row form's vectors: its norm and spectrum without the matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import memory
from .numerics import CHUNK, symmetric, total

if TYPE_CHECKING:
    from .rowgram import RowGramOperator


def gram_rows(op: RowGramOperator, samples: slice, first: int = 0) -> Tensor:
    """Rows of the Gram matrix ``v_k . v_l``, ``k`` and ``l`` running over ``(c, n)``.

    Rows are those of ``samples``, columns those of the samples from ``first`` on.
    """
    samples = slice(*samples.indices(op._S.shape[1])[:2])
    count, columns = op._S.shape[0], op._S.shape[1] - first
    rows = count * (samples.stop - samples.start)
    gram = op._S.new_zeros(count, samples.stop - samples.start, count, columns)
    if op.positions == 1:
        for g in range(op.view.groups):
            S, a = op._S[:, :, 0, g], op._a[:, 0, g]
            inner = torch.einsum("cno,dmo->cndm", S[:, samples], S[:, first:])
            gram += inner * (a[samples] @ a[first:].mT).unsqueeze(1)
        return gram.reshape(rows, -1)
    own = op.vectors(samples).reshape(rows, op.shape[0])
    for part in op.vector_chunks():
        part = slice(max(part.start, first), part.stop)
        if part.start < part.stop:
            other = op.vectors(part).reshape(-1, op.shape[0])
            found = (own @ other.mT).reshape(*gram.shape[:3], -1)
            gram[..., part.start - first : part.stop - first] = found
    return gram.reshape(rows, -1)


def gram_norm(op: RowGramOperator) -> float:
    """Frobenius norm ``sqrt(sum_kl w_k w_l (v_k . v_l)^2)``, without all vectors at once."""
    # few large pieces: every piece meets all later ones, which are made anew each time
    budget = int(0.1 * memory.available_bytes(op.device)) // op.dtype.itemsize
    square = 0.0
    for samples in op.vector_chunks(min(max(budget, CHUNK), 4 * CHUNK)):
        start, stop = samples.start, samples.stop
        gram = gram_rows(op, samples, start).square_()
        gram = op.weights(samples).reshape(1, -1) @ gram
        twice = op.weights(slice(start, None)).clone()
        twice[:, stop - start :] *= 2.0
        square += total(gram * twice.flatten())
    return math.sqrt(max(square, 0.0))


def gram_eigenvalues(op: RowGramOperator) -> Tensor:
    """All eigenvalues ``[P]`` of a matrix of rank ``r < P``, through ``r x r`` Gram matrices."""
    memory.require(
        3 * op.rank**2 * op.dtype.itemsize,
        f"The Gram matrix of the {op.rank} vectors of the {op.info.what}",
        "Take the leading eigenvalues, cs.eigsh(op, k), or fewer samples.",
        device=op.device,
    )
    gram, weights = symmetric("The Gram matrix", gram_rows(op, slice(None))), op.weights().flatten()
    if bool((weights >= 0).all()):
        root = weights.sqrt()
        values = torch.linalg.eigvalsh(gram * root * root.unsqueeze(1))
    else:  # the spectrum of V D V^T is that of K^(1/2) D K^(1/2)
        squares, basis = torch.linalg.eigh(gram)
        half = basis * squares.clamp_min(0.0).sqrt()
        values = torch.linalg.eigvalsh((half.mT * weights) @ half)
    return torch.cat([values, values.new_zeros(op.shape[0] - op.rank)]).sort().values
