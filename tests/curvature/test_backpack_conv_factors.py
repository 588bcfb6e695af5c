"""BackPACK's Kronecker factors of convolutions: how wrong, and under which name they come."""

from __future__ import annotations

from typing import Any

import backpack.extensions
import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.errors import BackpackError
from tests.curvature.backpack_models import N, Setting, classify, randn
from tests.curvature.backpack_raw import raw
from tests.curvature.backpack_truth import dense_ggn, relative


def problem_of(setting: Setting, **options: Any) -> cs.Problem:
    return cs.Problem(setting.model, setting.loss, (setting.x, setting.y), **options)


def cnn(positions: int) -> Setting:
    """One convolution with ``positions``^2 outputs per channel, then their mean."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool2d(positions)),
        *(nn.Flatten(), nn.Linear(2, 3)),
    )
    return classify(model, randn(N, 1, positions, positions))


def conv_trace_ratio(setting: Setting, extension: str) -> float:
    factors = raw(getattr(backpack.extensions, extension)(), extension.lower(), setting)[0]
    pieces = (setting.model, setting.total, setting.x, setting.y, [setting.model[0].weight])
    return float(factors[0].trace() * factors[1].trace() / dense_ggn(*pieces).trace())


@pytest.mark.parametrize("extension", ["KFLR", "KFRA"])
def test_conv_factors_grow_with_the_number_of_positions(extension: str) -> None:
    ratios = [conv_trace_ratio(cnn(size), extension) for size in (2, 4)]
    assert ratios[1] > 8.0  # T = 16
    assert ratios[1] > 2.5 * ratios[0]  # T = 4
    problem = problem_of(cnn(4))
    block = cs.ggn(problem).blocks["0"].restrict(["0.weight"]).trace()
    assert 0.2 < cs.kflr(problem).blocks["0"].restrict(["0.weight"]).trace() / block < 2.0


@pytest.mark.parametrize("extension", ["KFAC", "KFLR", "KFRA"])
def test_conv_factors_are_refused_or_named(extension: str) -> None:
    setting = cnn(4)
    problem = problem_of(setting)
    with pytest.raises(BackpackError, match=r"layer '0' \(Conv2d\).*unscaled=True") as caught:
        cs.backpack.compute(problem, extension)
    assert f"cs.{extension.lower()}(problem" in str(caught.value)
    op = cs.backpack.compute(problem, extension, unscaled=True)
    assert op.info.what == f"{extension} (BackPACK, unscaled)"
    assert any("too large" in note for note in op.info.notes)
    if extension != "KFAC":
        factors = raw(getattr(backpack.extensions, extension)(), extension.lower(), setting)
        for name, found in zip(problem.layout.names, factors, strict=True):
            expected = torch.kron(*found) if len(found) == 2 else found[0]
            block = op.blocks[name.rpartition(".")[0]].restrict([name])
            assert relative(N * block.dense(), expected.detach()) < 1e-10
    # nothing is unscaled in a problem without convolution weights
    linear = problem_of(setting, params=["4", "0.bias"])
    named = cs.backpack.compute(linear, extension, unscaled=True)
    assert named.info.what == f"{extension} (BackPACK)"


def test_transposed_convolution_weights_are_laid_out_right() -> None:
    """One input pixel: T = 1, so that KFLR's factors are exact up to the sample average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 2, 1), nn.Flatten())
    setting = classify(model, randn(1, 3, 1, 1))
    problem = problem_of(setting, params=["0.weight"])
    pieces = (setting.model, setting.total, setting.x, setting.y, [model[0].weight])
    op = cs.backpack.kflr(problem, unscaled=True)
    assert relative(op.dense(), dense_ggn(*pieces)) < 1e-10
