"""A small report, made once for all tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from curvscope.report import make_report

from .test_report import problem


@pytest.fixture(scope="session")
def small_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; nothing in it may be changed."""
    out = tmp_path_factory.mktemp("report") / "small"
    return make_report(problem(), out, probes=4, hessian=False, verification=False).folder
