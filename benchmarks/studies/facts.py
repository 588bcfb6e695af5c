"""Numbers for the sentences of the page, as functions that the template calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from . import identity as adafisher
from . import tables
from .numbers import Study, each, mean, records, short, spread
from .tables import median_of

DECAY = 0.8  # AdaFisher's default


def facts(study: Study) -> dict[str, Callable[..., str]]:
    """The functions by name, each bound to the study."""
    functions = (
        *(factor, factor_layer, layers_above, layers_below, lost, error),
        *(kind, distance, farthest, angle, outcome, twin_losses, bound, bound_angle),
        *(inverse, scatter, worse, fired, gap),
        *(stuck, crossover, ratio, gains, estimate, bias, size, rank, spatial_gap, training),
        *(minutes, machine),
    )
    return {f.__name__: functools.partial(f, study) for f in functions}


# -- factors -----------------------------------------------------------------------------------


def _factor_rows(study: Study, net: str, when: str, which: str) -> list[list[Any]]:
    parts = records(study, "factors", net)
    return [[r for r in p[when]["rows"] if r["factor"] == which] for p in parts]


def factor(study: Study, net: str, when: str, which: str, key: str) -> str:
    """Mean over layers."""
    return spread([mean(r[key] for r in rows) for rows in _factor_rows(study, net, when, which)])


def factor_layer(study: Study, net: str, when: str, layer: str, which: str, key: str) -> str:
    rows = _factor_rows(study, net, when, which)
    return spread([next(r[key] for r in own if r["layer"] == layer) for own in rows])


def layers_above(study: Study, net: str, when: str, which: str, times: float = 1.0) -> str:
    """``n of m``: layers (of all seeds) whose share is above so many times the null model's."""
    rows = [r for own in _factor_rows(study, net, when, which) for r in own]
    return f"{sum(r['share'] > times * r['null'] for r in rows)} of {len(rows)}"


def layers_below(study: Study, net: str, when: str, which: str) -> str:
    rows = [r for own in _factor_rows(study, net, when, which) for r in own]
    return f"{sum(r['share'] < r['null'] for r in rows)} of {len(rows)}"


def lost(study: Study, net: str, when: str) -> str:
    """Range over layers and seeds of the error of leaving out all off-diagonal entries."""
    values = [r["lost"] for own in _factor_rows(study, net, when, "A") for r in own]
    return f"{short(min(values))} to {short(max(values))}"


def error(study: Study, net: str, when: str, method: str, key: str = "error") -> str:
    """Mean over layers of an error against the exact Gauss-Newton blocks."""
    parts = records(study, "factors", net)
    return spread([mean(r[key] for r in p[when]["errors"] if r["method"] == method) for p in parts])


# -- AdaFisher ---------------------------------------------------------------------------------


def distance(study: Study, case: str, at: int) -> str:
    """Median over layers of the preconditioner's distance from a multiple of the identity."""
    parts = records(study, "identity", case)
    return spread([median_of(p["steps"][at], "inverse") for p in parts])


def kind(study: Study, case: str, layer: str, key: str) -> str:
    """Mean over the layers of one type at the last measurement."""
    last = [p["steps"][-1]["layers"] for p in records(study, "identity", case)]
    return spread([mean(r[key] for r in rows if r["kind"] == layer) for rows in last])


def farthest(study: Study, case: str, at: int, key: str = "inverse") -> str:
    """The largest number of any layer and seed."""
    parts = records(study, "identity", case)
    return short(max(r[key] for p in parts for r in p["steps"][at]["layers"]))


def angle(study: Study, case: str, at: int) -> str:
    return spread(each(records(study, "identity", case), lambda p: p["steps"][at]["whole"]))


def outcome(study: Study, case: str, who: str, key: str) -> str:
    return spread(each(records(study, "identity", case), lambda p: p[who][key]))


def twin_losses(study: Study, case: str, key: str = "train") -> str:
    """AdaFisher's number minus that of its twin, seed by seed."""
    parts = records(study, "identity", case)
    return spread([p["AdaFisher"][key] - p["twin"][key] for p in parts])


def stuck(study: Study, case: str, who: str) -> str:
    """How many seeds ended no better than guessing (loss log 10)."""
    parts = records(study, "identity", case)
    return f"{sum(p[who]['train'] > 2.2 for p in parts)} of {len(parts)}"


def _largest() -> float:
    """The largest entry of ``S (x) H`` that the released averages can settle at."""
    return (0.01 * DECAY / (1 - 0.1 * DECAY)) ** 2


