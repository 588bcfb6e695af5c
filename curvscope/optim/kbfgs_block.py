"""What K-BFGS keeps of one layer, and the parts of its step that concern one layer only.

The state of a layer with ``groups``, ``out`` and ``in`` (the 1 of a bias included) is a dictionary
of ``A``, ``H_a`` ``[groups, in, in]``, the momentum ``M`` ``[groups, out, in]``, the smoothed pair
``s``, ``y`` ``[groups, out]``, and ``H_g`` ``[groups, out, out]`` or the fields of
:class:`~.lbfgs.Memory`; ``peak_a`` and ``peak_g`` are for :func:`~.bfgs.keep_definite`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import SingularError
from .bfgs import (
    LEAST,
    double_damping,
    guarded_update,
    hessian_action,
    largest_diagonal,
    matmul,
    symmetric_inverse,
    times,
)
from .layer import Layer
from .lbfgs import Memory, dense, memory_times, remember

State = dict[str, Any]
COUNTS = (
    "updates",
    "skipped",
    "damped_on_inverse",
    "damped_on_identity",
    "skipped_input",
    "not_finite",
)


def begin(state: State, layer: Layer, memory: int | None, eps: float) -> None:
    """Everything that the state consists of besides ``A``, which is there already."""
    A = state["A"]
    groups, out, inp = layer.view.shape
    state["M"] = A.new_zeros(groups, out, inp)
    state["H_a"] = symmetric_inverse(A, eps, f"The factor A of layer {layer.block!r}")
    state["peak_a"] = largest_diagonal(state["H_a"])
    state["s"], state["y"] = A.new_zeros(groups, out), A.new_zeros(groups, out)
    if memory is None:
        state["H_g"] = torch.eye(out, dtype=A.dtype, device=A.device).repeat(groups, 1, 1)
        state["peak_g"] = largest_diagonal(state["H_g"])
    else:
        state.update(Memory.empty(memory, state["s"])._asdict())
    state["counts"] = torch.zeros(len(COUNTS), dtype=torch.long, device=A.device)


def direction(state: State) -> Tensor:
    """Step 3: ``H_g M H_a`` ``[groups, out, in]``."""
    half = matmul(state["M"], state["H_a"])
    if "H_g" in state:
        return matmul(state["H_g"], half)
    return memory_times(_memory(state), half)


def shorten(value: Tensor, factor: float) -> None:
    """Multiply in place; by 0 also what is infinite."""
    _ = value.mul_(factor) if factor else value.zero_()


def learn_pair(
    state: State, s_new: Tensor, y_new: Tensor, norm: Tensor, eps: float, smoothing: float
) -> dict[str, Tensor]:
    """Steps 4 to 6: smooth the pair, damp it twice, update ``H_g`` or the memory.

    ``norm`` ``[groups, 1]`` is the length of the mean gradient in the outputs.
    """
    state["s"].lerp_(s_new, 1 - smoothing)
    state["y"].lerp_(y_new, 1 - smoothing)
    s, y = state["s"], state["y"]  # stay undamped
    if "H_g" in state:
        pair = double_damping(s, y, times(state["H_g"], y), eps)
        H, peak = state["H_g"], state["peak_g"]
        done, state["peak_g"] = guarded_update(H, pair.s, pair.y, norm, peak)
    else:
        memory = _memory(state)
        Hy = memory_times(memory, y.unsqueeze(-1)).squeeze(-1)
        pair = double_damping(s, y, Hy, eps)
        memory, done = remember(memory, pair.s, pair.y, norm)
        state.update(memory._asdict())
    return {"done": done, **pair._asdict()}


def learn_input(state: State, mean: Tensor, eps: float) -> dict[str, Tensor]:
    """Step 7, "Hessian-action BFGS": update ``H_a`` with ``s = H_a a``, ``y = (A + eps I) s``."""
    s, y = hessian_action(state["H_a"], state["A"], eps, mean)
    norm, peak = mean.norm(dim=-1, keepdim=True), state["peak_a"]
    done, state["peak_a"] = guarded_update(state["H_a"], s, y, norm, peak)
    return {"input_done": done, "input_s": s, "input_y": y}


def count(state: State, last: dict[str, Tensor]) -> None:
    """Add to the counts of :data:`COUNTS` what the last step did."""
    events = (
        last["done"],
        ~last["done"],
        last["damped_on_inverse"],
        last["damped_on_identity"],
        ~last["input_done"],
    )
    state["counts"][: len(events)] += torch.stack([event.sum() for event in events])


def skip(state: State) -> None:
    """Count a pair that was never seen, and an input factor that learned nothing."""
    for name in ("skipped", "skipped_input"):
        state["counts"][COUNTS.index(name)] += len(state["s"])


def output_inverse(state: State) -> Tensor:
    """``H_g`` ``[groups, out, out]``, exactly symmetric."""
    if "H_g" in state:
        return state["H_g"]
    return dense(_memory(state)).to(state["A"].dtype)


def diagnose(state: State, last: dict[str, Tensor], eigenvalues: bool) -> dict[str, Any]:
    """The numbers of ``diagnostics()``; of several groups the worst one's.

    A count says how often since the beginning; ratios, residuals and the angle are the last step's.
    """
    found: dict[str, Any] = dict(zip(COUNTS, state["counts"].tolist(), strict=True))
    if "s" in last:
        found["sy_ss_before"] = float(last["before"].amin())
        found["sy_ss_after"] = float(last["after"].amin())
        H_g = output_inverse(state)
        found["secant_residual"] = _residual(H_g, last["s"], last["y"], last["done"])
        found["secant_residual_input"] = _residual(
            state["H_a"], last["input_s"], last["input_y"], last["input_done"]
        )
    if "cosine" in last:
        found["angle"] = degrees(last["cosine"])
        found["update_norm"] = float(last["update_norm"])
    if eigenvalues:
        found |= extremes(H_g=output_inverse(state), H_a=state["H_a"])
    return found


def exact_inverse(H: Tensor, block: str) -> Tensor:
    """The inverse of a stored factor, computed in float64.

    Eigenvalues that rounding has brought to zero or below count as those of :func:`keep_definite`,
    so that the curvature of a run can be read just before it diverges.
    """
    exact = H.double()
    try:
        return symmetric_inverse(exact, 0.0, f"An inverse factor of layer {block!r}").to(H.dtype)
    except SingularError:
        if not bool(torch.isfinite(exact).all()):
            raise
        values, vectors = torch.linalg.eigh(exact)
        least = LEAST * torch.finfo(H.dtype).eps * values[..., -1:]
        if not bool((least > 0).all()):
            raise
        inverse = (vectors / values.maximum(least).unsqueeze(-2)) @ vectors.mT
        return ((inverse + inverse.mT) / 2).to(H.dtype)


def extremes(**factors: Tensor) -> dict[str, float]:
    """Extreme eigenvalues of named factors, and the condition number of their Kronecker products.

    Of several groups the extremes of all; an eigenvalue of a product belongs to one group.
    """
    found: dict[str, float] = {}
    low = high = torch.ones((), dtype=torch.float64, device="cpu")
    for name, H in factors.items():
        values = torch.linalg.eigvalsh(H.double()).cpu()  # [groups, n], ascending
        found[f"{name}_min"], found[f"{name}_max"] = float(values.amin()), float(values.amax())
        low, high = low * values[:, 0], high * values[:, -1]
    definite = all(found[f"{name}_min"] > 0 for name in factors)
    return {**found, "condition": float(high.amax() / low.amin()) if definite else math.inf}


def degrees(cosine: Tensor) -> float:
    """The angle of a cosine."""
    return math.degrees(math.acos(min(1.0, max(-1.0, float(cosine)))))


def _memory(state: State) -> Memory:
    return Memory(*(state[name] for name in Memory._fields))


def _residual(H: Tensor, s: Tensor, y: Tensor, done: Tensor) -> float | None:
    """``||H y - s||`` of the last pair, where it was learned."""
    gaps = (times(H, y) - s).norm(dim=-1, keepdim=True)[done]
    return float(gaps.amax()) if gaps.numel() else None
