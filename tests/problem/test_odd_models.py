"""Where a wrong number would not be noticed: odd batches and odd models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

import curvscope as cs
from tests.curvature.nets import Apply, FirstToken, mlp, seeded, tokens_last
from tests.truth import dense_ggn, dense_hessian, flat_grad, relative

from .exactly import MATRICES, exact, truth_of
from .refusals import CE, MSE, X, Y, Z, net

# -- data --------------------------------------------------------------------------------------


def test_channels_last() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(3, 2, 3, stride=2),
            nn.Flatten(),
            nn.Linear(8, 3),
        )
    )
    x = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    pairs = [
        cs.Problem(m, CE(), (v, Y))
        for m, v in ((model, x), (last, x.contiguous(memory_format=torch.channels_last)))
    ]
    for name, matrix in MATRICES.items():
        assert relative(matrix(pairs[1]), matrix(pairs[0])) < 1e-11, name


def test_inputs_with_odd_memory() -> None:
    model = net()
    truth = MATRICES["ggn"](cs.Problem(model, CE(), (X, Y)))
    wide = torch.stack([X, X + 1], 2)
    for x in (X.T.contiguous().T, wide[..., 0], X.clone().requires_grad_(), X.float().double()):
        value = MATRICES["ggn"](cs.Problem(model, CE(), (x, Y)))
        assert relative(value, truth) < (
            1e-6 if x.grad_fn is None and not torch.equal(x, X) else 1e-12
        )


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 6])
def test_as_many_samples_as_channels_or_positions(samples: int) -> None:
    """Axes of equal length are not mistaken for each other, whatever the number of samples."""
    generator = torch.Generator().manual_seed(samples)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    n = samples
    settings: list[tuple[nn.Module, Tensor, Tensor]] = [
        (seeded(lambda: mlp(nn.Tanh, n, n, 2)), draw(n, n), draw(n, 2)),
        (
            seeded(
                lambda: nn.Sequential(
                    nn.Linear(2, n), nn.Tanh(), nn.Linear(n, 2), Apply(tokens_last)
                )
            ),
            draw(n, n, 2),
            draw(n, 2, n),
        ),
        (seeded(FirstToken), draw(n, n, 2), draw(n, 2)),
        (
            seeded(
                lambda: nn.Sequential(
                    nn.Conv1d(n, n, 1), nn.GroupNorm(1, n), nn.Tanh(), nn.Conv1d(n, 1, n)
                )
            ),
            draw(n, n, n),
            draw(n, 1, 1),
        ),
        (
            seeded(
                lambda: nn.Sequential(
                    nn.LayerNorm(n), nn.Linear(n, n), nn.Tanh(), nn.LayerNorm((n, n))
                )
            ),
            draw(n, n, n),
            draw(n, n, n),
        ),
    ]
    for model, x, y in settings:
        if n == 1 and any(isinstance(m, nn.GroupNorm) for m in model.modules()):
            continue  # torch refuses to normalise a single value
        problem = cs.Problem(model, MSE(), (x, y))
        parameters = list(model.parameters())
        with sdpa_kernel(SDPBackend.MATH):
            z = model(x)
        hessian = dense_hessian(MSE()(z, y), parameters)
        ggn = dense_ggn(lambda v, y=y: MSE()(v, y), z, parameters)
        exact(problem, hessian, ggn, 1e-10)
        g = torch.stack(
            [
                flat_grad(F.mse_loss(z[k], y[k], reduction="sum"), parameters, retain_graph=True)
                for k in range(n)
            ]
        )
        value = cs.empirical_fisher(problem)
        assert relative(value.dense(), g.T @ g / y.numel()) < 1e-10


def test_batches_of_no_sample_add_nothing() -> None:
    truth = cs.Problem(net(), CE(), (X, Y))
    problem = cs.Problem(net(), CE(), [(X[:0], Y[:0]), (X[:4], Y[:4]), (X[4:], Y[4:])])
    assert problem.n_samples == 6
    for matrix in ("hessian", "ggn blocks", "kfac", "gradient"):
        assert relative(MATRICES[matrix](problem), MATRICES[matrix](truth)) < 1e-12


def test_forms_of_data() -> None:
    pair, loader = (X, Y), DataLoader(TensorDataset(X, Y), batch_size=4)
    forms: list[Any] = [
        pair,
        [X, Y],
        [pair],
        [[X, Y]],
        (pair,),
        loader,
        list(loader),
        [X[:3], Y[:3]],
    ]
    sizes = [cs.Problem(net(), CE(), data).n_samples for data in forms]
    assert sizes == [6, 6, 6, 6, 6, 6, 6, 3]
    two = cs.Problem(net(), CE(), (pair, pair))
    assert two.n_samples == 12
    triples = cs.Problem(net(), CE(), [(X, Z, Y)], unpack=lambda b: (b[0], b[2]))
    assert triples.objective() == cs.Problem(net(), CE(), pair).objective()
    one = cs.Problem(net(), CE(), (X, Z, Y), unpack=lambda b: (b[0], b[2]))
    assert one.objective() == triples.objective()


# -- models ------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Returns its parameter: a function of two variables as a model."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor([[1.5, -0.5]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.point


def test_a_model_that_returns_its_parameter() -> None:
    def rosenbrock(z: Tensor, y: Tensor) -> Tensor:
        return ((1 - z[:, 0]) ** 2 + 100 * (z[:, 1] - z[:, 0] ** 2) ** 2).sum()

    problem = cs.Problem(Toy(), rosenbrock, (torch.zeros(1, 1), torch.zeros(1)), reduction="sum")
    a, b = 1.5, -0.5
    truth = torch.tensor([[1200 * a * a - 400 * b + 2, -400 * a], [-400 * a, 200.0]]).double()
    for op in (cs.hessian(problem), cs.ggn(problem)):
        assert relative(op.dense(), truth) < 1e-12
        assert relative(op.blocks["(root)"].dense(), truth) < 1e-12
        assert relative(op @ torch.eye(2, dtype=torch.float64), truth) < 1e-12


class MaxNorm(nn.Module):
    """The embedding scales its own weights down whenever it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3, max_norm=0.5)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


