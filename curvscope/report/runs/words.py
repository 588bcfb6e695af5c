"""What a report of runs says in words: its summary, its warnings, its facts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from ...analysis.result import listing
from ..numbers import percent, seconds, shown, with_error
from .gather import Group, Member, Runs

_LATE = 0.05  # share of a run that counts as its end


def summary(runs: Runs) -> list[str]:
    """The story of the page in a few sentences."""
    texts = [_what(runs), _best(runs), _accuracy(runs)]
    texts += [_curvature(name, group) for name, group in runs.groups.items()]
    texts += [_sharp(runs), _overhead(runs)]
    return [text for text in texts if text]


def warnings(runs: Runs) -> list[str]:
    """What a reader must know before believing a comparison."""
    texts = list(runs.notes)
    for state, word in (
        ("diverged", "diverged"),
        ("failed", "failed"),
        ("stopped", "was stopped by an alarm"),
    ):
        for member in runs.members:
            if member.state == state:
                texts.append(f"{member.name} {word}. {member.reason}".strip())
    open_ = [m.name for m in runs.members if m.state.startswith(("unfinished", "ended"))]
    if open_:
        texts.append(f"Not finished: {'; '.join(open_[:6])}{'; ...' if len(open_) > 6 else ''}.")
    for group in runs.groups.values():
        if group.at_edge:
            texts.append(
                f"The best learning rate of {group.optimizer}, {group.best_rate:g}, is at the edge "
                "of its grid: a better one may lie beyond."
            )
    single = [g.optimizer for g in runs.groups.values() if len(g.rates) == 1]
    if single and len(runs.groups) > 1:
        texts.append(
            f"One learning rate only: {listing(single)}. A comparison of optimizers whose rates "
            "were not searched says little about the optimizers."
        )
    if len(runs.groups) > 1 and max(len(ms) for _, ms in runs.best()) == 1:
        texts.append("One seed only: differences may be those of chance.")
    thinned = sorted({n for m in runs.members for n in _thinned(m)})
    if thinned:
        texts.append(
            f"The budget left out measurements of {listing(thinned)}; see the monitor's table."
        )
    return list(dict.fromkeys(texts))


def _thinned(member: Member) -> Iterable[str]:
    return (str(r["of"]) for r in member.rows("monitor") if float(r.get("thinned", 0) or 0) > 0)


def facts(runs: Runs) -> list[tuple[str, str]]:
    """Pairs of words and numbers."""
    plan = runs.plan
    parameters = next((m.run.fingerprint.get("parameters") for m in runs.members), None) or []
    pairs = [
        ("problem", runs.problem),
        ("parameters", f"{sum(map(_count, parameters)):,} in {len(runs.blocks)} layers"),
        ("loss", ", ".join({str(m.run.fingerprint.get("loss", "?")) for m in runs.members})),
        ("trainings", str(len(runs.members))),
    ]
    if plan:
        pairs += [
            ("epochs", str(plan["epochs"])),
            (
                "batch size",
                "all samples" if plan["batch_size"] is None else str(plan["batch_size"]),
            ),
            ("learning rates", f"{plan['schedule']} over the training"),
            ("seeds", ", ".join(str(s) for s in sorted({m.seed for m in runs.members}))),
        ]
    return pairs


def _count(parameter: str) -> int:
    shape = str(parameter).rpartition("[")[2].rstrip("]")
    return math.prod(int(n) for n in shape.split(",") if n.strip())


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``"0.31 ± 0.02"``: mean and standard deviation over seeds; the mean alone of one."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return "–"
    if len(known) < 2:
        return shown(known[0], digits)
    return with_error(statistics.fmean(known), statistics.stdev(known), digits)


def last(member: Member, key: str) -> float:
    """The last value of a column of the progress; NaN without one."""
    frame = member.progress
    return float(frame[key].iloc[-1]) if key in frame.columns and len(frame) else math.nan


def late(member: Member, measure: str, key: str, approximation: str | None = None) -> list[float]:
    """Values of one number over the blocks, at the last step with a record."""
    rows = [
        row
        for row in member.rows(measure)
        if approximation in (None, row.get("approximation")) and key in row
    ]
    end = max((row["step"] for row in rows), default=0)
    values = [row[key] for row in rows if row["step"] == end]
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]


def median(members: Iterable[Member], measure: str, key: str, name: str | None = None) -> float:
    """Median over blocks, then over seeds, at the end of the runs; NaN without records."""
    found = [late(m, measure, key, name) for m in members]
    each = [statistics.median(values) for values in found if values]
    return statistics.median(each) if each else math.nan


def _what(runs: Runs) -> str:
    names = list(runs.groups)
    seeds = len({m.seed for m in runs.members})
    plan = runs.plan
    how = f" for {plan['epochs']} epochs of batches of {plan['batch_size']}" if plan else ""
    if plan and plan["batch_size"] is None:
        how = f" for {plan['epochs']} epochs"
    if runs.alone:
        return f"{runs.problem} was trained by {names[0]}{how}, once."
    return (
        f"{runs.problem} was trained by {listing(names)}{how}: {len(runs.members)} "
        f"{'training' if len(runs.members) == 1 else 'trainings'} with {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}. Of every optimizer the learning rate with the "
        "lowest training loss at the end, in the mean over seeds, is shown."
    )


def _best(runs: Runs) -> str:
    ranked = sorted(runs.groups.values(), key=lambda g: g.score(g.best_rate))
    parts = []
    for group in ranked:
        score = group.score(group.best_rate)
        rate = "" if math.isnan(group.best_rate) else f" at learning rate {group.best_rate:g}"
        many = len(group.rates)
        of = f", the best of {many}" if many > 1 else ""
        value = spread([m.final_loss for m in group.best])
        parts.append(
            f"{group.optimizer} {value}{rate}{of}"
            if math.isfinite(score)
            else f"{group.optimizer} diverged"
        )
    return f"Training loss at the end: {'; '.join(parts)}."


def _accuracy(runs: Runs) -> str:
    found = {
        name: statistics.fmean(values)
        for name, members in runs.best()
        if (values := [v for m in members if (v := last(m, "test_accuracy")) == v])
    }
    if not found:
        return ""
    ranked = sorted(found, key=lambda name: -found[name])
    return (
        "Test accuracy at the end: "
        + "; ".join(f"{name} {percent(found[name])}" for name in ranked)
        + "."
    )


def _curvature(name: str, group: Group) -> str:
    """What the optimizer's own matrix is worth at the end, beside a fresh K-FAC."""
    own = median(group.best, "error", "cosine")
    if math.isnan(own):
        return ""
    error = median(group.best, "error", "error")
    fresh = median(group.best, "fresh", "cosine", "K-FAC")
    beside = f" (a fresh K-FAC: {shown(fresh, 2)})" if fresh == fresh else ""
    return (
        f"The curvature that {name} uses has, in the median layer at the end, a cosine of "
        f"{shown(own, 2)} with the exact one{beside} and a relative error of {shown(error, 2)}."
    )


