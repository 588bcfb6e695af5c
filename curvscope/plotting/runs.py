"""A watched training at a glance: loss, error, sharpness and alarms over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import NotDefinedError, OptionError, check_option
from .marks import mark, readout
from .style import (
    DASHES,
    INK,
    NEGATIVE,
    PALETTE,
    log_axis,
    new_figure,
    short,
    styled,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..training.run import Run

_MOST = 6  # blocks in one panel, the largest first
_SHARPNESS = {"product": "Hessian", "preconditioned_product": "preconditioned Hessian"}
_LIMIT = 2.0  # of λ_max · lr, beyond which descent on a quadratic diverges

Curve = tuple[list[float], list[float]]


@styled
def plot_run(
    run: Run, *, panels: Sequence[str] | None = None, axes: Sequence[Axes] | None = None
) -> list[Axes]:
    """Loss, error, sharpness and alarms over the steps, in panels below each other.

    ``panels`` chooses among ``"loss"`` (as the loop gave it), ``"error"`` (of the optimizer's
    curvature against the exact one, a line per block, of more than six those of the six largest),
    ``"sharpness"`` (largest eigenvalue times learning rate, of the Hessian and, where the optimizer
    preconditions, of the preconditioned one, with the limit of stability at 2) and ``"alarms"``
    (a bar per alarm from the step at which it was raised to the one at which it was over). By
    default all of which the run has records. ``axes`` are as many as there are panels.

    Returns the axes. Cost: one pass over the records. Raises ``NotDefinedError`` for a run, or a
    chosen panel, that has nothing to draw, ``OptionError`` for an unknown panel.
    """
    found = {name: curves(run) for name, (curves, _) in _PANELS.items()}
    chosen = [name for name in found if found[name]] if panels is None else list(panels)
    for name in chosen:
        check_option("panels", name, _PANELS)
    empty = [name for name in chosen if not found[name]]
    if empty or not chosen:
        raise NotDefinedError(
            f"{run.path} has no records of {', '.join(empty) or ', '.join(_PANELS)} to draw."
        )
    drawn = _axes(chosen, found, axes)
    for ax, name in zip(drawn, chosen, strict=True):
        _PANELS[name][1](ax, found[name], run)
        whole_numbers(ax.xaxis)
    drawn[-1].set_xlabel("step")
    if axes is None:
        for ax in drawn[:-1]:
            ax.tick_params(labelbottom=False)
        drawn[0].set_title(short(run.name, 60))
    return drawn


def _axes(
    chosen: Sequence[str], found: Mapping[str, Mapping[str, Any]], axes: Sequence[Axes] | None
) -> list[Axes]:
    if axes is not None:
        if len(axes) != len(chosen):
            raise OptionError(
                f"axes= holds {len(axes)} axes; {', '.join(chosen)} need {len(chosen)}. "
                "panels= chooses among them."
            )
        return list(axes)
    heights = [0.35 + 0.22 * len(found[n]) if n == "alarms" else 1.7 for n in chosen]
    figure = new_figure(7.0, sum(heights) + 0.7)
    grid = figure.subplots(
        len(chosen), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    return list(grid[:, 0])


# -- what a run has to draw ------------------------------------------------------------------------


def _loss(run: Run) -> dict[str, Curve]:
    return _filled({"loss": _curve(run.rows("loss"), "loss")})


def _error(run: Run) -> dict[str, Curve]:
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in run.rows("error"):
        rows.setdefault(str(row.get("block", "")), []).append(row)
    return _filled({block: _curve(found, "error") for block, found in rows.items()})


def _sharpness(run: Run) -> dict[str, Curve]:
    rows = run.rows("sharpness")
    return _filled({label: _curve(rows, key) for key, label in _SHARPNESS.items()})


def _alarms(run: Run) -> dict[str, list[tuple[int, int, str]]]:
    """By alarm and block, from which step to which it was on, and its sentence."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    on: dict[str, tuple[int, str]] = {}
    for row in run.rows("alarm"):
        name = " · ".join(str(row[key]) for key in ("alarm", "block") if row.get(key))
        found.setdefault(name, [])
        if row.get("state") != "over":
            on.setdefault(name, (row["step"], str(row.get("message", ""))))
        elif name in on:
            begun, message = on.pop(name)
            found[name].append((begun, row["step"], message))
    for name, (begun, message) in on.items():
        found[name].append((begun, max(run.last_step, begun), message))
    return {name: spans for name, spans in found.items() if spans}


