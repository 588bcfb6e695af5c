"""Numbers about a step that several optimizers report, and finding where a loss became NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..modes import aside
from ..problem.blocks import ROOT
from .passes import Buffers, RandomState


def angle(step: Tensor, gradient: Tensor) -> float:
    """The angle in degrees between two vectors; NaN where one of them is zero."""
    step, gradient = step.double(), gradient.double()
    lengths = torch.linalg.vector_norm(step) * torch.linalg.vector_norm(gradient)
    return float(torch.rad2deg(torch.acos(((step @ gradient) / lengths).clamp(-1, 1))))


def spread(denominator: Tensor, damping: float) -> dict[str, float]:
    """Extremes of a diagonal preconditioner's denominator, and how much of it is damping."""
    low, high = float(denominator.min()), float(denominator.max())
    return {
        "F_min": low,
        "F_max": high,
        "condition": high / low if low else float("inf"),
        "damping_share": damping / float(denominator.median()),
    }


def first_bad_layer(
    model: nn.Module, closure: Callable[[], Any], device: torch.device
) -> str | None:
    """Evaluate the closure again and see which layer is the first to be fed or return NaN.

    Buffers and random states are put back. ``None`` if no layer is.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found:
                if any(_bad(x) for x in inputs):
                    found.append(f"the input of layer {name!r}")
                elif any(_bad(x) for x in (output if isinstance(output, tuple) else (output,))):
                    found.append(f"the output of layer {name!r}")

        return look

    leaves = [
        (n or ROOT, m) for n, m in model.named_modules() if not any(True for _ in m.children())
    ]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    state, buffers = RandomState(device), Buffers(model)
    try:
        with torch.enable_grad(), aside():
            closure()
    except Exception:  # already on the way to an error, which must not be hidden by another
        return found[0] if found else None
    finally:
        for handle in handles:
            handle.remove()
        state.restore()
        buffers.restore()
    return found[0] if found else None


def _bad(value: Any) -> bool:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return floating and not bool(torch.isfinite(value).all())
