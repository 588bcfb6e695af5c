"""K-FAC, EKFAC, KFLR and FOOF against their definitions, term by term and label by label."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from tests.truth import relative

from . import factors as definition
from .cases import BCE, CE, MSE, UNEVEN
from .draws import POS, W3, bits, data, folded, labels, lengths, real, some_ignored
from .nets import Apply, Product, Reused, flat_tokens, mlp, seeded, tokens_last
from .reference import term_weights

S, T, R = nn.Sequential, nn.Tanh, nn.ReLU


def tokens(last: Any) -> nn.Module:
    return S(nn.Linear(2, 3), T(), nn.Linear(3, 3, bias=False), Apply(last))


SETTINGS: dict[str, tuple[Any, Any, Any]] = {
    "mlp": (lambda: mlp(T, 3, 4, 3), CE(), data(UNEVEN, real(3), labels(3))),
    "mlp-sum": (lambda: mlp(R, 3, 4, 3), CE(reduction="sum"), data((3, 2), real(3), labels(3))),
    "no-bias": (lambda: mlp(T, 3, 4, 2, bias=False), MSE(), data((3, 2), real(3), real(2))),
    "weights": (lambda: mlp(T, 3, 3, 3), CE(weight=W3), data((4, 2), real(3), labels(3))),
    "smoothing": (
        lambda: mlp(T, 3, 3, 3),
        CE(label_smoothing=0.3),
        data((4, 2), real(3), labels(3)),
    ),
    "bernoulli": (
        lambda: mlp(T, 3, 3, 3),
        BCE(pos_weight=POS),
        data((4, 2), real(3), bits(3)),
    ),
    "conv2d": (
        lambda: S(
            nn.Conv2d(2, 4, (2, 3), stride=(2, 1), padding=(1, 0), groups=2),
            T(),
            nn.Conv2d(4, 2, 2, dilation=(1, 2), bias=False),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        CE(),
        data((2, 3), real(2, 4, 6), labels(3)),
    ),
    "conv1d": (
        lambda: S(nn.Conv1d(2, 3, 2, padding=1), R(), nn.Conv1d(3, 2, 3)),
        CE(),
        data((3, 1), real(2, 4), labels(2, 3)),
    ),
    "conv3d": (
        lambda: S(nn.Conv3d(1, 2, (1, 2, 2)), T(), nn.Flatten(), nn.Linear(8, 2)),
        MSE(),
        data((2, 1), real(1, 1, 3, 3), real(2)),
    ),
    "tokens": (
        lambda: tokens(tokens_last),
        CE(),
        data((2, 3), real(3, 2), some_ignored(3, 3)),
    ),
    "tokens-flat-sum": (
        lambda: tokens(flat_tokens),
        CE(reduction="sum"),
        folded(data((2, 3), real(3, 2), labels(3, 3))),
    ),
    "tokens-lengths": (
        lambda: tokens(tokens_last),
        CE(),
        lengths(((2, 3), (1, 1), (3, 2)), lambda t: real(t, 2), lambda t: labels(3, t)),
    ),
    "reused": (Reused, CE(), data((3, 2), real(4), labels(3))),
}


class Setting:
    def __init__(self, name: str) -> None:
        build, self.loss, batches = SETTINGS[name]
        self.model, self.batches = seeded(build), batches()
        self.problem = cs.Problem(self.model, self.loss, self.batches)
        self.samples = sum(len(x) for x, _ in self.batches)

    def expected(self, sharing: str) -> dict[str, definition.Factors]:
        return definition.factors(self.model, self.loss, self.batches, self.problem.scale, sharing)

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param)


def close(value: Tensor, truth: Tensor) -> None:
    if truth.ndim == value.ndim + 1:
        truth = truth.squeeze(0)  # one group
    truth = truth.detach()
    assert value.shape == truth.shape
    assert relative(value, truth) < 1e-10


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_exact_factors(setting: Setting, sharing: str) -> None:
    op = cs.kfac(setting.problem, sharing=sharing)
    expected = setting.expected(sharing)
    assert list(op.blocks) == list(expected)
    for name, truth in expected.items():
        block, module = op.blocks[name], setting.module(name)
        close(block.factors["G"], truth.G)
        close(block.factors["A"], truth.A)
        close(block.dense(), definition.kron(module, truth.G, truth.A))
    close(cs.kflr(setting.problem, sharing=sharing).dense(), op.dense())


def test_the_definition_gives_the_exact_block(setting: Setting) -> None:
    ggn = cs.ggn(setting.problem)
    for name, truth in setting.expected("expand").items():
        module = setting.module(name)
        close(ggn.blocks[name].dense(), definition.dense(module, [truth.moments]))


def test_empirical_factors(setting: Setting) -> None:
    op = cs.kfac(setting.problem, fisher="empirical")

    def terms(loss: Any, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        none = copy.copy(loss)
        none.reduction = "none"
        losses = none(z, y)
        return losses, term_weights(loss, z, y).reshape(losses.shape)

    model = setting.model
    expected = definition.empirical_factors(
        model, setting.loss, setting.batches, setting.problem.scale, terms
    )
    for name, (G, A) in expected.items():
        close(op.blocks[name].factors["G"], G)
        close(op.blocks[name].factors["A"], A)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ekfac_is_the_best_in_its_basis(setting: Setting, sharing: str) -> None:
    op = cs.ekfac(setting.problem, sharing=sharing)
    for name, truth in setting.expected(sharing).items():
        module, block = setting.module(name), op.blocks[name]
        bases = [
            torch.kron(torch.linalg.eigh(g)[1], torch.linalg.eigh(a)[1])
            for g, a in zip(truth.G, truth.A, strict=True)
        ]
        basis = torch.block_diag(*bases)
        values = (basis.T @ truth.moments @ basis).diagonal()
        close(block.dense(), definition.dense(module, [basis * values @ basis.T]))
        # no other eigenvalues, and not K-FAC's own, come closer to the exact block
        exact = definition.dense(module, [truth.moments])
        error = (block.dense() - exact).norm()
        kfac = definition.kron(module, truth.G, truth.A)
        assert error <= (kfac - exact).norm() + 1e-12
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            noise = torch.randn(len(values), generator=generator, dtype=torch.float64)
            other = basis * (values + 0.1 * values.abs().max() * noise) @ basis.T
            assert error < (definition.dense(module, [other]) - exact).norm()


def test_foof(setting: Setting) -> None:
    plain, scaled = cs.foof(setting.problem), cs.foof(setting.problem, scaled=True)
    for name, truth in setting.expected("expand").items():
        module = setting.module(name)
        eye = torch.eye(truth.G.shape[-1], dtype=torch.float64).expand_as(truth.G)
        close(plain.blocks[name].dense(), definition.kron(module, eye, truth.A))
        mean = truth.G.diagonal(dim1=1, dim2=2).mean()
        close(scaled.blocks[name].dense(), definition.kron(module, eye * mean, truth.A))


def test_diagonal_factors(setting: Setting) -> None:
    op = cs.diagonal_kf(setting.problem, fisher="exact")
    for name, truth in setting.expected("expand").items():
        module = setting.module(name)
        G = torch.diag_embed(truth.G.diagonal(dim1=1, dim2=2))
        A = torch.diag_embed(truth.A.diagonal(dim1=1, dim2=2))
        close(op.blocks[name].dense(), definition.kron(module, G, A))


def test_blocks_of_single_parameters() -> None:
    """The bias alone has the input 1, the weight alone no appended 1."""
    setting = Setting("conv2d")
    problem = cs.Problem(setting.model, setting.loss, setting.batches, blocks="parameter")
    op = cs.kfac(problem)
    for name, truth in setting.expected("expand").items():
        module = setting.module(name)
        inputs = module.weight[0].numel()
        weight = op.blocks[f"{name}.weight"]
        close(weight.factors["A"], truth.A[:, :inputs, :inputs])
        close(weight.factors["G"], truth.G)
        close(
            weight.dense(),
            torch.block_diag(
                *[torch.kron(g, a[:inputs, :inputs]) for g, a in zip(truth.G, truth.A)]
            ),
        )
        if module.bias is not None:
            close(op.blocks[f"{name}.bias"].dense(), torch.block_diag(*truth.G))


def test_linear_layer_of_one_sample_is_exact() -> None:
    x, y = data((1,), real(3), labels(3))()[0]
    problem = cs.Problem(seeded(lambda: mlp(T, 3, 4, 3)), CE(), (x, y))
    ggn = cs.ggn(problem)
    for method in (cs.kfac, cs.kflr, cs.ekfac, cs.kfra):
        for name, block in method(problem).blocks.items():
            close(block.dense(), ggn.blocks[name].dense())


def test_huber_kflr() -> None:
    """A convex loss without likelihood: G from its Hessian in the outputs."""
    x, y = data((5,), real(3), real(2))()[0]
    model = seeded(lambda: mlp(T, 3, 4, 2))
    op = cs.kflr(cs.Problem(model, nn.HuberLoss(delta=0.8), (x, y)))
    z, uses = definition.watch(model, x)
    inside = ((z - y).abs() < 0.8).double()
    for name, entry in uses.items():
        G = 0.0
        for index in range(z.numel()):
            g = definition.gradients(z.reshape(-1)[index], entry)[0]
            G = G + inside.reshape(-1)[index] * g.T @ g / z.numel()
        close(op.blocks[name].factors["G"], G)


def test_uncovered_blocks_are_named() -> None:
    model = seeded(
        lambda: S(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 3), Apply(tokens_last))
    )
    problem = cs.Problem(model, CE(), data((2,), labels(5, 3), labels(3, 3))())
    op = cs.kfac(problem)
    assert list(op.blocks) == ["2"]
    assert op.uncovered == ("0", "1")
    reasons = op.info.settings["uncovered"]
    assert "Embedding" in reasons["0"]
    assert "Norm" in reasons["1"]
    with pytest.raises(cs.errors.UncoveredError, match="'0', '1'"):
        op @ torch.ones(op.shape[0], dtype=torch.float64)
    zero = cs.kfac(problem, uncovered="zero")
    assert float((zero @ torch.ones(zero.shape[0], dtype=torch.float64))[:21].abs().max()) == 0


class Switch(nn.Module):
    """Another path through the layers for inputs with a negative sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.first, self.second) if x.sum() > 0 else (self.second, self.first)
        for layer in layers:
            x = torch.tanh(layer(x)) if x.sum() > 0 else torch.relu(layer(x))
        return self.head(x)


