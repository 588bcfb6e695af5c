"""The loss on a plane against the objective at set parameters; curvature against dense matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors
from curvscope import training as tr
from tests.fixtures_side_effects import unchanged

from .nets import data, problem, put, random_path


def path_of(p: cs.Problem, count: int = 5) -> list[tuple[int, Tensor]]:
    flat = tr.flat_parameters(p).double()
    return [(s, flat + 0.3 * v) for s, v in random_path(p.layout.numel, count)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_values_are_the_objective_at_set_parameters(dtype: torch.dtype) -> None:
    p = problem(dtype)
    plane = tr.plane_of_paths(path_of(p), layout=p.layout)
    with unchanged(p):
        found = tr.loss_surface(p, plane, points=(4, 3))
    assert found.loss.shape == (3, 4) and found.settings["evaluated"] == 12
    assert (float(found.x[0]), float(found.x[-1])) == plane.extent[0]
    assert (float(found.y[0]), float(found.y[-1])) == plane.extent[1]
    before = tr.flat_parameters(p)
    for j, y in enumerate(found.y.tolist()):
        for i, x in enumerate(found.x.tolist()):
            put(p, plane.lift([x, y]))
            assert float(found.loss[j, i]) == p.objective()  # to the bit
    put(p, plane.origin)
    assert found.origin_loss == p.objective()
    put(p, before)
    frame = found.to_frame()
    assert (
        list(frame) == ["x", "y", "loss"] and frame.loss.tolist() == found.loss.flatten().tolist()
    )
    x, y, low = found.lowest
    assert low == float(found.loss.min())
    put(p, plane.lift([x, y]))
    assert p.objective() == low


def test_extent_and_a_quadratic_in_closed_form() -> None:
    torch.manual_seed(1)
    x = torch.randn(10, 3, dtype=torch.float64)
    p = cs.Problem(nn.Linear(3, 2).double(), nn.MSELoss(), (x, x[:, :2].sin()))
    H = cs.hessian(p)
    plane = tr.plane_along(tr.flat_parameters(p), H.eigh()[1][:, -2:], layout=p.layout)
    found = tr.loss_surface(p, plane, extent=((-2, 1), (0, 4)), points=5)
    slopes, curvature = plane.directions.mT @ p.gradient(), tr.ellipse(H, plane).matrix
    for j, b in enumerate(found.y.tolist()):
        for i, a in enumerate(found.x.tolist()):
            s = torch.tensor([a, b], dtype=torch.float64)
            expected = found.origin_loss + float(slopes @ s) + float(s @ curvature @ s) / 2
            assert float(found.loss[j, i]) == pytest.approx(expected, rel=1e-12)
    assert found.x.tolist() == [-2, -1.25, -0.5, 0.25, 1] and found.y.tolist() == [0, 1, 2, 3, 4]


class Fragile(nn.Module):
    """NaN beyond a radius; the loss refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.1, 0.2], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ self.w).unsqueeze(1) * torch.sqrt(4.0 - self.w @ self.w)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCELoss()], ids=["MSE", "BCE refuses NaN"])
def test_what_is_not_finite_is_kept_and_counted(loss: nn.Module) -> None:
    torch.manual_seed(0)
    x = -torch.rand(6, 2, dtype=torch.float64)
    net = Fragile()
    if isinstance(loss, nn.BCELoss):
        net.register_forward_hook(lambda module, inputs, out: out / 2)
    p = cs.Problem(net, loss, (x, torch.full((6, 1), 0.5, dtype=torch.float64)))
    plane = tr.plane_along(torch.zeros(2), torch.eye(2))
    found = tr.loss_surface(p, plane, extent=((-3, 3), (-3, 3)), points=7)
    X, Y = torch.meshgrid(found.x, found.y, indexing="xy")
    outside = X**2 + Y**2 > 4.001
    assert torch.equal(found.loss.isnan(), outside)
    count = int(outside.sum())
    assert f"at {count} of 49 points" in found.warnings[0] and 0 < count < 49
    assert math.isfinite(found.lowest[2])
    json.dumps(found.to_dict(), allow_nan=False)
    beyond = tr.loss_surface(p, plane, extent=((4, 5), (4, 5)), points=2)
    assert math.isnan(beyond.lowest[2]) and "not finite at any" in beyond.summary()


