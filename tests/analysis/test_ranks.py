"""Ranks as SciPy's, which takes longer to import than to wait for."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import rankdata

from curvscope.analysis.measures import ranks


@pytest.mark.parametrize("kinds", [3, 50, 10**9], ids=["many ties", "some ties", "no ties"])
def test_ranks_are_scipys(kinds: int) -> None:
    values = np.random.default_rng(0).integers(0, kinds, 200) / 7
    assert np.array_equal(ranks(values), rankdata(values))
    assert np.array_equal(ranks(-values[:1]), [1.0])
