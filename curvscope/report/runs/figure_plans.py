"""Which pictures a report of runs has, and how each is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...analysis.result import listing
from ...plotting.marks import readout
from ...plotting.style import INK, PALETTE, log_axis, short, whole_numbers
from ..figure_plans import Plan
from .gather import Group, Member, Runs, band
from .lines import (
    blank,
    colour_of,
    column,
    draw_band,
    heights,
    legend_below,
    logarithmic,
    of_block,
    over_seconds,
)
from .logged import logged_plan

_PANELS = 8  # blocks that one picture shows
_COLUMNS = 4
_FRESH = {"K-FAC": (PALETTE[0], (0, (5, 1.5))), "diagonal K-FAC": (PALETTE[2], (0, (1, 1)))}
_OTHER = (PALETTE[3], (0, (6, 1.5, 1, 1.5)))
_TITLES = {
    "train_loss": "training loss",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
}


def plans(runs: Runs) -> list[Plan]:
    """All pictures but those of trajectories, in the order of the page."""
    found = [_progress(runs, runs.axis), _progress(runs, "seconds")]
    if any(len(group.rates) > 1 for group in runs.groups.values()):
        found.append(_grid(runs))
    found += [_own(runs, "error"), _own(runs, "cosine")]
    if any(member.rows("fresh") for _, members in runs.best() for member in members):
        found += [_beside(runs, name, group) for name, group in runs.groups.items()]
    found.append(_sharpness(runs))
    logged = logged_plan(runs)
    return found if logged is None else [*found, logged]


def _seeds(runs: Runs) -> str:
    most = max((len(members) for _, members in runs.best()), default=1)
    return "Bands reach from the least to the largest value over seeds. " if most > 1 else ""


def _progress(runs: Runs, axis: str) -> Plan:
    keys = [
        key
        for key in _TITLES
        if any(column(runs.axis, key)(m) for _, members in runs.best() for m in members)
    ]
    over = {"seconds": "seconds of training"}.get(axis, f"{axis}s")

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(keys), squeeze=False)[0]
        looks = colour_of(list(runs.groups))
        for ax, key in zip(panels, keys, strict=True):
            for name, members in runs.best():
                colour, ls = looks[name]
                curve = (
                    over_seconds(members, runs.axis, key)
                    if axis == "seconds"
                    else band(members, column(runs.axis, key))
                )
                draw_band(
                    ax, curve, color=colour, ls=ls, label=_named(runs.groups[name]), series=name
                )
            readout(ax, {"seconds": "second"}.get(axis, axis), _TITLES[key])
            ax.set_title(_TITLES[key])
            ax.set_xlabel(over)
            if axis != "seconds":
                whole_numbers(ax.xaxis)
            ax.grid(True, axis="y")
            if key != "test_accuracy":
                logarithmic(ax)
        legend_below(figure)

    return Plan(
        f"progress-{'seconds' if axis == 'seconds' else 'epochs'}",
        "",
        f"Lines of {', '.join(_TITLES[k] for k in keys)} over {over}, one per optimizer.",
        f"{'Over' if runs.alone else 'Each optimizer at its best learning rate, over'} {over}. "
        + _seeds(runs)
        + (
            "The monitor's own time, tests and checkpoints are not counted."
            if axis == "seconds"
            else _what_loss(runs)
        ),
        (max(3.7, 2.7 * len(keys) + 0.6), 3.0 + 0.18 * math.ceil(len(runs.groups) / 3)),
        draw,
        reason="" if keys else "No run has a record of its loss.",
    )


def _what_loss(runs: Runs) -> str:
    """What a point of the training loss is."""
    if runs.axis == "epoch":
        return "The training loss is the mean over an epoch's minibatches, while they are learnt."
    sizes = {member.steps_per_point for member in runs.members} - {0}
    if sizes == {1}:
        return "The training loss is that of each step's minibatch, before the step."
    most = max(sizes, default=1)
    return (
        "The training loss is that of the steps' minibatches, each before its step; a point is the "
        f"mean of {'up to ' if len(sizes) > 1 else ''}{most} steps."
    )


def _grid(runs: Runs) -> Plan:
    def draw(figure: Any) -> None:
        ax = figure.subplots()
        looks = colour_of(list(runs.groups))
        for name, group in runs.groups.items():
            rates = [rate for rate in group.rates if not math.isnan(rate)]
            known = [rate for rate in rates if math.isfinite(group.score(rate))]
            colour, ls = looks[name]
            scores = [group.score(rate) for rate in known]
            ax.plot(known, scores, color=colour, ls=ls, marker="o", label=short(name))
            for rate in known:
                losses = [m.final_loss for m in group.rates[rate]]
                ax.plot([rate] * len(losses), losses, ".", color=colour, ms=3, alpha=0.6)
            for rate in set(rates) - set(known):
                ax.plot([rate], [1.0], "x", color=colour, transform=ax.get_xaxis_transform())
        ax.set_xscale("log")
        log_axis(ax.xaxis)
        logarithmic(ax)
        ax.set_xlabel("learning rate")
        ax.set_ylabel("training loss of the last epoch")
        ax.grid(True, axis="y")
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return Plan(
        "learning-rates",
        "",
        "Last training loss over the learning rate, one line per optimizer.",
        "The grid of learning rates: the mean over seeds of the last epoch's training loss, small "
        "dots the seeds. A cross at the top marks a rate at which a training diverged.",
        (6.4, 3.4),
        draw,
    )


def _own(runs: Runs, key: str) -> Plan:
    blocks = _blocks(runs, "error")
    having = [
        (name, members)
        for name, members in runs.best()
        if any(row.get("approximation") for m in members for row in m.rows("error"))
    ]
    title = {"error": "Relative error", "cosine": "Cosine"}[key]

    def draw(figure: Any) -> None:
        panels = _panels(figure, len(blocks))
        looks = colour_of(list(runs.groups))
        for ax in panels[::_COLUMNS]:
            ax.set_ylabel(title.lower())
        for ax, block in zip(panels, blocks):
            for name, members in having:
                colour, ls = looks[name]
                curve = band(members, of_block("error", block, key))
                draw_band(ax, curve, color=colour, ls=ls, label=short(name), series=name)
            readout(ax, "step", title.lower())
            ax.set_title(short(block, 24))
            _scale(ax, key)
        legend_below(figure)

    return Plan(
        f"own-{key}",
        "",
        f"{title} of each optimizer's curvature over the steps, a panel per layer.",
        f"{title} of the curvature that each optimizer used at that step, damping included, "
        "against the exact block on the probe"
        f"{'' if runs.alone else ', at its best learning rate'}. "
        + (
            "1 is the error of the zero matrix: an optimizer whose matrix is of another scale "
            "than the curvature lies above it. "
            if key == "error"
            else "It does not depend on scale: 1 is the exact matrix up to a factor. "
        )
        + _seeds(runs)
        + _left_out(runs, blocks, "error"),
        _size(len(blocks), 1),
        draw,
        reason="" if having and blocks else "No run has errors of its optimizer's curvature.",
    )


def _beside(runs: Runs, name: str, group: Group) -> Plan:
    members = group.best
    blocks = _blocks(runs, "fresh", members)
    others = list(dict.fromkeys(str(r["approximation"]) for m in members for r in m.rows("fresh")))

    def draw(figure: Any) -> None:
        panels = figure.subplots(2, len(blocks), squeeze=False, sharex=True)
        for row, key in zip(panels, ("error", "cosine"), strict=True):
            for ax, block in zip(row, blocks, strict=True):
                own = band(members, of_block("error", block, key))
                draw_band(ax, own, color=INK, label="the optimizer's own", lw=1.8)
                for other in others:
                    colour, ls = _FRESH.get(other, _OTHER)
                    curve = band(members, of_block("fresh", block, key, other))
                    draw_band(ax, curve, color=colour, ls=ls, label=f"fresh {other}")
                _scale(ax, key)
                readout(ax, "step", {"error": "relative error"}.get(key, key))
                if key == "error":
                    ax.set_title(short(block, 22))
                    ax.set_xlabel("")
        panels[0][0].set_ylabel("relative error")
        panels[1][0].set_ylabel("cosine")
        legend_below(figure)

    return Plan(
        f"beside-{_slug(name)}",
        name,
        f"Error and cosine of the curvature of {name} over the steps, beside fresh approximations.",
        f"{name}: the matrix that the optimizer used (black) beside K-FAC, diagonal Kronecker "
        "factors and Hutchinson's diagonal, computed afresh at the same parameters. Where black "
        "lies above, factors are old, averaged or damped; where all lie high, it is the price of "
        "the structure. " + _seeds(runs) + _left_out(runs, blocks, "fresh", members),
        (min(12.5, max(4.6, 2.1 * len(blocks) + 0.6)), 4.6),
        draw,
        reason="" if blocks else f"{name} has no measurements of fresh approximations.",
    )


def _sharpness(runs: Runs) -> Plan:
    keys = {
        "product": "λ_max of the Hessian · lr",
        "preconditioned_product": "λ_max of the preconditioned Hessian · lr",
    }
    having = [
        key
        for key in keys
        if any(of_block("sharpness", "", key)(m) for _, ms in runs.best() for m in ms)
    ]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(having), squeeze=False)[0]
        looks = colour_of(list(runs.groups))
        for ax, key in zip(panels, having, strict=True):
            for name, members in runs.best():
                colour, ls = looks[name]
                curve = band(members, of_block("sharpness", "", key))
                draw_band(ax, curve, color=colour, ls=ls, label=short(name), series=name)
            readout(ax, "step", "λ_max · lr")
            ax.axhline(2.0, color=INK, lw=1.0, ls=(0, (5, 1.5)))
            logarithmic(ax)
            ax.set_title(keys[key])
            ax.set_xlabel("step")
            ax.grid(True, axis="y")
        legend_below(figure)

    return Plan(
        "sharpness",
        "",
        "Largest eigenvalue times learning rate over the steps, with a line at 2.",
        "On a quadratic, descent is stable below the dashed line at 2. For an optimizer with a "
        "preconditioner P, which it multiplies the gradient by, the matrix that counts is P H"
        + (" (right; Cohen et al. 2022); the left picture is" if len(having) > 1 else "; this is")
        + " for plain gradient descent. Momentum moves the limit up. "
        + _seeds(runs),
        (3.5 * max(1, len(having)) + 0.4, 3.3),
        draw,
        reason="" if having else "No run measured the sharpness.",
    )


# -- pieces ----------------------------------------------------------------------------------------


def _blocks(
    runs: Runs, measure: str, members: Sequence[Member] | None = None, *, most: int = _PANELS
) -> list[str]:
    """Blocks with errors in a measure: the largest ones, in the order of the network."""
    members = [m for _, ms in runs.best() for m in ms] if members is None else members
    sizes = {
        str(r["block"]): float(r.get("size", 0))
        for m in members
        for r in m.rows(measure)
        if isinstance(r.get("error"), int | float) and math.isfinite(r["error"])
    }
    kept = sorted(sizes, key=lambda block: -sizes[block])[:most]
    return [block for block in runs.blocks if block in kept]


def _left_out(runs: Runs, blocks: Sequence[str], measure: str, members: Any = None) -> str:
    """Which layers have no panel: those that nothing covers, and all but the largest."""
    known = _blocks(runs, measure, members, most=len(runs.blocks))
    told = []
    if len(known) > len(blocks):
        told.append(
            f"The {len(blocks)} largest layers are shown; csv/errors.csv has all {len(known)}."
        )
    if bare := [block for block in runs.blocks if block not in known]:
        one = len(bare) == 1
        told.append(
            f"{'Layer' if one else 'Layers'} {listing(bare)} {'has' if one else 'have'} no panel: "
            "no error could be had there, as where a curvature leaves parameters out."
        )
    return " ".join(told)


def _panels(figure: Any, count: int) -> list[Any]:
    columns = min(_COLUMNS, max(1, count))
    rows = math.ceil(count / columns)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in panels[count:]:
        blank(ax)
    return panels


def _size(count: int, rows: int) -> tuple[float, float]:
    columns = min(_COLUMNS, max(1, count))
    return (max(4.6, 2.4 * columns + 0.6), 0.9 + 2.2 * rows * math.ceil(max(1, count) / columns))


def _scale(ax: Any, key: str) -> None:
    ax.set_xlabel("step")
    ax.grid(True, axis="y")
    if key == "cosine":
        ax.set_ylim(min([0.0, *heights(ax)]), 1.03)
    else:
        ax.axhline(1.0, color=INK, lw=0.6, ls=(0, (1, 2)))
        logarithmic(ax)


def _named(group: Group) -> str:
    rate = "" if math.isnan(group.best_rate) else f", lr {group.best_rate:g}"
    return f"{short(group.optimizer)}{rate}"


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")
