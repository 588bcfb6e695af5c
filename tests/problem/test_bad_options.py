"""Unknown parameters, blocks, routes and options; matrices that do not fit in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope import errors, memory
from tests.curvature.nets import seeded

from .refusals import CE, Refusal, X, Y, batchnorm, net, problem, refused

# -- models, parameters, blocks, options -------------------------------------------------------


def inferred() -> nn.Module:
    with torch.inference_mode():
        return net()


PARTS: dict[str, Refusal] = {
    "made in inference mode": (
        lambda: problem(model=inferred()),
        errors.ModelError,
        ("'0.weight'", "inference_mode", "outside"),
    ),
    "no module": (lambda: cs.Problem(len, CE(), (X, Y)), errors.ModelError, ("nn.Module",)),
    "nothing trainable": (
        lambda: problem(model=net().requires_grad_(False)),
        errors.ModelError,
        ("no trainable parameters (4 frozen)", "requires_grad_(True)"),
    ),
    "no parameters": (lambda: problem(model=nn.Tanh()), errors.ModelError, ("no trainable",)),
    "lazy": (
        lambda: problem(model=nn.LazyLinear(3)),
        errors.ModelError,
        ("'weight'", "run the model"),
    ),
    "complex": (
        lambda: problem(model=nn.Linear(3, 3, dtype=torch.complex64)),
        errors.ModelError,
        ("'weight'", "real"),
    ),
    "unknown parameter": (
        lambda: problem(params=["0.wieght"]),
        errors.ModelError,
        ("'0.wieght'", "Did you mean '0.weight'"),
    ),
    "nothing left": (lambda: problem(params=["!0", "!2"]), errors.ModelError, ("leaves no",)),
    "params of another type": (
        lambda: problem(params=[net()[0].weight]),
        errors.OptionError,
        ("names of parameters", "named_parameters"),
    ),
    "unknown block": (
        lambda: problem(blocks={"a": ["0"], "b": ["twoo"]}),
        errors.OptionError,
        ("blocks['b']", "'twoo'"),
    ),
    "empty block": (
        lambda: problem(blocks={"a": ["0", "2"], "b": []}),
        errors.OptionError,
        ("blocks['b'] names no parameter",),
    ),
    "overlap": (
        lambda: problem(blocks={"a": ["0", "2"], "b": ["2.bias"]}),
        errors.OptionError,
        ("'2.bias'", "'a' and 'b'", "overlap"),
    ),
    "not in any block": (
        lambda: problem(blocks={"a": ["0"]}),
        errors.OptionError,
        ("'2.weight', '2.bias'", "params="),
    ),
    "way of blocks": (
        lambda: problem(blocks="layers"),
        errors.OptionError,
        ("'layers'", "Did you mean 'layer'"),
    ),
    "blocks as a list": (lambda: problem(blocks=["0", "2"]), errors.OptionError, ("mapping",)),
    "batchnorm": (lambda: problem(batchnorm="train"), errors.OptionError, ("batchnorm='train'",)),
    "integer dtype": (lambda: problem(dtype=torch.int64), errors.OptionError, ("torch.int64",)),
    "no problem": (lambda: cs.hessian(net()), errors.OptionError, ("Problem", "Sequential")),
    "no problem for k-fac": (lambda: cs.kfac(net()), errors.OptionError, ("Problem",)),
    "route": (lambda: cs.ggn(problem(), route="fast"), errors.OptionError, ("route='fast'",)),
    "samples": (lambda: cs.fisher(problem(), samples=0), errors.OptionError, ("samples=0",)),
    "per": (lambda: cs.empirical_fisher(problem(), per="token"), errors.OptionError, ("'token'",)),
    "fisher": (
        lambda: cs.kfac(problem(), fisher="true"),
        errors.OptionError,
        ("'true'", "'exact'"),
    ),
    "sharing": (
        lambda: cs.kfac(problem(), sharing="sum"),
        errors.OptionError,
        ("'sum'", "'reduce'"),
    ),
    "probes": (
        lambda: cs.hutchinson_diagonal(problem(), probes=0),
        errors.OptionError,
        ("probes=0",),
    ),
    "matrix": (lambda: cs.exact_diagonal(problem(), "gauss"), errors.OptionError, ("'gauss'",)),
    "block": (
        lambda: cs.ggn(problem()).blocks["first"],
        errors.UnknownBlockError,
        ("'first'", "'0'"),
    ),
    "rows for a ggn": (
        lambda: cs.ggn(problem(), route="rows").blocks["0"],
        errors.UnsupportedLayerError,
        ("'rows'", "'0'", "route='auto'"),
    ),
    "gram for a smooth hessian": (
        lambda: cs.hessian(problem(), route="gram").blocks["0"],
        errors.UnsupportedLayerError,
        ("'gram'", "'0'", "not piecewise linear"),
    ),
    "rows for a norm": (
        lambda: cs.hessian(problem(model=batchnorm()), route="rows").blocks["1"],
        errors.UnsupportedLayerError,
        ("'rows'", "'1'", "acts on rows"),
    ),
    "a wrong vector": (
        lambda: cs.ggn(problem()) @ torch.ones(5),
        errors.ShapeError,
        ("(31, 31)", "[5]"),
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_models_blocks_and_options(name: str) -> None:
    refused(PARTS[name][0], PARTS[name][1], *PARTS[name][2])


COUNTS: dict[str, Callable[[Any, Any], Any]] = {
    "hutchinson_diagonal": lambda k, s: cs.hutchinson_diagonal(problem(), probes=k, seed=s),
    "fisher": lambda k, s: cs.fisher(problem(), samples=k, seed=s),
    "kfac": lambda k, s: cs.kfac(problem(), fisher="mc", samples=k, seed=s),
    "gradient_noise": lambda k, s: cs.gradient_noise(problem(), probes=k, seed=s),
    "batch_spectra": lambda k, s: cs.batch_spectra(problem(), draws=k, k=2, seed=s),
    "subset": lambda k, s: problem().subset(k, seed=s),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_seeds_are_whole_numbers_of_any_kind(name: str) -> None:
    COUNTS[name](np.int64(2), np.int64(1))
    for count, seed, named in ((2.0, 1, "2.0"), (True, 1, "True"), (2, "a", "seed='a'")):
        refused(lambda c=count, s=seed: COUNTS[name](c, s), errors.OptionError, named)


def test_forced_routes_still_compute_the_blocks_that_allow_them() -> None:
    op = cs.hessian(problem(), route="gram")
    assert op.blocks["2"].info.route == "piecewise-linear"  # nothing follows the last layer


def test_an_error_also_is_of_the_builtin_kind() -> None:
    with pytest.raises(ValueError):
        problem(blocks="layers")
    with pytest.raises(MemoryError):
        memory.require(10**18, "Something", "Do without it.")
    with pytest.raises(KeyError):
        cs.ggn(problem()).blocks["first"]


# -- memory ------------------------------------------------------------------------------------


def bytes_in(message: str) -> list[int]:
    return [int(n) for n in re.findall(r"\((\d+) bytes\)", message)]


def test_dense_matrices_that_do_not_fit() -> None:
    """A matrix of a terabyte is refused before anything is allocated, with the alternative."""
    wide = nn.Sequential(nn.Linear(300, 1000), nn.Tanh(), nn.Linear(1000, 3))
    x = torch.randn(2, 300)
    p = cs.Problem(wide, CE(), (x, torch.tensor([0, 1])))
    size = p.layout.numel
    for matrix in (cs.hessian, cs.ggn, cs.kfac):
        op = matrix(p)
        refused(op.dense, errors.MemoryLimitError, "op @ v", "are available")
    with pytest.raises(errors.MemoryLimitError) as caught:
        cs.hessian(p).dense()
    needed, available = bytes_in(str(caught.value))
    assert needed == 2 * size * size * 4
    assert 0 < available < needed
    # the product is not refused
    assert cs.hessian(p) @ torch.ones(size) is not None


@pytest.mark.parametrize("route", ["auto", "rows", "autograd"])
def test_hessian_blocks_that_do_not_fit(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem()
    op = cs.hessian(p, route=route)
    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 1000)
    refused(lambda: op.blocks["0"].dense(), errors.MemoryLimitError, "needs", "(1000 bytes)")


@pytest.mark.parametrize("matrix", [cs.ggn, cs.fisher, cs.empirical_fisher])
def test_gram_blocks_that_do_not_fit(matrix: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3)))
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    op = matrix(cs.Problem(model, CE(), (x, Y[:5])))
    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 1000)
    refused(
        lambda: op.blocks["0"], errors.MemoryLimitError, "'0'", "problem.subset", "(1000 bytes)"
    )


def test_jacobian_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: nn.Sequential(nn.EmbeddingBag(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    x = torch.tensor([[0, 1], [2, 3]])
    op = cs.ggn(cs.Problem(model, CE(), (x, Y[:2])))
    vector = torch.ones(op.shape[0], dtype=torch.float64)
    op @ vector
    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 1000)
    refused(lambda: op @ vector, errors.MemoryLimitError, "Jacobian", "smaller batches")
