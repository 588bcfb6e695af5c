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
        figure.set_layout_engine("none")  # it stays as it is, and need not be laid out again
        figure.savefig(folder / f"{name}.png", dpi=150)
    (folder / f"{name}.svg").write_text(markup, encoding="utf-8")
    return replace(blank, svg=for_page(markup, name, plan.alt), width=round(plan.size[0] * 96))


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    marks, planes = number_marks(figure)
    # No date, so that the same numbers give the same file.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return annotate_svg(buffer.getvalue(), marks, planes)
