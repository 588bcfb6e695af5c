"""The checks of a problem: what was measured against what is tolerated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..analysis.checks import FAILED, NOT_APPLICABLE, PASSED, SKIPPED, Check
from ..analysis.verify import Verification
from ..errors import NotDefinedError
from .marks import mark, value
from .style import GRID, INK, MUTED, axes_for, log_axis, short, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {PASSED: "#009e73", FAILED: "#d55e00", SKIPPED: "#e69f00", NOT_APPLICABLE: MUTED}
_MARKERS = {PASSED: "o", FAILED: "X", SKIPPED: "s", NOT_APPLICABLE: "o"}
_WORDS = {SKIPPED: "undecided"}
_HEIGHT = 0.21  # inches per check
_FLOOR = 1e-18  # what is smaller is drawn there


@styled
def plot_verification(
    verification: Verification, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """A row per check: what was measured (mark) and its tolerance (tick) on a logarithmic axis.

    Colour and mark say whether the check passed (green disc), failed (orange cross) or stayed
    undecided (yellow square); a mark left of its tick is within the tolerance. A value of exactly
    zero stands at the left edge, open, an infinite one at the right edge. Where nothing was
    measured, a word says so. The checks are grouped by what they are about: your problem,
    curvscope, other tools.
    """
    checks = verification.checks
    if not checks:
        raise NotDefinedError("There is no check to draw.")
    subjects = list(dict.fromkeys(check.about for check in checks))
    ax = axes_for(ax, width=7.2, height=1.1 + _HEIGHT * (len(checks) + len(subjects)))
    low, high = _limits(checks)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    place = 0
    rows: dict[int, Check] = {}
    for about in subjects:
        ax.annotate(
            about,
            (low, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
            fontsize=8.5,
        )
        ax.axhline(place - 0.5, color=GRID, lw=0.6)
        for check in (check for check in checks if check.about == about):
            place += 1
            rows[place] = check
            _draw(ax, check, place, low, high)
        place += 1
    ax.set_yticks(list(rows), [short(check.name, 36) for check in rows.values()])
    for label, check in zip(ax.get_yticklabels(), rows.values(), strict=True):
        if check.status == FAILED:
            label.set_color(_COLOURS[FAILED])
            label.set_fontweight("bold")
    ax.set_ylim(place - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    log_axis(ax.xaxis, minor=False)
    ax.set_xlabel("measured difference (mark) and tolerance (tick)")
    ax.grid(True, axis="x")
    _legend(ax, checks)
    if title is not None:
        ax.set_title(title)
    return ax


def _limits(checks: tuple[Check, ...]) -> tuple[float, float]:
    seen = [max(abs(x), _FLOOR) for c in checks for x in (c.value, c.tolerance) if _drawable(x)]
    if not seen:
        return 0.1, 10.0
    return min(seen) / 30, max(seen) * 10


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value != 0


def _draw(ax: Axes, check: Check, place: int, low: float, high: float) -> None:
    colour = _COLOURS[check.status]
    bound = max(check.tolerance, _FLOOR) if _drawable(check.tolerance) else math.nan
    if math.isnan(check.value):
        word = _WORDS.get(check.status, check.status)
        x = math.sqrt(low * bound) if math.isfinite(bound) else math.sqrt(low * high)
        text = ax.text(
            x, place, word, va="center", ha="center", color=colour, fontsize=7.5, style="italic"
        )
        mark(text, f"{check.name}: {word}. {check.sentence}")
    else:
        x = min(max(abs(check.value), _FLOOR), high) if check.value else low
        if math.isfinite(bound):
            ax.plot([x, bound], [place, place], color=colour, lw=1.0, alpha=0.45)
        face = colour if check.value else "none"
        (dot,) = ax.plot(
            [x],
            [place],
            marker=_MARKERS[check.status],
            color=colour,
            mfc=face,
            ms=6,
            mew=1.0 if check.value else 1.3,
            ls="none",
            clip_on=False,
            zorder=4,
        )
        tip = f"{check.name}: {check.status}, measured {value(check.value)}"
        mark(dot, tip + (f", tolerance {value(check.tolerance)}" if math.isfinite(bound) else ""))
    if math.isfinite(bound):
        ax.plot([bound], [place], marker="|", color=INK, ms=8, mew=1.3, ls="none", zorder=3)


def _legend(ax: Axes, checks: tuple[Check, ...]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for status, colour in _COLOURS.items():
        count = sum(check.status == status for check in checks)
        if count:
            label = f"{_WORDS.get(status, status)} ({count})"
            marker = _MARKERS[status]
            handles.append(
                Line2D([], [], color=colour, marker=marker, ms=6, ls="none", label=label)
            )
    handles.append(
        Line2D([], [], color=INK, marker="|", ms=8, mew=1.3, ls="none", label="tolerance")
    )
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.62 / (1 + _HEIGHT * len(checks))),
        ncols=len(handles),
        columnspacing=1.0,
        handletextpad=0.2,
    )
