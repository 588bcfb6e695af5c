"""The main pictures look as they did: compared with small ones kept in ``baselines/``."""

from __future__ import annotations

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from curvscope import plot as cplot

from .baselines import FOLDER, compared, difference, path, render
from .pictures import comparison


@pytest.mark.parametrize("name", list(compared()))
def test_the_picture_is_the_one_kept(name: str) -> None:
    said = difference(render(compared()[name]), path(name).read_bytes())
    assert not said, (
        f"The picture {name!r} has changed: {said}. If it is meant to, draw it anew with "
        f"python -m tests.plotting.baselines {name!r}, and look at it."
    )


def test_kept_pictures_are_few_small_and_all_used() -> None:
    kept = sorted(FOLDER.glob("*.png"))
    assert kept == sorted(map(path, compared()))
    assert all(file.stat().st_size < 30_000 for file in kept)


def test_a_change_is_seen() -> None:
    """A bar less, another scale, a lost legend, a lost label, other data."""
    kept = path("bars").read_bytes()

    def without_legend() -> object:
        ax = cplot.plot_comparison(comparison())
        ax.get_legend().remove()
        return ax

    def wider() -> object:
        ax = cplot.plot_comparison(comparison())
        ax.set_xlim(0, 3)
        return ax

    for draw in (
        without_legend,
        wider,
        lambda: cplot.plot_comparison(comparison(), approximations=["K-FAC"]),
        lambda: cplot.plot_comparison(comparison(), metric="cosine"),
    ):
        assert difference(render(draw), kept)
    plt.close("all")
    for name, other in (("spectrum", "trace"), ("discs", "bands"), ("surface", "fourier")):
        assert difference(path(name).read_bytes(), path(other).read_bytes())