def test_batch_norm_is_said_to_keep_its_statistics() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    data = torch.randn(8, 3), torch.arange(8) % 3
    plane = tr.random_plane(cs.Problem(net, nn.CrossEntropyLoss(), data), normalise="layer")
    said = [
        tr.loss_surface(
            cs.Problem(net, nn.CrossEntropyLoss(), data, batchnorm=mode), plane, points=2
        ).warnings
        for mode in ("eval", "batch")
    ]
    assert "running statistics" in said[0][0] and said[1] == ()


class Stopped(Exception):
    pass


def test_an_interrupted_surface_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curvscope.training import surfaces

    p = problem()
    plane = tr.plane_of_paths(path_of(p))
    whole = tr.loss_surface(p, plane, points=3)
    file = tmp_path / "surface.jsonl"
    real, calls = surfaces.objective_at, []

    def failing(*args: object) -> float:
        calls.append(args)
        if len(calls) == 6:  # the first is the plane's origin
            raise Stopped
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(surfaces, "objective_at", failing)
    with pytest.raises(Stopped), unchanged(p):
        tr.loss_surface(p, plane, points=3, checkpoint=file)
    with open(file, "a") as half:
        half.write("[4, 0.1")  # killed while writing
    monkeypatch.setattr(surfaces, "objective_at", real)
    found = tr.loss_surface(p, plane, points=3, checkpoint=file)
    assert found.settings["from_checkpoint"] == 4 and found.settings["evaluated"] == 5
    assert torch.equal(found.loss, whole.loss)
    again = tr.loss_surface(p, plane, points=3, checkpoint=file)
    assert again.settings["evaluated"] == 0 and torch.equal(again.loss, whole.loss)


def test_checkpoints_of_other_surfaces_are_refused(tmp_path: Path) -> None:
    p = problem()
    plane, file = tr.plane_of_paths(path_of(p)), tmp_path / "s"
    tr.loss_surface(p, plane, points=2, checkpoint=file)
    content = file.read_bytes()
    with pytest.raises(errors.DataError, match="its points is"):
        tr.loss_surface(p, plane, points=3, checkpoint=file)
    with pytest.raises(errors.DataError, match="its plane is"):
        tr.loss_surface(p, tr.random_plane(p), extent=plane.extent, points=2, checkpoint=file)
    with pytest.raises(errors.DataError, match="its origin_loss is"):
        tr.loss_surface(p.subset(8), plane, points=2, checkpoint=file)
    assert file.read_bytes() == content
    file.write_text("something else\n")
    with pytest.raises(errors.DataError, match="no checkpoint"):
        tr.loss_surface(p, plane, points=2, checkpoint=file)
    assert file.read_text() == "something else\n"
    file.write_text("a file without an end of line")
    with pytest.raises(errors.DataError, match="no checkpoint"):
        tr.loss_surface(p, plane, points=2, checkpoint=file)
    assert file.read_text() == "a file without an end of line"
    file.write_bytes(content[:30])  # killed within the first line
    assert tr.loss_surface(p, plane, points=2, checkpoint=file).settings["from_checkpoint"] == 0
    assert file.read_bytes() == content
    with pytest.raises(errors.OutputError, match="cannot be read or written"):
        tr.loss_surface(p, plane, points=2, checkpoint=tmp_path / "missing" / "s")


def test_refusals() -> None:
    p = problem()
    plane = tr.plane_of_paths(path_of(p))
    with pytest.raises(errors.ShapeError, match="36 parameters, the problem has 37"):
        tr.loss_surface(p, tr.plane_of_paths(random_path(36)))
    part = cs.Problem(p.model, nn.CrossEntropyLoss(), data(), params=["0.weight", "3.bias"])
    batch = torch.ones(2, 1, dtype=torch.float64), torch.ones(2, 23, dtype=torch.float64)
    turned = cs.Problem(nn.Linear(1, 23, bias=False).double(), nn.MSELoss(), batch)
    with pytest.raises(errors.ParameterMismatchError, match="weight"):
        tr.loss_surface(part, tr.random_plane(turned))
    for points in (1, (3, 1), (2, 2, 2), 2.5, (2000, 2000)):
        with pytest.raises(errors.OptionError, match="points="):
            tr.loss_surface(p, plane, points=points)
    for extent in (((0, 0), (0, 1)), ((1, 0), (0, 1)), ((0, math.nan), (0, 1)), (0, 1)):
        with pytest.raises(errors.OptionError, match="extent="):
            tr.loss_surface(p, plane, extent=extent)
    with pytest.raises(errors.OptionError, match="Problem"):
        tr.loss_surface(p.model, plane)
