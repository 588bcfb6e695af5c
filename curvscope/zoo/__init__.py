"""Ready problems on real data, trained by seeded recipes.

>>> from curvscope import zoo
>>> problem = zoo.load("digits-cnn")
>>> problem.accuracy() > 0.9
True
"""

from __future__ import annotations

from .problems import ZooProblem, load
from .recipes import Recipe
from .registry import names

__all__ = ["Recipe", "ZooProblem", "load", "names"]
