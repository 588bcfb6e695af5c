"""Paths: every number from its definition; forms of snapshots; refusals."""

from __future__ import annotations

import itertools
import json
import math
import pickle

import pytest
import torch

from curvscope import errors
from curvscope import training as tr

from .nets import random_path

RUNS = {"a": random_path(seed=1), "b": random_path(seed=2, count=4), "c": random_path(seed=3)}


def degrees(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.degrees(math.acos(float(a @ b / (a.norm() * b.norm()))))


def test_every_number_of_a_path() -> None:
    found = tr.trajectories(RUNS)
    assert found.names == ("a", "b", "c")
    D, origin = found.plane.directions, found.plane.origin
    for name, snapshots in RUNS.items():
        path = found.paths[name]
        X = torch.stack([v for _, v in snapshots])
        moves = X.diff(dim=0)
        assert path.steps == tuple(s for s, _ in snapshots)
        assert torch.allclose(path.points, (X - origin) @ D, atol=1e-12)
        rest = (X - origin) - (X - origin) @ D @ D.mT
        assert torch.allclose(path.off_plane, rest.norm(dim=1), atol=1e-12)
        assert torch.allclose(path.from_start, (X - X[0]).norm(dim=1), rtol=1e-13)
        assert torch.allclose(path.movements, moves.norm(dim=1), rtol=1e-13)
        turns = [degrees(a, b) for a, b in itertools.pairwise(moves)]
        assert path.turns.tolist() == pytest.approx(turns, rel=1e-10)
        shares = (moves @ D).square().sum(1) / moves.square().sum(1)
        assert torch.allclose(path.inside, shares, rtol=1e-10)
        assert path.length == pytest.approx(float(moves.norm(dim=1).sum()), rel=1e-13)
        assert path.straightness == pytest.approx(float((X[-1] - X[0]).norm()) / path.length)
        whole = float((moves @ D).square().sum() / moves.square().sum())
        assert path.share_inside == pytest.approx(whole, rel=1e-10)


def test_pairs_are_compared_at_common_steps() -> None:
    shifted = [(step + 6, v) for step, v in RUNS["c"]]  # steps 6, 9, ...
    found = tr.trajectories({"a": RUNS["a"], "late": shifted, "b": RUNS["b"]})
    pair = found.pair("late", "a")
    assert pair is found.pair("a", "late") and pair.steps == (6, 9, 12, 15)
    own, other = dict(RUNS["a"]), dict(shifted)
    for k, step in enumerate(pair.steps):
        distance = float((own[step] - other[step]).norm())
        assert float(pair.distances[k]) == pytest.approx(distance, rel=1e-13)
        if step == 6:  # the late one has not moved yet
            assert math.isnan(float(pair.angles[k]))
        else:
            angle = degrees(own[step] - own[0], other[step] - other[6])
            assert float(pair.angles[k]) == pytest.approx(angle, rel=1e-10)
    assert len(found.pairs) == 3 and len(found.pairs_frame()) == 4 + 2 + 4
    with pytest.raises(errors.UnknownBlockError, match="Did you mean 'late'"):
        found.pair("a", "lat")


def test_angles_are_accurate_where_the_arc_cosine_is_not() -> None:
    e = torch.eye(3, dtype=torch.float64)
    tiny = 1e-9
    path = [(0, 0 * e[0]), (1, e[0]), (2, 2 * e[0] + tiny * e[1]), (3, e[0] + tiny * e[1])]
    turns = tr.trajectories(path, plane=tr.plane_along(e[0], (e[0], e[1]))).paths["run"].turns
    assert float(turns[0]) == pytest.approx(math.degrees(tiny), rel=1e-6)
    assert 180 - float(turns[1]) == pytest.approx(math.degrees(tiny), rel=1e-4)


def test_another_plane_changes_the_projection_only() -> None:
    a, b, c = (v for _, v in RUNS["a"][:3])
    one, other = tr.trajectories(RUNS), tr.trajectories(RUNS, plane=tr.plane_through(a, b, c))
    assert torch.equal(one.paths["a"].movements, other.paths["a"].movements)
    assert torch.equal(one.pairs[0].distances, other.pairs[0].distances)
    assert float(other.paths["a"].off_plane[:3].max()) < 1e-12
    assert float(other.paths["a"].inside[0]) == pytest.approx(1.0, rel=1e-12)


class Kept:
    """What a run offers: steps, and one vector at a time."""

    def __init__(self, pairs: list[tuple[int, torch.Tensor]]) -> None:
        self.pairs = dict(pairs)
        self.steps = tuple(self.pairs)

    def vector(self, step: int) -> torch.Tensor:
        return self.pairs[step]


class Run:
    def __init__(self, content: object) -> None:
        self.content = content

    def snapshots(self) -> object:
        return self.content


def test_all_forms_of_snapshots_are_the_same() -> None:
    pairs = RUNS["a"]
    expected = tr.trajectories({"run": pairs}).to_frame()
    forms = {
        "list": pairs,
        "generator": (pair for pair in pairs),
        "run": Run(pairs),
        "mapping of a run": Run(dict(pairs)),
        "vectors of a run": Run(Kept(pairs)),
        "parameters": [(s, torch.nn.Parameter(v)) for s, v in pairs],
        "float steps": [(float(s), v) for s, v in pairs],
    }
    for form, snapshots in forms.items():
        found = tr.trajectories({"run": snapshots}).to_frame()
        assert found.equals(expected), form
    assert tr.trajectories(pairs).to_frame().equals(expected)


class Projected(Kept):
    """Kept as random projections."""

    def __init__(self, pairs: list[tuple[int, torch.Tensor]], seed: int, error: float) -> None:
        super().__init__(pairs)
        self.settings, self.error = {"kind": "projection", "size": 37, "seed": seed}, error


def test_projected_snapshots_say_so_and_only_the_same_projections_are_compared() -> None:
    one, two = (Run(Projected(RUNS[name], 0, 0.04)) for name in "ac")
    found = tr.trajectories({"a": one, "c": two})
    assert found.warnings == (
        "The snapshots are random projections: distances have a relative standard error of at most "
        "2 %.",
    )
    assert found.to_frame().equals(tr.trajectories({k: RUNS[k] for k in "ac"}).to_frame())
    (warning,) = tr.trajectories(Run(Projected(RUNS["a"], 0, math.nan))).warnings
    assert "some of the parameters' entries only" in warning
    for other in (Run(Projected(RUNS["c"], 1, 0.04)), RUNS["c"]):
        with pytest.raises(errors.OptionError, match="seed 0"):
            tr.trajectories({"a": one, "c": other})


def test_frames_sentences_and_files() -> None:
    found = tr.trajectories(RUNS)
    frame = found.to_frame()
    assert list(frame.columns[:5]) == ["run", "step", "x", "y", "off_plane"] and len(frame) == 16
    last = frame[frame.run == "a"].iloc[-1]
    assert last.length == pytest.approx(found.paths["a"].length)
    assert (
        frame[frame.step == 0].movement.isna().all() and frame[frame.step == 0].length.eq(0).all()
    )
    assert frame.turn.isna().sum() == 6 and frame.movement.isna().sum() == 3
    text = str(found)
    assert "a: 6 snapshots, length" in text and "a and b at step 9: distance" in text
    json.dumps(found.to_dict(), allow_nan=False)
    again = pickle.loads(pickle.dumps(found))
    assert again.to_frame().equals(frame)


def test_broken_snapshots_stay_nan_and_are_named() -> None:
    broken = [*RUNS["a"], (99, torch.full((37,), torch.nan)), (100, torch.full((37,), torch.inf))]
    found = tr.trajectories({"a": broken, "b": RUNS["b"]})
    path = found.paths["a"]
    assert bool(path.points[-2:].isnan().all()) and bool(path.points[:-2].isfinite().all())
    assert path.length == pytest.approx(tr.trajectories({"a": RUNS["a"]}).paths["a"].length)
    (warning,) = found.warnings
    assert "snapshots of a at steps 99 and 100" in warning
    assert math.isfinite(path.share_inside)


def test_standing_still_and_steps_apart() -> None:
    e = torch.eye(3, dtype=torch.float64)
    plane = tr.plane_along(e[2], (e[0], e[1]))
    still = tr.trajectories({"s": [(0, e[0]), (1, e[0])], "t": [(2, e[1])]}, plane=plane)
    path = still.paths["s"]
    assert path.length == 0 and math.isnan(path.straightness) and math.isnan(path.share_inside)
    assert "no step in common" in still.warnings[0]
    assert "undefined" in still.summary()


def test_refusals() -> None:
    a = RUNS["a"]
    with pytest.raises(errors.ShapeError, match="'a' 37, 'other' 12"):
        tr.trajectories({"a": a, "other": random_path(size=12)})
    with pytest.raises(errors.ShapeError, match="37 parameters, the run 'x' has 12"):
        tr.trajectories({"x": random_path(size=12)}, plane=tr.plane_of_paths(a))
    with pytest.raises(errors.ShapeError, match="at step 7 has 12 entries"):
        tr.trajectories({"a": [(0, a[0][1]), (7, torch.zeros(12))]})
    with pytest.raises(errors.ShapeError, match=r"is \[3, 3\], not a flat tensor"):
        tr.trajectories({"a": [(0, torch.eye(3))]})
    with pytest.raises(errors.ShapeError, match="list, not a flat"):
        tr.trajectories({"a": [(0, [1.0])]})
    with pytest.raises(errors.OptionError, match="3 comes after 3"):
        tr.trajectories({"a": [*a[:2], a[1]]})
    with pytest.raises(errors.OptionError, match="no snapshots"):
        tr.trajectories({"a": []})
    with pytest.raises(errors.OptionError, match="no runs"):
        tr.trajectories({})
    with pytest.raises(errors.OptionError, match="pairs"):
        tr.trajectories({"a": [v for _, v in a]})
    with pytest.raises(errors.NotDefinedError, match="line"):
        tr.trajectories({"a": a[:2]})
