"""Rules of the fallback, and what optimizers that watch layers refuse, on K-BFGS and K-FAC."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope import errors
from curvscope.optim import KBFGS, KFAC, AdaFisher, AdaHessian
from curvscope.optim.fallback import adam_update, sgd_update

from .every_method import Method, each_method
from .kronecker_cases import (
    closure_of,
    every_method,
    flat,
    labels,
    mixed,
    normal,
    relative,
    run,
    seeded,
    small,
)

# -- the fallback ----------------------------------------------------------------------------------


def test_fallback_rules_are_adam_and_averaged_sgd() -> None:
    for rule in ("adam", "sgd"):
        model, plain = seeded(lambda: nn.LayerNorm(5)), seeded(lambda: nn.LayerNorm(5))
        optimizer = KBFGS(model, 0.4, 0.3, fallback=rule, weight_decay=0.1)
        lr = {"adam": 1e-3, "sgd": 1e-2}[rule]
        assert optimizer.param_groups[0]["fallback_lr"] == lr
        if rule == "adam":
            other = torch.optim.Adam(plain.parameters(), lr, weight_decay=0.1)
        else:
            other = torch.optim.SGD(plain.parameters(), lr * 0.1, 0.9, weight_decay=0.1)
        for k in range(4):
            if k == 2:  # a schedule of lr is one of the fallback, too
                optimizer.param_groups[0]["lr"] *= 0.5
                other.param_groups[0]["lr"] *= 0.5
            x, y = normal(6, 5, seed=k), labels(6, 5, seed=k)
            optimizer.step(closure_of(optimizer, model, x, y))
            other.step(closure_of(other, plain, x, y))
            assert relative(flat(model), flat(plain)) < (1e-14 if rule == "adam" else 1e-12)


def test_update_functions_work_in_place() -> None:
    theta, g = normal(3), normal(3, seed=1)
    m, v, before = torch.zeros_like(g), torch.zeros_like(g), theta.clone()
    adam_update(theta, g, m, v, 1, lr=0.1, weight_decay=0.0)
    assert torch.allclose(theta, before - 0.1 * g.sign(), atol=1e-6)
    theta, m = before.clone(), torch.zeros_like(g)
    sgd_update(theta, g, m, lr=0.1, weight_decay=0.5)
    assert torch.allclose(theta, before - 0.1 * 0.1 * (g + 0.5 * before))


def test_sparse_gradients_and_own_learning_rates_of_the_fallback() -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)))
    groups = [
        {"params": model[0].parameters(), "fallback_lr": 0.5},
        {"params": model[1].parameters()},
    ]
    optimizer = KBFGS(model, 0.1, 0.3, params=groups)
    x = torch.tensor([1, 2, 2, 5])
    before = model[0].weight.detach().clone()
    optimizer.step(closure_of(optimizer, model, x, labels(4)))
    change = (model[0].weight.detach() - before).abs().amax(1)
    assert change[[1, 2, 5]] == pytest.approx(0.5, rel=1e-3)
    assert float(change[[0, 3, 4]].amax()) == 0


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"lr": -0.1}, "lr=-0.1"),
        ({"lr": math.nan}, "lr=nan"),
        ({"damping": 0.0}, "damping=0.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"fallback": "adamw"}, "'adam'"),
        ({"params": []}, "empty list"),
        ({"params": "no.such.layer"}, "matches no parameter"),
        ({"params": [torch.zeros(2, requires_grad=True)]}, "do not belong to the model"),
        ({"params": [3]}, "not int"),
        ({"params": 3}, "params=3"),
        ({"params": [{"lr": 0.1}]}, "'params'"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], part: str) -> None:
    for make in (KBFGS, KFAC):
        with pytest.raises(errors.CurvscopeError, match=part):
            make(small(), **{"lr": 0.1, "damping": 0.3, **options})


@pytest.mark.parametrize(
    ("make", "options", "part"),
    [
        (KBFGS, {"memory": 0}, "memory=0"),
        (KBFGS, {"memory": 2.5}, "memory=2.5"),
        (KBFGS, {"max_update_norm": 0.0}, "max_update_norm"),
        (KBFGS, {"memory": "10"}, "memory='10'"),
        (KBFGS, {"memory": math.nan}, "memory=nan"),
        (KBFGS, {"full_batch": "yes"}, "full_batch='yes'"),
        (KFAC, {"seed": None}, "seed=None"),
        (AdaHessian, {"seed": 0.5}, "seed=0.5"),
        (AdaHessian, {"probes": 5}, "probes=5"),
        (AdaFisher, {"maximize": "no"}, "maximize='no'"),
        (KFAC, {"fisher": "true"}, "'mc'"),
        (KFAC, {"split": "trac"}, "'trace'"),
        (KFAC, {"inverse_every": 0}, "inverse_every=0"),
        (KFAC, {"loss": "gaussian"}, "'normal'"),
        (KFAC, {"loss": nn.L1Loss()}, "negative log-likelihood"),
        (KFAC, {"loss": nn.CrossEntropyLoss(weight=torch.ones(3))}, "belong to targets"),
    ],
)
def test_own_settings_that_are_refused(make: Any, options: dict[str, Any], part: str) -> None:
    with pytest.raises(errors.CurvscopeError, match=part):
        make(small(), **{"lr": 0.1, **({} if make is AdaHessian else {"damping": 0.3}), **options})


@each_method
def test_calls_that_are_refused(method: Method) -> None:
    """Not by whatever Python says of the wrong type."""
    model = small()
    optimizer = method.build(model)
    group = {"params": [model[0].weight]}
    for call, part in (
        (lambda: optimizer.add_param_group(5), "must be a dict"),
        (lambda: optimizer.add_param_group(group), "more than one parameter group"),
        (lambda: method.build(model, params=[group, dict(group)]), "more than one parameter group"),
        (lambda: optimizer.factors(5), "no block 5"),
        (lambda: optimizer.step(5), "int"),
        (lambda: optimizer.curvature(blocks=["3"]), "no block '3'"),
    ):
        with pytest.raises(errors.CurvscopeError, match=part):
            call()
    if hasattr(optimizer, "warm_start"):
        own = {"loss": F.cross_entropy} if method.make is KFAC else {}
        with pytest.raises(errors.DataError, match="not iterable"):
            optimizer.warm_start(None, **own)


def test_models_that_are_refused() -> None:
    with pytest.raises(errors.OptionError, match="the model itself"):
        KBFGS(list(small().parameters()), 0.1, 0.3)
    with pytest.raises(errors.ModelError, match="no trainable"):
        KBFGS(small().requires_grad_(False), 0.1, 0.3)
    model = small()
    model[2].float()
    with pytest.raises(errors.ModelError, match=r"dtypes.*float32|float64"):
        KBFGS(model, 0.1, 0.3)
    model = small()
    model[2].to("meta")
    with pytest.raises(errors.ModelError, match=r"devices.*meta"):
        KBFGS(model, 0.1, 0.3)


@every_method
def test_closures_that_are_refused(make: Any) -> None:
    model = small()
    optimizer = make(model, 0.1, 0.3)
    x, y = normal(7, 5), labels(7)
    start = flat(model)

    def closure_that(result: Any, backward: bool = True) -> Callable[[], Any]:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if backward:
                loss.backward()
            return result(loss)

        return closure

    with pytest.raises(errors.OptionError, match="must return the loss"):
        optimizer.step(closure_that(lambda loss: None))
    with pytest.raises(errors.OptionError, match=r"shape \[3\]"):
        optimizer.step(closure_that(lambda loss: loss.expand(3)))
    with pytest.raises(errors.OptionError, match="backward"):
        optimizer.step(closure_that(lambda loss: loss, backward=False))
    with pytest.raises(errors.OptionError, match="closure"):
        optimizer.step(3)
    optimizer.zero_grad()
    with pytest.raises(errors.OptionError, match=r"closure|backward"):
        optimizer.step()
    assert torch.equal(flat(model), start) and optimizer.steps == 0
    assert not any(optimizer.state.values())
    run(optimizer, model, 1)


@every_method
def test_a_loss_that_is_not_finite_changes_nothing(make: Any) -> None:
    model = mixed()
    optimizer = make(model, 0.1, 0.3)
    run(optimizer, model, 2)
    before = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    x, y = normal(7, 5), labels(7)

    def unchanged() -> None:
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        now = optimizer.state_dict()
        assert now["curvscope"]["steps"] == 2
        for index, entry in before["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    assert torch.equal(value, now["state"][index][key]), key

    bad = x.clone()
    bad[2, 1] = math.inf
    with pytest.raises(errors.NonFiniteError, match="layer '0'"):
        optimizer.step(closure_of(optimizer, model, bad, y))
    unchanged()
    with pytest.raises(errors.NonFiniteError, match="step 3"):
        optimizer.step(closure_of(optimizer, model, x, y, lambda z, t: F.cross_entropy(z, t) / 0.0))
    unchanged()
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(errors.NonFiniteError, match=r"parameters of layer '4'"):
        optimizer.step(closure_of(optimizer, model, x, y))
    assert torch.equal(model[1].running_mean, weights["1.running_mean"])


def test_a_gradient_that_is_not_finite() -> None:
    model = small()
    optimizer = KBFGS(model, 0.1, 0.3)
    start = flat(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(normal(7, 5)), labels(7))
        loss.backward()
        model[2].bias.grad[1] = math.nan
        return loss

    with pytest.raises(errors.NonFiniteError, match=r"gradient is NaN.*'2' \(2.bias\)"):
        optimizer.step(closure)
    assert torch.equal(flat(model), start)


def test_gradients_that_overflow_their_norm_only_are_fine() -> None:
    model = small(dtype=torch.float32)
    optimizer = KBFGS(model, 1e-30, 0.3)
    run(optimizer, model, 1, loss=lambda z, y: 1e25 * F.cross_entropy(z, y))
    assert optimizer.steps == 1


@every_method
def test_a_model_that_has_changed(make: Any) -> None:
    def changed(change: Callable[[nn.Module], Any], part: str) -> None:
        model = small()
        optimizer = make(model, 0.1, 0.3)
        run(optimizer, model, 1)
        change(model)
        with pytest.raises(errors.ModelError, match=part):
            run(optimizer, model, 1)

    changed(lambda m: m.__setitem__(2, nn.Linear(6, 3).double()), "replaced")
    changed(lambda m: m.__delitem__(2), "gone")
    changed(lambda m: m.append(nn.Linear(3, 3).double()), "are new")
    changed(lambda m: m[0].bias.requires_grad_(False), "frozen")
    changed(lambda m: m.float(), "changed from")


@every_method
def test_unknown_and_uncovered_blocks(make: Any) -> None:
    model = mixed()
    optimizer = make(model, 0.1, 0.3)
    with pytest.raises(errors.UncoveredError, match="no step has been taken"):
        optimizer.factors("0")
    run(optimizer, model, 1)
    with pytest.raises(errors.UnknownBlockError, match="Blocks: 0, 1, 4"):
        optimizer.factors("7")
    with pytest.raises(errors.UncoveredError, match="not defined for BatchNorm1d"):
        optimizer.factors("1")
    assert set(optimizer.factors("0")) == {"A", "G", "H_a", "H_g"}
    optimizer.factors("0")["A"].zero_()
    assert float(optimizer.factors("0")["A"].norm()) > 0  # copies


def test_the_bias_of_a_layer_with_anothers_weight_is_given_its_reason() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    for optimizer in (KBFGS(model, 0.1, 0.3), AdaFisher(model)):
        reasons = {row["parameter"]: row["reason"] for row in optimizer.coverage()}
        assert reasons["2.bias"] == "its weight is shared with 0"


@each_method
def test_advice_fits_where_it_began_and_what_the_method_has(method: Method) -> None:
    model = small()
    optimizer = method.build(model)
    x, y = normal(7, 5), labels(7)
    bad = x.clone()
    bad[2, 1] = math.nan
    with pytest.raises(errors.NonFiniteError, match="look for NaN and infinity in the data") as one:
        optimizer.step(method.closure(optimizer, model, bad, y))
    assert "damping" not in str(one.value) and "Lower lr" not in str(one.value)
    closure = method.closure(optimizer, model, x, y, lambda z, t: F.cross_entropy(z, t) / 0.0)
    with pytest.raises(errors.NonFiniteError, match="Lower lr") as other:
        optimizer.step(closure)
    assert ("raise damping" in str(other.value)) == (method.name != "AdaHessian")


@each_method
def test_advice_where_a_layer_within_is_fed_infinity(method: Method) -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1 / (0 * x)

    model = nn.Sequential(nn.Linear(5, 4), Inverse(), nn.Linear(4, 3)).double()
    optimizer = method.build(model)
    closure = method.closure(optimizer, model, normal(7, 5), labels(7))
    with pytest.raises(errors.NonFiniteError, match="Lower lr") as caught:
        optimizer.step(closure)
    assert "in the data" not in str(caught.value)
