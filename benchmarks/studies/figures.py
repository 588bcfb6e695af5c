"""The figures of the study, drawn from the JSON file alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curvscope.plotting import style

from . import plan
from .numbers import Study, mean, records, stderr
from .tables import LAYERS

MARKS = {"A": "o", "G": "^"}
WHEN = {"init": style.PALETTE[0], "trained": style.PALETTE[1]}


def _panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    figure = style.new_figure(width, height)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def factors(study: Study) -> Any:
    """Diagonal share of every factor against that of the null model."""
    figure, axes = _panels(len(plan.FACTORS), 8.4, 3.1)
    for ax, net in zip(axes, plan.FACTORS):
        for part in records(study, "factors", net)[:1]:
            for when, colour in WHEN.items():
                for factor, mark in MARKS.items():
                    rows = [r for r in part[when]["rows"] if r["factor"] == factor]
                    words = "initial" if when == "init" else "trained"
                    ax.plot(
                        [r["null"] for r in rows],
                        [r["share"] for r in rows],
                        mark,
                        color=colour,
                        markersize=4,
                        markerfacecolor=colour if factor == "A" else "none",
                        label=f"{factor}, {words}",
                    )
        ax.plot([1e-3, 1], [1e-3, 1], color=style.INK, linewidth=0.8, zorder=0)
        ax.set(xscale="log", yscale="log", xlim=(2e-3, 1.2), ylim=(2e-3, 1.2), title=net)
        ax.set_xlabel("expected under the null model")
    axes[0].set_ylabel("share of energy on the diagonal")
    axes[-1].legend(loc="lower right")
    return figure


def preactivation(study: Study) -> Any:
    """Errors of the inverse over the steps: means over layers, and layer by layer."""
    parts = records(study, "preactivation", "autoencoder")
    figure, axes = _panels(3, 8.4, 3.1)
    steps = [entry["step"] for entry in parts[0]["steps"]]

    def line(ax: Any, value: Callable[[Any], float], **look: Any) -> None:
        found = [
            [mean(value(r) for r in p["steps"][k]["layers"]) for p in parts]
            for k in range(len(steps))
        ]
        bars = [stderr(v) if len(v) > 1 else 0.0 for v in found]
        ax.errorbar(steps, [mean(v) for v in found], yerr=bars, elinewidth=0.8, **look)

    looks = (("H_g", "H_g"), ("identity", "I"), ("K-FAC", "K-FAC, sampled labels"))
    for k, (who, label) in enumerate(looks):
        look = {"color": style.PALETTE[k], "marker": "o", "label": label}
        line(axes[0], lambda r, w=who: r[w]["rescaled"], **look)
        line(axes[1], lambda r, w=who: r[w]["angle"], **look)
    look = {"color": style.MUTED, "linestyle": "--", "label": "nearest c I + rank 2t"}
    line(axes[0], lambda r: r["best_rank"], **look)
    axes[0].set(title="error after rescaling", ylim=(0, None))
    axes[1].set(title="angle of the step (degrees)", ylim=(0, None))
    for k, layer in enumerate(LAYERS):
        values = [
            mean(
                r["H_g"]["rescaled"]
                for p in parts
                for r in p["steps"][j]["layers"]
                if r["layer"] == layer
            )
            for j in range(len(steps))
        ]
        dash = style.DASHES[k % len(style.DASHES)]
        axes[2].plot(steps, values, color=style.PALETTE[k], linestyle=dash, label=layer)
    axes[2].set(title="H_g layer by layer", ylim=(0, None))
    for ax in axes:
        ax.set(xscale="log", xlabel="step t")
    axes[0].legend(loc="upper left")
    axes[2].legend(ncols=2)
    return figure


def spatial(study: Study) -> Any:
    """Error of Hutchinson's diagonal against probes."""
    figure, axes = _panels(2 * len(plan.SPATIAL), 8.4, 2.9)
    cells = [(net, when) for net in plan.SPATIAL for when in WHEN]
    for ax, (net, when) in zip(axes, cells):
        parts = records(study, "spatial", net)
        if not parts:
            continue
        counts = parts[0]["probes"]
        for k, (key, label) in enumerate((("plain", "every weight"), ("averaged", "averaged"))):
            found = [
                [mean(r[key][j] for r in p[when]["layers"].values()) for p in parts]
                for j in range(len(counts))
            ]
            bars = [stderr(v) if len(v) > 1 else 0.0 for v in found]
            centre = [mean(v) for v in found]
            ax.errorbar(counts, centre, yerr=bars, marker="o", color=style.PALETTE[k], label=label)
        bias = mean(r["bias"] for p in parts for r in p[when]["layers"].values())
        ax.axhline(bias, color=style.PALETTE[1], linestyle="--", linewidth=0.9, label="its limit")
        ax.axhline(1, color=style.GRID, linewidth=0.8, zorder=0)
        words = "initial" if when == "init" else "trained"
        ax.set(xscale="log", yscale="log", xlabel="probes", title=f"{net}\n{words}")
        ax.set_xticks([1, 4, 16], ["1", "4", "16"])
        ax.minorticks_off()
    axes[0].set_ylabel("relative error of the diagonal")
    axes[-1].legend(loc="upper right")
    axes[-1].set_ylim(top=1e3)
    return figure


