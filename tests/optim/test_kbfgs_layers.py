"""K-BFGS on every layer type, against a transcription with loops and inverses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope.optim import KBFGS

from .kronecker_cases import (
    OneLayer,
    closure_of,
    flat,
    labels,
    normal,
    relative,
    seeded,
    small,
)

# -- one layer against a transcription with loops and inverses -------------------------------------


def linear_rows(x: Tensor) -> Tensor:
    rows = x.reshape(len(x), -1, 1, x.shape[-1])
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def conv_rows(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Patches by ``unfold``, ``[N, T, groups, i]``."""
    cut = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    rows = cut.mT.reshape(len(x), -1, conv.groups, cut.shape[1] // conv.groups)
    if conv.bias is None:
        return rows
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def half_square(z: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (torch.tanh(z) - target).square().sum() / len(z)


def matrix_of(layer: nn.Module) -> Tensor:
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.detach().reshape(groups, layer.weight.shape[0] // groups, -1)
    if layer.bias is None:
        return weight.clone()
    return torch.cat([weight, layer.bias.detach().reshape(groups, -1, 1)], -1)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (6, 4)),
    "tokens": (lambda: nn.Linear(4, 3), (5, 6, 4)),
    "conv": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (5, 2, 6, 6)),
    "dilated": (lambda: nn.Conv2d(2, 3, 2, dilation=2, bias=False), (5, 2, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 4, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3), (5, 3, 4, 4)),
}


