"""No call of the library may change anything of the user's: watched in every test.

``install()`` (called by ``conftest`` before any test module is imported) wraps the public
functions and the methods that compute. Each outermost call takes a snapshot of the models, losses
and data of the problems among its arguments and of torch's and the random generators' global state,
and compares afterwards, also when the call fails.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import curvscope as cs
from curvscope.curvature.autograd import AutogradOperator
from curvscope.curvature.whole import WholeOperator
from curvscope.problem.data import leaves

PUBLIC = {
    "curvscope.curvature": (
        "hessian ggn fisher empirical_fisher kfac ekfac kflr kfra foof diagonal_kf exact_diagonal "
        "hutchinson_diagonal"
    ),
    "curvscope.curvature.backpack": (
        "diag_hessian diag_ggn sqrt_ggn kfac kflr kfra batch_grad batch_l2 sum_grad_squared "
        "variance batch_diag_ggn batch_diag_hessian hmp ggnmp pchmp compute supported"
    ),
    "curvscope.analysis": (
        "compare spectrum concentration coverage verify eigsh trace diagonal norm"
    ),
    "curvscope.training.surfaces": "loss_surface objective_at",
    "curvscope.training.planes": "random_plane",
    "curvscope.training.paths": "flat_parameters",
    "curvscope.training.ellipses": "ellipse",
}
METHODS = {
    cs.Problem: "check objective gradient subset with_data describe snapshot",
    AutogradOperator: "_matmat _dense diagonal",
    WholeOperator: "_compute vectors diagonal trace",
}
_CONTAINERS = (list, dict, set, deque)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_TABLES = ("_parameters", "_buffers", "_modules", *_HOOKS)

State = dict[str, Any]


# -- snapshots ---------------------------------------------------------------------------------


def tensor_state(name: str, tensor: Tensor) -> State:
    return {
        f"{name} (identity)": id(tensor),
        f"{name} (storage)": tensor.data_ptr(),
        f"{name} (values)": tensor.detach().clone(),
        f"{name} (requires_grad)": tensor.requires_grad,
    }


def module_state(model: nn.Module) -> State:
    state: State = {}
    for name, module in model.named_modules(remove_duplicate=False):
        at = f"module {name!r}"
        state[f"{at} (class)"] = type(module)
        state[f"{at} (training)"] = module.training
        for table in _TABLES if not isinstance(module, torch.jit.ScriptModule) else ():
            entries = getattr(module, table, {})
            state[f"{at} ({table})"] = {k: id(v) for k, v in entries.items()}
            state[f"{at} ({table}, order)"] = list(entries)
        for key, value in module.__dict__.items():
            if key in _TABLES:
                continue
            state[f"{at} (attribute {key})"] = id(value)
            if isinstance(value, Tensor):
                state |= tensor_state(f"{at} (attribute {key})", value)
            elif isinstance(value, dict):
                state[f"{at} (items of {key})"] = {k: id(v) for k, v in value.items()}
            elif isinstance(value, _CONTAINERS):
                state[f"{at} (items of {key})"] = [id(v) for v in value]
    for name, p in model.named_parameters():
        state |= tensor_state(f"parameter {name!r}", p)
        state[f"parameter {name!r} (grad identity)"] = None if p.grad is None else id(p.grad)
        if p.grad is not None and not p.grad.is_sparse:
            state[f"parameter {name!r} (grad values)"] = p.grad.detach().clone()
        state[f"parameter {name!r} (hooks)"] = dict(p._backward_hooks or {})
        state[f"parameter {name!r} (attributes)"] = sorted(getattr(p, "__dict__", {}))
    for name, b in model.named_buffers():
        state |= tensor_state(f"buffer {name!r}", b)
    return state


def _numpy_state() -> tuple[Any, ...]:
    _, words, *rest = np.random.get_state()
    return np.asarray(words).tobytes(), *rest


def global_state() -> State:
    flags = torch.backends.cuda
    state: State = {
        "random state of torch": torch.get_rng_state(),
        "random state of numpy": _numpy_state(),
        "random state of python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention kernels": (
            flags.flash_sdp_enabled(),
            flags.math_sdp_enabled(),
            flags.mem_efficient_sdp_enabled(),
        ),
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "checkpoints": torch.utils.checkpoint.CheckpointFunction,
        "function modes": torch._C._len_torch_function_stack(),
    }
    if torch.cuda.is_initialized():
        state["random state of cuda"] = torch.cuda.get_rng_state()
    return state


def problem_state(problem: cs.Problem) -> State:
    state = module_state(problem.user_model)
    if isinstance(problem.user_loss, nn.Module):
        state |= {f"loss: {k}": v for k, v in module_state(problem.user_loss).items()}
    for number, item in enumerate(problem.data.items):
        for leaf in leaves(item):
            # inference tensors have no version; nothing can change them in place here
            state[f"data {number} {id(leaf)}"] = None if leaf.is_inference() else leaf._version
    for number, generator in enumerate(problem.data._generators()):
        state[f"generator {number} of the loader"] = generator.get_state()
    return state


def problems_in(values: Iterable[Any]) -> Iterator[cs.Problem]:
    for value in values:
        if isinstance(value, cs.Problem):
            yield value
        elif isinstance(value, dict):
            yield from problems_in(value.values())
        elif isinstance(value, list | tuple):
            yield from problems_in(value)
        elif isinstance(getattr(value, "problem", None), cs.Problem):
            yield value.problem


# -- comparing ---------------------------------------------------------------------------------


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.shape != right.shape or torch.equal(left, right):
            return left.shape == right.shape
        return torch.equal(left.nan_to_num(), right.nan_to_num())
    return bool(left == right)


def differences(before: State, after: State) -> list[str]:
    changed = [k for k in before if k not in after or not equal(before[k], after[k])]
    return changed + [f"{k} (new)" for k in after if k not in before]


_active = False


@contextlib.contextmanager
def unchanged(*values: Any) -> Iterator[None]:
    """Assert that the body changes nothing of the problems among ``values``."""
    global _active
    if _active:
        yield
        return
    problems = list({id(p): p for p in problems_in(values)}.values())
    before = [global_state(), *(problem_state(p) for p in problems)]
    _active = True
    try:
        yield
    finally:
        _active = False
        after = [global_state(), *(problem_state(p) for p in problems)]
        found = [entry for b, a in zip(before, after) for entry in differences(b, a)]
        assert not found, f"The call changed: {', '.join(found)}"


def watched(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with unchanged(args, kwargs):
            return function(*args, **kwargs)

    call.watched = True  # type: ignore[attr-defined]
    return call


def install() -> None:
    """Wrap what exists of ``PUBLIC`` and ``METHODS``, once."""
    for name, functions in PUBLIC.items():
        module = importlib.import_module(name)
        for entry in functions.split():
            function = getattr(module, entry, None)
            if function is not None and not hasattr(function, "watched"):
                setattr(module, entry, watched(function))
    for owner, methods in METHODS.items():
        for entry in methods.split():
            method = owner.__dict__.get(entry)
            if method is not None and not hasattr(method, "watched"):
                setattr(owner, entry, watched(method))


@pytest.fixture(autouse=True)
def side_effects() -> Iterator[None]:
    """Every test runs with the watch on, and leaves torch's modes as they were."""
    assert hasattr(cs.hessian, "watched"), "install() has not been called"
    before = {k: v for k, v in global_state().items() if not k.startswith("random")}
    yield
    after = {k: v for k, v in global_state().items() if not k.startswith("random")}
    assert not _active
    assert not (found := differences(before, after)), f"The test left changed: {found}"
