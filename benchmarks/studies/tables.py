"""The tables of the study's page, each a function of the JSON file's content."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from common import table

from . import plan
from .numbers import Record, Study, each, mean, records, short, spread

WHEN = {"init": "initial", "trained": "trained"}


def factors(study: Study) -> str:
    """Diagonal shares of the factors, means over the layers of a network."""
    rows = []
    for net in plan.FACTORS:
        parts = records(study, "factors", net)
        if not parts:
            continue
        for when, words in WHEN.items():
            for factor in ("A", "A centred", "G", "G observed"):
                own = [[r for r in p[when]["rows"] if r["factor"] == factor] for p in parts]
                if not own[0]:
                    continue
                sizes = [r["size"] for r in own[0]]
                rows.append(
                    [
                        net,
                        words,
                        factor,
                        f"{len(sizes)} of {min(sizes)} to {max(sizes)}",
                        spread([mean(r["share"] for r in layers) for layers in own]),
                        spread([mean(r["null"] for r in layers) for layers in own]),
                        spread([mean(r["share"] < r["null"] for r in layers) for layers in own]),
                        spread([mean(r["dominant"] for r in layers) for layers in own]),
                    ]
                )
    header = [
        "network",
        "weights",
        "factor",
        "layers and rows",
        "diagonal share",
        "null model",
        "layers below the null",
        "rows dominated",
    ]
    return table(header, rows)


METHODS = ("K-FAC", "diagonal factors", "exact diagonal")


def errors(study: Study) -> str:
    """Relative errors against exact Gauss-Newton blocks, layer by layer."""
    rows = []
    for net, options in plan.FACTORS.items():
        if "compared" not in options:
            continue
        parts = records(study, "factors", net)
        if not parts:
            continue
        for when, words in WHEN.items():
            for layer in dict.fromkeys(r["layer"] for r in parts[0][when]["errors"]):
                cells = [net, words, layer]
                cells += [spread(_errors(parts, when, layer, m, "error")) for m in METHODS]
                cells.insert(4, spread(_errors(parts, when, layer, "K-FAC", "best")))
                rows.append(cells)
    header = ["network", "weights", "layer", "K-FAC", "nearest Kronecker product"]
    return table([*header, "diagonals of its factors", "exact diagonal"], rows)


def _errors(parts: Iterable[Record], when: str, layer: str, method: str, key: str) -> list[float]:
    return [
        next(r[key] for r in p[when]["errors"] if (r["layer"], r["method"]) == (layer, method))
        for p in parts
    ]


def identity(study: Study) -> str:
    """Distance of AdaFisher's preconditioner from a multiple of the identity, first and last."""
    rows = []
    for case, options in plan.IDENTITY.items():
        parts = records(study, "identity", case)
        if not parts:
            continue
        for at in (0, -1):
            own = [p["steps"][at] for p in parts]
            rows.append(
                [
                    options["name"],
                    options["averaging"],
                    own[0]["step"],
                    spread([median_of(entry, "inverse") for entry in own]),
                    f"{short(min(least(own, 'inverse')))} to {short(max(most(own, 'inverse')))}",
                    spread(each(own, lambda e: e["distance"])),
                    spread(each(own, lambda e: e["whole"])),
                    spread([median_of(entry, "damping_share") for entry in own]),
                    spread([median_of(entry, "rate") for entry in own]),
                ]
            )
    header = [
        "network",
        "averaging",
        "step",
        "distance, median layer",
        "all layers and seeds",
        "distance, whole matrix",
        "angle in degrees",
        "damping / mean F",
        "effective rate",
    ]
    return table(header, rows)


def median_of(entry: Record, key: str) -> float:
    values = sorted(r[key] for r in entry["layers"])
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def least(entries: Iterable[Record], key: str) -> list[float]:
    return [min(r[key] for r in entry["layers"]) for entry in entries]


def most(entries: Iterable[Record], key: str) -> list[float]:
    return [max(r[key] for r in entry["layers"]) for entry in entries]


def kinds(study: Study) -> str:
    """The distance at the last measurement by type of layer (paper's averaging)."""
    rows = []
    for case, options in plan.IDENTITY.items():
        if options["averaging"] != "paper":
            continue
        parts = records(study, "identity", case)
        if not parts:
            continue
        last = [p["steps"][-1]["layers"] for p in parts]
        for kind in dict.fromkeys(r["kind"] for r in last[0]):
            own = [[r for r in layers if r["kind"] == kind] for layers in last]
            cells: list[Any] = [options["name"], kind, len(own[0])]
            for key in ("F", "inverse", "angle", "damping_share", "rate"):
                cells.append(spread([mean(r[key] for r in layers) for layers in own]))
            rows.append(cells)
    header = ["network", "layer", "how many", "distance of F", "distance of its inverse"]
    return table([*header, "angle in degrees", "damping / mean F", "effective rate"], rows)


def twins(study: Study) -> str:
    """Training with AdaFisher and with the nearest multiple of the identity per layer."""
    rows = []
    for case, options in plan.IDENTITY.items():
        parts = records(study, "identity", case)
        if not parts:
            continue
        cells = [options["name"], options["averaging"], options["steps"]]
        for key in ("train", "accuracy"):
            for who in ("AdaFisher", "twin"):
                cells.append(spread(each(parts, lambda p, w=who, k=key: p[w][k])))
        rows.append(cells)
    header = ["network", "averaging", "steps", "loss", "loss of the twin"]
    return table([*header, "test accuracy", "of the twin"], rows)


