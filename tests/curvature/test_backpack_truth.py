"""Every exact extension against dense autograd, on a table of models, losses and batchings."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.errors import BackpackError
from tests.curvature.backpack_cases import ALL, CASES, HESSIAN, Case
from tests.curvature.backpack_models import N, Setting, classify, cross_entropy, mlp, randn, regress
from tests.curvature.backpack_truth import (
    kflr_blocks,
    kfra_blocks,
    positive_curvature_blocks,
    relative,
    sample_ggns,
    sample_gradients,
    sample_hessians,
)

UNEVEN = (3, 1)


def split(setting: Setting, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(setting.x.split(list(sizes)), setting.y.split(list(sizes)), strict=True))


def problem_of(setting: Setting, sizes: tuple[int, ...] = UNEVEN, **options) -> cs.Problem:
    return cs.Problem(setting.model, setting.loss, split(setting, sizes), **options)


class Truth:
    """The dense matrices of a setting, unnormalised, each computed when it is first asked for."""

    def __init__(self, setting: Setting) -> None:
        self.wrt = [p for p in setting.model.parameters() if p.requires_grad]
        self.pieces = (setting.model, setting.total, setting.x, setting.y, self.wrt)
        self.sizes = [p.numel() for p in self.wrt]

    @functools.cached_property
    def gradients(self) -> Tensor:
        return sample_gradients(*self.pieces)

    @functools.cached_property
    def ggns(self) -> Tensor:
        return sample_ggns(*self.pieces)

    @functools.cached_property
    def hessians(self) -> Tensor:
        return sample_hessians(*self.pieces)

    def __getitem__(self, extension: str) -> Tensor:
        if extension in ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"):
            g = self.gradients
            norms = torch.stack([part.square().sum(1) for part in g.split(self.sizes, 1)], 1)
            return {
                "BatchGrad": g,
                "BatchL2Grad": norms,
                "SumGradSquared": g.square().sum(0),
                "Variance": g.var(0, correction=0),
            }[extension]
        samples = self.hessians if extension in HESSIAN or extension == "HMP" else self.ggns
        if extension in ("HMP", "GGNMP"):
            ones = [torch.ones(size, size, dtype=samples.dtype) for size in self.sizes]
            return samples.sum(0) * torch.block_diag(*ones)
        if extension == "SqrtGGNExact":
            return samples.sum(0)
        diagonals = samples.diagonal(dim1=1, dim2=2)
        return diagonals if extension.startswith("Batch") else diagonals.sum(0)


@functools.lru_cache(maxsize=1)
def setting_and_truth(case: Case) -> tuple[Setting, Truth]:
    torch.manual_seed(len(case.name))
    setting = case.build()
    return setting, Truth(setting)


def value_of(problem: cs.Problem, extension: str) -> Tensor:
    """What an extension gives, without the problem's factor 1/M."""
    result = cs.backpack.compute(problem, extension)
    if isinstance(result, cs.Operator):
        diagonal = extension.startswith("Diag")
        return (result.diagonal() if diagonal else result.dense()) / problem.scale
    return result.values


PAIRS = [(case, extension) for case in CASES for extension in case.extensions()]


@pytest.mark.parametrize(
    ("case", "extension"), PAIRS, ids=lambda value: getattr(value, "name", value)
)
def test_equals_dense_truth_or_is_refused(case: Case, extension: str) -> None:
    setting, truth = setting_and_truth(case)
    problem = problem_of(setting, blocks="all")
    if extension in case.refused:
        with pytest.raises(BackpackError, match=r"Use|use cs\."):
            cs.backpack.compute(problem, extension)
        return
    value = value_of(problem, extension)
    assert value.shape == truth[extension].shape
    # a sum of absolute sizes, so that a truth of zero is no division by zero
    scale = truth[extension].abs().max().clamp_min(1e-12)
    assert float((value - truth[extension]).abs().max() / scale) < 1e-10
    if extension in ("DiagHessian", "DiagGGNExact"):
        assert relative(value, truth[extension]) < 1e-10


