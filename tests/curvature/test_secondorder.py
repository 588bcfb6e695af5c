"""Convolutions and BatchNorm prepared for two derivatives give what torch gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvscope as cs
from curvscope.curvature.graphs import graph_bytes
from curvscope.curvature.secondorder import cheap_second_derivatives

IMAGES: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "2d": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "3d": lambda: nn.Conv3d(4, 6, 2),
    "stride": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
    "dilation": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 1), _norm(6)),
    "norm without scale": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)
    ),
    "norm of batches": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)
    ),
    "norm of the input": lambda: nn.Sequential(_norm(4), nn.Conv2d(4, 6, 1)),
}


def _norm(width: int) -> nn.Module:
    layer = nn.BatchNorm2d(width)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.running_mean = torch.randn(width)
    layer.running_var = torch.rand(width) + 0.5
    return layer


def _net(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = IMAGES[name]().double().eval()
    dimensions = {"1d": 1, "3d": 3}.get(name, 2)
    return layer, torch.randn(5, 4, *[6] * dimensions, dtype=torch.float64)


def _product(net: nn.Module, x: Tensor, *, frozen: bool = False) -> list[Tensor]:
    """First derivatives and a Hessian product of a smooth function of the input and the layer."""
    x = x.clone().requires_grad_(not frozen)
    over = [*net.parameters(), *([] if frozen else [x])]
    generator = torch.Generator().manual_seed(1)
    v = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in over]
    value = net(x).sin().square().sum()
    first = torch.autograd.grad(value, over, create_graph=True)
    second = torch.autograd.grad(first, over, v, retain_graph=True)
    many = torch.autograd.grad(
        first, over, [torch.stack([u, 2 * u]) for u in v], is_grads_batched=True
    )
    return [value, *first, *second, *many]


@pytest.mark.parametrize("frozen", [False, True], ids=["input", "frozen input"])
@pytest.mark.parametrize("name", IMAGES)
def test_two_derivatives_are_those_of_torch(name: str, frozen: bool) -> None:
    net, x = _net(name)
    expected = _product(net, x, frozen=frozen)
    with cheap_second_derivatives(net):
        found = _product(net, x, frozen=frozen)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def _curvature(net: nn.Module, x: Tensor, p: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(net(x).sin().square().sum(), p, create_graph=True)
    return torch.autograd.grad(first, p, torch.ones_like(first))[0]


def test_one_parameter_of_a_layer() -> None:
    net, x = _net("norm")
    for wanted in net.parameters():
        for p in net.parameters():
            p.requires_grad_(p is wanted)
        expected = _curvature(net, x, wanted)
        with cheap_second_derivatives(net):
            torch.testing.assert_close(_curvature(net, x, wanted), expected)


def test_what_is_no_ordinary_call_is_left_to_torch() -> None:
    net, x = _net("2d")
    assert isinstance(net, nn.Conv2d)
    calls: list[tuple[Any, ...]] = [(x[0],), (x.float(),), (x.to(torch.complex128),)]
    with cheap_second_derivatives(net):
        for (value,) in calls:
            weight = net.weight.to(value.dtype)
            bias = None if net.bias is None else net.bias.to(value.dtype)
            out = F.conv2d(value, weight, bias, padding=1)
            expected = net(value.real.double())
            torch.testing.assert_close(out.real.double(), expected, rtol=1e-4, atol=1e-5)
        single = torch.func.vmap(lambda image: net(image.unsqueeze(0)).squeeze(0))(x)
        torch.testing.assert_close(single, net(x))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangent = torch.autograd.forward_ad.unpack_dual(net(dual)).tangent
        assert tangent is not None and net.bias is not None
        torch.testing.assert_close(tangent, net(torch.ones_like(x)) - net.bias[:, None, None])


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Sequential(nn.Conv2d(1, 3, 3), _norm(3), nn.Tanh(), nn.Conv2d(3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return out.flatten(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ["fresh", "retained", "vmap", "auto"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_products_of_checkpointed_convolutions(reentrant: bool, engine: str) -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant).double().eval()
    data = torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.randint(8, (6,))
    problem = cs.Problem(model, nn.CrossEntropyLoss(), data)
    dense = cs.hessian(problem).dense()
    op = cs.hessian(problem, engine=engine)
    for count in (1, 5, 5):
        V = torch.randn(problem.layout.numel, count, dtype=torch.float64)
        assert float((op @ V - dense @ V).norm() / (dense @ V).norm()) < 1e-11


def test_what_graphs_keep_is_counted() -> None:
    net, x = _net("norm")
    parameters = list(net.parameters())

    def kept() -> int:
        out = net(x).square().sum()
        roots = list(torch.autograd.grad(out, parameters, create_graph=True))
        return graph_bytes(roots, parameters)

    plain = kept()
    with cheap_second_derivatives(net):
        assert 0.7 * plain < kept() < 1.05 * plain