def _curve(rows: Iterable[Mapping[str, Any]], key: str) -> Curve:
    pairs = [(r["step"], float(v)) for r in rows if isinstance(v := r.get(key), int | float)]
    return [step for step, _ in pairs], [v if math.isfinite(v) else math.nan for _, v in pairs]


def _filled(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    return {n: curve for n, curve in curves.items() if any(map(math.isfinite, curve[1]))}


# -- panels ----------------------------------------------------------------------------------------


def _draw_loss(ax: Axes, curves: Mapping[str, Curve], run: Run) -> None:
    _lines(ax, curves, [INK])
    ax.set_ylabel("loss")


def _draw_error(ax: Axes, curves: Mapping[str, Curve], run: Run) -> None:
    sizes = {str(r.get("block", "")): r.get("size") or 0 for r in run.rows("error")}
    largest = sorted(curves, key=lambda name: -sizes[name])[:_MOST]
    _lines(ax, {name: curve for name, curve in curves.items() if name in largest}, PALETTE)
    rest = len(curves) - len(largest)
    _legend(ax, f"{len(largest)} largest of {len(curves)} blocks" if rest else "block")
    ax.set_ylabel("relative error")


def _draw_sharpness(ax: Axes, curves: Mapping[str, Curve], run: Run) -> None:
    _lines(ax, curves, PALETTE)
    ax.axhline(_LIMIT, color=INK, lw=1.0, ls=DASHES[1], label="limit of stability")
    _legend(ax)
    ax.set_ylabel("λ_max · lr")


def _draw_alarms(ax: Axes, spans: Mapping[str, list[tuple[int, int, str]]], run: Run) -> None:
    for place, (name, found) in enumerate(spans.items()):
        for begun, over, message in found:
            # an alarm of one step has a mark, too
            bar = ax.plot([begun, over], [place, place], color=NEGATIVE, lw=5.0, marker="|", ms=5)
            bar[0].set_solid_capstyle("butt")
            mark(bar[0], f"{message} (steps {begun:,} to {over:,})", series=name)
    ax.set_yticks(range(len(spans)), [short(name) for name in spans])
    ax.set_ylim(len(spans) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")


def _lines(ax: Axes, curves: Mapping[str, Curve], tints: Sequence[str]) -> None:
    for k, (name, (steps, values)) in enumerate(curves.items()):
        line = ax.plot(
            steps,
            values,
            color=tints[k % len(tints)],
            ls=DASHES[k % len(DASHES)],
            marker="." if len(steps) < 60 else "",
            label=short(name),
        )
        mark(line[0], name, series=name, points=zip(steps, values, strict=True))
    readout(ax, "step", "value")
    ax.grid(True, axis="y")
    known = [v for _, values in curves.values() for v in values if math.isfinite(v)]
    if min(known) > 0 and max(known) > 10 * min(known):
        ax.set_yscale("log")
        log_axis(ax.yaxis, most=5)


def _legend(ax: Axes, title: str = "") -> None:
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title=title or None)


_PANELS: dict[str, tuple[Callable[[Run], Mapping[str, Any]], Callable[..., None]]] = {
    "loss": (_loss, _draw_loss),
    "error": (_error, _draw_error),
    "sharpness": (_sharpness, _draw_sharpness),
    "alarms": (_alarms, _draw_alarms),
}
