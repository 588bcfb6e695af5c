"""What the module of pictures offers, and colours that do not repeat."""

from __future__ import annotations

import curvscope as cs
from curvscope.plotting.style import PALETTE, colours


def test_only_pictures_are_offered() -> None:
    offered = dir(cs.plot)
    assert "plot" in offered and "plot_matrix" in offered
    assert not {"Any", "Callable", "Operator", "OptionError"} & set(offered)


def test_colours_of_many_approximations_differ() -> None:
    found = colours([f"method {k}" for k in range(24)], exact=0)
    assert len(set(found.values())) == 24
    assert tuple(found.values())[: len(PALETTE)] == PALETTE
