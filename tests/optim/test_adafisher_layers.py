"""AdaFisher on every kind of layer: statistics against explicit patches, and who is covered."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope.optim import AdaFisher
from curvscope.optim.factor_diagonals import patch_squares, sum_of_squares
from tests.optim.adaptive_cases import data, flat, mlp, relative, seeded


def patches_one_by_one(x: Tensor, layer: nn.Module) -> Tensor:
    """``[rows, groups, in * kernel]`` by cutting every patch out of the padded input."""
    kernel, dims = layer.kernel_size, len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    elif layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, kernel)]
        x = F.pad(x, [p for t in reversed(total) for p in (t // 2, t - t // 2)])
    elif layer.padding != "valid":
        x = F.pad(x, [p for p in reversed(layer.padding) for _ in (0, 1)])
    starts = [
        range(0, x.shape[2 + i] - layer.dilation[i] * (kernel[i] - 1), layer.stride[i])
        for i in range(dims)
    ]
    rows = []
    for place in torch.cartesian_prod(*[torch.tensor(list(s)) for s in starts]).reshape(-1, dims):
        cut = [
            slice(int(p), int(p) + layer.dilation[i] * (kernel[i] - 1) + 1, layer.dilation[i])
            for i, p in enumerate(place)
        ]
        rows.append(x[(slice(None), slice(None), *cut)].reshape(len(x), layer.groups, -1))
    return torch.cat(rows)


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(2, 3, 4, stride=2, padding=1), (5, 2, 11)),
    "1d same dilated": (lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2), (5, 2, 11)),
    "2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (4, 3, 7, 6)),
    "2d no bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (4, 3, 7, 6)),
    "2d stride leaves pixels": (lambda: nn.Conv2d(2, 3, 2, stride=3), (4, 2, 8, 7)),
    "2d dilated": (lambda: nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=2), (4, 2, 7, 6)),
    "2d same, even kernel": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same"), (4, 2, 5, 6)),
    "2d valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (4, 2, 5, 6)),
    "2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 5, 6)),
    "2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2), (4, 4, 7, 6)),
    "2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (4, 2, 5, 6)),
    "2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (4, 2, 5, 6)),
    "3d": (lambda: nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=1), (3, 2, 4, 5, 3)),
    "3d groups, dilated": (lambda: nn.Conv3d(4, 2, 2, groups=2, dilation=2), (3, 4, 5, 4, 4)),
}


def statistics(net, x, *, options=None, count=1):
    """Run one step on the sum of squares of the outputs; the output gradients of the layer 0."""
    optimizer = AdaFisher(net, **(options or {}))
    kept = []
    for _ in range(count):
        out = net(x)
        out.retain_grad()
        kept.append(out)
        (out.square().mean() / count).backward()
    optimizer.step()
    return optimizer, [out.grad for out in kept]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_against_explicit_patches(name):
    make, shape = CONVOLUTIONS[name]
    net = nn.Sequential(seeded(make))
    x, _ = data(1, *shape)
    optimizer, (s,) = statistics(net, x)
    layer = net[0]
    rows = patches_one_by_one(x, layer)
    assert rows.shape[0] == s.numel() // layer.out_channels
    H = rows.square().mean(0)
    if layer.bias is not None:
        H = torch.cat([H, torch.ones(layer.groups, 1).double()], 1)
    by_channel = s.movedim(1, -1).reshape(-1, layer.out_channels)
    S = by_channel.square().mean(0).reshape(layer.groups, -1)
    factors = optimizer.factors("0")
    assert relative(factors["H_D"], H.squeeze(0)) < 1e-13
    assert relative(factors["S_D"], S.squeeze(0)) < 1e-13
    # F~ in the weight's own shape, normalised over all groups together
    H_used = (H - H.min()) / (H.max() - H.min() + 1e-6)
    S_used = (S - S.min()) / (S.max() - S.min() + 1e-6)
    F_ = (S_used.unsqueeze(-1) * H_used.unsqueeze(1)) + 1e-3
    expected = (F_[..., :-1] if layer.bias is not None else F_).reshape(-1)
    if layer.bias is not None:
        expected = torch.cat([expected, F_[..., -1].reshape(-1)])
    assert relative(optimizer.curvature().diagonal(), expected) < 1e-13


def test_sums_of_squares_of_any_memory_format():
    x = torch.randn(6, 3, 5, 4)
    expected = (x.double() ** 2).sum(0)
    for form in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).transpose(2, 3)):
        assert relative(sum_of_squares(form).double(), expected) < 1e-6
    half = x.to(torch.bfloat16)
    assert sum_of_squares(half).dtype == torch.float32
    assert relative(sum_of_squares(half), half.float().square().sum(0)) < 1e-6
    assert patch_squares(x, [3, 3], [1, 1], 1, [1, 1]).shape == (3, 3, 3)


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (2, 3, 2, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_with_any_number_of_axes(shape, bias):
    net = nn.Sequential(seeded(lambda: nn.Linear(5, 4, bias=bias)))
    x, _ = data(1, *shape)
    optimizer, (s,) = statistics(net, x)
    H = x.reshape(-1, 5).square().mean(0)
    if bias:
        H = torch.cat([H, torch.ones(1).double()])
    assert relative(optimizer.factors("0")["H_D"], H) < 1e-14
    assert relative(optimizer.factors("0")["S_D"], s.reshape(-1, 4).square().mean(0)) < 1e-14


def test_layers_called_without_a_sample_axis():
    for layer, shape in ((nn.Conv2d(2, 3, 3), (2, 6, 5)), (nn.Linear(5, 3), (5,))):
        net = nn.Sequential(layer.double())
        x, _ = data(1, *shape)
        optimizer, _ = statistics(net, x)
        twin = nn.Sequential(copy.deepcopy(layer))
        batched, _ = statistics(twin, x.unsqueeze(0))
        # the optimizers have moved the layers, but both took statistics at the same weights
        for key in ("H_D", "S_D"):
            expected = batched.factors("0")[key]
            if key == "H_D":
                assert relative(optimizer.factors("0")[key], expected) < 1e-14
            assert optimizer.factors("0")[key].shape == expected.shape


NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (6, 4), (1,)),
    "BatchNorm1d sequence": (lambda: nn.BatchNorm1d(4), (6, 4, 5), (1,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (6, 4, 3, 2), (1,)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (6, 4, 3, 2, 2), (1,)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (6, 4, 3, 2), (1,)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (6, 4), (1,)),
    "LayerNorm tokens": (lambda: nn.LayerNorm(4), (6, 3, 4), (2,)),
    "LayerNorm image": (lambda: nn.LayerNorm((3, 4)), (6, 2, 3, 4), (2, 3)),
    "LayerNorm no shift": (lambda: nn.LayerNorm(4, bias=False), (6, 3, 4), (2,)),
}


def norm_factors(h: Tensor, s: Tensor, features, parameters):
    """The docstring's formula: ``q = sum h / T^2``, ``(sum q^2, C) / B^2``; ``(sum s)^2 / B``."""
    B = h.shape[0]
    channels = 1
    for axis in features:
        channels *= h.shape[axis]
    T = h.numel() // (B * channels)
    q = h.sum([a for a in range(h.ndim) if a not in features]).reshape(-1) / T**2
    total = s.sum([a for a in range(s.ndim) if a not in parameters]).reshape(-1)
    return torch.stack([q.square().sum(), torch.tensor(float(channels))]) / B**2, total**2 / B


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("averaging", ["paper", "release"])
@pytest.mark.parametrize("name", NORMS)
def test_normalisations(name, averaging, training):
    make, shape, features = NORMS[name]
    net = nn.Sequential(seeded(make)).train(training)
    with torch.no_grad():
        net[0].weight.uniform_(0.5, 1.5)
    x, _ = data(1, *shape)
    optimizer, (s,) = statistics(net, x, options={"averaging": averaging})
    inputs = (1,) if averaging == "release" and "LayerNorm" in name else features
    H, S = norm_factors(x, s, inputs, features)
    found = optimizer.factors("0")
    if averaging == "release":

        def normalised(v):
            return (v - v.min()) / (v.max() - v.min() + 1e-6)

        H, S = (0.08 + 0.008 * normalised(v) for v in (H, S))
    assert relative(found["H_D"], H) < 1e-13
    assert relative(found["S_D"], S) < 1e-13
    F_ = torch.outer(found["S"], found["H"]) + 1e-3
    expected = F_[:, 0] if net[0].bias is None else torch.cat([F_[:, 0], F_[:, 1]])
    assert relative(optimizer.curvature().diagonal(), expected) < 1e-14
    raw = optimizer.curvature(damped=False).blocks["0"].diagonal()
    columns = 1 if net[0].bias is None else 2
    assert relative(raw, torch.outer(S, H).mT[:columns].reshape(-1)) < 1e-13


