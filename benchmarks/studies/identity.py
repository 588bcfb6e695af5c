"""How close AdaFisher's matrix is to a multiple of the identity, and what a twin with it does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import curvscope as cs

from . import nets

LR, DAMPING, EVERY = 1e-3, 1e-3, 100


def distance(op: cs.Operator) -> float:
    """``||F - c I|| / ||F||`` with the best ``c``."""
    return (op - cs.best_identity(op)).frobenius_norm() / op.frobenius_norm()


def degrees(u: Tensor, v: Tensor) -> float:
    u, v = u.double(), v.double()
    return math.degrees(math.acos(max(-1.0, min(1.0, float(u @ v / u.norm() / v.norm())))))


def measure(model: nn.Module, optimizer: cs.optim.AdaFisher) -> dict[str, Any]:
    """A row per layer after a step: distances of ``F`` and of its inverse, angle, effective rate.

    The angle is that between the step and the averaged gradient that it was made of; ``whole`` that
    between ``F^-1 g`` and the gradient ``g`` of all layers together.
    """
    F, P = optimizer.curvature(), optimizer.preconditioner()
    angles = {row["block"]: row["angle"] for row in optimizer.diagnostics()}
    modules = dict(model.named_modules())
    layers = [
        {
            "layer": name,
            "kind": type(modules[name]).__name__,
            "F": distance(block),
            "inverse": distance(P.blocks[name]),
            "angle": angles[name],
            "damping_share": DAMPING * block.shape[0] / block.trace(),
            "rate": LR * P.blocks[name].trace() / block.shape[0],
        }
        for name, block in F.blocks.items()
    ]
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    return {"layers": layers, "whole": degrees(P @ g, g), "distance": distance(P)}


class Scaled(torch.optim.Optimizer):
    """AdaFisher's step with a number per layer for its matrix: ``theta -= rate m / (1 - b^t)``.

    ``rates(step)`` gives the number by layer's name.
    """

    def __init__(self, model: nn.Module, rates: Any, beta: float = 0.9) -> None:
        groups = [
            {"params": list(layer.parameters(recurse=False)), "name": name}
            for name, layer in model.named_modules()
            if list(layer.parameters(recurse=False))
        ]
        super().__init__(groups, {"beta": beta})
        self.rates, self.steps = rates, 0

    def step(self, closure: Any) -> Tensor:  # type: ignore[override]
        loss = closure()
        self.steps += 1
        rates = self.rates(self.steps)
        with torch.no_grad():
            for group in self.param_groups:
                beta = group["beta"]
                for p in group["params"]:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - beta)
                    p.sub_(m, alpha=rates[group["name"]] / (1 - beta**self.steps))
        return loss.detach()


def run(
    name: str, averaging: str, seed: int, data: Path, *, steps: int, batch: int
) -> dict[str, Any]:
    """AdaFisher on one network, measured after every refresh of its factors; and its twin."""
    samples = nets.NETS[name].data(data)
    model = nets.initial(name, seed)
    optimizer = cs.optim.AdaFisher(
        model, lr=LR, damping=DAMPING, update_every=EVERY, averaging=averaging
    )
    record: dict[str, Any] = {"net": name, "averaging": averaging, "seed": seed, "steps": []}

    def after(step: int, loss: float) -> None:
        if step % EVERY == 1:  # factors have just been refreshed
            record["steps"].append({"step": step, **measure(model, optimizer)})

    losses = nets.train(model, samples, optimizer, steps=steps, batch=batch, seed=seed, after=after)
    record["AdaFisher"] = outcome(model, samples, losses)
    record["coverage"] = len(optimizer.curvature().uncovered)
    at = [entry["step"] for entry in record["steps"]]
    rates = [{r["layer"]: r["rate"] for r in entry["layers"]} for entry in record["steps"]]

    def scheduled(step: int) -> dict[str, float]:
        return rates[max(k for k, first in enumerate(at) if first <= step)]

    model = nets.initial(name, seed)
    losses = nets.train(
        model, samples, Scaled(model, scheduled), steps=steps, batch=batch, seed=seed
    )
    record["twin"] = outcome(model, samples, losses)
    return record


def outcome(model: nn.Module, data: nets.Data, losses: list[float]) -> dict[str, Any]:
    """Training curve (means of windows), and loss and accuracy on the test images at the end."""
    window = max(1, len(losses) // 40)
    curve = [sum(part) / len(part) for part in _windows(losses, window)]
    loss, accuracy = nets.evaluate(model, data.test_inputs, data.test_labels)
    last = losses[-5 * window :]
    return {
        "curve": curve,
        "window": window,
        "train": sum(last) / len(last),
        "test": loss,
        "accuracy": accuracy,
    }


def _windows(values: list[float], size: int) -> list[list[float]]:
    return [values[k : k + size] for k in range(0, len(values) - size + 1, size)]
