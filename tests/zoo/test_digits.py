"""The digits problems: what they are, how well they are trained, and that nothing leaks."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch

from curvscope import zoo
from curvscope.errors import (
    DataError,
    NonFiniteError,
    OptionError,
    UnknownProblemError,
)
from curvscope.problem import Problem
from curvscope.zoo import datasets
from curvscope.zoo.recipes import Recipe, fit, private_randomness

# name, parameters, layers, test accuracy that the recipe must reach
DIGITS = [
    ("digits-mlp", 2410, 3, 0.94),
    ("digits-cnn", 1898, 3, 0.95),
    ("digits-tanh", 1930, 3, 0.94),
    ("digits-resnet", 2860, 11, 0.94),
    ("digits-transformer", 2926, 16, 0.92),
]
NAMES = [name for name, *_ in DIGITS]


@functools.cache
def trained(name: str) -> zoo.ZooProblem:
    """Trained once per test process, when first asked for. Not to be changed."""
    return zoo.load(name)


def weights(problem: Problem) -> torch.Tensor:
    return torch.cat([v.double().flatten() for v in problem.model.state_dict().values()])


@pytest.mark.parametrize(("name", "parameters", "layers", "accuracy"), DIGITS)
def test_trained_networks(name: str, parameters: int, layers: int, accuracy: float) -> None:
    problem = trained(name)
    assert isinstance(problem, Problem)
    assert problem.name == name
    assert problem.layout.numel == parameters
    assert len(problem.blocks) == layers
    assert f"{parameters:,}" in problem.description
    assert problem.accuracy() >= accuracy
    assert problem.accuracy("train") >= accuracy
    # Trained, but not to the point where the curvature vanishes with the loss.
    assert 1e-3 < problem.objective() < 0.2
    assert len(problem.history) == problem.recipe.epochs
    assert problem.history[-1] < problem.history[0] / 3
    assert not any(module.training for module in problem.model.modules())
    assert all(p.grad is None for p in problem.model.parameters())


def test_curvature_data_are_the_training_split_in_uneven_batches() -> None:
    problem = zoo.load("digits-cnn", trained=False)
    with problem.session():
        batches = list(problem.batches())
    sizes = [len(targets) for _, targets in batches]
    assert sizes == [600, 600, 341]
    assert problem.n_samples == len(problem.dataset.train) == 1541
    inputs, targets = problem.dataset.train.take(slice(None))
    assert torch.equal(torch.cat([x for x, _ in batches]), inputs)
    assert torch.equal(torch.cat([y for _, y in batches]), targets)


def test_splits_are_disjoint_complete_and_balanced() -> None:
    data = datasets.digits()
    assert len(data.train) + len(data.test) == 1797
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images)
    both = torch.cat([data.train.raw, data.test.raw]).flatten(1)
    assert torch.equal((16 * both.double()).sum(0), images.flatten(1).sum(0))
    assert both.min() == 0 and both.max() == 1
    for split in (data.train, data.test):
        share = torch.bincount(split.labels, minlength=10) / len(split)
        assert share.min() > 0.06 and share.max() < 0.14
    flat = datasets.digits_flat()
    assert torch.equal(flat.train.raw, data.train.raw.flatten(1))


@pytest.mark.parametrize("samples", [1, 7, 600, 601, 1541])
def test_samples(samples: int) -> None:
    problem = zoo.load("digits-mlp", trained=False, samples=samples)
    assert problem.n_samples == samples
    with problem.session():
        inputs = torch.cat([x for x, _ in problem.batches()])
    assert torch.equal(inputs, problem.dataset.train.take(slice(samples))[0])


@pytest.mark.parametrize("samples", [0, -1, 1542])
def test_samples_out_of_range(samples: int) -> None:
    with pytest.raises(OptionError, match="1,541"):
        zoo.load("digits-mlp", trained=False, samples=samples)


def test_float64_is_a_cast_after_training() -> None:
    single, double = trained("digits-cnn"), zoo.load("digits-cnn", dtype=torch.float64)
    assert double.dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in double.model.parameters())
    assert torch.equal(weights(single), weights(double))
    assert double.objective() == pytest.approx(single.objective(), rel=1e-5)
    assert double.accuracy() == single.accuracy()


def test_dtype_must_be_floating() -> None:
    with pytest.raises(OptionError, match="float64"):
        zoo.load("digits-mlp", trained=False, dtype=torch.int64)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_deterministic(name: str) -> None:
    torch.manual_seed(1)
    first = zoo.load(name, trained=False, seed=3)
    torch.manual_seed(2)
    second = zoo.load(name, trained=False, seed=3)
    assert torch.equal(weights(first), weights(second))
    start = weights(first)
    history = first.train(epochs=1)
    torch.randn(5)
    assert second.train(epochs=1) == history == first.history
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), start)
    # Training starts from fresh weights, whatever they are now.
    first.train(epochs=1)
    assert torch.equal(weights(first), weights(second))
    second.train(epochs=1, seed=4)
    assert not torch.equal(weights(first), weights(second))
    assert first.train(epochs=0) == []
    assert torch.equal(weights(first), start)


def test_training_does_not_depend_on_the_number_of_threads() -> None:
    problem = zoo.load("digits-cnn", trained=False)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            problem.train(epochs=1)
            assert torch.get_num_threads() == count
            found.append(weights(problem))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


def test_training_keeps_the_parameter_objects() -> None:
    problem = zoo.load("digits-resnet", trained=False)
    before = [id(p) for p in problem.model.parameters()]
    buffers = [id(b) for b in problem.model.buffers()]
    gradient = problem.gradient()
    problem.train(epochs=1)
    assert [id(p) for p in problem.model.parameters()] == before
    assert [id(b) for b in problem.model.buffers()] == buffers
    assert not torch.allclose(problem.gradient(), gradient)


def test_global_state_is_left_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    problem = zoo.load("digits-transformer", trained=False)
    problem.train(epochs=1)
    problem.accuracy()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_defaults_of_the_caller_do_not_matter() -> None:
    expected = zoo.load("digits-cnn", trained=False)
    expected.train(epochs=1)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            problem = zoo.load("digits-cnn", trained=False)
            problem.train(epochs=1)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert problem.dtype == torch.float32
    assert torch.equal(weights(problem), weights(expected))
    assert torch.equal(problem.gradient(), expected.gradient())


def test_subset_is_a_problem_on_the_same_network() -> None:
    problem = trained("digits-tanh")
    part = problem.subset(50, seed=1)
    assert part.n_samples == 50
    assert part.model is problem.model


def test_first_axis_is_the_sample_axis_everywhere() -> None:
    """Per-sample methods need it; positions are given for every sample for that reason."""
    problem = zoo.load("digits-transformer", trained=False, samples=5)
    seen = {}
    for name, module in problem.model.named_modules():
        module.register_forward_hook(
            lambda m, i, out, name=name: seen.update(
                {name: (out[0] if isinstance(out, tuple) else out).shape[0]}
            )
        )
    with problem.session():
        problem.outputs(next(problem.batches())[0])
    assert set(seen.values()) == {5}
    assert {"position", "patch", "blocks.0.attention", "blocks.1.norm2", "head"} <= set(seen)


def test_unknown_name() -> None:
    with pytest.raises(UnknownProblemError, match="Did you mean 'digits-cnn'") as caught:
        zoo.load("digit_cnn")
    for name in zoo.names():
        assert name in str(caught.value)


def test_names() -> None:
    assert zoo.names()[:5] == NAMES
    assert zoo.names()[5:] == ["mnist-autoencoder", "cifar10-resnet20", "char-transformer"]


def test_digits_take_no_folder(tmp_path: object) -> None:
    with pytest.raises(DataError, match="scikit-learn"):
        zoo.load("digits-mlp", data=str(tmp_path))


def test_accuracy_by_hand() -> None:
    problem = trained("digits-mlp")
    inputs, targets = problem.dataset.test.take(slice(None))
    with torch.no_grad():
        right = [int(problem.model(x[None]).argmax()) == int(y) for x, y in zip(inputs, targets)]
    assert problem.accuracy() == pytest.approx(sum(right) / 256, abs=1e-12)
    with pytest.raises(OptionError, match="split"):
        problem.accuracy("validation")


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"epochs": -1}, {"batch_size": 0}])
def test_recipes_are_checked(change: dict[str, float]) -> None:
    settings = {"optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 8, **change}
    with pytest.raises(OptionError):
        Recipe(**settings)  # type: ignore[arg-type]


def test_unknown_optimizer() -> None:
    with pytest.raises(OptionError, match="adam"):
        Recipe("adm", lr=0.1, epochs=1, batch_size=8)


def test_recipe_reads_as_a_sentence() -> None:
    text = str(zoo.load("digits-resnet", trained=False, seed=7).recipe)
    for part in ("sgd", "0.1", "12 epochs", "batches of 64", "momentum 0.9", "seed 7"):
        assert part in text


def test_divergence_is_reported_and_leaves_no_trace() -> None:
    data = datasets.digits_flat()
    state = torch.get_rng_state()
    recipe = Recipe("sgd", lr=1e12, epochs=3, batch_size=64)
    with pytest.raises(NonFiniteError, match="epoch 1"), private_randomness(0) as generator:
        model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
        fit(model, torch.nn.MSELoss(), _one_hot(data.train), recipe, generator)
    assert torch.equal(torch.get_rng_state(), state)


def _one_hot(split: datasets.Split) -> datasets.Split:
    def prepare(raw: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return raw, torch.nn.functional.one_hot(labels, 10).float()

    return datasets.Split(split.raw, split.labels, prepare)


def test_cosine_schedule_follows_its_formula() -> None:
    """One weight, gradient always 1: the distance travelled is the sum of learning rates."""
    data = torch.ones(12, 1)
    split = datasets.Split(data, data, lambda raw, labels: (raw, labels))
    recipe = Recipe("sgd", lr=0.5, epochs=2, batch_size=4)
    with private_randomness(0) as generator:
        model = torch.nn.Linear(1, 1, bias=False)
        start = model.weight.item()
        fit(model, lambda outputs, targets: outputs.mean(), split, recipe, generator)
    rates = [0.25 * (1 + np.cos(np.pi * step / 6)) for step in range(6)]
    assert start - model.weight.item() == pytest.approx(sum(rates), rel=1e-5)