def _sharp(runs: Runs) -> str:
    parts = []
    for name, members in runs.best():
        rows = [row for m in members for row in m.rows("sharpness")]
        key = "preconditioned_product" if any("preconditioned_product" in r for r in rows) else ""
        of = "of the Hessian H itself"
        if key:
            of = f"of P H, where P is what {name} multiplies the gradient by"
        elif any(row.get("covered") is False for row in rows):
            of += f", since the curvature of {name} leaves parameters out"
        key = key or "product"
        values = [float(r[key]) for r in rows if isinstance(r.get(key), int | float)]
        known = [v for v in values if math.isfinite(v)]
        if known:
            share = sum(v > 2 for v in known) / len(known)
            parts.append(f"{name} in {100 * share:.0f} % ({of})")
    if not parts:
        return ""
    return (
        "The largest eigenvalue times the learning rate exceeded 2, the limit of plain descent on "
        f"a quadratic, at these shares of the measured steps: {'; '.join(parts)}."
    )


def _overhead(runs: Runs) -> str:
    pairs = [m.monitored for m in runs.members]
    known = [(t, s) for t, s in pairs if s == s]
    if not known:
        return ""
    training, spent = sum(t for t, _ in known), sum(s for _, s in known)
    share = f", {percent(spent / training)} of it" if 0 < spent < training else ""
    outside = sum(m.outside for m in runs.members)
    apart = (
        f", and {seconds(outside)} for first and last measurements, which its budget does not count"
        if outside
        else ""
    )
    return (
        f"Training took {seconds(training)} in all, the monitor {seconds(spent)} more{share}"
        f"{apart}; this is not part of the times shown."
    )