def test_the_table_has_both_answers_for_every_extension() -> None:
    for extension in ALL:
        answers = {extension in case.refused for case in CASES}
        first_order = extension in ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance")
        assert answers == ({False} if first_order else {True, False})


SPLITS = (("mean", (4,)), ("mean", (1, 2, 1)), ("sum", (1, 3)))


@pytest.mark.parametrize(("reduction", "sizes"), SPLITS, ids=str)
@pytest.mark.parametrize("extension", ALL)
def test_reductions_and_splits(extension: str, reduction: str, sizes: tuple[int, ...]) -> None:
    setting, truth = setting_and_truth(CASES[0])
    loss = nn.CrossEntropyLoss(reduction=reduction)
    problem = cs.Problem(setting.model, loss, split(setting, sizes), blocks="all")
    assert problem.scale == (1 / N if reduction == "mean" else 1.0)
    assert relative(value_of(problem, extension), truth[extension]) < 1e-10


def test_squared_error_divides_by_all_outputs() -> None:
    torch.manual_seed(0)
    setting = regress(mlp(), randn(N, 3))
    wrt = list(setting.model.parameters())
    truth = sample_ggns(setting.model, setting.total, setting.x, setting.y, wrt).sum(0) / (3 * N)
    problem = problem_of(setting, blocks="all")
    assert relative(cs.backpack.sqrt_ggn(problem).dense(), truth) < 1e-10
    assert relative(cs.backpack.ggnmp(problem).diagonal(), truth.diagonal()) < 1e-10


def test_per_sample_totals_are_those_of_the_objective() -> None:
    setting, truth = setting_and_truth(CASES[0])
    problem = problem_of(setting)
    grad = cs.backpack.batch_grad(problem)
    assert relative(grad.total(), problem.gradient()) < 1e-12
    diagonal = cs.backpack.batch_diag_ggn(problem).total()
    assert relative(diagonal, cs.backpack.diag_ggn(problem).diagonal()) < 1e-12
    norms = cs.backpack.batch_l2(problem)
    assert relative(norms.total(), truth["BatchGrad"].square().sum(1)) < 1e-12
    name = problem.layout.names[2]
    assert grad.of(name).shape == (N, *problem.params[name].shape)
    assert relative(norms.of(name), grad.of(name).flatten(1).square().sum(1)) < 1e-12
    assert list(grad.to_frame()["parameter"]) == list(problem.layout.names)
    with pytest.raises(cs.errors.ParameterMismatchError, match=r"0\.weight"):
        grad.of("0.weigth")


def test_blocks_follow_the_problem() -> None:
    setting, truth = setting_and_truth(CASES[0])
    problem = problem_of(setting)
    for compute in (cs.backpack.diag_ggn, cs.backpack.sqrt_ggn, cs.backpack.kflr, cs.backpack.hmp):
        op = compute(problem)
        assert list(op.blocks) == list(problem.blocks)
        assert op.layout == problem.layout and not op.uncovered
    roots = cs.backpack.sqrt_ggn(problem)
    rows = problem.layout.index(problem.blocks["2"])
    block = truth["SqrtGGNExact"][rows][:, rows] / N
    assert relative(roots.blocks["2"].dense(), block) < 1e-10
    assert roots.blocks["2"].rank == 3 * N


def test_parameters_left_out_stay_out() -> None:
    setting, truth = setting_and_truth(CASES[0])
    problem = problem_of(setting, params=["!0.bias", "!2"], blocks="all")
    rows = cs.Problem(setting.model, nn.MSELoss(), (setting.x, setting.x)).layout.index(
        problem.layout.names
    )
    assert problem.layout.names == ("0.weight", "4.weight", "4.bias")
    for extension in ("SqrtGGNExact", "HMP"):
        value = cs.backpack.compute(problem, extension).dense() * N
        assert relative(value, truth[extension][rows][:, rows]) < 1e-10
    assert relative(cs.backpack.batch_grad(problem).values, truth["BatchGrad"][:, rows]) < 1e-10


def linear_chain(act: nn.Module, make: Callable[..., Setting] = classify) -> Setting:
    torch.manual_seed(3)
    return make(mlp(act), randn(N, 3))


