"""The best that a class can do: nearest diagonal, identity multiple and Kronecker products.

All are nearest in the Frobenius norm. For an operator with blocks each is taken block by block,
which is also the nearest block-diagonal operator whose blocks are of that class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import memory
from ..errors import OptionError
from . import row_algebra as rows_
from .base import Operator
from .blockdiag import BlockDiagonalOperator
from .dense import DenseOperator, IdentityOperator
from .diagonal import DiagonalOperator
from .kronecker import DiagonalKroneckerOperator, KroneckerOperator
from .rearrange import input_contraction, output_contraction, view_of
from .row_algebra import SMALL
from .rowgram import RowGramOperator
from .rowhessian import RowHessianOperator
from .singular import Pair, Space, leading_pair
from .view import MatrixView

_MOST_SAMPLES = 4096  # samples up to which their Gram matrices are cheaper than the factors


def best_diagonal(op: Operator) -> Operator:
    """The diagonal matrix nearest to ``op`` in Frobenius norm: its own diagonal ``[P]``.

    Cost: that of ``op.diagonal()``. Raises ``MemoryLimitError`` where that needs the dense matrix
    and it does not fit. Source: the definition, as the norm separates over entries.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> op = cs.operators.DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    >>> cs.best_diagonal(op).dense()
    tensor([[2., 0.],
            [0., 3.]])
    """

    def nearest(block: Operator) -> Operator:
        return DiagonalOperator(block.diagonal(), layout=block.layout, view=block.view)

    return _blockwise(op, nearest, "nearest diagonal")


def best_identity(op: Operator) -> Operator:
    """The multiple of the identity nearest to ``op`` in Frobenius norm: ``tr(op) / P``.

    Cost: that of ``op.trace()``. Raises ``MemoryLimitError`` where that needs the dense matrix and
    it does not fit. Source: the definition, the projection of ``op`` on the identity.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> op = cs.operators.DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))
    >>> cs.best_identity(op).diagonal()
    tensor([3., 3.])
    """

    def nearest(block: Operator) -> Operator:
        return IdentityOperator(
            block.shape[0],
            block.trace() / max(1, block.shape[0]),
            dtype=block.dtype,
            device=block.device,
            layout=block.layout,
            view=block.view,
        )

    return _blockwise(op, nearest, "nearest multiple of the identity")


def best_kronecker(
    op: Operator, *, view: MatrixView | None = None, tol: float = 1e-12, max_iter: int = 1000
) -> Operator:
    """The Kronecker product ``G (x) A`` of symmetric factors nearest to ``op`` (one per group).

    It is the leading singular pair of the rearranged matrix ``[out^2, in^2]``, found to a relative
    residual ``tol`` by Lanczos bidiagonalisation in at most ``max_iter`` products;
    ``info.settings`` records iterations, residual and convergence. Factors carry the square root
    of the singular value each; those of a positive-semidefinite matrix are positive semidefinite.
    Of an operator with blocks, those that are not weight matrices (``block.view is None``) are
    left out and listed in ``uncovered``.

    Cost: a factored block with one position takes one Gram matrix of its samples, others one pass
    over the rows per iteration; no matrix is formed beyond 4,096 rows unless ``op`` is stored.

    Raises ``OptionError`` for what is no Operator, ``ShapeError`` for a matrix without a view as
    weight matrix (give ``view=``) and ``MemoryLimitError`` for one that would have to be formed
    and does not fit.

    Source: Van Loan and Pitsianis 1993, section 2.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> block = cs.ggn(problem).blocks["2"]
    >>> nearest = cs.best_kronecker(block)
    >>> error = (nearest.dense() - block.dense()).norm()
    >>> bool(error <= (cs.kfac(problem).blocks["2"].dense() - block.dense()).norm())
    True
    """

    def nearest(block: Operator) -> Operator:
        own = view_of(block, view)
        found = _kronecker_pairs(block, own, tol, max_iter)
        G = torch.stack([pair.left for pair in found.pairs])
        A = torch.stack([pair.right for pair in found.pairs])
        twin = KroneckerOperator(
            G, A, own, layout=block.layout, positive_semidefinite=block.positive_semidefinite
        )
        return found.describe(twin, tol)

    return _blockwise(op, nearest, "nearest Kronecker product", needs_view=view is None)


def best_diagonal_kronecker(
    op: Operator, *, view: MatrixView | None = None, tol: float = 1e-12, max_iter: int = 1000
) -> Operator:
    """The Kronecker product of two diagonal matrices nearest to ``op`` (one per group).

    It is the rank-one matrix nearest to the diagonal in the view ``[out, in]``. A non-negative
    diagonal has non-negative factors (Perron). ``view``, ``tol`` and ``max_iter`` are those of
    :func:`best_kronecker`.

    Cost: that of ``op.diagonal()`` and ``O(out * in)`` per iteration.

    Raises ``OptionError`` for what is no Operator, ``ShapeError`` for a matrix without a view as
    weight matrix and ``MemoryLimitError`` where the diagonal needs a dense matrix that does not
    fit.

    Source: Van Loan and Pitsianis 1993, section 2, with diagonal factors.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> nearest = cs.best_diagonal_kronecker(cs.ggn(problem).blocks["2"])
    >>> nearest.factors["G"].shape, nearest.factors["A"].shape
    (torch.Size([2]), torch.Size([5]))
    """

    def nearest(block: Operator) -> Operator:
        own = view_of(block, view)
        diagonal = own.matrix(block.diagonal())
        positive = bool((diagonal >= 0).all())
        pairs = []
        for matrix in diagonal:
            space = Space(lambda v, m=matrix: m @ v, lambda u, m=matrix: m.mT @ u)  # type: ignore[misc]
            start = _start(matrix.new_ones(matrix.shape[1]), positive)
            pair = leading_pair(space, start, tol=tol, max_iter=max_iter)
            pairs.append(pair.with_positive(pair.right.sum(), pair.left.sum()))
        found = _Found(pairs, "bidiagonalisation of the diagonal")
        s = torch.stack([pair.left for pair in pairs])
        h = torch.stack([pair.right for pair in pairs])
        if positive:  # rounding may leave -1e-17
            s, h = s.clamp_min(0.0), h.clamp_min(0.0)
        return found.describe(DiagonalKroneckerOperator(s, h, own, layout=block.layout), tol)

    return _blockwise(op, nearest, "nearest diagonal Kronecker product", needs_view=view is None)


@dataclass(frozen=True)
class _Found:
    """One leading singular pair per group, and how they were found."""

    pairs: list[Pair]
    route: str

    def describe(self, op: Operator, tol: float) -> Operator:
        converged = all(pair.converged for pair in self.pairs)
        residual = max(pair.residual for pair in self.pairs)
        note = (
            f"the nearest product has not converged (relative residual {residual:.1e}, asked "
            f"{tol:.1e}): raise max_iter or tol"
        )
        return op.with_info(
            route=self.route,
            notes=() if converged else (note,),
            settings={
                "tol": tol,
                "iterations": sum(pair.iterations for pair in self.pairs),
                "residual": residual,
                "converged": converged,
                "singular_values": [pair.value for pair in self.pairs],
            },
        )


def _kronecker_pairs(op: Operator, view: MatrixView, tol: float, max_iter: int) -> _Found:
    simple = isinstance(op, RowGramOperator | RowHessianOperator) and op.simple
    if simple and op.view == view and op._a.shape[0] <= _MOST_SAMPLES:  # type: ignore[attr-defined]
        return _from_samples(op, tol, max_iter)  # type: ignore[arg-type]
    if isinstance(op, DenseOperator) or op.shape[0] <= SMALL:
        return _from_dense(op, view, tol, max_iter)
    pairs = []
    positive = bool(op.positive_semidefinite)
    for g in range(view.groups):

        def within(factor: Tensor, g: int = g) -> Tensor:
            stack = factor.new_zeros(view.groups, *factor.shape)
            stack[g] = factor
            return stack

        space = Space(
            lambda A, g=g: output_contraction(op, within(A, g), view)[g],  # type: ignore[misc]
            lambda G, g=g: input_contraction(op, within(G, g), view)[g],  # type: ignore[misc]
        )
        eye = torch.eye(view.inp, dtype=op.dtype, device=op.device)
        pair = leading_pair(space, _start(eye, positive), tol=tol, max_iter=max_iter)
        pairs.append(_signed(pair))
    return _Found(pairs, "bidiagonalisation of the rearranged matrix, by structure")


def _from_dense(op: Operator, view: MatrixView, tol: float, max_iter: int) -> _Found:
    memory.require(
        3 * op.shape[0] ** 2 * op.dtype.itemsize,
        f"The rearranged {op.info.what} of shape {op.shape}",
        "Keep the block in factored form.",
        device=op.device,
    )
    groups, out, inp = view.shape
    dense = view.dense_to_matrix(op.dense()).reshape(groups, out, inp, groups, out, inp)
    positive = bool(op.positive_semidefinite)
    pairs = []
    for g in range(groups):
        joint = dense[g, :, :, g].transpose(1, 2).reshape(out * out, inp * inp)

        def forward(A: Tensor, joint: Tensor = joint) -> Tensor:
            return _symmetrised((joint @ A.flatten()).reshape(out, out))

        def adjoint(G: Tensor, joint: Tensor = joint) -> Tensor:
            return _symmetrised((joint.mT @ G.flatten()).reshape(inp, inp))

        eye = torch.eye(inp, dtype=op.dtype, device=op.device)
        start = _start(eye, positive)
        pair = leading_pair(Space(forward, adjoint), start, tol=tol, max_iter=max_iter)
        pairs.append(_signed(pair))
    return _Found(pairs, "bidiagonalisation of the rearranged matrix")


def _from_samples(op: RowGramOperator | RowHessianOperator, tol: float, max_iter: int) -> _Found:
    """In coordinates: ``A = sum_n alpha_n a_n a_n^T`` and ``G = sum_n beta_n H_n``.

    The rearranged matrix is ``sum_n H_n (a_n a_n^T)^T``, so that ``beta = K_a alpha`` and
    ``alpha = K_H beta`` with the Gram matrices of the samples, which also give the norms.
    """
    if isinstance(op, RowGramOperator):
        outer = op.sample_gram(op)
    else:
        flat = op._H.flatten(1)
        outer = op.scale**2 * (flat @ flat.mT)
    forms = rows_.sample_form_gram(op._a, op._a)
    space = Space(
        lambda alpha: forms @ alpha,
        lambda beta: outer @ beta,
        left_metric=lambda beta: outer @ beta,
        right_metric=lambda alpha: forms @ alpha,
    )
    start = _start(forms.new_ones(forms.shape[0]), bool(op.positive_semidefinite))
    pair = leading_pair(space, start, tol=tol, max_iter=max_iter)
    G = op.output_moments(pair.left[:, None, None, None])[0]
    A = rows_.input_moments(op._a, pair.right[:, None, None, None])[0]
    pair = pair.with_vectors(_symmetrised(G), _symmetrised(A))
    return _Found([_signed(pair)], "bidiagonalisation in the Gram matrices of the samples")


def _start(plain: Tensor, positive: bool) -> Tensor:
    """A starting vector: ``plain`` itself meets the leading pair of any semidefinite matrix.

    Without definiteness it could be orthogonal to it, so something random is added.
    """
    if positive:
        return plain
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    noise = noise.to(dtype=plain.dtype, device=plain.device)
    if plain.ndim == 2:
        noise = _symmetrised(noise)
    return plain / plain.norm() + noise / noise.norm()


def _symmetrised(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _signed(pair: Pair) -> Pair:
    """Both factors with non-negative traces where one choice of sign does that."""
    return pair.with_positive(pair.right.trace(), pair.left.trace())


def _blockwise(
    op: Operator, nearest: Callable[[Operator], Operator], what: str, needs_view: bool = False
) -> Operator:
    def labelled(block: Operator) -> Operator:
        return nearest(block).with_info(what=f"{what} to the {block.info.what}", exact=False)

    if not isinstance(op, Operator):
        raise OptionError(
            f"{what.capitalize()} is that of a matrix, not of a {type(op).__name__}: say which, as "
            "in cs.best_kronecker(cs.ggn(problem)); cs.operators.DenseOperator takes a tensor."
        )
    if not op.blocks:
        return labelled(op)
    assert op.layout is not None, "an operator with blocks knows its parameters"
    members, blocks = {}, {}
    for name, block in op.blocks.items():
        assert block.layout is not None, "a block knows its parameters"
        members[name] = block.layout.names
        if not needs_view or block.view is not None:
            blocks[name] = labelled(block)
    info = op.info.with_(what=f"{what} to the {op.info.what}", exact=False)
    twin = BlockDiagonalOperator(
        blocks, op.layout, members, uncovered_names=op.uncovered, info=info
    )
    if isinstance(op, BlockDiagonalOperator):
        twin._mode, twin._rest = op._mode, op._rest
    return twin
