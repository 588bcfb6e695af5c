"""Folders that are no run: the message says where runs are, or what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import curvscope as cs
from curvscope.errors import MemoryLimitError, OptionError, RunError, UnknownProblemError
from curvscope.loading import load_problem
from curvscope.operators import DiagonalOperator
from curvscope.training.snapshots import Snapshots
from curvscope.training.store import HEADER


def test_a_folder_of_runs_points_to_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / HEADER).write_text("{}")
    with pytest.raises(RunError, match=r"Runs are below it: cs\.Run\('.*a'\) and 1 more\."):
        cs.Run(tmp_path)


def test_a_folder_that_is_not_there_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(UnknownProblemError, match=r"folder .* does not exist"):
        load_problem(str(tmp_path / "none"))
    with pytest.raises(UnknownProblemError, match="holds no runs"):
        load_problem(str(tmp_path))


def test_the_option_of_snapshots_is_named() -> None:
    with pytest.raises(OptionError, match=r"snapshots .*'all'"):
        Snapshots("all")


def test_a_matrix_too_large_names_what_needs_only_products() -> None:
    op = DiagonalOperator(torch.ones(10**7))
    with pytest.raises(MemoryLimitError, match=r"cs\.density, cs\.eigsh") as found:
        op.dense()
    assert "op.blocks" not in str(found.value)
