"""coverage says what the methods do: held against the methods themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.analysis import Coverage
from curvscope.analysis.checks import Marks
from curvscope.analysis.methods import METHODS
from curvscope.curvature import backpack
from curvscope.errors import CurvscopeError, OptionError
from tests.analysis import verify_models as models

COMPUTED: dict[str, Callable[[cs.Problem], cs.Operator]] = {
    "K-FAC": cs.kfac,
    "EKFAC": cs.ekfac,
    "KFLR": cs.kflr,
    "KFRA": cs.kfra,
    "FOOF": cs.foof,
    "diagonal K-FAC": cs.diagonal_kf,
    "AdaFisher factors": lambda problem: cs.diagonal_kf(problem, scale="adafisher"),
    "Hutchinson diagonal": cs.hutchinson_diagonal,
}
WHOLE = {
    "Hessian": cs.hessian,
    "GGN": cs.ggn,
    "Fisher": cs.fisher,
    "empirical Fisher": cs.empirical_fisher,
}
NAMES = [*models.HEALTHY, "unused"]


def problem(name: str) -> cs.Problem:
    if name == "unused":
        return models.problem_of(
            models.Unused, nn.CrossEntropyLoss(), models.inputs(4), models.classes()
        )
    return models.problem(name)


@pytest.fixture(scope="module")
def covered() -> Callable[[str], Coverage]:
    kept: dict[str, Coverage] = {}

    def get(name: str) -> Coverage:
        if name not in kept:
            kept[name] = cs.coverage(problem(name))
        return kept[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_methods_cover_what_is_said(covered, name: str) -> None:
    found, at = covered(name), problem(name)
    for method, compute in COMPUTED.items():
        try:
            op = compute(at)
        except CurvscopeError as error:
            assert found.not_available[method] == str(error), method
            assert found.shares[method] == 0
            continue
        assert method not in found.not_available, method
        reasons = op.info.settings.get("uncovered", {})
        for row in found.parameters:
            cell = found.cell(row.name, method)
            if not row.included:
                assert cell.status == "ignored"
            elif row.block in op.uncovered:
                assert cell.status == "uncovered", (method, row.name)
                assert cell.reason.lower().rstrip(".") == reasons[row.block].lower().rstrip(".")
            else:
                assert cell.status == "covered", (method, row.name)
                assert cell.route


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "tied", "huber", "unused"])
def test_routes_are_the_ones_used(covered, name: str) -> None:
    found, at = covered(name), problem(name)
    for method, compute in WHOLE.items():
        try:
            op = compute(at)
        except CurvscopeError as error:
            assert found.not_available[method] == str(error)
            continue
        for row in found.parameters:
            if row.included:
                route = found.cell(row.name, method).route
                assert route == op.blocks[row.block].info.route, (method, row.name)
        assert found.shares[method] == 1


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "tied", "class weights"])
def test_backpack_columns(covered, name: str) -> None:
    found, at = covered(name), problem(name)
    for method in found.methods:
        if method.startswith("BackPACK "):
            supported, reason = backpack.supported(at, method.removeprefix("BackPACK "))
            assert found.shares[method] == float(supported), method
            said = found.not_available.get(method, "")
            # without the advice to use what does not cover the model either
            assert said == reason or (said and reason.startswith(f"{said[:-1]}. Use cs.k")), method


def test_transformer(covered) -> None:
    found = covered("transformer")
    assert found.row("norm.weight").layer == "LayerNorm"
    assert found.row("attention.out_proj.weight").layer == "Linear"
    assert found.row("attention.in_proj_weight").layer == "MultiheadAttention"
    cell = found.cell("norm.weight", "K-FAC")
    assert cell.status == "uncovered"
    assert cell.reason == "Norm has no input and output factors."
    assert found.cell("norm.weight", "AdaFisher factors").route == "diagonal Kronecker"
    assert found.cell("norm.weight", "Hessian").route == "autograd"
    assert found.cell("head.weight", "Hessian").route == "piecewise-linear"
    sizes = {row.name: row.size for row in found.parameters}
    assert found.shares["K-FAC"] == pytest.approx(1 - 8 / sum(sizes.values()))
    assert sum(found.routes("Hessian").values()) == sum(sizes.values())


def test_tied_parameters_stand_once_with_all_names(covered) -> None:
    found = covered("tied")
    rows = [row for row in found.parameters if len(row.names) > 1]
    assert [row.names for row in rows] == [("first.weight", "second.weight")]
    assert found.row("second.weight") is rows[0]
    assert rows[0].block == "first"
    assert "Tied: first.weight = second.weight" in found.summary()
    assert "layers with different biases" in found.cell("first.weight", "K-FAC").reason
    assert found.cell("first.weight", "BackPACK DiagGGNExact").status == "uncovered"
    assert "tied to another" in found.cell("second.bias", "AdaFisher factors").reason


def test_what_is_ignored(covered) -> None:
    found = covered("unused")
    states = {row.name: row.state for row in found.parameters}
    assert states["frozen.weight"] == "frozen"
    assert states["layer.weight"] == "included"
    assert states["forgotten.bias"] == "without influence"
    assert found.buffers == {"offset": 4}
    assert "always zero" in found.row("forgotten.weight").note
    assert any("forgotten.weight" in text for text in found.warnings)
    assert found.cell("forgotten.weight", "K-FAC").status == "uncovered"
    assert found.cell("frozen.weight", "Hessian").status == "ignored"
    size = sum(row.size for row in found.parameters if row.included)
    assert size == cs.hessian(problem("unused")).shape[0]
    assert found.shares["K-FAC"] == pytest.approx(15 / size)
    gradient = problem("unused").gradient()
    index = problem("unused").layout.index(["forgotten.weight", "forgotten.bias"])
    assert not bool(gradient[index].any())


def test_left_out_parameters() -> None:
    data = models.inputs(4), models.classes()
    at = models.problem_of(models.mlp, nn.CrossEntropyLoss(), *data, params="!0.bias")
    found = cs.coverage(at)
    assert found.row("0.bias").state == "left out"
    assert found.row("0.bias").block == ""
    assert found.cell("0.bias", "GGN").status == "ignored"
    assert "Left out by params=: 0.bias (5 entries)." in found.summary()
    assert found.shares["K-FAC"] == 1
    assert set(found.shares) == set(found.methods)


def test_losses_without_likelihood(covered) -> None:
    found = covered("huber")
    for method in ("Fisher", "K-FAC", "EKFAC"):
        assert "HuberLoss" in found.not_available[method]
        assert found.cell("0.weight", method).status == "uncovered"
    assert found.shares["KFLR"] == 1  # Huber's loss is convex

    def bump(outputs: Tensor, targets: Tensor) -> Tensor:
        return -torch.exp(-((outputs - targets) ** 2)).sum(1).mean()

    at = models.problem_of(
        models.mlp, bump, models.inputs(4), models.inputs(3, seed=2), reduction="mean"
    )
    found = cs.coverage(at)
    for method in ("KFLR", "KFRA"):
        assert "not convex" in found.not_available[method]
    with pytest.raises(CurvscopeError, match="not convex"):
        cs.kflr(at)
    assert found.shares["GGN"] == 1


def test_outputs_without_a_sample_axis() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets.T) ** 2).sum()

    at = models.problem_of(
        models.mlp,
        loss,
        models.inputs(4),
        models.inputs(3, seed=2),
        forward=lambda model, x: model(x).T.contiguous(),
        reduction="sum",
    )
    found = cs.coverage(at)
    for method in ("empirical Fisher", "diagonal K-FAC", "AdaFisher factors"):
        assert found.not_available[method], method
    assert found.cell("0.weight", "Hessian").route == "autograd"
    assert "do not start with the 16 samples" in found.cell("0.weight", "Hessian").reason
    assert found.cell("0.weight", "K-FAC").status == "uncovered"


def test_large_models_are_not_tried_with_backpack(monkeypatch) -> None:
    from curvscope.analysis import methods

    def never(*_: object, **__: object) -> tuple[bool, str]:
        raise AssertionError("BackPACK was run")

    monkeypatch.setattr(methods, "_TRIAL_BYTES", 100)
    original = backpack.supported
    monkeypatch.setattr(
        backpack, "supported", lambda p, e: original(p, e) if e == "BatchGrad" else never()
    )
    found = cs.coverage(models.problem("mlp"))
    assert "Not tried" in found.not_available["BackPACK DiagGGNExact"]
    assert found.shares["BackPACK BatchGrad"] == 1


def test_nothing_changes_and_little_is_computed() -> None:
    at = models.problem("batch norm")
    at.user_model.train()
    before = Marks.of(at)
    cs.coverage(at)
    assert before.changes(Marks.of(at)) == []
    x, y = models.inputs(4).repeat(100, 1), models.classes().repeat(100)
    seen: list[int] = []
    big = cs.Problem(
        models.seeded(models.mlp),
        nn.CrossEntropyLoss(),
        [(x, y)] * 3,
        forward=lambda model, inputs: (seen.append(len(inputs)), model(inputs))[1],
    )
    big.check()
    seen.clear()
    cs.coverage(big)
    assert seen and max(seen) <= 16


def test_result_protocol(covered) -> None:
    found = covered("unused")
    assert found.methods == tuple(METHODS)
    frame = found.to_frame()
    assert list(frame.columns) == [
        "parameter",
        "block",
        "layer",
        "size",
        "state",
        *METHODS,
        "reasons",
    ]
    assert len(frame) == len(found.parameters) == 8
    matrix = found.matrix()
    assert matrix.shape == (8, len(METHODS))
    for i, row in enumerate(found.parameters):
        for j, method in enumerate(found.methods):
            cell, value = found.cell(row.name, method), float(matrix[i, j])
            assert (cell.parameter, cell.method) == (row.name, method)
            expected = {"covered": 1.0, "uncovered": 0.0, "ignored": math.nan}[cell.status]
            assert value == expected or (math.isnan(value) and math.isnan(expected))
            assert (frame[method][i] != "") == (cell.status == "covered")
            if cell.status == "uncovered":
                assert cell.reason.endswith(".")
    details = found.details()
    assert len(details) == len(found.cells)
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["type"] == "Coverage"
    assert "<table" in found._repr_html_()
    assert str(found).startswith("Unused: 38 parameters in 3 blocks")


def test_frame_says_why_a_method_leaves_a_parameter_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    data = torch.eye(3), torch.tensor([0, 1, 0])
    found = cs.coverage(cs.Problem(model, nn.CrossEntropyLoss(), data))
    reasons = dict(zip(*(found.to_frame()[k] for k in ("parameter", "reasons")), strict=True))
    cell = found.cell("1.weight", "K-FAC")
    assert cell.status == "uncovered" and cell.reason in reasons["1.weight"]
    # methods of the same reason stand together, those that refuse the problem do not stand here
    assert reasons["1.weight"].count(cell.reason) == 1 and "K-FAC, EKFAC" in reasons["1.weight"]
    assert found.not_available and not any(m in reasons["1.weight"] for m in found.not_available)
    assert reasons["0.bias"] == "Frozen: requires_grad is False."
    assert cell.reason in found._repr_html_() and ">Reasons<" in found._repr_html_()


def test_unknown_names(covered) -> None:
    with pytest.raises(OptionError, match=r"0\.weight"):
        covered("mlp").row("0.wieght")
    with pytest.raises(OptionError, match="EKFAC"):
        covered("mlp").cell("0.weight", "EKFACC")
    with pytest.raises(OptionError, match="Problem"):
        cs.coverage(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_no_advice_to_use_what_does_not_cover_a_layer_either() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    data = torch.randn(6, 1, 6, 6), torch.randint(0, 3, (6,))
    found = cs.coverage(cs.Problem(net, nn.CrossEntropyLoss(), data))
    assert found.shares["KFRA"] < 1
    for method in ("KFRA", "KFLR", "KFAC"):
        assert "se cs." not in found.not_available[f"BackPACK {method}"]
    assert "cs.ggn(problem).diagonal()" in found.not_available["BackPACK DiagGGNExact"]
    assert not any(f"cs.{name}(" in str(found) for name in ("kfra", "kflr", "kfac"))


def test_the_refusal_of_kfra_names_layers() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.last = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.last(y + self.second(y))

    data = torch.randn(6, 3), torch.randint(0, 2, (6,))
    found = cs.coverage(cs.Problem(Residual(), nn.CrossEntropyLoss(), data))
    reason = found.not_available["KFRA"]
    assert "the output of layer 'first' also reaches the loss around layer 'second'" in reason
