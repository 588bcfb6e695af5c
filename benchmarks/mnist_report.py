"""The table, the numbers and the picture of ``kbfgs_mnist.py``."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from common import RESULTS, table

# training loss after epochs, from the notebook of Goldfarb, Ren and Bahamou (2020)
PUBLISHED = {
    "K-BFGS": {1: 169.0, 2: 109.6, 3: 85.2, 5: 68.0, 10: 59.8},
    "K-FAC": {1: 183.2, 2: 135.1, 3: 99.7, 5: 74.0, 10: 61.6},
}
ALLOWED = {"K-BFGS": 0.04, "K-FAC": 0.06}
FIRST = 3  # survivors of a method that are shown beside the others
EPOCHS = (1, 2, 3, 5, 10)
Run = dict[str, Any]


def read() -> dict[str, list[Run]]:
    """The runs of the last results, as :func:`write` takes them; empty where there are none."""
    path = RESULTS / "kbfgs_mnist.json"
    runs: dict[str, list[Run]] = {}
    for run in json.loads(path.read_text())["runs"] if path.exists() else []:
        runs.setdefault(run["method"], []).append(run)
        for seen in run["before"]:  # JSON knows no NaN, and no infinity, to which norms overflow
            lost = {"update_norm": math.inf}
            seen.update({k: lost.get(k, math.nan) for k, v in seen.items() if v is None})
    return runs


def write(runs: dict[str, list[Run]], machine: str) -> None:
    """Write ``results/kbfgs_mnist.md``, ``.json`` and ``.svg``."""
    RESULTS.mkdir(exist_ok=True)
    parts = [
        "# The MNIST autoencoder of K-BFGS's paper",
        f"Machine: {machine}. 784-1000-500-250-30-250-500-1000-784, batches of 1000, float32; "
        "training loss of all 60,000 images, weight decay included. Seconds are those of steps 21 "
        "to 40, taken by all methods in turns (M-FAC's grow until its memory is full); [another "
        "benchmark](optimizers.md) has ratios and memory.",
        _losses(runs),
        "![curves](kbfgs_mnist.svg)",
        _goals(runs),
        "## All seeds",
        _seeds(runs.get("K-BFGS", [])),
        "## Seeds that diverge",
        _divergences(runs),
        _before(runs.get("K-BFGS", [])),
        "## A safeguard",
        _safeguard(runs),
    ]
    path = RESULTS / "kbfgs_mnist.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    data = {"machine": machine, "runs": [_plain(r) for each in runs.values() for r in each]}
    path.with_suffix(".json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    _figure(runs, path.with_suffix(".svg"))
    print(path.read_text())


def _plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def _survivors(runs: list[Run]) -> list[Run]:
    return [run for run in runs if run["diverged"] is None]


def _shown(runs: dict[str, list[Run]], name: str) -> list[Run]:
    """The first survivors; of a variant those with the seeds of the method itself."""
    survived = _survivors(runs[name])
    base = runs.get(name.partition(",")[0])
    if base is None or base is runs[name]:
        return survived[:FIRST]
    seeds = [run["seed"] for run in _survivors(base)[:FIRST]]
    return [run for run in survived if run["seed"] in seeds]


def _losses(runs: dict[str, list[Run]]) -> str:
    rows = []
    for name in runs:
        if name in PUBLISHED:
            losses = [f"{PUBLISHED[name][e]:.1f}" for e in EPOCHS]
            rows.append([name, "published", *losses, "", ""])
        for run in _shown(runs, name):
            if len(run["losses"]) <= max(EPOCHS):
                continue
            losses = [f"{run['losses'][e]:.1f}" for e in EPOCHS]
            step = f"{run['step_seconds']:.3f}"
            rows.append([name, str(run["seed"]), *losses, step, run["settings"]])
    header = ["method", "seed", *(f"epoch {e}" for e in EPOCHS), "s per step", "setting"]
    return table(header, rows)


def _gap(loss: float, epoch: int, name: str) -> float:
    """How far a loss lies from the published one, relative to it."""
    return loss / PUBLISHED[name][epoch] - 1


def _goals(runs: dict[str, list[Run]]) -> str:
    lines = []
    for name, allowed in ALLOWED.items():
        ours = [run["losses"] for run in _survivors(runs.get(name, []))]
        for which, group in _groups(name, ours).items():
            columns = {e: [losses[e] for losses in group if e < len(losses)] for e in EPOCHS}
            columns = {e: column for e, column in columns.items() if column}
            if not columns:
                continue
            mean = max((_gap(statistics.fmean(c), e, name) for e, c in columns.items()), key=abs)
            gaps = [_gap(loss, e, name) for e, column in columns.items() for loss in column]
            within, worst = sum(abs(g) <= allowed for g in gaps), max(gaps, key=abs)
            verdict = "all" if within == len(gaps) else f"{within} of {len(gaps)}"
            lines.append(
                f"- {name}, {which}: {verdict} losses are within {allowed:.0%} of the published "
                f"row, the farthest {worst:+.1%}"
                + (f"; their means are at most {mean:+.1%} from it." if len(group) > 1 else ".")
            )
    return "\n".join(lines)


def _groups(name: str, ours: list[list[float]]) -> dict[str, list[list[float]]]:
    """Which runs are judged together: losses by epoch."""
    if len(ours) <= FIRST:
        return {"the published run's seed" if len(ours) == 1 else "all survivors": ours}
    groups = {
        "the published run's seed": ours[:1],
        f"the first {FIRST} survivors": ours[:FIRST],
        "all survivors": ours,
    }
    if name == "K-BFGS" and (theirs := [x for x in _release()["losses"].values() if len(x) > 1]):
        groups[f"the authors' code, its first {FIRST} survivors"] = theirs[:FIRST]
        groups["the authors' code, all survivors"] = theirs
    return groups


def _release() -> dict[str, dict[str, list[float]]]:
    """What ``kbfgs_release.py`` found, by seed: losses by epoch, and differences in float64."""
    path = RESULTS / "kbfgs_release.json"
    return json.loads(path.read_text()) if path.exists() else {"losses": {}, "float64": {}}


def _seeds(runs: list[Run]) -> str:
    """The losses of K-BFGS over all seeds, and how they spread; those of the authors' code."""
    survived = _survivors(runs)
    if len(survived) < 2:
        return ""
    release = _release()
    columns = {"curvscope": [run["losses"] for run in survived]}
    columns["authors' code"] = [x for x in release["losses"].values() if len(x) > 1]
    rows = []
    for run in runs:
        if run["diverged"] is None:
            rows.append(_row(str(run["seed"]), "curvscope", run["losses"]))
        else:
            step = f"diverged at step {run['diverged']['step']}"
            rows.append([str(run["seed"]), "curvscope", step, *([""] * (len(EPOCHS) - 1))])
        theirs = release["losses"].get(str(run["seed"]), [])
        if len(theirs) > 1:
            rows.append(_row("", "authors' code", theirs))
        elif theirs:
            rows.append(["", "authors' code", "diverged", *([""] * (len(EPOCHS) - 1))])
    for what, number in (("mean", _mean), ("standard deviation", _deviation)):
        for code, found in columns.items():
            if len(found) > 1:
                rows.append(
                    [what, code, *(number([x[e] for x in found if e < len(x)]) for e in EPOCHS)]
                )
    rows.append(["published", "", *(f"{PUBLISHED['K-BFGS'][e]:.1f}" for e in EPOCHS)])
    return "\n\n".join(
        part
        for part in (
            f"K-BFGS at the published setting: {len(survived)} of {len(runs)} seeds survive; the "
            "mean is theirs, with its standard error. The published row is a single run, with seed "
            "9999." + _beside(release["losses"]),
            table(["seed", "code", *(f"epoch {e}" for e in EPOCHS)], rows),
            _double(release["float64"]),
        )
        if part
    )