def test_a_path_that_changes_from_batch_to_batch() -> None:
    """Exact matrices hold for every batch; factors of layers whose use changes do not exist."""
    x = torch.tensor([[1.0, 2.0, 0.5], [0.3, 1.0, 1.5]], dtype=torch.float64)
    y = torch.tensor([0, 2])
    model = seeded(Switch)
    both = cs.Problem(model, CE(), [(x, y), (-x, y)])
    parts = [cs.Problem(model, CE(), (v, y)) for v in (x, -x)]
    for matrix in (cs.hessian, cs.ggn):
        whole = matrix(both)
        for name in whole.members:
            mean = sum(matrix(p).blocks[name].dense() for p in parts) / 2
            close(whole.blocks[name].dense(), mean)
    op = cs.kfac(both)
    assert list(op.blocks) == ["head"]
    assert "later batch" in op.info.settings["uncovered"]["first"]
    close(
        op.blocks["head"].factors["G"],
        sum(cs.kfac(p).blocks["head"].factors["G"] for p in parts) / 2,
    )
    assert list(cs.diagonal_kf(both, scale="adafisher").blocks) == ["head"]
    with pytest.raises(cs.errors.UnsupportedLayerError, match=r"cs\.kflr or cs\.kfac"):
        cs.kfra(both)


