"""Tiny networks, one per way in which a model can use its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model in eval mode whose parameters and buffers are all random, none special."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().double().eval()
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            for name, b in model.named_buffers():
                if name.endswith("running_mean"):
                    b.copy_(0.5 * torch.randn(b.shape, generator=generator, dtype=b.dtype))
                elif name.endswith("running_var"):
                    b.copy_(0.5 + torch.rand(b.shape, generator=generator, dtype=b.dtype))
    return model


def mlp(activation: Callable[[], nn.Module], *sizes: int, bias: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for inp, out in itertools.pairwise(sizes):
        layers += [nn.Linear(inp, out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


class Apply(nn.Module):
    """A module from a function, for reshaping in a Sequential."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def tokens_last(x: Tensor) -> Tensor:
    """``[N, T, C] -> [N, C, T]``, as CrossEntropyLoss wants it."""
    return x.transpose(1, 2)


def flat_tokens(x: Tensor) -> Tensor:
    """``[N, T, C] -> [N T, C]``."""
    return x.flatten(0, 1)


class Residual(nn.Module):
    """Pre-activation residual net; ``inplace`` uses in-place ReLU and ``x += y``."""

    def __init__(self, inplace: bool, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.head = nn.Linear(2, classes)
        self.relu = nn.ReLU(inplace=inplace)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.relu(self.norm(x))
        y = self.conv(y)
        if self.inplace:
            y += x
        else:
            y = y + x
        return self.head(self.relu(y).mean((2, 3)))


class Reused(nn.Module):
    """One layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class TwoNames(nn.Module):
    """One module object registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class TiedTranspose(nn.Module):
    """An autoencoder whose decoder is the transposed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.sigmoid(self.encoder(x))
        return F.linear(code, self.encoder.weight.t(), self.shift)


class TiedLanguage(nn.Module):
    """Embedding and output head share their weight."""

    def __init__(self, vocabulary: int = 5, width: int = 4, flat: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.flat = flat

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = h + torch.tanh(self.mix(h.cumsum(1)))
        logits = self.head(h)
        return flat_tokens(logits) if self.flat else tokens_last(logits)


class RootParameters(nn.Module):
    """Parameters of the root module beside a layer, and two uses of functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))
        self.bias = nn.Parameter(torch.zeros(3))
        self.gain = nn.Parameter(torch.ones(()))
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.gain * F.linear(x, self.weight, bias=self.bias)))


class Functional(nn.Module):
    """All layers written with ``torch.nn.functional``, arguments by keyword and position."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(2, 1, 2, 2))
        self.shift = nn.Parameter(torch.zeros(2))
        self.scale = nn.Parameter(torch.zeros(2))
        self.matrix = nn.Parameter(torch.zeros(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, weight=self.kernel, bias=self.shift, stride=(1,), dilation=2)
        x = F.group_norm(x, 1, weight=self.scale)
        return F.linear(input=F.softplus(x).flatten(1), weight=self.matrix)


class Product(nn.Module):
    """A linear layer with its weight as ``[in, out]``, as GPT-2's ``Conv1D``."""

    def __init__(self, inp: int, out: int, how: str) -> None:
        super().__init__()
        if how == "bias first":
            self.bias = nn.Parameter(torch.randn(out))
        self.weight = nn.Parameter(torch.randn(inp, out) / inp**0.5)
        if how == "addmm":
            self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "bias"):
            return x @ self.weight
        flat = x.reshape(-1, x.shape[-1])
        out = torch.addmm(self.bias, flat, self.weight)
        return out.reshape(*x.shape[:-1], out.shape[-1])


class Attention(nn.Module):
    """One attention layer between projections; positions or samples first inside."""

    def __init__(self, batch_first: bool, kdim: int | None = None, vdim: int | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, kdim=kdim, vdim=vdim)
        self.head = nn.Linear(4, 3)
        self.batch_first, self.kdim, self.vdim = batch_first, kdim, vdim

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        key = x if self.kdim is None else x[..., : self.kdim]
        value = x if self.vdim is None else x[..., -self.vdim :]
        y, _ = self.attention(x, key, value, need_weights=False)
        y = y if self.batch_first else y.transpose(0, 1)
        return tokens_last(self.head(y))


class FirstToken(nn.Module):
    """Time-first attention whose output is read at the first position only."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head(self.attention(x, x, x, need_weights=False)[0])[0]


class Recurrent(nn.Module):
    """A recurrent layer and a head on every step (or on the last one)."""

    def __init__(self, layer: nn.Module, every: bool, width: int, classes: int) -> None:
        super().__init__()
        self.layer, self.every = layer, every
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        if not self.layer.batch_first:
            x = x.transpose(0, 1)
        y, _ = self.layer(x)
        if not self.layer.batch_first:
            y = y.transpose(0, 1)
        return tokens_last(self.head(y)) if self.every else self.head(y[:, -1])


class Pair(nn.Module):
    """Two inputs, joined by a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Bilinear(3, 2, 2)
        self.act = nn.PReLU(2)
        self.head = nn.Linear(2, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.act(self.join(left, right)))


class Windows(nn.Module):
    """Windows of a sequence folded into the batch axis and unfolded afterwards."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 3)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.head = nn.Linear(3, 2)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        if self.inner:
            windows = x.reshape(n * (t // 2), 2, d)
        else:
            windows = x.reshape(n, t // 2, 2, d).transpose(0, 1).reshape(n * (t // 2), 2, d)
        h = self.embed(windows)
        h = self.attention(h, h, h, need_weights=False)[0]
        h = h.mean(1)
        h = h.reshape(n, t // 2, 3) if self.inner else h.reshape(t // 2, n, 3).transpose(0, 1)
        return self.head(h.mean(1))


class Autograd(nn.Module):
    """Outputs made of the net's own derivative in its input, as in physics-informed nets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.head(torch.tanh(self.body(x)))
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return force


class WrittenOut(nn.Module):
    """A model with ``weight_norm`` whose first weight is formed step by step.

    The second derivative of ``torch._weight_norm`` is wrong, so it cannot serve as its own truth.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.children()
        parts = first.parametrizations["weight"]
        g, v = parts.original0, parts.original1
        x = F.linear(x, g * v / v.square().sum(1, keepdim=True).sqrt(), first.bias)
        return nn.Sequential(*rest)(x)


def normalised(kind: str, **options: Any) -> nn.Module:
    """``nn.utils.parametrizations.weight_norm`` or ``spectral_norm`` on the first layer."""
    wrap = getattr(nn.utils.parametrizations, kind)
    return nn.Sequential(wrap(nn.Linear(4, 3), **options), nn.Tanh(), nn.Linear(3, 2))
