"""What the BackPACK adapter refuses: the type of the error, the layer's name, the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs
from curvscope.errors import BackpackError, CurvscopeError, MemoryLimitError, OptionError
from tests.curvature.backpack_cases import (
    N,
    Residual,
    Setting,
    Wrapped,
    bernoulli,
    classify,
    image,
    mlp,
    randn,
    random_statistics,
    regress,
    squared_error,
    with_head,
)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Slicing(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :3]


class Loose(nn.Module):
    """A parameter outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class Functions(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.function = nn.Linear(3, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.function(self.fc1(x)))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(3, 3), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.fc(x)))


class Transposed(nn.Module):
    """Uses a weight a second time, behind the layer's back."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(3, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act(self.fc(x)), self.fc.weight.T)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class TimeFirst(nn.Module):
    """Moves the samples to the second axis for a while; ``T = N`` hides it from shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(2, 2), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x.transpose(0, 1)))
        return self.fc2(h.transpose(0, 1).flatten(1))


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h - h.mean(0))


class Hidden(nn.Module):
    """Takes an LSTM's last state, not its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[1][0][0])


def normed() -> nn.Sequential:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 3))


def bce(outputs: int = 1, **options: Any) -> Setting:
    model = nn.Sequential(nn.Linear(3, outputs)).double()
    y = torch.rand(N, outputs).double()
    return Setting(model, nn.BCEWithLogitsLoss(**options), bernoulli, randn(N, 3), y)


def log_softmax() -> Setting:
    model = nn.Sequential(nn.Linear(3, 3), nn.LogSoftmax(1))
    return classify(model, randn(N, 3), nn.NLLLoss())


def regression(loss: Any) -> Setting:
    setting = regress(mlp(), randn(N, 3))
    return Setting(setting.model, loss, squared_error, setting.x, setting.y)


def vectors(model: nn.Module) -> Callable[[], Setting]:
    return lambda: classify(model, randn(N, 3))


def tokens() -> Setting:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    return classify(model, randn(N, 2, 3))


@dataclass(frozen=True)
class Refusal:
    name: str
    build: Callable[[], Setting]
    extensions: tuple[str, ...]
    message: str
    options: tuple[tuple[str, Any], ...] = ()


CURVED = ("DiagHessian", "DiagGGNExact", "SqrtGGNMC", "KFLR", "GGNMP")
FIRST = ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance")
KRONECKER = ("KFAC", "KFLR", "KFRA")

REFUSALS = (
    # layers
    Refusal("subclass", vectors(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Doubling(4, 3))), CURVED,
            r"Layer '2' is a Doubling, a subclass of Linear"),
    Refusal("subclass, first order", vectors(nn.Sequential(Doubling(3, 3))), FIRST,
            r"does not support layer '0' \(Doubling\).*params=\['!0'\]"),
    Refusal("GELU", vectors(mlp(nn.GELU())), CURVED, r"layer '1' \(GELU\)"),
    Refusal("LayerNorm", vectors(mlp(nn.LayerNorm(4))), (*CURVED, *FIRST),
            r"layer '1' \(LayerNorm\)"),
    Refusal("attention", lambda: classify(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True),
                                          randn(N, 2, 4)),
            CURVED, r"\(TransformerEncoderLayer\)"),
    Refusal("leaky relu", vectors(mlp(nn.LeakyReLU())), (*KRONECKER, "HMP", "GGNMP", "PCHMP"),
            r"layer '1' \(LeakyReLU\)"),
    Refusal("weight norm", lambda: classify(normed(), randn(N, 3)), (*CURVED, *FIRST),
            r"weight of layer '0' is computed from other parameters"),
    Refusal("BatchNorm", vectors(mlp(random_statistics(nn.BatchNorm1d(4)))),
            ("DiagHessian", "BatchDiagHessian", *KRONECKER), r"layer '1' \(BatchNorm1d\)"),
    Refusal("BatchNorm by batch", vectors(mlp(nn.BatchNorm1d(4))), ("DiagGGNExact", *FIRST),
            "batchnorm=\"batch\" couples samples in layer '1'", (("batchnorm", "batch"),)),
    Refusal("BatchNorm without statistics",
            vectors(mlp(nn.BatchNorm1d(4, track_running_stats=False))),
            ("DiagGGNExact", *FIRST), "Layer '1' has no running statistics"),
    Refusal("output padding",
            lambda: with_head(nn.ConvTranspose1d(2, 2, 2, stride=2, output_padding=1),
                              x=randn(N, 2, 3)),
            ("DiagGGNExact", *FIRST), r"layer '0' \(ConvTranspose1d\).*output_padding=\(1,\)"),
    Refusal("average-pool, ceiling", lambda: image(nn.AvgPool2d(3, 2, ceil_mode=True)),
            ("DiagHessian", "DiagGGNExact", "SqrtGGNExact"), r"failed at layer '2': ValueError"),
    Refusal("average-pool, in products", lambda: image(nn.AvgPool2d(3, 2, ceil_mode=True)),
            ("HMP", "GGNMP"), r"in the product for parameter '0\.weight'"),
    Refusal("grouped", lambda: image(nn.Conv2d(2, 4, 3, groups=2)), KRONECKER,
            r"layer '0' \(Conv2d\)"),
    Refusal("tokens", tokens, KRONECKER, r"layer '3'|layer '0'.*2d inputs"),
    Refusal("embedding with padding",
            lambda: classify(nn.Sequential(nn.Embedding(5, 3, 0), nn.Flatten(), nn.Linear(6, 3)),
                             torch.randint(5, (N, 2))),
            ("DiagGGNExact", *FIRST), r"failed at layer '0'.*padding_idx"),
    # containers
    Refusal("slicing container", vectors(nn.Sequential(nn.Linear(3, 4), Slicing(nn.Linear(4, 4)))),
            CURVED, r"failed at layer|does not support layer|rewrite|in the product"),
    Refusal("loose parameter", vectors(Loose()), (*CURVED, *FIRST), r"\(root\)|'scale'"),
    Refusal("function", vectors(Functions(torch.tanh)), CURVED, "uses 'tanh'"),
    Refusal("in-place function", vectors(Functions(lambda h: h.relu_())), CURVED, "uses 'relu_'"),
    Refusal("a view", vectors(Functions(lambda h: h.view(h.size(0), -1))), CURVED,
            r"uses '(size|view)'"),
    Refusal("adding a number", vectors(Functions(lambda h: h + 1.0)), ("DiagGGNExact", "SqrtGGNMC"),
            "tuple of tensors"),
    Refusal("control flow", vectors(Functions(lambda h: h if h.sum() > 1e9 else -h)), CURVED,
            "converter cannot rewrite Functions"),
    Refusal("residual", vectors(Residual()), ("DiagHessian", "BatchDiagHessian", "HMP"),
            "'sum_module0'"),
    Refusal("residual, Kronecker", vectors(Residual()), ("KFLR", "KFRA"), "residual connections"),
    Refusal("reused layer", vectors(Reused()), (*CURVED, *FIRST), "'?fc'?.* used 2 times"),
    Refusal("weight used twice", vectors(Transposed()), FIRST, r"'fc\.weight' is used more than"),
    Refusal("unused layer", vectors(Unused()), FIRST, r"'other\.weight'.*params=\['!other"),
    Refusal("samples moved", lambda: classify(TimeFirst(), randn(3, 3, 2)), (*CURVED, *FIRST),
            "silently wrong|Batch axis"),
    Refusal("coupled samples", vectors(Coupled()), FIRST, "gradient of sample 0"),
    Refusal("hidden state", lambda: classify(Hidden(), randn(N, 2, 3)), FIRST, "layer 'rnn'"),
    # losses
    Refusal("NLLLoss", log_softmax, CURVED, "does not know NLLLoss"),
    Refusal("L1Loss", lambda: regression(nn.L1Loss()), CURVED, "not the loss 'L1Loss'"),
    Refusal("pos_weight", lambda: bce(pos_weight=torch.tensor([2.0])), CURVED, "pos_weight="),
    Refusal("two Bernoulli outputs", lambda: bce(2), CURVED[:4], r"outputs \[N, 1\], not \[3, 2\]"),
    Refusal("Bernoulli", bce, ("KFRA", "HMP", "GGNMP", "PCHMP"),
            "does not support BCEWithLogitsLoss"),
    Refusal("soft targets, sampled", bce, ("DiagGGNMC", "KFAC"),
            r"the loss \(BCEWithLogitsLoss\).*binary targets"),
    # the way in
    Refusal("forward=", vectors(mlp()), (*CURVED, *FIRST), "through forward=",
            (("forward", lambda model, x: model(x)),)),
    Refusal("half precision", vectors(mlp()), ("DiagGGNExact", "BatchGrad"), "float32 or float64",
            (("dtype", torch.bfloat16),)),
)  # fmt: skip


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
