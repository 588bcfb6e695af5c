"""What marks of a figure mean, said on the artists, so that a page can answer a pointer.

Drawing functions call :func:`mark` and :func:`readout`; nothing of it changes the picture.
:func:`annotate_svg` puts what was said into matplotlib's SVG as ``<title>`` elements, which
browsers show on hover even without scripts, and as attributes for the page's scripts.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

_A = TypeVar("_A")
_MARK, _PLANE = "_curvscope_mark", "_curvscope_plane"
_MOST_POINTS = 160  # of one line
# What legends add to a name.
_REMARK = re.compile(r", [\d,]+ negative$|, lr [-+.\de]+$| \(\d+ % along the plane\)$")


@dataclass(frozen=True)
class Mark:
    """What an artist shows: a sentence, the name it belongs to, and the points of a line."""

    tip: str
    series: str
    points: Sequence[tuple[float, float]]


def mark(
    artist: _A, tip: str = "", *, series: str = "", points: Iterable[tuple[float, float]] = ()
) -> _A:
    """Say what ``artist`` shows; returns it.

    ``series`` is the name by which the page's check boxes switch it; ``points`` are the places of
    a line whose values can be read, as data coordinates.
    """
    setattr(artist, _MARK, Mark(tip, series, thinned(list(points))))
    return artist


def readout(ax: Any, x: str, y: str) -> None:
    """Let readers read and zoom the lines of ``ax``; ``x`` and ``y`` name the values in a word."""
    setattr(ax, _PLANE, {"names": [x, y]})


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 160 points: all of the first ones, then evenly by the logarithm of their place."""
    if len(points) <= _MOST_POINTS:
        return points
    places = np.geomspace(1, len(points), _MOST_POINTS).round().astype(int) - 1
    kept = set(places.tolist()) | set(range(_MOST_POINTS // 4))
    return [points[k] for k in sorted(kept)]


def number_marks(figure: Any) -> tuple[list[Mark], list[Any]]:
    """Give every marked artist of ``figure``, and its legends' entries, an id; returns them."""
    marked = [a for a in figure.findobj() if getattr(a, _MARK, None) is not None]
    names = {getattr(a, _MARK).series for a in marked} - {""}
    legends = [legend for ax in figure.axes if (legend := ax.get_legend())] + list(figure.legends)
    for legend in legends:
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=False):
            label = _REMARK.sub("", text.get_text())
            if label in names:
                marked += [mark(handle, series=label), mark(text, series=label)]
    for place, artist in enumerate(marked):
        artist.set_gid(f"mark-{place}")
    planes = [ax for ax in figure.axes if getattr(ax, _PLANE, None) is not None]
    for place, ax in enumerate(planes):
        ax.set_gid(f"plane-{place}")
    return [getattr(a, _MARK) for a in marked], planes


def annotate_svg(markup: str, marks: Sequence[Mark], planes: Sequence[Any]) -> str:
    """Put titles and attributes where :func:`number_marks` has left its ids."""

    def one(match: re.Match[str]) -> str:
        found = marks[int(match.group(1))]
        text = '<g class="mark"'
        if found.series:
            text += f' data-series="{html.escape(found.series)}"'
        if found.points:
            places = ",".join(f"{x:.5g} {y:.4g}" for x, y in found.points)
            text += f' data-points="{places}"'
        return f"{text}><title>{html.escape(found.tip)}</title>" if found.tip else f"{text}>"

    def plane(match: re.Match[str]) -> str:
        return f'<g class="plane" data-plane="{html.escape(_plane(planes[int(match.group(1))]))}">'

    markup = re.sub(r'<g id="mark-(\d+)"[^>]*>', one, markup)
    markup = re.sub(r'<g id="plane-(\d+)"[^>]*>', plane, markup)
    return re.sub(r'<g id="[xy]tick_\d+">', '<g class="tick">', markup) if planes else markup


def _plane(ax: Any) -> str:
    """Where the axes lie in the SVG (points, y downwards), and their limits and scales."""
    width, height = ax.figure.get_size_inches() * 72
    box = ax.get_position()
    found = {
        **getattr(ax, _PLANE),
        "box": [
            round(v, 2)
            for v in (box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height)
        ],
        "x": [ax.get_xscale(), *map(_short, ax.get_xlim())],
        "y": [ax.get_yscale(), *map(_short, ax.get_ylim())],
    }
    return json.dumps(found, separators=(",", ":"))


def _short(value: float) -> float:
    return float(f"{value:.8g}")


def value(number: float, digits: int = 3) -> str:
    """A number in a tip: ``"0.422"``, ``"1.2e-07"``; a word for what is not one."""
    if math.isnan(number):
        return "not defined"
    return f"{number:.{digits}g}".replace("-", "−")