def test_a_forward_pass_that_changes_its_weights() -> None:
    model = seeded(MaxNorm)
    tokens = torch.tensor([0, 1, 2, 3, 4, 0])
    before = model.embed.weight.detach().clone()
    problem = cs.Problem(model, CE(), (tokens, Y))
    values = [MATRICES[name](problem) for name in ("hessian", "ggn blocks", "gradient")]
    assert torch.equal(model.embed.weight, before)
    model(tokens)  # now the weights are within the norm, and stay as they are
    assert not torch.equal(model.embed.weight, before)
    again = [MATRICES[name](problem) for name in ("hessian", "ggn blocks", "gradient")]
    for first, second in zip(values, again, strict=True):
        assert relative(first, second) < 1e-5


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.never = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.never(x)
        return self.used(x)


def test_parameters_without_influence() -> None:
    problem = cs.Problem(seeded(Unused), CE(), (X, Y))
    hessian, ggn = cs.hessian(problem), cs.ggn(problem)
    for op in (hessian, ggn, cs.empirical_fisher(problem), cs.fisher(problem, samples=1)):
        assert not op.blocks["never"].dense().any()
        assert float(op.blocks["used"].trace()) > 0
        assert op.dense().shape == (20, 20)


class Mixed(nn.Module):
    """float32 and float64 layers in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(torch.tanh(self.low(x.to(self.low.weight.dtype))).double())


def test_models_of_two_precisions() -> None:
    model = seeded(Mixed)
    truth = cs.hessian(cs.Problem(model, CE(), (X, Y))).dense()
    model.low.float()
    for matrix in (cs.hessian, cs.ggn):
        problem = cs.Problem(model, CE(), (X, Y))
        op = matrix(problem)
        assert bool(op.dense().isfinite().all())
        for block in op.blocks.values():
            assert bool(block.dense().isfinite().all())
    assert relative(cs.hessian(problem).dense().double(), truth) < 1e-5


class Transformed(nn.Module):
    """Function transforms of torch around layers, and one sample at a time."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(3, 4), nn.Linear(4, 3), how

    def net(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "loop":
            return torch.stack([self.net(v) for v in x])
        if self.how == "vmap":
            return torch.vmap(self.net)(x)
        if self.how == "grad":
            return torch.vmap(torch.func.grad(lambda v: self.net(v).square().sum()))(x)
        if self.how == "jvp":
            return torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1]
        values = dict(self.second.named_parameters())
        return torch.func.functional_call(self.second, values, (torch.tanh(self.first(x)),))


