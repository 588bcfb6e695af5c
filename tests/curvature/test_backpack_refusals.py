"""What the BackPACK adapter refuses: the type of the error, the layer's name, the way out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.errors import BackpackError, CurvscopeError, MemoryLimitError, OptionError
from tests.curvature.backpack_models import N, Wrapped, classify, image, mlp, randn
from tests.curvature.backpack_refusals import KRONECKER, REFUSALS, Refusal


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_refused_with_reason_and_way_out(case: Refusal) -> None:
    torch.manual_seed(0)
    setting = case.build()
    problem = cs.Problem(
        setting.model, setting.loss, (setting.x, setting.y), check=False, **dict(case.options)
    )
    for extension in case.extensions:
        with pytest.raises(BackpackError, match=case.message) as caught:
            cs.backpack.compute(problem, extension)
        assert "cs." in str(caught.value) or "dtype=" in str(caught.value)
    last = case.extensions[-1]
    assert cs.backpack.supported(problem, last) == (False, str(caught.value))


def test_grouped_factors_are_refused_also_unscaled() -> None:
    torch.manual_seed(0)
    setting = image(nn.Conv2d(2, 4, 3, groups=2))
    problem = cs.Problem(setting.model, setting.loss, (setting.x, setting.y))
    for extension in KRONECKER:
        with pytest.raises(BackpackError, match=r"layer '2': NotImplementedError: groups"):
            cs.backpack.compute(problem, extension, unscaled=True)


def test_dict_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.fc(batch["x"])

    problem = cs.Problem(
        Named().double(), nn.CrossEntropyLoss(), [({"x": randn(4, 3)}, torch.tensor([0, 1, 2, 0]))]
    )
    for extension in ("DiagGGNExact", "BatchGrad"):
        with pytest.raises(BackpackError, match="inputs are a dict"):
            cs.backpack.compute(problem, extension)


def test_a_later_batch_is_refused_too() -> None:
    torch.manual_seed(0)
    setting = classify(mlp(), randn(N, 3))
    bad = setting.y.clone()
    bad[0] = -100
    problem = cs.Problem(
        setting.model, setting.loss, [(setting.x, setting.y), (setting.x, bad)], check=False
    )
    assert cs.backpack.supported(problem, "DiagGGNExact") == (True, "")
    for extension in ("DiagGGNExact", "KFRA"):
        with pytest.raises(BackpackError, match="1 targets equal"):
            cs.backpack.compute(problem, extension)


def test_kfra_needs_batches_that_can_be_joined() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(2, 3)).double()
    y = torch.tensor([0, 1])
    data = [(randn(2, 1, 4), y), (randn(2, 1, 6), y)]
    problem = cs.Problem(model, nn.CrossEntropyLoss(), data)
    assert cs.backpack.batch_grad(problem).values.shape == (4, 9)
    with pytest.raises(BackpackError, match=r"AdaptiveAvgPool1d|cannot be joined"):
        cs.backpack.kfra(problem)
    linear = nn.Sequential(nn.Linear(2, 3)).double()
    ragged = cs.Problem(
        linear, nn.CrossEntropyLoss(), [(randn(2, 2), y), (randn(3, 2), y.new_ones(3))]
    )
    assert cs.backpack.kfra(ragged).shape == (9, 9)


def test_options() -> None:
    torch.manual_seed(0)
    setting = classify(mlp(), randn(N, 3))
    problem = cs.Problem(setting.model, setting.loss, (setting.x, setting.y))
    for call, message in (
        (lambda: cs.backpack.diag_ggn(problem, mc=0), "mc=0"),
        (lambda: cs.backpack.sqrt_ggn(problem, mc=1.5), r"mc=1\.5"),
        (lambda: cs.backpack.kfac(problem, samples=-1), "samples=-1"),
        (lambda: cs.backpack.kfac(problem, seed="0"), "seed='0'"),
        (lambda: cs.backpack.pchmp(problem, modify="max"), "modify='max'"),
        (lambda: cs.backpack.compute(problem, "DiagGGN"), "Did you mean 'DiagGGN"),
        (lambda: cs.backpack.supported(problem, "Fisher"), "extension='Fisher'"),
    ):
        with pytest.raises(OptionError, match=message):
            call()
    with pytest.raises(TypeError):
        cs.backpack.compute(problem, "DiagHessian", mc=3)
    assert len(cs.backpack.names()) == 18
    for name in cs.backpack.names():
        assert cs.backpack.supported(problem, name) == (True, "")
        cs.backpack.compute(problem, name)


def test_what_would_not_fit_is_refused_before_it_is_allocated() -> None:
    model = nn.Linear(3000, 3000).double()
    x = torch.zeros(1, 3000, dtype=torch.float64).expand(100_000, -1)
    y = torch.zeros(1, dtype=torch.long).expand(100_000)
    problem = cs.Problem(model, nn.CrossEntropyLoss(), [(x[:2], y[:2])], check=False)
    problem.check()
    object.__setattr__(problem._facts, "samples", 10**9)  # as if the data were that many
    for extension in ("SqrtGGNExact", "BatchGrad", "BatchDiagHessian"):
        with pytest.raises(MemoryLimitError, match=r"problem\.subset"):
            cs.backpack.compute(problem, extension)


def test_errors_of_the_problem_come_through() -> None:
    problem = cs.Problem(mlp().double(), nn.CrossEntropyLoss(), (randn(N, 3), torch.full((N,), 7)))
    with pytest.raises(CurvscopeError, match="classes") as caught:
        cs.backpack.diag_ggn(problem)
    assert not isinstance(caught.value, BackpackError)


def test_wrapped_errors_keep_their_cause() -> None:
    torch.manual_seed(0)
    setting = image(nn.AvgPool2d(3, 2, ceil_mode=True))
    problem = cs.Problem(setting.model, setting.loss, (setting.x, setting.y))
    with pytest.raises(BackpackError) as caught:
        cs.backpack.diag_ggn(problem)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_container_is_no_reason_to_refuse() -> None:
    torch.manual_seed(0)
    setting = classify(Wrapped(mlp()), randn(N, 3))
    problem = cs.Problem(setting.model, setting.loss, (setting.x, setting.y))
    for name in cs.backpack.names():
        assert cs.backpack.supported(problem, name) == (True, "")