def _row(seed: str, code: str, losses: list[float]) -> list[str]:
    return [seed, code, *(f"{losses[e]:.1f}" if e < len(losses) else "" for e in EPOCHS)]


def _mean(values: list[float]) -> str:
    if len(values) < 2:
        return ""
    return f"{statistics.fmean(values):.1f} ± {_spread(values) / math.sqrt(len(values)):.1f}"


def _deviation(values: list[float]) -> str:
    return f"{_spread(values):.1f}" if len(values) > 1 else ""


def _spread(values: list[float]) -> float:
    return statistics.stdev(values)


def _beside(losses: dict[str, list[float]]) -> str:
    if not losses:
        return ""
    survived = sum(len(x) > 1 for x in losses.values())
    return (
        f" Of the authors' code, with the same weights, orders and batches on the same machine "
        f"(`benchmarks/kbfgs_release.py`), {survived} of {len(losses)} survive."
    )


def _double(gaps: dict[str, list[float]]) -> str:
    """How far both codes are from each other where rounding has no say."""
    if not gaps:
        return ""
    early, late = (max(max(each[:k]) for each in gaps.values()) for k in (30, None))
    steps, seeds = len(next(iter(gaps.values()))), " and ".join(gaps)
    return (
        f"In float64 both are the same: with seeds {seeds} their minibatch losses differ by at "
        f"most {early:.0e} of the loss in 30 steps and {late:.0e} in {steps}. The difference grows "
        "as in chaotic systems, so that in float32 rounding has a say in which seeds diverge."
    )


