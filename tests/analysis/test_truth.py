"""The truth module against closed forms and against definitions written out here."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope.analysis import truth
from curvscope.analysis.batches import cut, merge
from curvscope.analysis.labels import own_loss, term_weights
from curvscope.errors import MemoryLimitError, UnsupportedLayerError, UnsupportedLossError
from tests.analysis import verify_models as models


def linear(loss: object, targets: Tensor, **options: object) -> tuple[cs.Problem, Tensor]:
    """A linear model in two uneven batches; and its inputs ``[N, 5]`` with a 1 appended."""
    model = models.seeded(lambda: nn.Linear(4, 3)).double()
    x = models.inputs(4).double()
    batches = [(x[:13], targets[:13]), (x[13:], targets[13:])]
    ones = torch.ones(models.N, 1, dtype=torch.float64)
    return cs.Problem(model, loss, batches, **options), torch.cat([x, ones], 1)


def in_vector_order(matrix: Tensor) -> Tensor:
    """From the order of ``[W b]`` (row by row) to weight first, then bias."""
    index = torch.arange(15).reshape(3, 5)
    order = torch.cat([index[:, :4].reshape(-1), index[:, 4]])
    return matrix[order.unsqueeze(1), order]


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())


def test_linear_regression() -> None:
    problem, a = linear(nn.MSELoss(), models.inputs(3, seed=2).double())
    gram = 2 * a.T @ a / (3 * models.N)
    expected = in_vector_order(torch.kron(torch.eye(3, dtype=torch.float64), gram))
    for matrix in (truth.hessian, truth.ggn, truth.fisher):
        close(matrix(problem), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_regression(weighted: bool) -> None:
    y = models.classes()
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64) if weighted else None
    problem, a = linear(nn.CrossEntropyLoss(weight=weight), y)
    p = problem.model(a[:, :4]).softmax(1).detach()
    c = torch.ones(models.N, dtype=torch.float64) if weight is None else weight[y]
    middle = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    expected = torch.einsum("n,noq,ni,nj->oiqj", c, middle, a, a).reshape(15, 15) / c.sum()
    expected = in_vector_order(expected)
    for matrix in (truth.hessian, truth.ggn, truth.fisher):
        close(matrix(problem), expected)
    onehot = F.one_hot(y, 3).double()
    g = torch.einsum("n,no,ni->noi", c.sqrt(), p - onehot, a).reshape(models.N, 15)
    close(truth.empirical_fisher(problem), in_vector_order(g.T @ g / c.sum()))
    flat = torch.einsum("n,no,ni->oi", c, p - onehot, a).reshape(15) / c.sum()
    close(truth.gradient(problem), in_vector_order(torch.diag(flat)).diagonal())


def test_logistic_regression() -> None:
    y = (models.inputs(3, seed=2) > 0).double()
    positive = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    problem, a = linear(nn.BCEWithLogitsLoss(pos_weight=positive, reduction="sum"), y)
    p = problem.model(a[:, :4]).sigmoid().detach()
    c = y * positive + (1 - y)
    middle = torch.diag_embed(c * p * (1 - p))
    expected = torch.einsum("noq,ni,nj->oiqj", middle, a, a).reshape(15, 15)
    for matrix in (truth.hessian, truth.ggn, truth.fisher):
        close(matrix(problem), in_vector_order(expected))


@pytest.mark.parametrize("name", ["tokens", "tied", "binary", "class weights", "transformer"])
def test_fisher_is_the_ggn(name: str) -> None:
    problem = models.problem(name)
    close(truth.fisher(problem), truth.ggn(problem))


def test_columns_and_products() -> None:
    problem = models.problem("tied").subset(6)
    rows, v = [3, 17, 20], torch.randn(problem.layout.numel, dtype=torch.float64)
    hessian = truth.hessian(problem)
    close(hessian, hessian.T)
    close(truth.hessian_columns(problem, rows), hessian[:, rows])
    close(truth.hessian_product(problem, v), hessian @ v)
    close(truth.ggn_columns(problem, rows), truth.ggn(problem)[:, rows])
    close(truth.fisher_columns(problem, rows), truth.fisher(problem)[:, rows])
    g = truth.sample_gradients(problem)
    close(problem.scale * (g.T @ g), truth.empirical_fisher(problem))


def test_float32_models_are_copied_to_float64() -> None:
    problem = models.problem("mlp")
    assert problem.dtype == torch.float32
    found = truth.hessian(problem)
    assert found.dtype == torch.float64
    double = models.problem("mlp").with_data(truth.materialised(problem), dtype=torch.float64)
    close(found, truth.hessian(double))
    assert truth.converted(double) is double
    single = truth.hessian(problem, dtype=torch.float32)
    assert 1e-9 < float((single - found).norm() / found.norm()) < 1e-5
    assert problem.model[0].weight.dtype == torch.float32


SMOOTH = 0.1
WEIGHT = torch.tensor([0.5, 1.0, 3.0])


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=SMOOTH, ignore_index=1),
        functools.partial(F.cross_entropy, weight=WEIGHT, label_smoothing=SMOOTH, ignore_index=1),
    ],
)
def test_weights_of_smoothed_and_ignored_terms(loss: object) -> None:
    x, y = models.inputs(4), models.classes()
    problem = cs.Problem(models.seeded(models.mlp), loss, (x, y), dtype=torch.float64)
    with problem.session():
        outputs = problem.outputs(x.double())
        found = term_weights(problem, outputs, y)
        value = own_loss(problem.user_loss, outputs, y)
    weight = WEIGHT.double()
    target = (1 - SMOOTH) * F.one_hot(y, 3).double() + SMOOTH / 3
    expected = (target * weight).sum(1) * (y != 1)
    close(found, expected)
    assert float(value) == pytest.approx(problem.objective(), rel=1e-12)


def test_soft_labels_and_log_probabilities() -> None:
    soft = models.inputs(3, seed=4).softmax(1)
    problem = cs.Problem(
        models.seeded(models.mlp), nn.CrossEntropyLoss(weight=WEIGHT), (models.inputs(4), soft)
    )
    close(truth.fisher(problem), truth.ggn(problem))

    def build() -> nn.Module:
        return models.mlp().append(nn.LogSoftmax(1))

    logs = models.problem_of(build, nn.NLLLoss(weight=WEIGHT), models.inputs(4), models.classes())
    plain = models.problem_of(
        models.mlp, nn.CrossEntropyLoss(weight=WEIGHT), models.inputs(4), models.classes()
    )
    close(truth.fisher(logs), truth.fisher(plain))
    close(truth.hessian(logs), truth.hessian(plain))


def test_refusals(monkeypatch) -> None:
    with pytest.raises(UnsupportedLossError, match="HuberLoss"):
        truth.fisher(models.problem("huber"))
    with pytest.raises(UnsupportedLayerError, match="once_differentiable"):
        truth.hessian(models.custom(models.OnceDifferentiable))
    monkeypatch.setattr("curvscope.memory.available_bytes", lambda device="cpu": 1000)
    with pytest.raises(MemoryLimitError, match="params="):
        truth.ggn(models.problem("mlp"))


def test_batches_are_merged_and_cut() -> None:
    x, y = models.inputs(4), models.classes()
    mask = torch.ones(2, 2)
    batches = [({"x": x[:7], "mask": mask}, y[:7]), ({"x": x[7:], "mask": mask}, y[7:])]
    merged = merge(batches)
    assert merged is not None
    assert torch.equal(merged[0]["x"], x) and torch.equal(merged[1], y)
    assert torch.equal(merged[0]["mask"], mask)
    parts = cut(merged, [5, 15], torch.arange(20).flip(0))
    assert [len(part[1]) for part in parts] == [5, 15]
    assert torch.equal(parts[0][0]["x"], x.flip(0)[:5])
    assert torch.equal(parts[1][0]["mask"], mask)
    lengths = [(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 4), torch.zeros(2))]
    assert merge(lengths) is None
    assert merge([(x[:2], y[:2]), ({"x": x[2:]}, y[2:])]) is None
    assert merge([((x[:2], "a"), y[:2]), ((x[2:], "b"), y[2:])]) is None