class Twice(nn.Module):
    """A layer that runs twice in one pass, a tied pair, attention, a frozen and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.twice = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.half_frozen = nn.Linear(4, 4)
        self.half_frozen.bias.requires_grad_(False)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = F.relu(self.twice(x), inplace=True)
        x = x + F.relu(self.twice(x), inplace=True)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.rnn(self.norm(x))[0]
        x = self.half_frozen(self.frozen(x)) * self.scale
        return self.head(x).mean(1) + self.tied(x).mean((1, 2)).unsqueeze(1)


def test_coverage_of_a_model_with_everything():
    model = seeded(Twice)
    tokens = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(1))
    optimizer = AdaFisher(model, update_every=2)
    for _ in range(4):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), y).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            unchanged = torch.equal(before[name], p)
            still = not p.requires_grad or name.startswith("unused")
            assert unchanged == still, name
    rows = {row["parameter"]: row for row in optimizer.coverage()}
    assert set(rows) == {n for n, p in model.named_parameters() if p.requires_grad}
    method = {n.split(".")[0] for n, row in rows.items() if row["rule"] == "AdaFisher"}
    assert method == {"twice", "norm", "half_frozen", "head"}
    assert "never fired" in rows["attention.out_proj.weight"]["reason"]
    assert "never fired" in rows["unused.weight"]["reason"]
    assert "Embedding" in rows["embedding.weight"]["reason"]
    assert "GRU" in rows["rnn.weight_ih_l0"]["reason"]
    assert rows["scale"]["rule"] == "adam"
    assert optimizer.factors("half_frozen")["H_D"].shape == (4,)  # no column for a frozen bias
    assert set(optimizer.curvature().uncovered) == {
        *("embedding", "attention", "attention.out_proj", "rnn", "unused", "(root)")
    }


def test_reused_layer_counts_all_its_rows():
    model = seeded(lambda: mlp(4, 4))
    x, _ = data(0, 6, 4)
    optimizer = AdaFisher(model)
    z1 = model(x)
    a2 = z1.tanh()
    z2 = model(a2)
    z1.retain_grad(), z2.retain_grad()
    z2.square().mean().backward()
    optimizer.step()
    rows = torch.cat([x, a2.detach()])
    assert relative(optimizer.factors("0")["H_D"][:4], rows.square().mean(0)) < 1e-14
    gradients = torch.cat([z1.grad, z2.grad])
    assert relative(optimizer.factors("0")["S_D"], gradients.square().mean(0)) < 1e-14


def test_in_place_activations_change_nothing():
    def net(inplace):
        return nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=inplace),
            nn.Flatten(),
            nn.Linear(48, 6),
            nn.LeakyReLU(inplace=inplace),
            nn.Linear(6, 3),
        )

    x, y = data(0, 8, 2, 6, 6)
    results = []
    for inplace in (False, True):
        model = seeded(lambda inplace=inplace: net(inplace))
        optimizer = AdaFisher(model, update_every=1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        results.append(flat(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4), (2, 3, 5, 4)])
def test_in_place_after_a_layer_that_returns_a_view(shape):
    """A Linear on more than two axes returns a view, whose hooks an in-place change drops."""
    x, _ = data(0, *shape)
    found = []
    for inplace in (False, True):
        model = seeded(
            lambda i=inplace: nn.Sequential(nn.Linear(4, 3), nn.ReLU(i), nn.Linear(3, 2))
        )
        optimizer = AdaFisher(model)
        model(x).square().mean().backward()
        optimizer.step()
        assert {row["rule"] for row in optimizer.coverage()} == {"AdaFisher"}
        found.append(optimizer.factors("0")["S_D"])
    assert torch.equal(*found)


def test_tied_layers_follow_the_fallback():
    model = seeded(lambda: mlp(4, 4, 4, 3))
    model[2].weight = model[0].weight
    x, y = data(0, 8, 4)
    optimizer = AdaFisher(model, fallback="sgd")
    before = flat(model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert bool((flat(model) != before).any())
    rows = {row["parameter"]: row for row in optimizer.coverage()}
    assert rows["0.weight"]["rule"] == "sgd"
    assert "shared by 0 and 2" in rows["0.weight"]["reason"]
    assert rows["4.weight"]["rule"] == "AdaFisher"


def test_layer_that_is_skipped_and_comes_back():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
            self.skip = True

        def forward(self, x):
            return self.b(x if self.skip else self.a(x))

    model = seeded(Sometimes)
    optimizer = AdaFisher(model, update_every=100)
    x, y = data(0, 8, 4)
    before = model.a.weight.detach().clone()
    for t in range(5):
        model.skip = t < 1 or t == 3
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        rule = {row["parameter"]: row["rule"] for row in optimizer.coverage()}["a.weight"]
        assert rule == ("adam" if t < 1 else "AdaFisher")  # statistics when it runs first
    assert not torch.equal(before, model.a.weight)
    assert [row["refreshes"] for row in optimizer.diagnostics()] == [1, 1]


def test_forward_passes_without_backward_do_not_count():
    model = seeded(lambda: mlp(4, 3))
    x, y = data(0, 8, 4)
    optimizer = AdaFisher(model, update_every=1)
    model(10 * x)  # with a graph, never differentiated
    with torch.no_grad():
        model(100 * x)
    F.cross_entropy(model(3 * x), y).backward()
    optimizer.zero_grad()  # discards that one too
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert relative(optimizer.factors("0")["H_D"][:4], x.square().mean(0)) < 1e-14


def test_checkpointed_segments_count_once():
    from torch.utils.checkpoint import checkpoint

    model = seeded(lambda: mlp(4, 5, 3))
    twin = copy.deepcopy(model)
    x, y = data(0, 8, 4)
    plain, recomputed = AdaFisher(model), AdaFisher(twin)
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(checkpoint(twin, x, use_reentrant=False), y).backward()
    plain.step(), recomputed.step()
    assert torch.equal(flat(model), flat(twin))
    assert torch.equal(plain.factors("0")["S_D"], recomputed.factors("0")["S_D"])


def test_single_output_takes_damped_steps():
    """Min-max of one number is zero, so that F~ is the damping alone."""
    model = seeded(lambda: mlp(4, 1))
    x, _ = data(0, 8, 4)
    optimizer = AdaFisher(model, damping=0.25)
    model(x).square().mean().backward()
    optimizer.step()
    assert torch.allclose(optimizer.curvature().diagonal(), torch.tensor(0.25).double())
