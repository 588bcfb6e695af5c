"""What BackPACK 1.7.1 gets silently wrong, measured, and what the adapter makes of each case.

If a new BackPACK mends one of these, the test fails and the refusal can go.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import backpack
import backpack.extensions
import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.errors import BackpackError
from tests.curvature.backpack_models import (
    N,
    Setting,
    classify,
    cross_entropy,
    image,
    mlp,
    randn,
    weighted,
)
from tests.curvature.backpack_raw import raw
from tests.curvature.backpack_truth import (
    Total,
    dense_ggn,
    dense_hessian,
    positive_curvature_blocks,
    relative,
    sample_gradients,
)


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def wrt(setting: Setting) -> list[nn.Parameter]:
    return list(setting.model.parameters())


def ggn_error(setting: Setting, total: Total | None = None) -> float:
    pieces = (setting.model, total or setting.total, setting.x, setting.y, wrt(setting))
    value = flat(raw(backpack.extensions.DiagGGNExact(), "diag_ggn_exact", setting))
    return relative(value, dense_ggn(*pieces).diagonal())


def problem_of(setting: Setting, **options: Any) -> cs.Problem:
    return cs.Problem(setting.model, setting.loss, (setting.x, setting.y), **options)


# -- settings that BackPACK takes and gets wrong, and that are refused ----------------------------


def tied() -> Setting:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return classify(nn.Sequential(first, nn.Tanh(), second), randn(N, 3))


def ignored() -> Setting:
    setting = classify(mlp(), randn(N, 3))
    setting.y[0] = -100
    return setting


def soft() -> Setting:
    setting = classify(mlp(), randn(N, 3))
    return Setting(setting.model, setting.loss, cross_entropy, setting.x, torch.rand(N, 3).double())


def folded() -> Setting:
    """Tokens folded into the sample axis before the loss."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Flatten(0, 1)).double()
    y = torch.randint(3, (2 * N,))
    return Setting(model, nn.CrossEntropyLoss(), cross_entropy, randn(N, 2, 3), y)


def hooked() -> Setting:
    model = mlp()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return classify(model, randn(N, 3))


@dataclass(frozen=True)
class Wrong:
    name: str
    build: Callable[[], Setting]
    at_least: float
    message: str


