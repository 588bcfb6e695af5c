"""``kill -9`` at random moments: no finished record is lost or doubled."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import curvscope as cs
from curvscope.training import lines
from tests.training.killing import MEASURES, STEPS, served

MOMENTS = int(os.environ.get("CURVSCOPE_KILLS", "20"))
NAMES = {getattr(measure, "name", measure) for measure in MEASURES} | {"snapshot"}


def content(path: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Rows by step and measure, without what differs between two trainings: seconds."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in cs.Run(path).records:
        if row["measure"] in NAMES:
            kept = {k: v for k, v in row.items() if k not in ("seconds", "file")}
            found.setdefault((row["step"], row["measure"]), []).append(kept)
    return found


def assert_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal; measured numbers up to the rounding of products whose order torch chooses."""
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected):
        assert row.keys() == other.keys()
        for key, value in row.items():
            exact = row["measure"] == "loss" or not isinstance(value, float)
            good = value == other[key]
            if not exact:
                good = value == pytest.approx(other[key], rel=1e-4, abs=1e-6, nan_ok=True)
            assert good, (row["step"], row["measure"], key, value, other[key])


def test_killed_at_random_moments(tmp_path: Path) -> None:
    with served("training") as run:
        killed_at_random_moments(run, tmp_path)


def killed_at_random_moments(run: Any, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    start = time.perf_counter()
    assert run(whole, -1) == "done 0"
    duration = time.perf_counter() - start
    expected = content(whole / "run")
    assert {step for step, measure in expected if measure == "loss"} == set(range(1, STEPS + 1))
    final = torch.load(whole / "checkpoint", weights_only=True)["model"]
    generator = random.Random(4)
    deaths = 0
    for moment in range(MOMENTS):
        folder = tmp_path / f"killed{moment}"
        folder.mkdir()
        deaths += run(folder, generator.uniform(0.1, 0.9) * duration) == "killed"
        path = folder / "run"
        if (path / "run.json").exists():
            file = (
                (path / "records.jsonl").read_bytes() if (path / "records.jsonl").exists() else b""
            )
            before = lines.scan(file, "records").rows
            found = content(path)
            assert not cs.Run(path).problems
            for key, rows in found.items():  # complete, and the same numbers
                assert_same(rows, expected[key])
            losses = [r["step"] for r in before if r["measure"] == "loss"]
            assert losses == list(range(1, len(losses) + 1))  # none is missing
        assert run(folder, -1) == "done 0"
        after = content(path)
        assert after.keys() == expected.keys()
        for key, rows in after.items():
            assert_same(rows, expected[key])
        state = torch.load(folder / "checkpoint", weights_only=True)["model"]
        assert all(torch.equal(state[name], value) for name, value in final.items())
        snapshots = cs.Run(path).snapshots()
        assert snapshots.steps == tuple(range(0, STEPS + 1, 2))
        reference = cs.Run(whole / "run").snapshots()
        for step in snapshots:
            assert torch.equal(snapshots.vector(step), reference.vector(step))
    assert deaths >= MOMENTS // 2
