"""Planes: projection and lift, principal components against the SVD, filter normalisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope import errors
from curvscope import training as tr
from curvscope.training import paths

from .nets import data, problem, random_path

RUNS = {"a": random_path(seed=1), "b": random_path(seed=2, count=4)}


def rows(runs: dict[str, list[tuple[int, Tensor]]]) -> Tensor:
    return torch.stack([v for run in runs.values() for _, v in run])


def planes() -> dict[str, tr.Plane]:
    a, b, c = rows(RUNS)[:3]
    return {
        "principal components": tr.plane_of_paths(RUNS),
        "three points": tr.plane_through(a, b, c),
        "two vectors": tr.plane_along(a, torch.stack([b, c], 1)),
        "random": tr.random_plane(problem(), seed=3),
    }


@pytest.mark.parametrize("name", list(planes()))
def test_projection_lift_and_distance(name: str, randn64) -> None:
    plane = planes()[name]
    D, size = plane.directions, plane.size
    assert torch.allclose(D.mT @ D, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-14)
    xy = randn64(2, 5, seed=4)
    assert torch.allclose(plane.project(plane.lift(xy)), xy, rtol=0, atol=1e-12)
    assert float(plane.distance(plane.lift(xy)).max()) < 1e-12
    assert torch.equal(plane.lift([0.0, 0.0]), plane.origin)
    theta = randn64(size, seed=5)
    nearest = plane.lift(plane.project(theta))
    assert float((D.mT @ (theta - nearest)).abs().max()) < 1e-12
    assert float(plane.distance(theta)) == pytest.approx(float((theta - nearest).norm()), rel=1e-12)
    several = torch.stack([theta, plane.origin], 1)
    assert torch.allclose(plane.project(several)[:, 0], plane.project(theta), rtol=1e-13)
    assert float(plane.distance(several)[1]) == 0
    move = 3 * D[:, 0] + 4 * D[:, 1]
    off = theta - nearest
    assert float(plane.inside(move + off)) == pytest.approx(25 / (25 + float(off @ off)), rel=1e-10)
    assert math.isnan(float(plane.inside(torch.zeros(size))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("centred", [True, False], ids=["mean", "origin"])
def test_principal_components_are_those_of_the_svd(
    dtype: torch.dtype, centred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "_CHUNK", 10)  # more than one piece
    runs = {k: [(s, v.to(dtype)) for s, v in run] for k, run in RUNS.items()}
    X = rows(runs).double()
    origin = None if centred else runs["a"][-1][1]
    plane = tr.plane_of_paths(runs, origin=origin)
    X = X - (X.mean(0) if origin is None else origin.double())
    _, s, V = torch.linalg.svd(X, full_matrices=False)
    assert torch.allclose((V[:2] @ plane.directions).abs(), torch.eye(2).double(), atol=1e-12)
    shares = s.square() / s.square().sum()
    assert plane.explained == pytest.approx(shares[:2].tolist(), rel=1e-12)
    (x0, x1), (y0, y1) = plane.extent
    seen = plane.project(rows(runs).mT)
    assert bool((seen[0] > x0).all() and (seen[0] < x1).all())
    assert bool((seen[1] > y0).all() and (seen[1] < y1).all())


def test_the_plane_does_not_depend_on_who_is_named_first_and_is_never_large() -> None:
    one, other = tr.plane_of_paths(RUNS), tr.plane_of_paths({"b": RUNS["b"], "a": RUNS["a"]})
    assert torch.allclose(one.origin, other.origin, rtol=1e-13)
    overlap = (one.directions.mT @ other.directions).abs()
    assert torch.allclose(overlap, torch.eye(2).double(), atol=1e-12)
    big = [(k, torch.randn(200_000, generator=torch.Generator().manual_seed(k))) for k in range(4)]
    assert tr.plane_of_paths(big).directions.shape == (200_000, 2)  # P x P would be 320 GB


def test_three_points_and_two_vectors_lie_where_said(randn64) -> None:
    a, b, c = randn64(3, 20, seed=6)
    plane = tr.plane_through(a, b, c)
    corners = plane.project(torch.stack([a, b, c], 1))
    assert torch.allclose(corners[:, 0], torch.zeros(2).double(), atol=1e-13)
    assert float(corners[0, 1]) == pytest.approx(float((b - a).norm()), rel=1e-13)
    assert abs(float(corners[1, 1])) < 1e-13 and float(corners[1, 2]) > 0
    assert float(plane.distance(torch.stack([a, b, c], 1)).max()) < 1e-13
    H = torch.diag(torch.arange(20.0, dtype=torch.float64))
    vectors = torch.linalg.eigh(H)[1][:, [19, 0]]
    along = tr.plane_along(a, vectors, names=("largest", "smallest"))
    assert torch.equal(along.directions, vectors) and along.names == ("largest", "smallest")
    assert along.extent == ((-1.0, 1.0), (-1.0, 1.0))
    longer = tr.plane_along(a, (3 * vectors[:, 0], vectors[:, 0] + 2 * vectors[:, 1]))
    assert torch.allclose(longer.directions, vectors, atol=1e-14)
    assert sum(longer.extent, ()) == pytest.approx((-3.0, 3.0, -2.0, 2.0))


class Filters(nn.Module):
    """Every kind of weight whose filters lie elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.up = nn.ConvTranspose2d(3, 2, 2)
        self.norm = nn.GroupNorm(1, 2)
        self.head = nn.Linear(50, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.conv(x))).flatten(1))


