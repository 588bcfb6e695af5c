"""Optimizers by name: what is built, how it is stepped, and what is refused."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.errors import MissingPackageError, OptionError
from curvscope.training import NamedOptimizer, OptimizerSpec, build_optimizer
from curvscope.training.optimizers_by_name import OURS, torch_optimizers
from tests.training.loops import data, plain_net

# what torch has beside first-order methods on dense gradients
ODD = {"sparseadam": "sparse gradients", "muon": "matrices only"}


def imported(name: str) -> Any:
    """A package, or a skip where it is missing or does not go with the installed torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"{name} cannot be imported here: {error}")


def losses(built: NamedOptimizer, model: nn.Module, steps: int) -> list[float]:
    """The loss before each of some steps on all samples."""
    x, y = data()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    return [float(built.step(loss)) for _ in range(steps)]


@pytest.mark.parametrize("name", [*OURS, *(n for n in torch_optimizers() if n not in ODD)])
def test_every_name_learns(name: str) -> None:
    model = plain_net()
    built = build_optimizer(name, model)
    found = losses(built, model, 12)
    assert found[-1] < found[0], found
    assert built.lr is None or built.lr > 0


@pytest.mark.parametrize("name", ["adam", "kbfgs", "adahessian"])
def test_a_step_is_that_of_the_class(name: str) -> None:
    """Two of them, by name and by hand, end at the same bits."""
    named, own = plain_net(), plain_net()
    losses(build_optimizer(f"{name}:lr=0.05", named), named, 3)
    x, y = data()
    optimizer: Any = {
        "adam": lambda: torch.optim.Adam(own.parameters(), lr=0.05),
        "kbfgs": lambda: cs.optim.KBFGS(own, lr=0.05, damping=0.01),
        "adahessian": lambda: cs.optim.AdaHessian(own, lr=0.05),
    }[name]()
    for _ in range(3):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(own(x), y)
            if name != "adahessian":
                loss.backward()
            return loss

        optimizer.step(closure)
    assert all(map(torch.equal, named.parameters(), own.parameters()))


def test_how_names_are_read() -> None:
    spec = OptimizerSpec.parse("kbfgs:lr=[0.1, 0.3],damping=0.3,fallback=sgd")
    assert spec.options == {"lr": [0.1, 0.3], "damping": 0.3, "fallback": "sgd"}
    assert spec.label == "kbfgs (damping=0.3, fallback=sgd)"
    spec = OptimizerSpec.parse("some.package:Class:lr=0.1,betas=(0.9, 0.99)")
    assert spec.name == "some.package:Class" and spec.options["betas"] == (0.9, 0.99)
    assert OptimizerSpec.parse(str(spec)) == spec and spec.label.startswith("Class (betas")
    assert OptimizerSpec.parse("torch.optim:SGD").options == {}


@pytest.mark.parametrize(
    "name, error, words",
    [
        ("adamm", OptionError, "adam"),
        ("", OptionError, "names no optimizer"),
        ("adam:lr", OptionError, "'lr' in 'adam:lr' is not of the form option=value"),
        ("adam:learning_rate=1", OptionError, "cannot be made.*options lr"),
        ("kbfgs:dampnig=1", OptionError, "damping"),
        ("not_a_package_at_all:Class", MissingPackageError, "pip install not_a_package_at_all"),
        ("torch.optim.nowhere:SGD", OptionError, "no module"),
        ("torch.optim:Adan", OptionError, "no class 'Adan'.*Adam"),
        ("torch.nn:Linear", OptionError, "something else than an optimizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_refusals(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build_optimizer(name, plain_net())


OTHERS = [
    "pytorch_optimizer:AdaBelief:lr=0.02",
    "pytorch_optimizer:DiffGrad:lr=0.02",
    "pytorch_optimizer:EXAdam:lr=0.02",
    "pytorch_optimizer:Lion:lr=0.01",
    "pytorch_optimizer:AdaHessian:lr=0.05",
    "pytorch_optimizer:Shampoo:lr=0.02",
    "bitsandbytes.optim:Adam8bit:lr=0.02,min_8bit_size=16",
]


@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_of_others(name: str, tmp_path: Any) -> None:
    """Each learns, under a monitor, in ``curvscope train``'s own loop."""
    imported(name.partition(":")[0].partition(".")[0])
    from tests.training.loops import problem_of

    found = cs.training.train(
        problem_of(plain_net()),
        name,
        epochs=4,
        batch_size=8,
        out=tmp_path / "out",
        monitor={"measures": ["loss", "gradient", "sharpness"], "every": 4},
    ).runs[0]
    assert found.state == "finished", found.reason
    frame = cs.Run(found.path).frame("epoch")
    assert frame["train_loss"].iloc[-1] < frame["train_loss"].iloc[0]