WRONG = (
    Wrong("tied weights", tied, 0.05, r"'0\.weight'.*tied"),
    Wrong("ignored targets", ignored, 0.1, "1 targets equal ignore_index=-100"),
    Wrong("class probabilities", soft, 0.1, "class probabilities"),
    Wrong("folded samples", folded, 0.3, r"outputs \[\d+, 3\].*first"),
    Wrong("a hook that doubles", hooked, 0.01, "hooks on '0'"),
    Wrong(
        "circular padding",
        lambda: image(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")),
        1e-3,
        r"layer '2' \(Conv2d\).*padding_mode='circular'",
    ),
    Wrong(
        "reflected padding",
        lambda: image(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")),
        1e-3,
        r"layer '2' \(Conv2d\).*padding_mode='reflect'",
    ),
    Wrong(
        "divisor of an average-pool",
        lambda: image(nn.AvgPool2d(2, divisor_override=3)),
        5e-3,
        r"layer '2' \(AvgPool2d\).*divisor_override=3",
    ),
)


def truth_of_folded(setting: Setting) -> Tensor:
    """One pass over all samples: a single one would not know its targets."""
    outputs = setting.model(setting.x)
    rows = []
    for entry in outputs.reshape(-1):
        parts = torch.autograd.grad(entry, wrt(setting), retain_graph=True)
        rows.append(flat(list(parts)))
    jacobian = torch.stack(rows)
    middle = torch.autograd.functional.hessian(
        lambda z: cross_entropy(z, setting.y), outputs.detach()
    )
    size = outputs.numel()
    return (jacobian.T @ middle.reshape(size, size) @ jacobian).diagonal()


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_silently_wrong_and_refused(case: Wrong) -> None:
    torch.manual_seed(0)
    setting = case.build()
    if case.build is folded:
        value = flat(raw(backpack.extensions.DiagGGNExact(), "diag_ggn_exact", setting))
        error = relative(value, truth_of_folded(setting))
    else:
        error = ggn_error(setting)
    assert error > case.at_least, error
    problem = problem_of(setting)
    for extension in ("DiagGGNExact", "SqrtGGNExact", "DiagHessian", "BatchDiagGGNExact"):
        with pytest.raises(BackpackError, match=case.message) as caught:
            cs.backpack.compute(problem, extension)
        assert "cs." in str(caught.value)
        trusted, reason = cs.backpack.supported(problem, extension)
        assert not trusted and reason == str(caught.value)


@pytest.mark.parametrize("case", WRONG[:2] + WRONG[4:7], ids=lambda case: case.name)
def test_first_order_is_refused_only_where_it_is_wrong(case: Wrong) -> None:
    torch.manual_seed(0)
    setting = case.build()
    pieces = (setting.model, setting.total, setting.x, setting.y, wrt(setting))
    truth = sample_gradients(*pieces)
    rows = raw(backpack.extensions.BatchGrad(), "grad_batch", setting)
    error = relative(torch.cat([r.flatten(1) for r in rows], 1), truth)
    if case.name == "ignored targets":
        assert error < 1e-12
        value = cs.backpack.batch_grad(problem_of(setting)).values
        assert relative(value, truth) < 1e-12
    else:
        assert error > case.at_least
        with pytest.raises(BackpackError, match=case.message):
            cs.backpack.batch_grad(problem_of(setting))


# -- corrected ------------------------------------------------------------------------------------


def test_same_padding_is_wrong_and_corrected() -> None:
    torch.manual_seed(0)
    setting = image(nn.Conv2d(2, 2, 3, padding="same"), size=5)
    pieces = (setting.model, setting.total, setting.x, setting.y, wrt(setting))
    truth = sample_gradients(*pieces)
    rows = raw(backpack.extensions.BatchGrad(), "grad_batch", setting)
    assert relative(torch.cat([r.flatten(1) for r in rows], 1), truth) > 0.02
    assert relative(cs.backpack.batch_grad(problem_of(setting)).values, truth) < 1e-12


def test_even_kernels_with_same_padding_are_refused() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: the input must be copied
        setting = image(nn.Conv2d(2, 2, 2, padding="same"))
        for extension in ("DiagGGNExact", "BatchGrad", "HMP"):
            with pytest.raises(BackpackError, match=r"layer '2' \(Conv2d\): padding='same'"):
                cs.backpack.compute(problem_of(setting), extension)


def test_gradient_norms_of_grouped_convolutions() -> None:
    torch.manual_seed(0)
    setting = image(nn.Conv2d(2, 4, 3, groups=2))
    pieces = (setting.model, setting.total, setting.x, setting.y, wrt(setting))
    g = sample_gradients(*pieces)
    truth = g.square().sum(1)
    wrong = torch.stack(raw(backpack.extensions.BatchL2Grad(), "batch_l2", setting), 1).sum(1)
    assert relative(wrong, truth) > 1e-3
    assert relative(cs.backpack.batch_l2(problem_of(setting)).total(), truth) < 1e-12


@pytest.mark.parametrize("modify", ["clip", "abs"])
def test_positive_curvature_hessian_multiplies_by_the_gradient_twice(modify: str) -> None:
    torch.manual_seed(0)
    setting = classify(mlp(), randn(N, 3))
    pieces = (setting.model, setting.total, setting.x, setting.y)
    truth = torch.block_diag(*positive_curvature_blocks(*pieces, modify).values())
    wrong = torch.block_diag(*raw(backpack.extensions.PCHMP(modify=modify), "pchmp", setting))
    assert relative(wrong, truth) > 0.01
    op = cs.backpack.pchmp(problem_of(setting), modify=modify)
    assert relative(N * op.dense(), truth) < 1e-10


def test_a_factor_before_the_loss_is_invisible_to_backpack() -> None:
    """A callable loss is refused; its curvature would be that of the unscaled loss."""
    torch.manual_seed(0)
    setting = classify(mlp(), randn(N, 3))
    half: Total = lambda z, y: 0.5 * cross_entropy(z, y)  # noqa: E731
    assert abs(ggn_error(setting, half) - 1.0) < 1e-10
    problem = cs.Problem(setting.model, half, (setting.x, setting.y), reduction="sum")
    with pytest.raises(BackpackError, match="regulariser in a callable loss"):
        cs.backpack.diag_ggn(problem)
    pieces = (setting.model, half, setting.x, setting.y, wrt(setting))
    assert relative(cs.backpack.batch_grad(problem).values, sample_gradients(*pieces)) < 1e-12


def test_overflowing_formulas() -> None:
    torch.manual_seed(0)
    setting = classify(mlp(nn.LogSigmoid()), randn(N, 3))
    with torch.no_grad():
        setting.model[0].weight.mul_(1000)
        setting.model[0].bias.fill_(1000.0)
        setting.model[2].weight.mul_(1e-3)
    pieces = (setting.model, setting.total, setting.x, setting.y, wrt(setting))
    assert torch.isfinite(dense_hessian(*pieces)).all()
    wrong = flat(raw(backpack.extensions.DiagHessian(), "diag_h", setting))
    assert torch.isnan(wrong).any()
    with pytest.raises(BackpackError, match=r"'0\.weight' is NaN"):
        cs.backpack.diag_hessian(problem_of(setting))


def test_class_weights_are_refused_by_name() -> None:
    torch.manual_seed(0)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    setting = classify(mlp(), randn(N, 3), nn.CrossEntropyLoss(weight=weight), weighted)
    with pytest.raises(BackpackError, match=r"CrossEntropyLoss\(weight="):
        cs.backpack.diag_ggn(problem_of(setting))
