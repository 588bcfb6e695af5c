"""Precisions, modes of the caller, and training that goes on while operators live."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvscope as cs
from tests.curvature.nets import Apply, mlp, seeded
from tests.truth import relative

from .exactly import MATRICES
from .refusals import BCE, CE, MSE, X, Y, Z, batchnorm, net

# -- precisions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize("matrix", MATRICES)
def test_lower_precisions(matrix: str, dtype: torch.dtype, tolerance: float) -> None:
    """Within the precision of the model, and summed in float32 at least."""
    truth = MATRICES[matrix](cs.Problem(net(), CE(), (X, Y)))
    value = MATRICES[matrix](cs.Problem(net().to(dtype), CE(), [(X[:2], Y[:2]), (X[2:], Y[2:])]))
    assert value.dtype == (dtype if matrix == "gradient" else torch.float32)
    assert relative(value.double(), truth) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_of_other_losses(dtype: torch.dtype) -> None:
    for loss, y in ((MSE(), Z), (BCE(), (Z > 0).double()), (nn.SmoothL1Loss(), Z)):
        low = cs.Problem(net().to(dtype), loss, (X, y))
        high = cs.Problem(net(), loss, (X, y))
        for matrix in (cs.ggn, cs.kflr, cs.empirical_fisher, cs.hessian):
            value, truth = matrix(low).dense(), matrix(high).dense()
            assert value.dtype == torch.float32
            assert relative(value.double(), truth) < (1e-4 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precisions_still_notice_dropout(dtype: torch.dtype) -> None:
    model = nn.Sequential(net(), Apply(lambda x: F.dropout(x, 0.5))).to(dtype)
    with pytest.raises(cs.errors.NonDeterministicError, match="functional dropout"):
        cs.Problem(model, CE(), (X, Y)).check()
    # but not the rounding of another order
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    cs.Problem(net().to(dtype), CE(), loader).check()


def test_half_precision_still_notices_what_is_not_additive() -> None:
    p = cs.Problem(net().bfloat16(), lambda z, y: z.sum().abs(), (X, Y), reduction="mean")
    with pytest.raises(cs.errors.UnsupportedLossError, match="not additive"):
        p.check()


# -- modes of the caller -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast", "train"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_modes_of_the_caller(matrix: str, mode: str) -> None:
    dtype = torch.float32 if mode == "autocast" else torch.float64
    model = net().to(dtype)
    truth = MATRICES[matrix](cs.Problem(model, CE(), (X, Y)))
    modes: dict[str, Any] = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "train": torch.enable_grad(),
    }
    model.train(mode == "train")
    with modes[mode]:
        data = (X.clone(), Y.clone())
        problem = cs.Problem(model, CE(), data)
        value = MATRICES[matrix](problem)
    assert "blocks" in matrix or not value.is_inference()
    assert torch.equal(value, truth)


def test_operators_made_in_inference_mode_live_on() -> None:
    model = net()
    with torch.inference_mode():
        problem = cs.Problem(model, CE(), (X.clone(), Y.clone()))
        ops = [cs.hessian(problem), cs.ggn(problem), cs.kfac(problem), cs.ekfac(problem)]
        vector = torch.ones(problem.layout.numel, dtype=torch.float64)
        for op in ops:
            op @ vector
    for op in ops:
        assert not (
            op @ torch.ones_like(torch.empty(vector.shape, dtype=torch.float64))
        ).is_inference()
        op.damped(0.1).inverse() @ torch.ones(len(vector), dtype=torch.float64)


def test_products_under_autocast() -> None:
    problem = cs.Problem(net().float(), CE(), (X, Y))
    v = torch.randn(problem.layout.numel, generator=torch.Generator().manual_seed(0))
    for make in (cs.hessian, cs.ggn, cs.kfac, cs.ekfac, cs.diagonal_kf):
        op = make(problem)
        plain = op @ v
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(op @ v, plain)


def test_train_flags_make_no_difference_and_are_noted() -> None:
    model = batchnorm(nn.Dropout(0.5), nn.ReLU())
    quiet = cs.hessian(cs.Problem(model, CE(), (X, Y)))
    loud = cs.hessian(cs.Problem(copy.deepcopy(model).train(), CE(), (X, Y)))
    # products may take another engine, whichever a trial finds faster, with other roundings
    assert float((quiet.dense() - loud.dense()).norm() / loud.dense().norm()) < 1e-13
    assert quiet.info.notes == ()
    assert "eval()" in loud.info.notes[0]


# -- later changes -----------------------------------------------------------------------------


def step(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("matrix", [cs.hessian, cs.ggn, cs.empirical_fisher, cs.kfac, cs.ekfac])
def test_operators_keep_the_values_of_their_creation(matrix: Any, dtype: Any) -> None:
    model = net() if dtype is None else net().float()
    problem = cs.Problem(model, CE(), (X, Y), dtype=dtype)
    truth = matrix(problem).dense()
    op = matrix(problem)
    step(model)
    v = torch.ones(len(truth), dtype=torch.float64)
    assert relative(op @ v, truth @ v) < 1e-12
    for name, members in problem.blocks.items():
        index = problem.layout.index(members)
        assert relative(op.blocks[name].dense(), truth[index][:, index]) < 1e-12
    assert relative(op.diagonal(), truth.diagonal()) < 1e-12
    assert relative(op.dense(), truth) < 1e-12
    # and a new one sees the new values, also through a private copy
    fresh = cs.Problem(copy.deepcopy(model).double(), CE(), (X, Y))
    assert relative(matrix(problem).dense(), matrix(fresh).dense()) < 1e-12
    assert relative(matrix(problem).dense(), truth) > 0.01
    assert problem.objective() == pytest.approx(fresh.objective(), rel=1e-12)


def test_buffers_are_those_of_the_creation() -> None:
    model = batchnorm()
    problem = cs.Problem(model, CE(), (X, Y))
    op, truth = cs.hessian(problem), cs.hessian(problem).dense()
    model[1].running_var.mul_(3.0)
    assert relative(op.dense(), truth) < 1e-12
    assert relative(cs.hessian(problem).dense(), truth) > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_private_copies(dtype: torch.dtype) -> None:
    """``dtype=`` computes on a copy; the user's model keeps its type and its ties."""
    model = seeded(lambda: mlp(nn.Tanh, 3, 3, 3, 3)).float()
    model[4].weight = model[0].weight
    problem = cs.Problem(model, CE(), (X, Y), dtype=dtype)
    assert problem.dtype == dtype
    assert problem.user_model is model
    assert model[0].weight.dtype == torch.float32
    assert "4.weight" not in problem.layout.names
    twin = copy.deepcopy(model).to(dtype)
    assert twin[4].weight is twin[0].weight
    direct = cs.Problem(twin, CE(), (X, Y))
    assert relative(cs.hessian(problem).dense(), cs.hessian(direct).dense()) < 1e-6