@pytest.mark.parametrize("how", ["addmm", "bias first", "matmul"])
@pytest.mark.parametrize("method", [cs.kfac, cs.ekfac, cs.foof, cs.diagonal_kf])
def test_weights_stored_as_inputs_by_outputs(how: str, method: Any) -> None:
    """The same network with ``nn.Linear`` has the same blocks, its entries in another order."""
    bias = how != "matmul"
    ours = nn.Sequential(Product(4, 5, how), nn.Tanh(), Product(5, 3, how)).double()
    usual = nn.Sequential(nn.Linear(4, 5, bias), nn.Tanh(), nn.Linear(5, 3, bias)).double()
    for k in (0, 2):
        usual[k].weight.data = ours[k].weight.detach().mT.clone()
        if bias:
            usual[k].bias.data = ours[k].bias.detach().clone()
    torch.manual_seed(0)
    batch = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    first, second = (method(cs.Problem(net, nn.CrossEntropyLoss(), batch)) for net in (ours, usual))
    for k, (inp, out) in {"0": (4, 5), "2": (5, 3)}.items():
        order = torch.arange(inp * out).reshape(inp, out).mT.reshape(-1)  # weights of usual
        if how == "addmm":
            order = torch.cat([order, torch.arange(out) + inp * out])
        elif bias:
            order = torch.cat([order + out, torch.arange(out)])
        A, B = first.blocks[k].dense(), second.blocks[k].dense()
        assert float((A[order][:, order] - B).norm() / B.norm()) < 1e-14
