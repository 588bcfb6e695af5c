"""Pictures as files: text stays text, the same numbers give the same file, no setting changes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")

import curvscope as cs
from curvscope.errors import OptionError, OutputError

from .pictures import kronecker, pictures


@pytest.mark.parametrize("ending", ["svg", "pdf", "png"])
def test_every_format_and_the_same_file_again(tmp_path: Path, ending: str) -> None:
    draw = pictures()["bars"]
    before = dict(matplotlib.rcParams)
    first = cs.plot.save(draw(), tmp_path / f"a.{ending}").read_bytes()  # type: ignore[operator]
    other = draw().figure  # type: ignore[operator]
    second = cs.plot.save(other, tmp_path / f"b.{ending}").read_bytes()
    assert dict(matplotlib.rcParams) == before
    starts = {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}
    assert first.startswith(starts[ending]) and first == second


def test_text_stays_text(tmp_path: Path) -> None:
    ax = pictures()["bars"]()  # type: ignore[operator]
    svg = cs.plot.save(ax, tmp_path / "a.svg").read_text(encoding="utf-8")
    assert ">K-FAC<" in svg and "DejaVu Sans" in svg
    pdf = cs.plot.save(ax, tmp_path / "a.pdf").read_bytes()
    assert b"/Subtype /Type0" in pdf and b"/Type3" not in pdf  # TrueType, embedded


def test_what_is_drawn_in_several_panels(tmp_path: Path) -> None:
    assert cs.plot.save(cs.plot.plot_factors(kronecker()), tmp_path / "f.pdf").stat().st_size > 1000


def test_refusals(tmp_path: Path) -> None:
    ax = pictures()["bars"]()  # type: ignore[operator]
    with pytest.raises(OptionError, match="ending of path='gif'"):
        cs.plot.save(ax, tmp_path / "a.gif")
    with pytest.raises(OptionError, match="Tensor is no picture"):
        cs.plot.save(torch.ones(2), tmp_path / "a.svg")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="cannot be written"):
        cs.plot.save(ax, tmp_path / "no" / "a.svg")
