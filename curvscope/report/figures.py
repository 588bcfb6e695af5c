"""The figures of a report: drawn once each, as SVG for the page and SVG and PNG files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CurvscopeError
from ..plot import style
from ..plotting.marks import annotate_svg, number_marks
from .figure_plans import Plan, plans
from .findings import Findings
from .svg import for_page, lighter

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """One figure. ``alt`` says in words what is to be seen, ``caption`` how to read it.

    ``svg`` is the markup for the page; empty, with the ``reason``, where nothing could be drawn.
    """

    name: str
    kind: str
    block: str
    alt: str
    caption: str
    svg: str = ""
    reason: str = ""
    width: int = 0


def make_pictures(found: Findings, folder: Path) -> Iterator[Picture]:
    """Draw all figures; files go to ``folder`` as ``NAME.svg`` and ``NAME.png``."""
    for plan in plans(found):
        name = f"{plan.kind}-{found.slug(plan.block)}" if plan.block else plan.kind
        yield draw_plan(plan, name, folder)


def draw_plan(plan: Plan, name: str, folder: Path) -> Picture:
    """One figure, with its files in ``folder``."""
    from matplotlib.figure import Figure

    blank = Picture(name, plan.kind, plan.block, plan.alt, plan.caption, reason=plan.reason)
    if plan.reason:
        return blank
    with style():
        figure = Figure(figsize=plan.size, layout="constrained")
        try:
            plan.draw(figure)
        except CurvscopeError as error:
            return replace(blank, reason=str(error))
        markup = lighter(_svg(figure))
        _png(figure, folder / f"{name}.png")
    (folder / f"{name}.svg").write_text(markup, encoding="utf-8")
    return replace(blank, svg=for_page(markup, name, plan.alt), width=round(plan.size[0] * 96))


# savefig would draw every figure once more for its layout alone, which takes half of the time.


def _svg(figure: Figure) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.dpi = 72
    FigureCanvasAgg(figure)  # measures text
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    marks, planes = number_marks(figure)
    buffer = io.StringIO()
    # No date, so that the same numbers give the same file.
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return annotate_svg(buffer.getvalue(), marks, planes)


def _png(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.dpi = 150
    FigureCanvasAgg(figure).print_png(path)
