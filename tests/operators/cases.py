"""The registry of operators under test: per class some builders, each with its dense truth.

All matrices have 12 rows, so that every one can be combined with every other. The truth is built
here from loops and ``torch.kron``, not from the code under test. A new operator class is tested by
adding a builder with ``@cases_of(NewOperator)`` that yields ``(name, operator, dense truth)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import scipy.sparse
import torch
from torch import Tensor

from curvscope.operators import (
    BlockDiagonalOperator,
    Converted,
    Damped,
    DenseOperator,
    DiagonalKroneckerOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    FunctionOperator,
    IdentityOperator,
    KroneckerOperator,
    Layout,
    LowRankOperator,
    MatrixView,
    Operator,
    ParameterSpec,
    Restricted,
    RowGramOperator,
    RowHessianOperator,
    Scaled,
    Sum,
    from_scipy,
)
from curvscope.optim.mfac import Window

SIZE = 12
LAYOUT = Layout([ParameterSpec("a", (2, 2)), ParameterSpec("b", (5,)), ParameterSpec("c", (3,))])
ROWS = {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7, 8], "c": [9, 10, 11]}

Builder = Callable[[], Iterator[tuple[str, Operator, Tensor]]]
REGISTRY: dict[type[Operator], list[Builder]] = {}
SLOW: set[type[Operator]] = set()


@dataclass(frozen=True)
class Case:
    """One operator and the matrix that it must be."""

    name: str
    op: Operator
    truth: Tensor
    slow: bool = False

    def __str__(self) -> str:
        return self.name


def cases_of(kind: type[Operator], *, slow: bool = False) -> Callable[[Builder], Builder]:
    """Register a builder for an operator class; ``slow`` ones meet fewer of the others."""
    if slow:
        SLOW.add(kind)

    def add(builder: Builder) -> Builder:
        REGISTRY.setdefault(kind, []).append(builder)
        return builder

    return add


@cache
def all_cases() -> tuple[Case, ...]:
    """Every registered case, those of operators above the operators package as well."""
    from tests.operators import curvature_cases  # noqa: F401 (registers its cases)

    return tuple(
        Case(f"{kind.__name__}-{name}", op, truth, kind in SLOW)
        for kind, builders in REGISTRY.items()
        for builder in builders
        for name, op, truth in builder()
    )


def concrete_subclasses(base: type) -> set[type]:
    """All subclasses that can be instantiated, and are not private helpers."""
    found: set[type] = set()
    for kind in base.__subclasses__():
        found |= concrete_subclasses(kind)
        if not inspect.isabstract(kind):
            found.add(kind)
    return found


# -- random material -----------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spd(*shape: int, seed: int = 0) -> Tensor:
    """Positive definite matrices ``[..., d, d]``, well conditioned."""
    x = randn(*shape, shape[-1], seed=seed)
    return x @ x.mT / shape[-1] + 0.2 * torch.eye(shape[-1], dtype=torch.float64)


def sym(*shape: int, seed: int = 0) -> Tensor:
    """Symmetric indefinite matrices."""
    x = randn(*shape, shape[-1], seed=seed)
    return (x + x.mT) / 2


def orthogonal(*shape: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(*shape, shape[-1], seed=seed)).Q


# groups, out, inp, and whether the view is permuted; all of 12 entries
VIEWS = [
    (1, 3, 4, False),
    (1, 4, 3, True),
    (2, 2, 3, True),
    (3, 2, 2, False),
    (12, 1, 1, True),
    (1, 1, 12, True),
    (1, 6, 2, "bias"),
    (2, 3, 2, "bias"),
]


def views() -> Iterator[tuple[str, MatrixView, Tensor]]:
    """Views with the permutation matrix ``P`` such that ``P v`` is the flattened view of ``v``."""
    for groups, out, inp, kind in VIEWS:
        if kind == "bias":  # vector order: weights row by row, then biases
            view = MatrixView.for_weight_and_bias(groups * out, inp - 1, True, groups=groups)
            order = []
            for row in range(groups * out):
                order += [row * (inp - 1) + j for j in range(inp - 1)]
                order.append(groups * out * (inp - 1) + row)
        elif kind:
            order = torch.randperm(
                SIZE, generator=torch.Generator().manual_seed(groups + out)
            ).tolist()
            view = MatrixView(groups, out, inp, torch.tensor(order))
        else:
            order = list(range(SIZE))
            view = MatrixView(groups, out, inp)
        P = torch.zeros(SIZE, SIZE, dtype=torch.float64)
        for row, column in enumerate(order):
            P[row, column] = 1.0
        yield f"{groups}x{out}x{inp}{'-' + str(kind) if kind else ''}", view, P


def block_diagonal(parts: list[Tensor]) -> Tensor:
    return torch.block_diag(*parts)


# -- builders ------------------------------------------------------------------------------------


@cases_of(DenseOperator)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    for name, matrix in (("spd", spd(SIZE)), ("indefinite", sym(SIZE, seed=1))):
        yield name, DenseOperator(matrix, layout=LAYOUT), matrix.clone()
    matrix = spd(SIZE, seed=2)
    yield "transposed", DenseOperator(matrix.mT, view=MatrixView(1, 3, 4)), matrix.clone()
    yield "zero", DenseOperator(torch.zeros(SIZE, SIZE, dtype=torch.float64)), 0 * matrix


@cases_of(IdentityOperator)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    for scale in (1.0, 2.5, -0.5, 0.0):
        truth = scale * torch.eye(SIZE, dtype=torch.float64)
        yield f"{scale}", IdentityOperator(SIZE, scale, dtype=torch.float64), truth


@cases_of(DiagonalOperator)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    for name, d in (("mixed", randn(SIZE)), ("positive", randn(SIZE, seed=1).abs() + 0.1)):
        yield name, DiagonalOperator(d, layout=LAYOUT), torch.diag(d)
    d = randn(SIZE, seed=2)
    d[3] = 0.0
    yield "singular", DiagonalOperator(d[::1]), torch.diag(d)


@cases_of(KroneckerOperator)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    for name, view, P in views():
        g, o, i = view.shape
        for kind, make in (("spd", spd), ("indefinite", sym))[: 1 + (view.out > 1 < view.inp)]:
            G, A = make(g, o, seed=1), make(g, i, seed=2)
            truth = P.T @ block_diagonal([torch.kron(G[k], A[k]) for k in range(g)]) @ P
            if g == 1:
                G, A = G[0], A[0]
            yield f"{name}-{kind}", KroneckerOperator(G, A, view), truth


@cases_of(DiagonalKroneckerOperator)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    for name, view, P in views():
        g, o, i = view.shape
        s, h = randn(g, o, seed=3), randn(g, i, seed=4).abs()
        truth = P.T @ torch.diag(torch.cat([torch.kron(s[k], h[k]) for k in range(g)])) @ P
        op = DiagonalKroneckerOperator(s if g > 1 else s[0], h if g > 1 else h[0], view)
        yield name, op, truth


@cases_of(EigenKroneckerOperator)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    for name, view, P in views():
        g, o, i = view.shape
        U, W, S = orthogonal(g, o, seed=5), orthogonal(g, i, seed=6), randn(g, o, i, seed=7)
        if "True" not in name:
            S = S.abs() + 0.1
        parts = []
        for k in range(g):
            basis = torch.kron(U[k], W[k])
            parts.append(basis @ torch.diag(S[k].flatten()) @ basis.T)
        truth = P.T @ block_diagonal(parts) @ P
        if g == 1:
            U, W, S = U[0], W[0], S[0]
        yield name, EigenKroneckerOperator(U, W, S, view), truth


@cases_of(LowRankOperator)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    for rank in (0, 1, 4, 12, 20):
        V, w = randn(SIZE, rank, seed=8), randn(rank, seed=9)
        signed = sum((w[k] * torch.outer(V[:, k], V[:, k]) for k in range(rank)), 0 * spd(SIZE))
        plain = sum((torch.outer(V[:, k], V[:, k]) for k in range(rank)), 0 * spd(SIZE))
        yield f"rank{rank}-signed", LowRankOperator(V, w, layout=LAYOUT), signed
        yield f"rank{rank}", LowRankOperator(V, view=MatrixView(1, 4, 3)), plain
    V = randn(SIZE, 2, seed=10)[:, [0, 1, 1]]  # a vector twice
    yield "dependent", LowRankOperator(V), V @ V.T


@cases_of(Window)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    V = randn(SIZE, 3, seed=21)
    op = Window(V, layout=LAYOUT)
    op.members = {s.name: (s.name,) for s in LAYOUT}
    yield "three gradients", op, V @ V.T


# outputs C, samples N, positions T
ROW_SIZES = [(3, 3, 1), (4, 5, 1), (2, 3, 3)]


def _gram_truth(S: Tensor, a: Tensor, weights: Tensor) -> Tensor:
    """Naive sum over outputs and samples, in the order of the view."""
    count, samples, positions, g, o = S.shape
    truth = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for c in range(count):
        for n in range(samples):
            v = torch.zeros(g, o, a.shape[-1], dtype=torch.float64)
            for t in range(positions):
                for k in range(g):
                    v[k] += torch.outer(S[c, n, t, k], a[n, t, k])
            truth += weights[c, n] * torch.outer(v.flatten(), v.flatten())
    return truth


@cases_of(RowGramOperator)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    for name, view, P in views():
        g, o, i = view.shape
        for C, N, T in ROW_SIZES if view.out > 1 < view.inp else ROW_SIZES[-1:]:
            S, a = randn(C, N, T, g, o, seed=11), randn(N, T, g, i, seed=12)
            if T > 1:  # padding
                S[:, -1, -1], a[-1, -1] = 0.0, 0.0
            for signs in (None, randn(C, N, seed=13).sign()) if N == 3 else (None,):
                weights = torch.ones(C, N, dtype=torch.float64) if signs is None else signs
                truth = P.T @ _gram_truth(S, a, 0.3 * weights) @ P
                plain = g == 1 and T == 1
                op = RowGramOperator(
                    S[:, :, :, 0] if plain else S,
                    a[:, :, 0] if plain else a,
                    0.3,
                    signs=signs,
                    view=view,
                )
                label = "" if signs is None else "-signed"
                yield f"{name}-C{C}N{N}T{T}{label}", op, truth


@cases_of(RowHessianOperator)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    for name, view, P in views():
        g, o, i = view.shape
        for N, T in ((2, 1), (5, 1), (2, 3)) if view.out > 1 < view.inp else ((2, 3),):
            H, a = sym(N, T * g * o, seed=14), randn(N, T, g, i, seed=15)
            if T > 1:
                a[-1, -1] = 0.0
            truth = torch.zeros(SIZE, SIZE, dtype=torch.float64)
            for n in range(N):
                # the map from the weights to all outputs of one sample
                J = torch.zeros(T, g, o, g, o, i, dtype=torch.float64)
                for t in range(T):
                    for k in range(g):
                        for row in range(o):
                            J[t, k, row, k, row] = a[n, t, k]
                J = J.reshape(T * g * o, SIZE)
                truth += 0.7 * J.T @ H[n] @ J
            op = RowHessianOperator(
                H.reshape(N, T, g * o, T, g * o), a if g > 1 else a[:, :, 0], 0.7, view=view
            )
            yield f"{name}-N{N}T{T}", op, P.T @ truth @ P


@cases_of(Sum)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    M, d, V = spd(SIZE, seed=16), randn(SIZE, seed=17), randn(SIZE, 2, seed=18)
    G, A = spd(3, seed=19), spd(4, seed=20)
    kron = KroneckerOperator(G, A)
    yield "lowrank+diagonal", LowRankOperator(V) + DiagonalOperator(d), V @ V.T + torch.diag(d)
    yield "kronecker-dense", kron - DenseOperator(M, layout=LAYOUT), torch.kron(G, A) - M
    nested = (kron + LowRankOperator(V)) + (kron + DiagonalOperator(d))
    yield "nested", nested, 2 * torch.kron(G, A) + V @ V.T + torch.diag(d)


@cases_of(Scaled)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    M = spd(SIZE, seed=21)
    free = FunctionOperator(lambda v: M @ v, SIZE)
    yield "positive", 2.0 * free, 2.0 * M
    yield "negative", -free, -M
    yield "zero", 0.0 * free, 0.0 * M
    yield "wrapped", Scaled(DenseOperator(M, layout=LAYOUT), -0.5), -0.5 * M


@cases_of(Damped)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    eye = torch.eye(SIZE, dtype=torch.float64)
    G, A, V = spd(3, seed=22), spd(4, seed=23), randn(SIZE, 3, seed=24)
    yield "kronecker", KroneckerOperator(G, A).damped(0.3), torch.kron(G, A) + 0.3 * eye
    yield "lowrank", LowRankOperator(V).damped(0.7), V @ V.T + 0.7 * eye
    yield (
        "twice",
        LowRankOperator(V).damped(0.7) + IdentityOperator(SIZE, -0.2),
        V @ V.T + 0.5 * eye,
    )
    inverse = torch.linalg.inv(V @ V.T + 0.7 * eye)
    yield "woodbury", LowRankOperator(V, layout=LAYOUT).inverse(0.7), inverse
    yield "cancelling", Damped(IdentityOperator(SIZE, 1.0, dtype=torch.float64), -1.0), 0 * eye


@cases_of(Restricted)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    big = spd(20, seed=25)
    index = torch.tensor([3, 1, 0, 7, 19, 12, 13, 4, 5, 6, 10, 11])
    op = Restricted(FunctionOperator(lambda v: big @ v, 20), index)
    yield "permuted", op, big[index][:, index]
    G, A = spd(4, seed=26), spd(5, seed=27)
    truth = torch.kron(G, A)[index][:, index]
    yield "kronecker", Restricted(KroneckerOperator(G, A), index, layout=LAYOUT), truth


@cases_of(Converted)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    M = sym(SIZE, seed=28)
    exact = FunctionOperator(lambda v: M @ v, SIZE)
    yield "float64", Converted(exact, torch.float64, torch.device("cpu")), M


@cases_of(FunctionOperator)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    M = spd(SIZE, seed=29)
    yield "function", FunctionOperator(lambda v: M @ v, SIZE, layout=LAYOUT), M
    sparse = torch.where(M.abs() > 0.2, M, 0.0)
    yield "sparse", from_scipy(scipy.sparse.csr_matrix(sparse.numpy())), sparse


@cases_of(BlockDiagonalOperator)
def _() -> Iterator[tuple[str, Operator, Tensor]]:
    def placed(**parts: Tensor) -> Tensor:
        truth = torch.zeros(SIZE, SIZE, dtype=torch.float64)
        for names, part in parts.items():
            rows = [row for name in names for row in ROWS[name]]
            for p, row in enumerate(rows):
                for q, column in enumerate(rows):
                    truth[row, column] = part[p, q]
        return truth

    first, second = spd(7, seed=30), sym(5, seed=31)
    blocks: dict[str, Operator] = {"x": DenseOperator(first), "y": DenseOperator(second)}
    members = {"x": ("a", "c"), "y": ("b",)}
    yield "apart", BlockDiagonalOperator(blocks, LAYOUT, members), placed(ac=first, b=second)
    G, A, d = spd(2, seed=32), spd(2, seed=33), randn(3, seed=34).abs() + 0.1
    mixed = BlockDiagonalOperator(
        {
            "x": KroneckerOperator(G, A, MatrixView(1, 2, 2)),
            "y": LowRankOperator(randn(5, 2, seed=35)),
            "z": DiagonalOperator(d),
        },
        LAYOUT,
        {"x": ("a",), "y": ("b",), "z": ("c",)},
    )
    V = randn(5, 2, seed=35)
    yield "mixed", mixed, placed(a=torch.kron(G, A), b=V @ V.T, c=torch.diag(d))
    partial = BlockDiagonalOperator(
        {"x": DenseOperator(first)}, LAYOUT, {"x": ("a", "c")}, uncovered="zero"
    )
    truth = placed(ac=first)
    yield "uncovered", partial, truth
    rest = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    rest[4:9, 4:9] = 0.3 * torch.eye(5, dtype=torch.float64)
    yield (
        "uncovered-damped",
        partial.damped(0.3),
        placed(ac=first + 0.3 * torch.eye(7, dtype=torch.float64)) + rest,
    )
