"""Models of other people's making: GPT-2 of ``transformers`` and ResNet-18 of ``torchvision``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvscope as cs
from tests.truth import relative

TIED = "transformer.wte"


def imported(package: str, names: str) -> list[Any]:
    """Names of an optional package; skipped where it, or what it needs, cannot be imported."""
    try:
        module = __import__(package, fromlist=names.split())
        return [getattr(module, name) for name in names.split()]
    except Exception as error:
        pytest.skip(f"{package} cannot be imported here: {type(error).__name__}")


def gpt2(params: list[str] | None = None) -> tuple[nn.Module, cs.Problem, Tensor, Tensor]:
    GPT2Config, GPT2LMHeadModel = imported("transformers", "GPT2Config GPT2LMHeadModel")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 20, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double()
    x, y = torch.randint(20, (2, 3, 8))
    problem = cs.Problem(
        model,
        nn.CrossEntropyLoss(),
        [(x[:2], y[:2]), (x[2:], y[2:])],
        forward=lambda model, ids: model(input_ids=ids).logits.mT,
        params=params,
    )
    return model, problem, x, y


def resnet18(
    params: list[str] | None = None,
) -> tuple[nn.Module, cs.Problem, Tensor, Tensor]:
    (make,) = imported("torchvision.models", "resnet18")
    torch.manual_seed(0)
    model = make(num_classes=4).double().eval()
    x, y = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.randint(4, (3,))
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    return model, cs.Problem(model, nn.CrossEntropyLoss(), data, params=params), x, y


def by_hand(model: nn.Module, loss: Tensor, vector: Tensor) -> Tensor:
    p = list(model.parameters())
    v = [part.view_as(q) for part, q in zip(vector.split([q.numel() for q in p]), p)]
    g = torch.autograd.grad(loss, p, create_graph=True)
    return torch.cat([h.reshape(-1) for h in torch.autograd.grad(g, p, v)])


def test_gpt2_products_with_tied_weights_are_exact() -> None:
    model, problem, x, y = gpt2()
    assert "lm_head" not in problem.blocks and "transformer.wte" in problem.blocks
    v = torch.randn(problem.layout.numel, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        model.eval()
        truth = by_hand(model, F.cross_entropy(model(input_ids=x).logits.mT, y), v)
    for engine in ("auto", "fresh", "retained"):
        assert relative(cs.hessian(problem, engine=engine) @ v, truth) < 1e-12
    tied = cs.ggn(problem).blocks["transformer.wte"]
    e = torch.zeros(problem.layout.numel, dtype=torch.float64)
    rows = problem.layout.index(problem.blocks["transformer.wte"])
    e[rows[7]] = 1
    assert relative((cs.ggn(problem) @ e)[rows], tied.dense()[:, 7]) < 1e-12


def test_gpt2_layers_are_taken_apart() -> None:
    """Its ``Conv1D`` holds weights as [in, out]; blocks agree with products, K-FAC covers them."""
    _, problem, _, _ = gpt2()
    kfac = cs.kfac(problem)
    layers = [name for name in problem.blocks if "attn" in name or "mlp" in name]
    assert set(layers) == set(kfac.blocks)
    G = cs.ggn(problem)
    block = G.blocks["transformer.h.1.mlp.c_fc"]
    assert block.info.route == "gram"
    rows = problem.layout.index(problem.blocks["transformer.h.1.mlp.c_fc"])
    e = torch.zeros(problem.layout.numel, dtype=torch.float64)
    e[rows] = torch.randn(len(rows), dtype=torch.float64)
    assert relative((G @ e)[rows], block @ e[rows]) < 1e-12
    row = cs.compare(G, {"K-FAC": kfac}, metrics=["error"]).row("transformer.h.1.mlp.c_fc", "K-FAC")
    assert 0 < row.best_in_class <= row.error < 1


def test_gpt2_spectrum_matrix_free() -> None:
    _, problem, _, _ = gpt2()
    found = cs.eigsh(cs.hessian(problem), 3, which="LA", tol=1e-6)
    assert found.converged
    for value, vector in zip(found.values, found.vectors.mT, strict=True):
        residual = cs.hessian(problem) @ vector - value * vector
        assert float(residual.norm()) < 2e-6 * float(value)


def test_gpt2_compared_as_the_digits_are() -> None:
    """Products alone, against everything formed, with tied weights among the parameters."""
    _, problem, _, _ = gpt2(["transformer.h.1.mlp.c_fc", "transformer.h.1.attn.c_proj", TIED])
    ggn, others = cs.ggn(problem), {"K-FAC": cs.kfac(problem)}
    options: dict[str, Any] = {"gradient": problem, "damping": 0.05, "blocks": ["(all)"]}
    options["metrics"] = [
        *("error", "cosine", "trace_ratio", "diagonal_correlation", "spectral_error"),
        *("eigenspace_overlap", "reference_condition_number", "spectrum_distance"),
        *("step_angle", "step_efficiency", "stein_divergence"),
    ]
    exact = cs.compare(ggn, others, method="exact", **options).row("(all)", "K-FAC")
    found = cs.compare(ggn, others, method="estimated", **options).row("(all)", "K-FAC")
    for name in options["metrics"]:
        slack = 5 * found.stderr.get(name, 0.0) + 1e-6 * abs(exact[name])
        assert found.method[name] == "estimated" or not found.stderr.get(name), name
        assert abs(found[name] - exact[name]) <= slack, (name, found[name], exact[name])


def test_gpt2_density_trace_and_concentration() -> None:
    _, problem, _, _ = gpt2()
    density = cs.density(cs.hessian(problem), probes=2, steps=8)
    assert float(density.nodes.min()) < 0 < float(density.nodes.max())
    op = cs.ggn(problem)
    trace, true = cs.trace(op, method="hutchinson", budget=16, tol=0), op.trace()
    assert abs(trace.value - true) < 5 * trace.stderr
    whole = cs.concentration(op, blocks=False, budget=16)
    assert whole.method == "estimated" and whole.size == problem.layout.numel
    assert 0 < whole.diagonal_share < 1 and whole.stderr["diagonal_share"] > 0
    assert abs(whole.scale - true / whole.size) < 5 * whole.stderr["scale"]


def test_resnet18_products_spectrum_and_comparison() -> None:
    model, problem, x, y = resnet18()
    assert problem.layout.numel > 11_000_000
    v = torch.randn(problem.layout.numel, dtype=torch.float64)
    truth = by_hand(model, F.cross_entropy(model(x), y), v)
    assert relative(cs.hessian(problem) @ v, truth) < 1e-11
    G = cs.ggn(problem)
    pairs = cs.eigsh(G, 1, which="LA", tol=1e-2, budget=8, copies=False)
    assert float(pairs.values[0]) > 0
    mean = cs.trace(G, method="hutchinson", budget=4, tol=1e-9)
    assert mean.value > float(pairs.values[0]) - 4 * mean.stderr
    # a layer of 2.4 million parameters beside K-FAC, formed by nobody
    name = "layer4.1.conv2"
    row = cs.compare(G.blocks[name], {"K-FAC": cs.kfac(problem).blocks[name]}, metrics=["error"])
    assert 0 < row.rows[0].error < 2


def test_resnet18_compared_as_the_digits_are() -> None:
    """Its first stage and its head, 150,000 parameters, by products alone."""
    _, problem, _, _ = resnet18(["layer1", "fc"])
    assert problem.layout.numel > 140_000
    options = {"metrics": ["error", "cosine", "trace_ratio"], "blocks": ["(all)"], "budget": 8}
    found = cs.compare(cs.ggn(problem), {"K-FAC": cs.kfac(problem)}, memory=0, **options)
    row = found.row("(all)", "K-FAC")
    assert 0 < row["cosine"] <= 1 and 0 < row.stderr["error"] < 1
    assert row["trace_ratio"] > 0 and set(row.method.values()) >= {"estimated"}
    whole = cs.concentration(cs.ggn(problem).blocks["layer1.0.conv1"], budget=8)
    assert whole.method == "estimated" and 0 < whole.diagonal_share < 1
