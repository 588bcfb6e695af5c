"""Per layer type: gradients of single samples and rows, against one backward pass per sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curvscope.curvature.recording import Recorder, record
from curvscope.layer_calls import LAYER_TYPES
from curvscope.layers import Call, SampleAxis, sample_axes

N = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter(*shape: int, seed: int = 5) -> Tensor:
    return draw(*shape, seed=seed).requires_grad_()


def recorded(function: Callable[[], Tensor], *parameters: Tensor) -> Call:
    recorder = Recorder(parameters)
    with recorder:
        function()
    (call,) = recorder.calls
    return call


def check(call: Call, axis: SampleAxis) -> None:
    """Gradients of every sample, and rows whose products are these gradients."""
    z = call.outputs
    s = draw(*z.shape, seed=9)
    owner = torch.arange(N).reshape(N, *[1] * (axis.first(z, N).ndim - 1))
    ranks = torch.zeros_like(z)
    # which sample each entry of the output belongs to: write through the view
    axis_view = axis.first(torch.arange(z.numel()).reshape(z.shape), N)
    ranks.view(-1)[axis_view.reshape(-1)] = owner.expand(axis_view.shape).reshape(-1).to(z)
    for target, rule in (
        (call.weight, call.kind.weight_gradient),
        (call.bias, call.kind.bias_gradient),
    ):
        if target is None:
            continue
        value = rule(call, s, axis, N)
        assert value.shape == (N, *target.shape)
        for n in range(N):
            part = torch.where(ranks == n, s, torch.zeros_like(s))
            (truth,) = torch.autograd.grad(z, target, part, retain_graph=True)
            assert torch.allclose(value[n], truth, rtol=1e-12, atol=1e-12)
    if call.kind.kronecker and call.weight is not None:
        a = call.kind.input_rows(call, axis, N)
        rows = call.kind.output_rows(call, s, axis, N)
        groups, out, inp = call.kind.sizes(call)
        assert a.shape[2:] == (groups, inp)
        assert rows.shape[2:] == (groups, out)
        product = torch.einsum("ntgo,ntgi->ngoi", rows, a).reshape(N, *call.weight.shape)
        assert torch.allclose(product, call.kind.weight_gradient(call, s, axis, N), atol=1e-12)


FIRST = SampleAxis()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)], ids=str)
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    W, b = parameter(4, 5), parameter(4) if bias else None
    call = recorded(lambda: F.linear(draw(N, *shape, 5), W, b), W, *([b] if bias else []))
    check(call, FIRST)
    assert FIRST in call.candidates(N)


@pytest.mark.parametrize(
    "axis",
    [
        SampleAxis(1),
        SampleAxis(0, 2, True),
        SampleAxis(0, 2, False),
        SampleAxis(1, 2, True),
        SampleAxis(1, 2, False),
    ],
    ids=str,
)
def test_linear_with_samples_elsewhere(axis: SampleAxis) -> None:
    shape = [4, 4, 5]
    shape[axis.axis] = N * axis.fold
    W, b = parameter(2, 5), parameter(2)
    call = recorded(lambda: F.linear(draw(*shape), W, b), W, b)
    check(call, axis)
    assert axis in call.candidates(N)


def geometries(dims: int) -> list[dict[str, Any]]:
    found = []
    for stride, padding, dilation, groups in itertools.product(
        (1, 2), (0, 1, "same"), (1, 2), (1, 2)
    ):
        if padding == "same" and stride == 2:
            continue  # torch refuses
        found.append({"stride": stride, "padding": padding, "dilation": dilation, "groups": groups})
    # settings that differ between the axes
    if dims > 1:
        found.append(
            {
                "stride": (1, 2, 1)[:dims],
                "padding": (2, 0, 1)[:dims],
                "dilation": (2, 1, 1)[:dims],
                "groups": 2,
            }
        )
    return found


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int) -> None:
    kernel, size = (2, 3, 1)[:dims], (5, 6, 3)[:dims]
    for options in geometries(dims):
        W, b = parameter(4, 4 // options["groups"], *kernel), parameter(4)
        x = draw(N, 4, *size)
        check(recorded(partial(CONV[dims], x, W, b, **options), W, b), FIRST)
        folded = draw(2 * N, 4, *size)
        call = recorded(partial(CONV[dims], folded, W, b, **options), W, b)
        for inner in (True, False):
            check(call, SampleAxis(0, 2, inner))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions(dims: int) -> None:
    kernel, size = (2, 3, 1)[:dims], (3, 2, 4)[:dims]
    for options in geometries(dims):
        if options["padding"] == "same":
            continue
        stride = options["stride"]
        for extra in (0, 1):
            if extra and not (isinstance(stride, int) and stride > 1):
                continue  # torch wants less than the stride
            W, b = parameter(4, 3, *kernel), parameter(3 * options["groups"])
            x = draw(N, 4, *size)
            call = recorded(
                partial(TRANSPOSED[dims], x, W, b, output_padding=extra, **options), W, b
            )
            check(call, FIRST)
            folded = draw(2 * N, 4, *size)
            call = recorded(partial(TRANSPOSED[dims], folded, W, b, **options), W, b)
            check(call, SampleAxis(0, 2, False))


def test_arguments_by_position_and_keyword() -> None:
    W, b, x = parameter(2, 3, 2), parameter(2), draw(N, 3, 5)
    calls = [
        recorded(lambda: F.conv1d(x, W, b, 2, 1, 1, 1), W, b),
        recorded(lambda: F.conv1d(input=x, weight=W, bias=b, stride=[2], padding=(1,)), W, b),
        recorded(lambda: torch.conv1d(x, W, bias=b, stride=2, padding=1), W, b),
    ]
    for call in calls:
        check(call, FIRST)
        assert torch.equal(call.outputs, calls[0].outputs)


@pytest.mark.parametrize(
    ("x", "features"),
    [
        ((N, 4), (4,)),
        ((N, 2, 4), (4,)),
        ((N, 2, 3, 4), (3, 4)),
        ((N, 2, 4), (2, 4)),
    ],
    ids=str,
)
def test_layer_norm(x: tuple[int, ...], features: tuple[int, ...]) -> None:
    w, b = parameter(*features), parameter(*features, seed=6)
    check(recorded(lambda: F.layer_norm(draw(*x), features, w, b, 1e-3), w, b), FIRST)
    check(recorded(lambda: F.layer_norm(draw(*x), features, weight=w), w), FIRST)
    check(recorded(lambda: F.rms_norm(draw(*x), features, w, eps=1e-3), w), FIRST)


def test_layer_norm_with_samples_second() -> None:
    w, b = parameter(4), parameter(4, seed=6)
    call = recorded(lambda: F.layer_norm(draw(2, N, 4), (4,), w, b), w, b)
    check(call, SampleAxis(1))


@pytest.mark.parametrize("positions", [(), (5,), (2, 3)], ids=str)
def test_channel_norms(positions: tuple[int, ...]) -> None:
    w, b, x = parameter(4), parameter(4, seed=6), draw(N, 4, *positions)
    mean, var = draw(4, seed=7), draw(4, seed=8).square() + 0.5
    check(recorded(lambda: F.batch_norm(x, mean, var, w, b, False, 0.1, 1e-3), w, b), FIRST)
    # batch statistics: the gradient at fixed normalised inputs is still that of the sample
    check(recorded(lambda: F.batch_norm(x, None, None, w, b, training=True), w, b), FIRST)
    check(recorded(lambda: F.group_norm(x, 2, w, b), w, b), FIRST)
    if positions:
        check(recorded(lambda: F.instance_norm(x, weight=w, bias=b), w, b), FIRST)
        check(recorded(lambda: F.instance_norm(x, mean, var, w, b, False), w, b), FIRST)


@pytest.mark.parametrize("padding", [None, 1, -1])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_embedding(shape: tuple[int, ...], padding: int | None) -> None:
    W = parameter(5, 2)
    index = torch.randint(0, 5, (N, *shape), generator=torch.Generator().manual_seed(0))
    check(recorded(lambda: F.embedding(index, W, padding), W), FIRST)
    if shape:
        call = recorded(lambda: F.embedding(index.movedim(0, 1), W, padding_idx=padding), W)
        check(call, SampleAxis(1))


def test_what_is_not_described_is_not_recorded() -> None:
    W, x = parameter(5, 2), torch.tensor([0, 1, 1])
    recorder = Recorder([W])
    with recorder:
        F.embedding(x, W, max_norm=0.3)
        F.embedding(x, W, scale_grad_by_freq=True)
        F.conv1d(draw(3, 5), parameter(2, 3, 2))  # without a sample axis
        F.linear(draw(2, 2), W.detach())
        with torch.no_grad():
            F.linear(draw(2, 2), W)
    assert recorder.calls == []
    assert len(set(LAYER_TYPES)) == len(LAYER_TYPES) >= 13


# -- sample axes -------------------------------------------------------------------------------


def test_sample_axis_views() -> None:
    x = torch.arange(12).reshape(6, 2)
    inner, outer = SampleAxis(0, 2, True).first(x, 3), SampleAxis(0, 2, False).first(x, 3)
    assert inner.shape == outer.shape == (3, 2, 2)
    assert torch.equal(inner[1, 1], x[3])  # n * fold + j
    assert torch.equal(outer[1, 1], x[4])  # j * N + n
    assert torch.equal(SampleAxis(1).first(x, 2)[1, 0], x[:, 1])


def test_candidates() -> None:
    assert sample_axes((3, 4), 3) == [SampleAxis(0)]
    assert sample_axes((3, 3), 3) == [SampleAxis(0), SampleAxis(1)]
    assert sample_axes((6,), 3) == [SampleAxis(0, 2, True), SampleAxis(0, 2, False)]
    assert sample_axes((4, 5), 3) == []
    assert sample_axes((2,), 3) == []


@pytest.mark.parametrize("samples", [2, 3, 4, 6, 7, 12, 30])
def test_an_axis_of_which_one_entry_is_read_is_not_that_of_the_samples(samples: int) -> None:
    """As many positions as samples, the outputs read from one position: whichever it is."""
    for position in range(samples):
        W = parameter(2, 2)

        def forward(W: Tensor = W, position: int = position) -> Tensor:
            z = F.linear(draw(samples, samples, 2), W)  # positions first, samples second
            return z[position]

        recording = record(forward, [W], None, samples)
        assert recording.axes == [SampleAxis(1)]


@pytest.mark.parametrize("samples", [2, 3, 4, 5, 6])
def test_any_pair_of_up_to_six_samples_that_meets_is_seen(samples: int) -> None:
    for i, j in itertools.permutations(range(samples), 2):
        W = parameter(2, 2)
        mix = torch.eye(samples, dtype=torch.float64)
        mix[i, j] = 0.3  # output i depends on sample j

        def forward(W: Tensor = W, mix: Tensor = mix) -> Tensor:
            return mix @ F.linear(draw(samples, 2), W)

        assert record(forward, [W], None, samples).axes == [None]


@pytest.mark.parametrize("samples", [8, 16, 31])
def test_regular_patterns_of_more_samples_that_meet_are_seen(samples: int) -> None:
    """Neighbours, halves, mirror images, one for all, all for one."""
    index = torch.arange(samples)
    patterns = [
        (index, (index + 1) % samples),
        (index, (index + samples // 2) % samples),
        (index, samples - 1 - index),
        (index, torch.zeros_like(index)),
        (torch.zeros_like(index), index),
    ]
    for rows, columns in patterns:
        W = parameter(2, 2)
        mix = torch.eye(samples, dtype=torch.float64)
        mix[rows, columns] += 0.3

        def forward(W: Tensor = W, mix: Tensor = mix) -> Tensor:
            return mix @ F.linear(draw(samples, 2), W)

        assert record(forward, [W], None, samples).axes == [None]