def bound(study: Study) -> str:
    """In the limit, the most by which released ``F`` can exceed the damping, in percent."""
    return f"{100 * _largest() / adafisher.DAMPING:.1f}"


def bound_angle(study: Study) -> str:
    """The largest angle in degrees between ``F^-1 m`` and ``m`` for such an ``F``."""
    condition = 1 + _largest() / adafisher.DAMPING
    return f"{math.degrees(math.asin((condition - 1) / (condition + 1))):.1f}"


# -- K-BFGS ------------------------------------------------------------------------------------


def inverse(study: Study, at: int, who: str, key: str = "") -> str:
    """Mean over layers at the measurement number ``at``."""
    parts = records(study, "preactivation", "autoencoder")
    own = [p["steps"][at]["layers"] for p in parts]
    return spread([mean(r[who][key] if key else r[who] for r in rows) for rows in own])


def scatter(study: Study, at: int, who: str) -> str:
    parts = records(study, "preactivation", "autoencoder")
    return spread(tables.scatter([p["steps"][at]["layers"] for p in parts], who))


def worse(study: Study) -> str:
    """How often (layers of all seeds and steps) ``H_g`` is farther than ``c I``."""
    parts = records(study, "preactivation", "autoencoder")
    rows = [r for p in parts for entry in p["steps"] for r in entry["layers"]]
    count = sum(r["H_g"]["rescaled"] > r["identity"]["rescaled"] for r in rows)
    return f"{count} of {len(rows)}"


def fired(study: Study, at: int, which: str) -> str:
    """Share of steps and layers in which a damping fired, in percent."""
    parts = records(study, "preactivation", "autoencoder")
    found = [mean(r[which] for r in p["steps"][at]["fired"].values()) for p in parts]
    return f"{100 * mean(found):.0f}"


def gap(study: Study) -> str:
    """The largest gap between the two ways to the exact matrix."""
    return f"{max(p['gap'] for p in records(study, 'preactivation', 'autoencoder')):.0e}"


# -- AdaHessian --------------------------------------------------------------------------------


def _layers(study: Study, net: str, when: str) -> list[list[Any]]:
    return [list(p[when]["layers"].values()) for p in records(study, "spatial", net)]


def estimate(study: Study, net: str, when: str, key: str, at: int) -> str:
    """Mean over layers of the error of the mean of ``2^at`` probes."""
    return spread([mean(r[key][at] for r in rows) for rows in _layers(study, net, when)])


def bias(study: Study, net: str, when: str, key: str = "bias") -> str:
    return spread([mean(r[key] for r in rows) for rows in _layers(study, net, when)])


def size(study: Study, net: str, when: str, kind: str) -> str:
    return bias(study, net, when, f"rms_energy_{kind}")


def rank(study: Study, net: str, when: str, kind: str) -> str:
    return bias(study, net, when, f"rms_rank_{kind}")


def ratio(study: Study, net: str, when: str, key: str = "averaged", at: int = 0) -> str:
    """By what factor averaging lowers the error of ``2^at`` probes; mean over layers."""
    found = [mean(r["plain"][at] / r[key][at] for r in rows) for rows in _layers(study, net, when)]
    return spread(found)


def gains(study: Study, net: str, when: str) -> str:
    """The same for the root mean square that AdaHessian divides by."""
    layers = _layers(study, net, when)
    return spread(
        [mean(r["rms_energy_plain"] / r["rms_energy_averaged"] for r in x) for x in layers]
    )


def crossover(study: Study, net: str, when: str) -> str:
    """Probes from which the plain mean is nearer than the exact average: (error of one / bias)^2,
    as the error falls with the root of their number; one digit, the least of layers and seeds."""
    rows = [r for own in _layers(study, net, when) for r in own]
    least = min((r["plain"][0] / r["bias"]) ** 2 for r in rows)
    return f"{float(f'{least:.1g}'):,.0f}"


def spatial_gap(study: Study) -> str:
    """The largest gap between the two computations of the spatial average."""
    parts = study["spatial"]["parts"].values()
    largest = max(p[when]["gap"] for p in parts for when in ("init", "trained"))
    return f"{largest:.0e}" if largest else "nothing"


def training(study: Study, case: str, key: str = "train") -> str:
    return spread(each(records(study, "averaged", case), lambda p: p[key]))


# -- all ---------------------------------------------------------------------------------------


def minutes(study: Study, question: str) -> str:
    return f"{study[question]['minutes']:.0f}"


def machine(study: Study) -> str:
    return "; ".join(dict.fromkeys(m for q in study.values() for m in q["machine"]))