def _divergences(runs: dict[str, list[Run]]) -> str:
    lines = []
    for name, each in runs.items():
        lost = [run for run in each if run["diverged"] is not None]
        if lost:
            where = ", ".join(f"seed {r['seed']} at step {r['diverged']['step']}" for r in lost)
            lines.append(f"- {name}: {len(lost)} of {len(each)} seeds: {where}.")
        else:
            lines.append(f"- {name}: none of {len(each)}.")
    return "\n".join(lines)


def _before(runs: list[Run]) -> str:
    """What the diagnostics showed before the divergences."""
    rows = []
    for run in runs:
        for seen in run["before"]:
            rows.append(
                [
                    str(run["seed"]),
                    str(seen["step"]),
                    f"{seen['loss']:.4g}",
                    f"{seen['update_norm']:.3g}",
                    seen["layer"],
                    f"{seen['angle']:.0f}",
                    f"{seen['sy_ss_before']:.2g}",
                    f"{seen['damped_on_inverse']:.0%}",
                    f"{seen['damped_on_identity']:.0%}",
                ]
            )
    if not rows:
        return ""
    header = [
        "seed",
        "step",
        "loss",
        "update norm",
        "largest in",
        "largest angle",
        "least s'y/s's",
        "damped on H",
        "damped on I",
    ]
    return (
        "The last steps before, as `optimizer.diagnostics()` shows them: the norm of the update "
        "`H_g M H_a` over all layers, the layer with most of it, the largest angle between update "
        "and gradient in degrees, the least curvature of a pair before damping, and in how many "
        "of the steps and layers so far each damping fired.\n\n" + table(header, rows)
    )


def _safeguard(runs: dict[str, list[Run]]) -> str:
    name = next((n for n in runs if "max_update_norm" in n), None)
    if name is None:
        return ""
    bare = {r["seed"]: r for r in _survivors(runs.get("K-BFGS", []))}
    rows = []
    for run in _survivors(runs[name]):
        row = [str(run["seed"])]
        for epoch in (e for e in EPOCHS if e < len(run["losses"])):
            price = "diverged"
            if run["seed"] in bare:
                price = f"{run['losses'][epoch] / bare[run['seed']]['losses'][epoch] - 1:+.1%}"
            row.append(f"{run['losses'][epoch]:.1f} ({price})")
        rows.append(row)
    lost = len(runs[name]) - len(rows)
    text = (
        f"{name}: the update of all layers together is never longer. {lost} of {len(runs[name])} "
        "seeds diverged. The loss and, in brackets, its price against the same seed without:"
    )
    return text + "\n\n" + table(["seed", *(f"epoch {e}" for e in EPOCHS)], rows)


def _figure(runs: dict[str, list[Run]], path: Path) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for k, name in enumerate(runs):
        for first, run in enumerate(_shown(runs, name)):
            epochs = range(1, len(run["losses"]))
            options = {"color": f"C{k}", "lw": 1.2, "label": None if first else name}
            options["ls"] = "--" if name == "AdaFisherW" else "-"  # lies upon AdaFisher
            left.plot(epochs, run["losses"][1:], **options)
            right.plot(run["seconds"][1:], run["losses"][1:], **options)
    for name, row in PUBLISHED.items():
        left.plot(list(row), list(row.values()), "kx" if name == "K-BFGS" else "k+", ms=6)
    left.plot([], [], "kx", label="K-BFGS, published")
    left.plot([], [], "k+", label="K-FAC, published")
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="seconds of training")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("{x:.0f}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None})
