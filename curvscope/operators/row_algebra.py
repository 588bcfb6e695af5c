"""What the factored forms share: a layer's weight acting on its input rows, and Gram matrices.

Throughout, ``a`` is ``[N, T, g, i]`` (samples, positions, groups, inputs) and a *stack* is a set of
``k`` weight matrices ``[g, o, i, k]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import OptionError, ShapeError
from .numerics import CHUNK, as_float, chunks
from .view import MatrixView

SMALL = 4096
"""Rows up to which a dense block (128 MiB in float64) is cheaper than thinking about it."""


def outputs(a: Tensor, stack: Tensor) -> Tensor:
    """Layer outputs ``z_nt = W a_nt`` of ``k`` weights: ``[N, T, g, o, k]``."""
    samples, positions, groups, inp = a.shape
    _, out, _, count = stack.shape
    rows = a.permute(2, 0, 1, 3).reshape(groups, samples * positions, inp)
    z = rows @ stack.transpose(1, 2).reshape(groups, inp, out * count)
    return z.reshape(groups, samples, positions, out, count).permute(1, 2, 0, 3, 4)


def weights(a: Tensor, z: Tensor) -> Tensor:
    """The adjoint of :func:`outputs`: ``sum_nt z_nt a_nt^T`` as a stack ``[g, o, i, k]``."""
    samples, positions, groups, inp = a.shape
    out, count = z.shape[-2:]
    rows = a.permute(2, 0, 1, 3).reshape(groups, samples * positions, inp)
    z = z.permute(2, 0, 1, 3, 4).reshape(groups, samples * positions, out * count)
    return (rows.mT @ z).reshape(groups, inp, out, count).transpose(1, 2)


def input_forms(a: Tensor, A: Tensor | None) -> Tensor:
    """``a_nt^T A_g a_nu`` for all pairs of positions: ``[N, g, T, T]``; ``None``: the identity."""
    rows = a.transpose(1, 2)
    return (rows if A is None else rows @ A) @ rows.mT


def input_moments(a: Tensor, forms: Tensor) -> Tensor:
    """``sum_n sum_tu forms_n[t, u] a_nt a_nu^T`` per group: ``[N, g, T, T]`` -> ``[g, i, i]``."""
    rows = a.transpose(1, 2)  # [N, g, T, i]
    right = (forms @ rows).transpose(0, 1).reshape(a.shape[2], -1, a.shape[3])
    left = rows.transpose(0, 1).reshape(a.shape[2], -1, a.shape[3])
    return left.mT @ right


def sample_form_gram(left: Tensor, right: Tensor) -> Tensor:
    """``(a_n . b_m)^2`` for one position and one group: ``[N, M]``."""
    return (left.flatten(1) @ right.flatten(1).mT).square()


def outer_gram(left: Tensor, wl: Tensor | None, right: Tensor, wr: Tensor | None) -> Tensor:
    """``<sum_c w s_nc s_nc^T, sum_c w t_mc t_mc^T>`` for rows ``[C, N, o]``: ``[N, M]``.

    Taken as squared inner products of rows, or through the ``o x o`` matrices where these are
    fewer numbers.
    """
    count_l, samples_l, out = left.shape
    count_r, samples_r, _ = right.shape
    same = left is right and wl is wr
    if out < count_l * count_r and (samples_l + samples_r) * out * out <= 2**25:
        flat_l = outer_sums(left, wl).flatten(1)
        flat_r = flat_l if same else outer_sums(right, wr).flatten(1)
        return flat_l @ flat_r.mT
    gram = left.new_empty(samples_l, samples_r)
    # blocks of rows: small enough that of a symmetric Gram matrix the lower half can be copied
    step = max(1, min(-(-samples_l // 4), math.isqrt(CHUNK // max(1, count_l * count_r))))
    for start in range(0, samples_l, step):
        rows = slice(start, min(start + step, samples_l))
        part = left[:, rows]
        first = start if same else 0
        for columns in chunks(samples_r - first, count_l * count_r * (rows.stop - rows.start)):
            columns = slice(columns.start + first, columns.stop + first)
            squares = torch.einsum("cno,dmo->cndm", part, right[:, columns]).square_()
            if wl is not None:
                squares *= wl[:, rows, None, None]
            if wr is not None:
                squares *= wr[:, columns]
            gram[rows, columns] = squares.sum((0, 2))
        if same:
            gram[rows.stop :, rows] = gram[rows, rows.stop :].mT
    return gram


def outer_sums(rows: Tensor, weights_: Tensor | None) -> Tensor:
    """``sum_c w_cn s_nc s_nc^T``: ``[C, N, o]`` -> ``[N, o, o]``."""
    weighted = rows if weights_ is None else rows * weights_.unsqueeze(-1)
    return rows.permute(1, 2, 0) @ weighted.transpose(0, 1)


def dense_sum(outer: Callable[[slice], Tensor], a: Tensor, out: int) -> Tensor:
    """``sum_n H_n (x) a_n a_n^T`` ``[o i, o i]``; ``outer(samples)`` gives ``H_n`` ``[n, o, o]``.

    One matrix product over the samples, of half of ``H_n`` and half of ``a_n a_n^T``: a quarter
    of the matrix, of which the rest is mirror images.
    """
    samples, inp = a.shape
    left, right = torch.triu_indices(out, out, device=a.device)
    first, second = torch.triu_indices(inp, inp, device=a.device)
    joint = a.new_zeros(len(left), len(first))
    # short chunks would read and write ``joint`` more often than they add to it
    budget = max(CHUNK, joint.numel())
    for part in chunks(samples, len(first) + 2 * out * out, budget):
        rows, start = a[part], 0
        squares = rows.new_empty(len(rows), len(first))
        for k in range(inp):  # row by row of the triangle: gathered factors would be temporaries
            stop = start + inp - k
            torch.mul(rows[:, k : k + 1], rows[:, k:], out=squares[:, start:stop])
            start = stop
        joint.addmm_(outer(part)[:, left, right].mT, squares)
        del squares  # before the next is made
    where = torch.empty(inp, inp, dtype=torch.long, device=a.device)
    where[first, second] = where[second, first] = torch.arange(len(first), device=a.device)
    blocks = joint[:, where.flatten()].reshape(-1, inp, inp)
    del joint
    dense = a.new_empty(out, inp, out, inp)
    pairs = dense.transpose(1, 2)
    pairs[left, right] = blocks
    pairs[right, left] = blocks
    return dense.reshape(out * inp, out * inp)


def input_rows(a: Tensor) -> Tensor:
    """Checked input rows ``[N, T, i]`` or ``[N, T, g, i]``, with the group axis."""
    a = as_float("a", a, (3, 4))
    return a.unsqueeze(2) if a.ndim == 3 else a


def fitting_view(view: MatrixView | None, groups: int, out: int, inp: int) -> MatrixView:
    """``view``, or the plain one, after checking that its sizes are those of the rows."""
    view = view or MatrixView(groups, out, inp)
    if view.shape != (groups, out, inp):
        raise OptionError(
            f"The rows are of {groups} groups, {out} outputs and {inp} inputs; the view is of "
            f"{view.groups}, {view.out} and {view.inp}."
        )
    return view


def check_rows(name: str, actual: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise ``ShapeError`` unless samples and positions of both tensors agree."""
    if actual != wanted:
        raise ShapeError(
            f"{name} has {actual[0]} samples of {actual[1]} positions, but a has {wanted[0]} of "
            f"{wanted[1]}."
        )
