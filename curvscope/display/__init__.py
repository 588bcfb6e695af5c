"""How objects show themselves in a notebook: they say what to show, this package writes the HTML.

A class that derives from :class:`Shown` gives a :class:`Card`: a title, facts, sentences, tables
and small pictures. :func:`render` turns it into a fragment that inherits the notebook's colours
and needs neither network nor widgets. Nothing here computes anything.
"""

from __future__ import annotations

from .card import Card, Readable, Shown, Table
from .numbers import cell, with_error
from .pictures import spark, strip, thumbnail
from .render import render

__all__ = [
    "Card",
    "Readable",
    "Shown",
    "Table",
    "cell",
    "render",
    "spark",
    "strip",
    "thumbnail",
    "with_error",
]