@pytest.mark.parametrize("normalise", ["filter", "layer", "none"])
def test_random_directions(normalise: str) -> None:
    torch.manual_seed(0)
    p = cs.Problem(
        Filters().double(),
        nn.CrossEntropyLoss(),
        (torch.randn(4, 2, 6, 6).double(), torch.arange(4) % 3),
    )
    plane = tr.random_plane(p, seed=5, normalise=normalise)
    assert torch.equal(plane.origin, tr.flat_parameters(p)) and plane.layout == p.layout
    length = plane.extent[0][1]
    first = p.layout.split(length * plane.directions[:, 0])  # the first one as it was drawn
    own = p.layout.split(plane.origin)
    if normalise == "none":
        generator = torch.Generator().manual_seed(5)
        drawn = torch.randn(p.layout.numel, generator=generator, dtype=torch.float64)
        assert torch.allclose(torch.cat([v.reshape(-1) for v in first.values()]), drawn, rtol=1e-12)
        return
    for name, part in first.items():
        if part.ndim == 1:
            assert not part.any()
        elif normalise == "layer":
            assert float(part.norm()) == pytest.approx(float(own[name].norm()), rel=1e-12)
        else:
            axis = 1 if name == "up.weight" else 0
            lengths = [t.movedim(axis, 0).flatten(1).norm(dim=1) for t in (part, own[name])]
            assert torch.allclose(*lengths, rtol=1e-12), name
    again = tr.random_plane(p, seed=5, normalise=normalise)
    assert torch.equal(again.directions, plane.directions)
    assert not torch.equal(tr.random_plane(p, seed=6).directions, plane.directions)
    # orthogonal to begin with, up to chance: a tenth is six standard deviations away
    assert plane.extent[1][1] == pytest.approx(length, rel=0.1)


def test_the_global_generator_is_left_alone() -> None:
    p = problem()
    before = torch.get_rng_state()
    tr.random_plane(p, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_flat_parameters_are_a_copy_in_the_operators_order() -> None:
    p = problem()
    flat = tr.flat_parameters(p)
    expected = torch.cat([q.detach().reshape(-1) for q in p.model.parameters() if q.requires_grad])
    assert torch.equal(flat, expected) and not flat.requires_grad
    with torch.no_grad():
        p.model[0].weight.add_(1.0)
    assert torch.equal(flat, expected)
    other = cs.Problem(p.model, nn.CrossEntropyLoss(), data(), dtype=torch.float32)
    assert tr.flat_parameters(other).dtype == torch.float32
    assert torch.equal(tr.flat_parameters(other), tr.flat_parameters(p).float())


def test_broken_snapshots_are_left_out_and_counted() -> None:
    path = RUNS["a"]
    broken = [*path, (99, torch.full((37,), torch.nan)), (100, torch.full((37,), torch.inf))]
    plane = tr.plane_of_paths(broken)
    assert torch.allclose(plane.directions, tr.plane_of_paths(path).directions, atol=1e-12)
    assert "2 snapshots" in plane.notes[0] and not tr.plane_of_paths(path).notes
    with pytest.raises(errors.NonFiniteError, match="Every snapshot"):
        tr.plane_of_paths(broken[-2:])


def test_refusals(randn64) -> None:
    a, b = randn64(2, 8)
    line = [(k, a + k * b) for k in range(5)]
    for few in (line[:1], line[:2], line, [(0, a), (1, a), (2, a)]):
        with pytest.raises(errors.NotDefinedError, match="line"):
            tr.plane_of_paths(few)
    with pytest.raises(errors.NotDefinedError, match="line"):
        tr.plane_of_paths([(k, v.float()) for k, v in line])
    with pytest.raises(errors.NotDefinedError, match="parallel"):
        tr.plane_through(a, b, a + 2 * (b - a))
    with pytest.raises(errors.NotDefinedError, match="parallel"):
        tr.plane_along(a, (torch.zeros(8), b))
    with pytest.raises(errors.ShapeError, match="two vectors, not 3"):
        tr.plane_along(a, randn64(8, 3))
    with pytest.raises(errors.ShapeError, match=r"flat tensor \[8\]"):
        tr.plane_through(a, b, b[:3])
    with pytest.raises(errors.NonFiniteError, match="b holds"):
        tr.plane_through(a, b / 0, b)
    plane = tr.plane_along(a, (b, a))
    for call in (plane.project, plane.distance, plane.inside):
        with pytest.raises(errors.ShapeError, match="another problem"):
            call(torch.zeros(9))
    with pytest.raises(errors.ShapeError, match=r"\[2\]"):
        plane.lift(torch.zeros(3))
    with pytest.raises(errors.OptionError, match="Did you mean 'filter'"):
        tr.random_plane(problem(), normalise="filters")
    with pytest.raises(errors.OptionError, match="Problem"):
        tr.random_plane(problem().model)
    biases = cs.Problem(problem().model, nn.CrossEntropyLoss(), data(), params="0.bias")
    with pytest.raises(errors.NotDefinedError, match="one axis"):
        tr.random_plane(biases)
    assert tr.random_plane(biases, normalise="none").size == 5
