"""Small matrices over named parameters, of every class, for the analyses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from curvscope.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalKroneckerOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    IdentityOperator,
    KroneckerOperator,
    Layout,
    LowRankOperator,
    MatrixView,
    Operator,
    ParameterSpec,
    Provenance,
)
from curvscope.operators.blocks import Blocks

LAYOUT = Layout(
    [
        ParameterSpec("one.weight", (3, 4)),
        ParameterSpec("one.bias", (3,)),
        ParameterSpec("two.weight", (2, 3)),
        ParameterSpec("two.bias", (2,)),
    ]
)
MEMBERS = {"one": ("one.weight", "one.bias"), "two": ("two.weight", "two.bias")}
VIEWS = {
    "one": MatrixView.for_weight_and_bias(3, 4),
    "two": MatrixView.for_weight_and_bias(2, 3),
}
SIZE = LAYOUT.numel  # 23 = 15 + 8
ROWS = {name: LAYOUT.index(members) for name, members in MEMBERS.items()}


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def definite(size: int, seed: int, ridge: float = 0.1) -> Tensor:
    """A positive-definite matrix with a spread spectrum."""
    root = normal(size, size, seed=seed)
    return root @ root.mT / size + ridge * torch.eye(size, dtype=torch.float64)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def reference_matrix(seed: int = 0) -> Tensor:
    """Positive definite over all parameters, with something outside the blocks."""
    return definite(SIZE, seed)


def block_operators(kind: str, seed: int = 100) -> dict[str, Operator]:
    """One operator of a class per block, in the block's matrix view."""
    made: dict[str, Operator] = {}
    for place, (name, view) in enumerate(VIEWS.items()):
        made[name] = KINDS[kind](view, seed + 10 * place)
        made[name].layout = LAYOUT.restrict(MEMBERS[name])
    return made


def block_diagonal(kind: str, seed: int = 100, **options: object) -> BlockDiagonalOperator:
    info = Provenance(what=kind, exact=False)
    return BlockDiagonalOperator(block_operators(kind, seed), LAYOUT, MEMBERS, info=info, **options)


def _ekfac(view: MatrixView, seed: int) -> Operator:
    values = normal(view.out, view.inp, seed=seed + 2).square() + 0.05
    return EigenKroneckerOperator(
        orthogonal(view.out, seed), orthogonal(view.inp, seed + 1), values, view
    )


KINDS: Mapping[str, Callable[[MatrixView, int], Operator]] = {
    "identity": lambda view, seed: IdentityOperator(view.numel, 0.7, dtype=torch.float64),
    "diagonal": lambda view, seed: DiagonalOperator(
        normal(view.numel, seed=seed).square() + 0.1, view=view
    ),
    "diagonal-Kronecker": lambda view, seed: DiagonalKroneckerOperator(
        normal(view.out, seed=seed).square() + 0.1,
        normal(view.inp, seed=seed + 1).square() + 0.1,
        view,
    ),
    "Kronecker": lambda view, seed: KroneckerOperator(
        definite(view.out, seed), definite(view.inp, seed + 1), view
    ),
    "Kronecker-eigenbasis": _ekfac,
    "low-rank": lambda view, seed: LowRankOperator(normal(view.numel, 3, seed=seed), view=view),
    "dense": lambda view, seed: DenseOperator(definite(view.numel, seed), view=view),
}


class Products(Operator):
    """A matrix with known blocks whose whole is known by products only; counts them."""

    def __init__(self, matrix: Tensor, *, blocks: bool = True) -> None:
        self._hidden = matrix
        self.shape = (matrix.shape[0], matrix.shape[0])
        self.dtype, self.device = matrix.dtype, matrix.device
        self.layout, self.info = LAYOUT, Provenance(what="hidden")
        self.count = 0
        self.members = MEMBERS if blocks else {}

    def _matmat(self, vectors: Tensor) -> Tensor:
        self.count += vectors.shape[1]
        return self._hidden @ vectors

    @property
    def blocks(self) -> Mapping[str, Operator]:
        found = {}
        for name, members in self.members.items():
            rows = ROWS[name]
            found[name] = DenseOperator(
                self._hidden[rows][:, rows],
                layout=LAYOUT.restrict(members),
                view=VIEWS[name],
                info=self.info,
            )
        return Blocks(found)


def reference(seed: int = 0) -> Operator:
    """The reference matrix as an operator with blocks."""
    return Products(reference_matrix(seed))