@pytest.mark.parametrize("how", ["loop", "vmap", "grad", "jvp", "functional_call"])
def test_function_transforms_in_the_model(how: str) -> None:
    model = seeded(lambda: Transformed(how))
    problem = cs.Problem(model, CE(), (X, Y))
    exact(problem, *truth_of(model))
    cs.kfac(problem, uncovered="zero")


class UserFunction(torch.autograd.Function):
    """Named like an operation of torch that is piecewise linear, which it is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def test_functions_of_the_user_are_not_known_by_their_name() -> None:
    relu = type("Relu", (UserFunction,), {})
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), Apply(relu.apply), nn.Linear(4, 3)))
    problem = cs.Problem(model, CE(), (X, Y))
    assert "piecewise-linear" not in cs.hessian(problem).plans["0"].routes
    exact(problem, *truth_of(model), 1e-10)


class LearnedQuery(nn.Module):
    """A parameter that is the input of a layer, and a weight that multiplies itself."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(3, 3))
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.linear(self.query, self.query)  # both arguments
        return self.out(torch.tanh(x @ mixed)) + F.linear(x, self.out.weight)


def test_parameters_as_inputs_of_layers() -> None:
    model = seeded(LearnedQuery)
    exact(cs.Problem(model, CE(), (X, Y)), *truth_of(model))


class TwoBiases(nn.Module):
    """One weight with two biases, each with a block of its own or together."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))
        self.first, self.second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight, self.first)), self.weight, self.second)


@pytest.mark.parametrize(
    "blocks", ["layer", "parameter", {"a": ["weight", "first"], "b": ["second"]}]
)
def test_one_weight_with_two_biases(blocks: Any) -> None:
    model = seeded(TwoBiases)
    problem = cs.Problem(model, CE(), (X, Y), blocks=blocks)
    exact(problem, *truth_of(model))
    cs.kfac(problem, uncovered="zero")


class BiasFirst(nn.Module):
    """Registers the bias before the weight: the order of the vector, not of the view."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.weight = nn.Parameter(torch.zeros(4, 3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(F.linear(x, self.weight, self.bias))))


def test_bias_before_weight() -> None:
    model = seeded(BiasFirst)
    problem = cs.Problem(model, CE(), (X, Y))
    assert problem.layout.names[0] == "bias"
    exact(problem, *truth_of(model))
    usual = seeded(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
    )
    usual[0].load_state_dict({"weight": model.weight, "bias": model.bias})
    usual[1].load_state_dict(model.norm.state_dict())
    usual[3].load_state_dict(model.head.state_dict())
    other = cs.Problem(usual, CE(), (X, Y))
    order = torch.cat([12 + torch.arange(4), torch.arange(12)])
    for method in (cs.kfac, cs.ekfac, cs.kflr, cs.kfra, cs.diagonal_kf):
        block = method(problem, uncovered="zero").blocks["(root)"].dense()
        expected = method(other, uncovered="zero").blocks["0"].dense()
        assert relative(block, expected[order][:, order]) < 1e-12


def test_old_weight_norm() -> None:
    """The hook that came before parametrizations: another way to ``torch._weight_norm``."""
    with pytest.warns(FutureWarning):
        model = seeded(
            lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))
        )
    problem = cs.Problem(model, CE(), (X, Y))
    H = cs.hessian(problem).dense()
    parameters = list(problem.params.values())
    rows = []
    for p in parameters:
        flat = p.data.view(-1)
        for k in range(flat.numel()):
            value = float(flat[k])
            flat[k] = value + 1e-5
            high = problem.gradient()
            flat[k] = value - 1e-5
            rows.append((high - problem.gradient()) / 2e-5)
            flat[k] = value
    assert float((H - torch.stack(rows)).norm()) < 1e-8
