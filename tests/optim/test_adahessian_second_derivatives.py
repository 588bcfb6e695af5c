"""Fast second derivatives of convolutions, BatchNorm and ReLU: finite differences, torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from curvscope.optim.double_backward import hessian_product
from curvscope.optim.second_derivatives import FastSecondDerivatives
from tests.optim.adaptive_cases import conv_net, data, seeded

CONVOLUTIONS = {
    "1d": (F.conv1d, (2, 2, 7), (3, 2, 3), {"stride": 2, "padding": 1}),
    "1d same": (F.conv1d, (2, 2, 6), (3, 2, 3), {"padding": "same", "dilation": 2}),
    "1d same, even kernel": (F.conv1d, (2, 2, 6), (3, 2, 2), {"padding": "same"}),
    "2d": (F.conv2d, (2, 2, 5, 4), (3, 2, 3, 2), {"padding": (1, 0)}),
    "2d stride leaves pixels": (F.conv2d, (2, 2, 6, 5), (2, 2, 2, 2), {"stride": (3, 2)}),
    "2d groups": (F.conv2d, (2, 4, 4, 4), (2, 2, 2, 2), {"groups": 2, "dilation": (1, 2)}),
    "2d valid": (F.conv2d, (2, 1, 4, 4), (2, 1, 2, 2), {"padding": "valid"}),
    "3d": (F.conv3d, (1, 2, 3, 3, 3), (2, 2, 2, 2, 1), {"stride": (1, 2, 1)}),
    "no sample axis": (F.conv2d, (2, 4, 4), (2, 2, 2, 2), {}),
}


def leaf(*shape: int, seed: int) -> torch.Tensor:
    return data(seed, *shape)[0].requires_grad_()


def fast(function, *args, **options):
    with FastSecondDerivatives():
        return function(*args, **options)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, bias):
    function, x_shape, w_shape, options = CONVOLUTIONS[name]
    x, w, b = leaf(*x_shape, seed=0), leaf(*w_shape, seed=1), leaf(w_shape[0], seed=2)
    inputs = (x, w, b) if bias else (x, w)
    assert torch.equal(fast(function, *inputs, **options), function(*inputs, **options))
    assert gradcheck(lambda *v: fast(function, *v, **options), inputs)
    assert gradgradcheck(lambda *v: fast(function, *v, **options), inputs)
    fixed = x.detach()  # the first layer: nothing to differentiate in the data
    rest = inputs[1:]
    assert gradgradcheck(lambda *v: fast(function, fixed, *v, **options).square(), rest)
    only_bias = (leaf(w_shape[0], seed=3),)
    assert gradgradcheck(
        lambda v: fast(function, fixed, w.detach(), v, **options).pow(3), only_bias
    )


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 5), (4, 3, 2, 4), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_batch_norm(shape, eps):
    x, w, b = leaf(*shape, seed=0), leaf(3, seed=1), leaf(3, seed=2)

    def normalised(x, w, b):
        return fast(F.batch_norm, x, None, None, w, b, True, 0.1, eps)

    assert torch.equal(normalised(x, w, b), F.batch_norm(x, None, None, w, b, True, 0.1, eps))
    assert gradcheck(normalised, (x, w, b))
    assert gradgradcheck(normalised, (x, w, b))
    fixed = x.detach()
    assert gradgradcheck(lambda w, b: normalised(fixed, w, b).pow(2), (w, b))


def test_relu():
    x, c = leaf(4, 5, seed=0), leaf(4, 5, seed=1)
    for relu in (F.relu, torch.relu, torch.Tensor.relu, nn.ReLU()):
        assert torch.equal(fast(relu, x), x.relu())
        assert gradgradcheck(lambda x, c, relu=relu: (fast(relu, x * c) * c).pow(3), (x, c))
    bad = torch.tensor([float("nan"), -1.0], requires_grad=True)
    assert fast(F.relu, bad)[0].isnan()
    changed = (1 * x).clone()
    fast(F.relu, changed, inplace=True)
    assert float(changed.detach().min()) == 0


def test_a_network_in_both_memory_formats():
    """Product of a whole net against torch's own formulas; running statistics move as ever."""
    model, twin = seeded(conv_net), seeded(conv_net)
    x, y = data(0, 6, 2, 8, 8, classes=5)
    z = [torch.randn_like(p) for p in model.parameters()]
    for form in (torch.contiguous_format, torch.channels_last):
        inputs = x.to(memory_format=form)
        with FastSecondDerivatives():
            loss = F.cross_entropy(model(inputs), y)
        slow = F.cross_entropy(twin(inputs), y)
        found, expected = (
            hessian_product(torch.autograd.grad(v, p, create_graph=True), p, z)
            for v, p in ((loss, list(model.parameters())), (slow, list(twin.parameters())))
        )
        for one, other in zip(found, expected):
            assert float((one - other).norm()) <= 1e-12 * max(float(other.norm()), 1.0)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, twin.get_buffer(name))


def test_cases_left_to_torch():
    model = seeded(conv_net, dtype=torch.float32)
    x = torch.randn(4, 2, 8, 8)

    def nodes(output):
        names, stack = set(), [output.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None:
                names.add(type(node).__name__)
                stack += [n for n, _ in node.next_functions]
        return names

    with FastSecondDerivatives():
        assert {"_BatchNormBackward", "_ConvolutionBackward", "_ReLUBackward"} <= nodes(model(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "_ConvolutionBackward" not in nodes(model(x))
        assert "_BatchNormBackward" not in nodes(model.eval()(x))
        with torch.no_grad():
            assert model(x).grad_fn is None
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            nn.BatchNorm1d(3)(torch.randn(1, 3))
        without = nn.BatchNorm2d(2, affine=False)(x)
        assert without.shape == x.shape