@pytest.mark.parametrize("memory", [None, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_of_one_layer(name: str, memory: int | None) -> None:
    make, shape = LAYERS[name]
    layer = seeded(make, seed=3)
    rows = linear_rows if isinstance(layer, nn.Linear) else (lambda x: conv_rows(layer, x))
    optimizer = KBFGS(layer, 0.5, 0.3, memory=memory, weight_decay=0.01)
    sample = layer(normal(*shape))
    groups = getattr(layer, "groups", 1)

    def as_rows(z: Tensor) -> Tensor:
        """``[N, T, groups, o]`` of the layer's own outputs."""
        if isinstance(layer, nn.Linear):
            return z.reshape(len(z), -1, 1, z.shape[-1])
        return z.reshape(len(z), groups, z.shape[1] // groups, -1).permute(0, 3, 1, 2)

    target_rows = normal(*as_rows(sample).shape, seed=9)
    plain = OneLayer(
        rows, half_square, matrix_of(layer), lr=0.5, damping=0.3, tau=0.01, memory=memory
    )
    for k in range(5):
        x = normal(*shape, seed=k)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = half_square(as_rows(layer(x)), target_rows)
            loss.backward()
            return loss

        optimizer.step(closure)
        plain.step(x, target_rows)
        assert relative(matrix_of(layer), plain.W) < 1e-11
    factors = optimizer.factors("(root)")
    assert relative(factors["A"], torch.stack(plain.A).squeeze(0)) < 1e-12
    assert relative(factors["H_a"], torch.stack(plain.Ha).squeeze(0)) < 1e-10
    H_g = torch.stack([plain.inverse(k) for k in range(groups)])
    assert relative(factors["H_g"], H_g.squeeze(0)) < 1e-10


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 3, 3, padding="same"), (4, 2, 5)),
        (nn.Conv3d(2, 3, 2, stride=2), (4, 2, 4, 4, 4)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (4, 2, 4, 4)),
    ],
)
def test_input_factor_of_other_convolutions(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """``G (x) A`` needs ``gradient = E[sum_t g a^T]``: the rows must be those of the gradient."""
    layer = layer.double()
    optimizer = KBFGS(layer, 0.1, 0.3)
    x = normal(*shape)
    target = normal(*layer(x).shape, seed=1)
    seen = {}
    receive = KBFGS._receive

    def spy(self: KBFGS, call) -> None:
        if self._phase == "first":
            call.on_gradient(
                lambda c, g: seen.update(g=c.output_rows(g, x.dtype), a=c.input_rows(x.dtype))
            )
        receive(self, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KBFGS, "_receive", spy)
        optimizer.step(closure_of(optimizer, layer, x, target, F.mse_loss))
    gradient = torch.einsum("gro,gri->goi", seen["g"], seen["a"])
    assert relative(gradient.reshape(layer.weight.shape), layer.weight.grad) < 1e-12


# -- which rule applies ----------------------------------------------------------------------------


class Everything(nn.Module):
    """Layers that K-BFGS covers, and all kinds that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.zeros(5, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.dense = nn.Linear(4, 6, bias=False)
        self.recurrent = nn.GRU(6, 4, batch_first=True)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.partial = nn.Linear(4, 4)
        self.partial.weight.requires_grad_(False)
        self.direct = nn.Linear(4, 4)
        self.unused = nn.Linear(2, 2)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = F.relu(self.dense(self.norm(x)), inplace=True)
        x = self.recurrent(x)[0]
        x = self.partial(self.frozen(x))
        x = F.linear(x, self.direct.weight, self.direct.bias)
        return self.out(x).flatten(0, 1)


@pytest.mark.parametrize("fallback", ["adam", "sgd"])
def test_every_parameter_that_gets_a_gradient_moves_and_coverage_says_how(fallback: str) -> None:
    model = seeded(Everything)
    optimizer = KBFGS(model, 0.1, 0.3, fallback=fallback)
    expected = {r["parameter"]: r for r in optimizer.coverage()}
    assert expected["dense.weight"]["reason"] == "Linear, expected: no step has been taken"
    tokens = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        optimizer.step(closure_of(optimizer, model, tokens, labels(30, 7)))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    still = {"frozen.weight", "frozen.bias", "partial.weight", "unused.weight", "unused.bias"}
    assert moved == set(before) - still
    rows = {r["parameter"]: (r["rule"], r["reason"]) for r in optimizer.coverage()}
    assert rows["dense.weight"] == ("K-BFGS", "Linear")
    assert "frozen.weight" not in rows
    reasons = {
        "embedding.weight": "shared by embedding and out",
        "position": "not defined for Everything",
        "attention.in_proj_weight": "not defined for MultiheadAttention",
        "attention.out_proj.weight": "never fired",
        "norm.weight": "not defined for LayerNorm",
        "recurrent.weight_ih_l0": "not defined for GRU",
        "partial.bias": "its weight is frozen",
        "direct.weight": "never fired",
        "unused.weight": "never fired",
    }
    for name, part in reasons.items():
        assert rows[name][0] == fallback and part in rows[name][1], name
    assert set(optimizer.curvature().blocks) == {"dense"}
    assert "never fired" in optimizer.curvature().info.settings["uncovered"]["direct"]
    assert "dense.weight" in str(optimizer.coverage())
    assert len(optimizer.coverage().to_frame()) == len(rows)


def test_in_place_activations_and_three_axes() -> None:
    def make(inplace: bool) -> nn.Module:
        return seeded(
            lambda: nn.Sequential(
                nn.Linear(5, 6),
                nn.ReLU(inplace=inplace),
                nn.Linear(6, 6),
                nn.ReLU(inplace=inplace),
                nn.Linear(6, 3),
                nn.Flatten(0, 1),
            )
        )

    models = [make(False), make(True)]
    for model in models:
        optimizer = KBFGS(model, 0.3, 0.3)
        for k in range(3):
            x, y = normal(4, 2, 5, seed=k), labels(8, seed=k)
            optimizer.step(closure_of(optimizer, model, x, y))
    assert torch.equal(flat(models[0]), flat(models[1]))


def test_inputs_without_a_batch_axis() -> None:
    model = small()
    optimizer = KBFGS(model, 0.3, 0.3)
    x = normal(5)
    optimizer.step(closure_of(optimizer, model, x, torch.tensor(1)))
    row = torch.cat([x, torch.ones(1, dtype=x.dtype)])
    assert relative(optimizer.factors("0")["A"], torch.outer(row, row)) < 1e-13