LAYERS = [f"fc{k}" for k in range(1, 9)]


def preactivation(study: Study) -> str:
    """By step, means over the layers."""
    parts = records(study, "preactivation", "autoencoder")
    rows = []
    for k, entry in enumerate(parts[0]["steps"]):
        own = [p["steps"][k]["layers"] for p in parts if len(p["steps"]) > k]
        cells: list[Any] = [entry["step"]]
        for who, key in (
            ("H_g", "rescaled"),
            ("identity", "rescaled"),
            ("K-FAC", "rescaled"),
            ("best_rank", ""),
            ("H_g", "angle"),
            ("identity", "angle"),
            ("K-FAC", "angle"),
        ):
            cells.append(
                spread([mean(r[who][key] if key else r[who] for r in rows_) for rows_ in own])
            )
        cells += [spread(scatter(own, who)) for who in ("H_g", "identity", "K-FAC")]
        rows.append(cells)
    header = ["step", "error H_g", "c I", "K-FAC", "best c I + rank 2t"]
    header += ["angle H_g", "angle I", "angle K-FAC", "scatter H_g", "scatter I", "scatter K-FAC"]
    return table(header, rows)


def scatter(own: Iterable[Any], who: str) -> list[float]:
    """By what factor the layers' step lengths scatter around those with the exact inverse: the
    exponential of the standard deviation of their logarithms, seed by seed."""
    return [math.exp(statistics.pstdev([math.log(r[who]["length"]) for r in rows])) for rows in own]


def layers(study: Study) -> str:
    """Layer by layer at the last measured step."""
    parts = records(study, "preactivation", "autoencoder")
    rows = []
    for layer in LAYERS:
        own = [next(r for r in p["steps"][-1]["layers"] if r["layer"] == layer) for p in parts]
        fired = [p["steps"][-1]["fired"][layer] for p in parts]
        rows.append(
            [
                layer,
                own[0]["size"],
                spread(each(own, lambda r: r["G_mean"])),
                spread(each(own, lambda r: r["G_max"])),
                spread(each(own, lambda r: r["above"])),
                spread(each(own, lambda r: r["H_g"]["rescaled"])),
                spread(each(own, lambda r: r["identity"]["rescaled"])),
                spread(each(own, lambda r: r["K-FAC"]["rescaled"])),
                spread(each(own, lambda r: r["H_g"]["angle"])),
                spread(each(own, lambda r: r["identity"]["angle"])),
                spread(each(fired, lambda r: r["damped_on_inverse"])),
                spread(each(fired, lambda r: r["damped_on_identity"])),
            ]
        )
    header = ["layer", "outputs", "mean eigenvalue", "largest", "share above ε", "error H_g"]
    header += ["c I", "K-FAC", "angle H_g", "angle I", "damped on H", "damped on I"]
    return table(header, rows)


def spatial(study: Study) -> str:
    """Errors of Hutchinson's diagonal on convolution weights, means over layers."""
    rows = []
    for net in plan.SPATIAL:
        parts = records(study, "spatial", net)
        if not parts:
            continue
        for when, words in WHEN.items():
            own = [list(p[when]["layers"].values()) for p in parts]
            for k, count in enumerate(parts[0]["probes"]):
                if count not in (1, 4, 32):  # the figure has them all
                    continue
                rows.append(
                    [
                        net,
                        words,
                        count,
                        spread([mean(r["plain"][k] for r in rows_) for rows_ in own]),
                        spread([mean(r["averaged"][k] for r in rows_) for rows_ in own]),
                        spread([mean(r["bias"] for r in rows_) for rows_ in own]),
                    ]
                )
    header = ["network", "weights", "probes", "error", "error averaged", "of the average itself"]
    return table(header, rows)


def rms(study: Study) -> str:
    """What AdaHessian divides by, against the magnitude of the exact diagonal."""
    rows = []
    for net in plan.SPATIAL:
        parts = records(study, "spatial", net)
        if not parts:
            continue
        for when, words in WHEN.items():
            own = [list(p[when]["layers"].values()) for p in parts]
            cells = [net, words]
            for what in ("energy", "rank"):
                for kind in ("plain", "averaged", "release"):
                    key = f"rms_{what}_{kind}"
                    cells.append(spread([mean(r[key] for r in rows_) for rows_ in own]))
            rows.append(cells)
    header = ["network", "weights", "size, none", "size, paper", "size, release"]
    return table([*header, "rank, none", "rank, paper", "rank, release"], rows)


def averaged(study: Study) -> str:
    """Training by AdaHessian with each kind of averaging."""
    rows = []
    for case, options in plan.AVERAGED.items():
        parts = records(study, "averaged", case)
        if not parts:
            continue
        rows.append(
            [
                options["averaging"],
                f"{options['lr']:g}",
                spread(each(parts, lambda p: p["train"])),
                spread(each(parts, lambda p: p["accuracy"])),
                spread(each(parts, lambda p: p["worst"])),
            ]
        )
    header = ["averaging", "learning rate", "training loss", "test accuracy", "largest loss"]
    return table(header, rows)


TABLES = {
    "factors": (factors, errors),
    "preactivation": (preactivation, layers),
    "spatial": (spatial, rms),
    "averaged": (averaged,),
    "identity": (identity, kinds, twins),
}