@pytest.mark.parametrize("make", [classify, regress], ids=lambda make: make.__name__)
@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU(), nn.Dropout()], ids=str)
@pytest.mark.parametrize("extension", ["KFLR", "KFRA"])
def test_kronecker_factors_of_linear_layers(
    extension: str, act: nn.Module, make: Callable[..., Setting]
) -> None:
    setting = linear_chain(act, make)
    blocks = {"KFLR": kflr_blocks, "KFRA": kfra_blocks}[extension]
    truth = blocks(setting.model, setting.total, setting.x, setting.y)
    problem = problem_of(setting, (1, 3))
    op = cs.backpack.compute(problem, extension)
    assert op.info.what == f"{extension} (BackPACK)" and not op.info.exact
    for name, (G, A) in truth.items():
        expected = problem.scale * torch.block_diag(torch.kron(G, A), G)
        assert relative(op.blocks[name].dense(), expected) < 1e-10


def test_kflr_agrees_with_the_library_up_to_the_bias_column() -> None:
    setting = linear_chain(nn.Tanh())
    problem = problem_of(setting, params=["*.weight"])
    assert relative(cs.backpack.kflr(problem).dense(), cs.kflr(problem).dense()) < 1e-10
    assert relative(cs.backpack.kfra(problem).dense(), cs.kfra(problem).dense()) < 1e-10


@pytest.mark.parametrize("modify", ["clip", "abs"])
def test_positive_curvature_hessian(modify: str) -> None:
    setting = linear_chain(nn.Tanh())
    pieces = (setting.model, setting.total, setting.x, setting.y)
    truth = torch.block_diag(*positive_curvature_blocks(*pieces, modify).values()) / N
    op = cs.backpack.pchmp(problem_of(setting), modify=modify)
    assert relative(op.dense(), truth) < 1e-10
    assert float(op.eigenvalues().min()) > -1e-12
    vectors = randn(op.shape[0], 70)  # more columns than BackPACK gets at once
    assert relative(op @ vectors, truth @ vectors) < 1e-10


def test_products_use_the_parameters_of_their_time() -> None:
    setting = linear_chain(nn.Tanh())
    problem = problem_of(setting, blocks="parameter")
    op = cs.backpack.hmp(problem)
    assert op.info.exact and not cs.backpack.hmp(problem_of(setting)).info.exact
    before = op.dense()
    with torch.no_grad():
        setting.model[0].weight.mul_(2.0)
    assert torch.equal(op.dense(), before)
    assert relative(cs.backpack.hmp(problem).dense(), before) > 1e-3


def test_float32_problem() -> None:
    setting, truth = setting_and_truth(CASES[0])
    problem = cs.Problem(
        setting.model, nn.CrossEntropyLoss(), split(setting, UNEVEN), dtype=torch.float32
    )
    for extension in ("DiagHessian", "DiagGGNExact", "KFRA", "BatchGrad"):
        result = cs.backpack.compute(problem, extension)
        assert (result.dtype if isinstance(result, cs.Operator) else result.values.dtype) == (
            torch.float32
        )
    value = cs.backpack.diag_ggn(problem).diagonal().double()
    assert relative(value, truth["DiagGGNExact"] / N) < 1e-5


def test_truth_helpers_know_a_closed_form() -> None:
    """Softmax regression: the GGN is the Hessian, ``sum_n (diag p - p p^T) (x) x x^T``."""
    torch.manual_seed(1)
    model, x = nn.Linear(3, 3, bias=False).double(), randn(N, 3)
    y = torch.randint(3, (N,))
    p = model(x).softmax(1).detach()
    closed = sum(
        torch.kron(torch.diag(p[n]) - torch.outer(p[n], p[n]), torch.outer(x[n], x[n]))
        for n in range(N)
    )
    wrt = [model.weight]
    for truth in (sample_ggns, sample_hessians):
        assert relative(truth(model, cross_entropy, x, y, wrt).sum(0), closed) < 1e-12
    problem = cs.Problem(model, nn.CrossEntropyLoss(reduction="sum"), (x, y))
    assert relative(cs.backpack.sqrt_ggn(problem).dense(), closed) < 1e-12
