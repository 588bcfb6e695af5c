"""What the study runs: parts by name, each a function that returns numbers for the JSON file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import factors, identity, preactivation, spatial

SEEDS = (0, 1, 2)
Part = Callable[[Path], Any]


@dataclasses.dataclass(frozen=True)
class Question:
    """One of the study's questions: its parts by name, and its settings for the page."""

    name: str
    parts: Mapping[str, Part]
    settings: Mapping[str, Any]


def _question(
    name: str,
    run: Callable[..., Any],
    cases: Mapping[str, dict[str, Any]],
) -> Question:
    """Every case with every seed."""
    parts = {
        f"{name}/{case}/seed{seed}": functools.partial(run, seed=seed, **options)
        for seed in SEEDS
        for case, options in cases.items()
    }
    calls = {key: _with_data(part) for key, part in parts.items()}
    return Question(name, calls, cases)


def _with_data(part: Callable[..., Any]) -> Part:
    return lambda data: part(data=data)


_MNIST = {"samples": 500, "steps": 500, "batch": 128, "compared": 100}
FACTORS: dict[str, dict[str, Any]] = {
    "mnist-mlp": {"name": "mnist-mlp", **_MNIST},
    "mnist-cnn": {"name": "mnist-cnn", **_MNIST},
    "cifar-resnet20": {"name": "cifar-resnet20", "samples": 100, "steps": 120, "batch": 64},
}

_TRAINED = {
    "mnist-mlp": {"steps": 1001, "batch": 128},
    "mnist-cnn": {"steps": 401, "batch": 64},
    "cifar-resnet8": {"steps": 201, "batch": 64},
}
IDENTITY: dict[str, dict[str, Any]] = {
    f"{net}/{averaging}": {"name": net, "averaging": averaging, **options}
    for net, options in _TRAINED.items()
    for averaging in ("paper", "release")
}

_ESTIMATED = {"probes": 32, "steps": 120, "batch": 64}
SPATIAL: dict[str, dict[str, Any]] = {
    "mnist-cnn": {"name": "mnist-cnn", "samples": 128, **_ESTIMATED},
    "cifar-resnet8": {"name": "cifar-resnet8", "samples": 64, **_ESTIMATED},
}
AVERAGED: dict[str, dict[str, Any]] = {
    f"{net}/{averaging}/lr{lr:g}": {
        "name": net,
        "averaging": averaging,
        "lr": lr,
        "steps": 200,
        "batch": 64,
    }
    for net in ("mnist14-cnn",)
    for averaging in spatial.AVERAGINGS
    for lr in (0.02, 0.06, 0.18)
}

PREACTIVATION: dict[str, dict[str, Any]] = {
    "autoencoder": {"at": [1, 4, 16, 60, 120], "samples": 30}
}

QUESTIONS = {
    question.name: question
    for question in (
        _question("factors", factors.run, FACTORS),
        _question("preactivation", preactivation.run, PREACTIVATION),
        _question("identity", identity.run, IDENTITY),
        _question("spatial", spatial.estimates, SPATIAL),
        _question("averaged", spatial.training, AVERAGED),
    )
}