def averaged(study: Study) -> Any:
    """Training curves of AdaHessian: means over seeds."""
    rates = sorted({options["lr"] for options in plan.AVERAGED.values()})
    figure, axes = _panels(len(rates), 8.4, 2.8)
    for ax, lr in zip(axes, rates):
        names = [case for case, options in plan.AVERAGED.items() if options["lr"] == lr]
        for k, case in enumerate(names):
            parts = records(study, "averaged", case)
            if parts:
                _curves(ax, parts, lambda p: p, style.PALETTE[k], plan.AVERAGED[case]["averaging"])
        ax.set(title=f"learning rate {lr:g}", xlabel="step", yscale="log")
    axes[0].set_ylabel("training loss")
    axes[-1].legend()
    return figure


def _curves(
    ax: Any, parts: Any, pick: Callable[[Any], Any], colour: str, label: str, **look: Any
) -> None:
    window = pick(parts[0])["window"]
    curves = [pick(p)["curve"] for p in parts]
    length = min(len(c) for c in curves)
    steps = [window * (k + 1) for k in range(length)]
    columns = [[c[k] for c in curves] for k in range(length)]
    if any(v is None for column in columns for v in column):
        return
    centre = [mean(v) for v in columns]
    ax.plot(steps, centre, color=colour, label=label, **look)
    if len(parts) > 1:
        bars = [stderr(v) for v in columns]
        low = [c - b for c, b in zip(centre, bars)]
        high = [c + b for c, b in zip(centre, bars)]
        ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def identity(study: Study) -> Any:
    """Distance of AdaFisher's preconditioner from a multiple of the identity; training."""
    nets = list(dict.fromkeys(options["name"] for options in plan.IDENTITY.values()))
    figure = style.new_figure(8.4, 5.2)
    axes = figure.subplots(2, len(nets), squeeze=False)
    for column, net in enumerate(nets):
        top, bottom = axes[0][column], axes[1][column]
        for k, averaging in enumerate(("paper", "release")):
            parts = records(study, "identity", f"{net}/{averaging}")
            if not parts:
                continue
            steps = [entry["step"] for entry in parts[0]["steps"]]
            names = [r["layer"] for r in parts[0]["steps"][0]["layers"]]
            for layer in names:
                values = [
                    mean(
                        r["inverse"]
                        for p in parts
                        for r in p["steps"][j]["layers"]
                        if r["layer"] == layer
                    )
                    for j in range(len(steps))
                ]
                values = [v if v > 0 else math.nan for v in values]
                label = averaging if layer == names[0] else None
                mark = {"marker": "o", "markersize": 2.5, "linewidth": 0.9}
                top.plot(steps, values, color=style.PALETTE[k], label=label, **mark)
            for who, dash in (("AdaFisher", "-"), ("twin", "--")):
                label = f"{averaging}{' as c I' if who == 'twin' else ''}"
                colour = style.PALETTE[k]
                _curves(bottom, parts, lambda p, w=who: p[w], colour, label, linestyle=dash)
        top.set(title=net, yscale="log", ylim=(2e-4, 1.2))
        bottom.set(xlabel="step", yscale="log")
    axes[0][0].set_ylabel("distance from c I")
    axes[1][0].set_ylabel("training loss")
    axes[0][-1].legend()
    axes[1][0].legend()
    return figure


FIGURES = {
    "factors": factors,
    "preactivation": preactivation,
    "spatial": spatial,
    "averaged": averaged,
    "identity": identity,
}


def draw(study: Study, folder: Path) -> list[Path]:
    """Every figure whose question has numbers, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in FIGURES.items():
        if study.get(name, {}).get("parts"):
            with style.style():
                figure = make(study)
                path = folder / f"{name}.svg"
                figure.savefig(path, metadata={"Date": None})
                lines = path.read_text().splitlines()
                path.write_text("\n".join(line.rstrip() for line in lines) + "\n")
                paths.append(path)
    return paths
