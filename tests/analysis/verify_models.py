"""Small problems for verify and coverage: healthy ones, and models with a fault each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs

N = 20


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module with reproducible parameters; the global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, count: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, count, (N, *shape), generator=generator)


class Transformer(nn.Module):
    """LayerNorm and MultiheadAttention on four tokens; logits ``[N, 3, 4]`` or ``[N, 3]``."""

    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = self.head(x)
        return x.transpose(1, 2) if self.tokens else x.mean(1)


class Tied(nn.Module):
    """One weight in two layers of different names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def mlp(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def problem(name: str) -> cs.Problem:
    """A healthy problem by name."""
    return HEALTHY[name]()


def ignoring(targets: Tensor) -> Tensor:
    targets = targets.clone()
    targets[::3] = -100
    return targets


def tied_sequential() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(4, 3))


def batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.3))
    model.append(nn.Flatten()).append(nn.Linear(12, 3))
    with torch.no_grad():
        model[1].running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
        model[1].running_var.copy_(torch.tensor([0.5, 1.5, 2.0]))
    return model


def problem_of(model: Callable[[], nn.Module], loss: object, *data: Tensor, **options: object):
    """A problem on a freshly seeded model."""
    return cs.Problem(seeded(model), loss, data, **options)  # type: ignore[arg-type]


HEALTHY: dict[str, Callable[[], cs.Problem]] = {
    "mlp": lambda: problem_of(mlp, nn.CrossEntropyLoss(), inputs(4), classes()),
    "cnn": lambda: problem_of(cnn, nn.CrossEntropyLoss(), inputs(1, 4, 4), classes()),
    "transformer": lambda: problem_of(
        Transformer, nn.CrossEntropyLoss(label_smoothing=0.1), inputs(4, 4), classes()
    ),
    "tokens": lambda: problem_of(
        lambda: Transformer(tokens=True),
        nn.CrossEntropyLoss(ignore_index=2),
        inputs(4, 4),
        classes(4),
    ),
    "tied": lambda: problem_of(Tied, nn.CrossEntropyLoss(), inputs(4), classes()),
    "ignored targets": lambda: problem_of(
        mlp, nn.CrossEntropyLoss(), inputs(4), ignoring(classes())
    ),
    "class weights": lambda: problem_of(
        mlp, nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 3.0])), inputs(4), classes()
    ),
    "sum of squares": lambda: problem_of(
        mlp, nn.MSELoss(reduction="sum"), inputs(4), inputs(3, seed=2)
    ),
    "binary": lambda: problem_of(
        mlp,
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.5])),
        inputs(4),
        (inputs(3, seed=2) > 0).float(),
    ),
    "batch norm": lambda: problem_of(batch_norm, nn.CrossEntropyLoss(), inputs(1, 6), classes()),
    "huber": lambda: problem_of(
        lambda: mlp(nn.GELU), nn.HuberLoss(delta=0.7), inputs(4), inputs(3, seed=2)
    ),
}


# -- faults -----------------------------------------------------------------------------------


class WrongBackward(torch.autograd.Function):
    """tanh whose gradient is 10 % too large."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 1.1 * g * (1 - x.tanh() ** 2)


class DetachedBackward(torch.autograd.Function):
    """tanh whose gradient is right, but is constant to autograd."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.detach().tanh() ** 2)


class OnceDifferentiable(torch.autograd.Function):
    """tanh whose backward pass is marked as not differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


class Apply(nn.Module):
    """An activation that is a custom function."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def custom(function: type[torch.autograd.Function]) -> cs.Problem:
    """Three layers, with the custom function between the second and the last."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), Apply(function), nn.Linear(5, 3)
        )

    return problem_of(build, nn.CrossEntropyLoss(), inputs(4), classes())


class Stateful(nn.Module):
    """Counts its calls in buffers, an attribute, a list and, if asked, a nested list."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.calls = 0
        self.history: list[int] = []
        self.log: dict[str, list[int]] = {"calls": []} if nested else {}

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.calls += 1
        self.history.append(self.calls)
        for entries in self.log.values():
            entries.append(self.calls)
        return self.layer(x)


class Noisy(nn.Module):
    """Dropout that does not ask for the training flag."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5, training=True)


class Cancelling(nn.Module):
    """Loses its digits in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) + 1e6) - 1e6


class Squeezing(nn.Module):
    """Drops the batch axis of a single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze()


class OnlySingle(nn.Module):
    """Casts to float32 inside, whatever its inputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x.float() @ self.matrix.float()), self.layer.weight)


class Unused(nn.Module):
    """A layer that the forward pass forgets, a frozen one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.layer = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(4)
        self.forgotten = nn.Linear(4, 3)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(torch.tanh(self.frozen(x) + self.offset)))
