"""``quick=True`` in Python stands for what ``--quick`` does on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.report import collect


class Asked(Exception):
    """What would have been computed."""


@pytest.mark.parametrize(
    ("options", "samples", "settings"),
    [
        ({"quick": True}, 256, (False, False, 8)),
        ({"quick": True, "hessian": True, "probes": 3}, 256, (True, False, 3)),
        ({}, 300, (True, True, 16)),
    ],
    ids=["quick", "quick with the Hessian", "all"],
)
def test_quick(
    options: dict[str, Any],
    samples: int,
    settings: tuple[bool, bool, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(problem: cs.Problem, given: Any) -> None:
        raise Asked(problem.n_samples, (given.hessian, given.verification, given.probes))

    monkeypatch.setattr(collect, "collect", asked)
    data = torch.randn(300, 3), torch.randn(300, 1)
    problem = cs.Problem(nn.Linear(3, 1), nn.MSELoss(), data)
    with pytest.raises(Asked) as found:
        cs.make_report(problem, tmp_path / "r", **options)
    assert found.value.args == (samples, settings)
    with pytest.raises(cs.errors.OptionError, match="quick="):
        cs.make_report(problem, tmp_path / "r", quick=1)  # type: ignore[arg-type]
