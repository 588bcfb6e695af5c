"""What must hold whatever the numbers: splits, duplication, scaling, order, closed forms."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvscope as cs
from tests.truth import relative

from .cases import BCE, CE, MSE
from .draws import POS, W3, bits, both, data, labels, quartic, real, soft, some_ignored
from .nets import (
    Apply,
    Attention,
    Pair,
    Residual,
    TiedLanguage,
    TwoNames,
    flat_tokens,
    mlp,
    seeded,
    tokens_last,
)

S, T, R = nn.Sequential, nn.Tanh, nn.ReLU
Matrix = Callable[[cs.Problem], Tensor]

MATRICES: dict[str, Matrix] = {
    "hessian": lambda p: cs.hessian(p).dense(),
    "hessian blocks": lambda p: blocks(cs.hessian(p)),
    "ggn": lambda p: cs.ggn(p).dense(),
    "ggn blocks": lambda p: blocks(cs.ggn(p)),
    "empirical": lambda p: cs.empirical_fisher(p).dense(),
    "per term": lambda p: blocks(cs.empirical_fisher(p, per="term")),
    "kfac": lambda p: cs.kfac(p, uncovered="zero").dense(),
    "kfac reduce": lambda p: cs.kfac(p, uncovered="zero", sharing="reduce").dense(),
    "kfac empirical": lambda p: cs.kfac(p, uncovered="zero", fisher="empirical").dense(),
    "ekfac": lambda p: cs.ekfac(p, uncovered="zero").dense(),
    "kflr": lambda p: cs.kflr(p, uncovered="zero").dense(),
    "foof": lambda p: cs.foof(p, uncovered="zero").dense(),
    "diagonal_kf": lambda p: cs.diagonal_kf(p, uncovered="zero").dense(),
    "adafisher": lambda p: cs.diagonal_kf(p, uncovered="zero", scale="adafisher").dense(),
    "exact_diagonal": lambda p: cs.exact_diagonal(p).diagonal(),
    "hutchinson": lambda p: cs.hutchinson_diagonal(p, probes=2, seed=1).diagonal(),
    "gradient": lambda p: p.gradient(),
    "objective": lambda p: torch.tensor([p.objective()], dtype=torch.float64),
}


def blocks(op: cs.Operator) -> Tensor:
    return torch.block_diag(*[block.dense() for block in op.blocks.values()])


def tokens(last: Any) -> nn.Module:
    return S(nn.Linear(2, 3), nn.LayerNorm(3), T(), nn.Linear(3, 3), Apply(last))


# six samples each: model, loss, (x, y)
SETTINGS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "tanh": (lambda: mlp(T, 3, 4, 3), CE(weight=W3), data((6,), real(3), labels(3))),
    "soft": (lambda: mlp(R, 3, 4, 3), CE(label_smoothing=0.1), data((6,), real(3), soft(3))),
    "bce": (lambda: mlp(T, 3, 3, 3), BCE(pos_weight=POS), data((6,), real(3), bits(3))),
    "mse": (lambda: mlp(T, 3, 3, 2), MSE(), data((6,), real(3), real(2))),
    "tokens": (lambda: tokens(tokens_last), CE(), data((6,), real(3, 2), some_ignored(3, 3))),
    "conv": (
        lambda: S(nn.Conv2d(1, 2, 2), R(), nn.Flatten(), nn.Linear(8, 3)),
        CE(),
        data((6,), real(1, 3, 3), labels(3)),
    ),
}
SPLITS = [(1, 5), (2, 3, 1), (1, 1, 1, 1, 1, 1)]


def problem(name: str, **changes: Any) -> cs.Problem:
    model, loss, batches = SETTINGS[name]
    arguments = {"model": seeded(model), "loss": loss, "data": batches(), **changes}
    return cs.Problem(**arguments)


def cut(pair: tuple[Any, Tensor], sizes: tuple[int, ...]) -> list[tuple[Any, Tensor]]:
    x, y = pair
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@functools.cache
def whole(name: str, matrix: str) -> Tensor:
    return MATRICES[matrix](problem(name))


def same(value: Tensor, truth: Tensor, tolerance: float = 1e-12) -> None:
    assert relative(value, truth) <= tolerance


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_any_split_into_batches(name: str, matrix: str) -> None:
    pair = SETTINGS[name][2]()[0]
    for sizes in SPLITS:
        split = problem(name, data=cut(pair, sizes))
        same(MATRICES[matrix](split), whole(name, matrix))
    x, y = pair
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    same(MATRICES[matrix](problem(name, data=loader)), whole(name, matrix))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_order_and_duplication_of_samples(name: str, matrix: str) -> None:
    x, y = SETTINGS[name][2]()[0]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    same(MATRICES[matrix](problem(name, data=(x[order], y[order]))), whole(name, matrix))
    if matrix == "adafisher":
        return  # its rule for normalisation layers is not a mean over samples
    twice = problem(name, data=[(x, y), (x, y)])
    same(MATRICES[matrix](twice), whole(name, matrix))


@pytest.mark.parametrize(
    "matrix",
    [
        "hessian",
        "hessian blocks",
        "ggn",
        "ggn blocks",
        "empirical",
        "per term",
        "kfac",
        "ekfac",
        "kflr",
        "gradient",
        "objective",
        "exact_diagonal",
    ],
)
@pytest.mark.parametrize("name", SETTINGS)
def test_sum_is_the_mean_times_the_number_of_terms(name: str, matrix: str) -> None:
    loss = copy.copy(SETTINGS[name][1])
    loss.reduction = "sum"
    terms = problem(name).n_terms
    same(MATRICES[matrix](problem(name, loss=loss)), terms * whole(name, matrix))


@pytest.mark.parametrize("matrix", ["hessian", "ggn blocks", "gradient", "exact_diagonal"])
def test_scaling_of_a_callable(matrix: str) -> None:
    pair = data((6,), real(3), real(2))()[0]
    one = problem("mse", data=pair, loss=quartic, reduction="mean")
    scaled = problem("mse", data=pair, loss=lambda z, y: 2.5 * quartic(z, y), reduction="mean")
    same(MATRICES[matrix](scaled), 2.5 * MATRICES[matrix](one))


@pytest.mark.parametrize(
    "matrix",
    [
        "hessian",
        "ggn",
        "ggn blocks",
        "empirical",
        "per term",
        "gradient",
        "objective",
        "exact_diagonal",
        "kfac G",
    ],
)
def test_class_weight_two_is_duplication(matrix: str) -> None:
    x, y = data((6,), real(3), labels(3))()[0]
    weight = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    again = y == 1
    assert 0 < int(again.sum()) < 6
    weighted = problem("tanh", data=(x, y), loss=CE(weight=weight))
    doubled = problem("tanh", data=(torch.cat([x, x[again]]), torch.cat([y, y[again]])), loss=CE())
    take = MATRICES.get(matrix) or (
        lambda p: torch.cat([b.factors["G"].reshape(-1) for b in cs.kfac(p).blocks.values()])
    )
    same(take(weighted), take(doubled))


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "empirical", "gradient", "objective"])
def test_positive_weight_two_is_duplication(matrix: str) -> None:
    x, y = data((6,), real(3), lambda n, g: (torch.arange(n) % 2).double().unsqueeze(1))()[0]
    model = functools.partial(mlp, T, 3, 3, 1)
    again = y[:, 0] == 1
    # the mean of a weighted binary cross-entropy divides by the number of elements
    weighted = cs.Problem(
        seeded(model), BCE(pos_weight=torch.tensor([2.0]), reduction="sum"), (x, y)
    )
    doubled = cs.Problem(
        seeded(model),
        BCE(reduction="sum"),
        (torch.cat([x, x[again]]), torch.cat([y, y[again]])),
    )
    same(MATRICES[matrix](weighted), MATRICES[matrix](doubled))


@pytest.mark.parametrize(
    "matrix", ["hessian", "ggn", "ggn blocks", "empirical", "kfac", "gradient"]
)
def test_ignored_targets_are_as_if_not_there(matrix: str) -> None:
    x, y = data((6,), real(3), labels(3))()[0]
    ignored = y.clone()
    ignored[[1, 4]] = -100
    keep = torch.tensor([0, 2, 3, 5])
    a = problem("tanh", data=(x, ignored), loss=CE())
    b = problem("tanh", data=(x[keep], y[keep]), loss=CE())
    if matrix == "kfac":  # the input factor still sees all rows
        for name in b.blocks:
            same(cs.kfac(a).blocks[name].factors["G"], cs.kfac(b).blocks[name].factors["G"])
        return
    same(MATRICES[matrix](a), MATRICES[matrix](b))


# -- Hessian and GGN ---------------------------------------------------------------------------

RELU_NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (lambda: mlp(R, 3, 4, 4, 3), data((5,), real(3), labels(3))),
    "leaky": (lambda: mlp(lambda: nn.LeakyReLU(0.2), 3, 4, 3), data((5,), real(3), labels(3))),
    "max-pool": (
        lambda: S(nn.Conv2d(1, 3, 2), nn.MaxPool2d(2), R(), nn.Flatten(), nn.Linear(3, 3)),
        data((5,), real(1, 3, 3), labels(3)),
    ),
    "residual": (lambda: Residual(True), data((4,), real(1, 3, 3), labels(3))),
}


@pytest.mark.parametrize("name", RELU_NETS)
def test_hessian_blocks_of_relu_nets_are_ggn_blocks(name: str) -> None:
    build, batches = RELU_NETS[name]
    problem = cs.Problem(seeded(build), CE(), batches()[0])
    hessian, ggn = cs.hessian(problem), cs.ggn(problem)
    forced = cs.hessian(problem, route="autograd")
    for block in ggn.members:
        assert hessian.route_of(block) == "piecewise-linear"
        same(hessian.blocks[block].dense(), ggn.blocks[block].dense())
        same(forced.blocks[block].dense(), ggn.blocks[block].dense())
        assert hessian.blocks[block].positive_semidefinite
    # the whole matrices differ: layers multiply each other
    assert relative(hessian.dense(), ggn.dense()) > 0.01


def test_shared_layers_of_relu_nets_are_not() -> None:
    problem = cs.Problem(seeded(TwoNames), CE(), data((4,), real(4), labels(3))()[0])
    hessian, ggn = cs.hessian(problem), cs.ggn(problem)
    assert hessian.route_of("first") == "autograd"
    assert relative(hessian.blocks["first"].dense(), ggn.blocks["first"].dense()) > 0.01


# -- closed forms ------------------------------------------------------------------------------


def design(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def kron(outer: Tensor, inner: Tensor, out: int, inp: int) -> Tensor:
    """``sum_n outer_n (x) inner_n`` on ``[W b]`` in the order ``[W.flatten(), b]``."""
    matrix = torch.einsum("nop,nij->oipj", outer, inner).reshape(out * (inp + 1), -1)
    grid = torch.arange(out * (inp + 1)).reshape(out, inp + 1)
    order = torch.cat([grid[:, :-1].reshape(-1), grid[:, -1]])
    return matrix[order][:, order]


def squares(x: Tensor) -> Tensor:
    return design(x).unsqueeze(2) * design(x).unsqueeze(1)


@pytest.mark.parametrize("sizes", [(6,), (4, 1, 1)])
def test_linear_regression(sizes: tuple[int, ...]) -> None:
    x, y = data((6,), real(3), real(2))()[0]
    problem = cs.Problem(seeded(lambda: nn.Linear(3, 2)), MSE(), cut((x, y), sizes))
    eye = torch.eye(2, dtype=torch.float64).expand(6, 2, 2)
    truth = kron(2 * eye / 12, squares(x), 2, 3)
    for matrix in (cs.hessian, cs.ggn, cs.fisher):
        same(matrix(problem).dense(), truth)
        same(matrix(problem).blocks["(root)"].dense(), truth)
    same(cs.kfac(problem).dense(), truth)
    error = 2 * (problem.user_model(x) - y).detach()
    truth = kron(error.unsqueeze(2) * error.unsqueeze(1) / 12, squares(x), 2, 3)
    same(cs.empirical_fisher(problem).dense(), truth)


@pytest.mark.parametrize("sizes", [(6,), (4, 1, 1)])
def test_logistic_regression(sizes: tuple[int, ...]) -> None:
    x, y = data((6,), real(3), lambda n, g: torch.randint(0, 2, (n, 1), generator=g).double())()[0]
    problem = cs.Problem(seeded(lambda: nn.Linear(3, 1)), BCE(), cut((x, y), sizes))
    p = problem.user_model(x).sigmoid().detach()
    truth = kron((p * (1 - p)).unsqueeze(2) / 6, squares(x), 1, 3)
    for matrix in (cs.hessian, cs.ggn, cs.fisher):
        same(matrix(problem).dense(), truth)
    truth = kron((p - y).square().unsqueeze(2) / 6, squares(x), 1, 3)
    same(cs.empirical_fisher(problem).dense(), truth)


@pytest.mark.parametrize("sizes", [(6,), (4, 1, 1)])
def test_softmax_regression(sizes: tuple[int, ...]) -> None:
    x, y = data((6,), real(3), labels(3))()[0]
    problem = cs.Problem(seeded(lambda: nn.Linear(3, 3)), CE(weight=W3), cut((x, y), sizes))
    p = problem.user_model(x).softmax(1).detach()
    c = W3[y]
    inner = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    truth = kron((c / c.sum()).reshape(-1, 1, 1) * inner, squares(x), 3, 3)
    for matrix in (cs.hessian, cs.ggn, cs.fisher):
        same(matrix(problem).dense(), truth)
        same(matrix(problem).blocks["(root)"].dense(), truth)
    error = p - nn.functional.one_hot(y, 3)
    outer = (c / c.sum()).reshape(-1, 1, 1) * error.unsqueeze(2) * error.unsqueeze(1)
    same(cs.empirical_fisher(problem).dense(), kron(outer, squares(x), 3, 3))


# -- other identities --------------------------------------------------------------------------


def test_attention_does_not_care_which_axis_is_first() -> None:
    """The same weights, samples or positions first, and as many of one as of the other."""
    for positions in (2, 3):
        pair = data((3,), real(positions, 4), labels(3, positions))()[0]
        first, second = (
            cs.Problem(seeded(lambda b=b: Attention(b)), CE(), pair) for b in (True, False)
        )
        for name in ("hessian", "ggn", "ggn blocks", "empirical", "kfac", "kfac reduce", "ekfac"):
            same(MATRICES[name](second), MATRICES[name](first))


def test_flat_and_stacked_tokens_are_the_same_problem() -> None:
    x, y = data((3,), labels(5, 4), labels(5, 4))()[0]
    stacked = cs.Problem(seeded(lambda: TiedLanguage(flat=False)), CE(), (x, y))
    flat = cs.Problem(seeded(lambda: TiedLanguage(flat=True)), CE(), (x, y.flatten()))
    for name in ("hessian", "ggn", "ggn blocks", "empirical", "per term", "kfac", "kfac reduce"):
        same(MATRICES[name](flat), MATRICES[name](stacked))


def test_a_tied_weight_sums_the_blocks_of_the_untied_ones() -> None:
    """The gradient of a tied weight is the sum over its uses, so the Fisher has all cross terms."""

    class Free(TiedLanguage):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight = nn.Parameter(self.embed.weight.detach().clone())

    pair = data((3,), labels(5, 4), labels(5, 4))()[0]
    tied_model = seeded(TiedLanguage)
    free_model = seeded(Free)
    free_model.load_state_dict(tied_model.state_dict())
    tied, free = (cs.Problem(m, CE(), pair) for m in (tied_model, free_model))
    a, b = cs.ggn(free).layout.index(["embed.weight"]), cs.ggn(free).layout.index(["head.weight"])
    for matrix in (cs.ggn, cs.hessian, cs.empirical_fisher):
        full = matrix(free).dense()
        total = full[a][:, a] + full[b][:, b] + full[a][:, b] + full[b][:, a]
        same(matrix(tied).blocks["embed"].dense(), total)


def test_named_blocks_are_parts_of_the_whole() -> None:
    pair = data((4,), real(3), labels(3))()[0]
    ways = ["layer", "parameter", "all", {"ends": ["0", "4.bias"], "middle": ["2", "4.weight"]}]
    problems = [cs.Problem(seeded(lambda: mlp(T, 3, 3, 3, 3)), CE(), pair, blocks=w) for w in ways]
    for matrix in (cs.hessian, cs.ggn, cs.empirical_fisher):
        full = matrix(problems[0]).dense()
        for problem in problems:
            op = matrix(problem)
            same(op.dense(), full)
            for name, members in op.members.items():
                index = op.layout.index(members)
                same(op.blocks[name].dense(), full[index][:, index])


def test_subset_is_the_problem_on_these_samples() -> None:
    x, y = data((6,), real(3), labels(3))()[0]
    problem_ = problem("tanh", data=cut((x, y), (2, 3, 1)))
    subset = problem_.subset(4, seed=2)
    chosen = torch.randperm(6, generator=torch.Generator().manual_seed(2))[:4].sort().values
    direct = problem("tanh", data=(x[chosen], y[chosen]))
    assert subset.n_samples == 4
    for name in ("hessian", "ggn blocks", "kfac", "gradient"):
        same(MATRICES[name](subset), MATRICES[name](direct))
    same(MATRICES["hessian"](problem_.subset(6)), MATRICES["hessian"](problem_))


def test_tuple_and_dict_inputs_are_cut_together() -> None:
    (left, right), y = data((5,), both(real(3), real(2)), labels(3))()[0]
    model = seeded(Pair)
    as_tuple = cs.Problem(model, CE(), ((left, right), y), forward=lambda m, x: m(*x))
    as_dict = cs.Problem(
        model, CE(), ({"left": left, "right": right}, y), forward=lambda m, x: m(**x)
    )
    unpacked = cs.Problem(
        model,
        CE(),
        [{"a": left, "b": right, "target": y}],
        forward=lambda m, x: m(*x),
        unpack=lambda batch: ((batch["a"], batch["b"]), batch["target"]),
    )
    for name in ("hessian", "ggn blocks", "empirical"):
        same(MATRICES[name](as_dict), MATRICES[name](as_tuple))
        same(MATRICES[name](unpacked), MATRICES[name](as_tuple))
        same(MATRICES[name](as_dict.subset(3, 1)), MATRICES[name](as_tuple.subset(3, 1)))


def test_tokens_flat_or_not_under_a_split() -> None:
    model = seeded(lambda: tokens(flat_tokens))
    x, y = data((4,), real(3, 2), labels(3, 3))()[0]
    one = cs.Problem(model, CE(), (x, y.flatten()))
    many = cs.Problem(model, CE(), [(x[:1], y[:1].flatten()), (x[1:], y[1:].flatten())])
    for name in ("hessian", "ggn blocks", "empirical", "per term", "kfac", "kfac reduce"):
        same(MATRICES[name](many), MATRICES[name](one))
