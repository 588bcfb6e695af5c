"""Runs, reports and comparisons in one form: rows with metrics, spectra, and concentrations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..analysis.comparison import WHOLE, Comparison, place
from ..analysis.metrics import METRICS
from ..errors import NotDefinedError, OptionError, ReportError, RunError
from ..report.read import read_report
from ..report.write import KIND
from ..training.run import Run

Row = dict[str, Any]

_MEASURES = ("best", "error", "fresh", "staleness")
_PLACE = ("step", "seconds", "size", "damping", "age", "error_stderr", "row", "rows")
_CONCENTRATION = ("score", "disjoint", "dominant", "kaiser", "snr")


@dataclass(frozen=True)
class Data:
    """What the views show.

    ``rows`` have ``reference``, ``block``, ``approximation``, metrics, and ``step`` if ``steps``
    is not empty. ``spectra(step, block)`` gives eigenvalues by name and ``concentrations(step,
    block)`` rows, about what ``beside`` says. ``curves`` are pairs ``(steps, values)`` by name,
    ``notes`` sentences; ``missing`` says by ``"eigenvalues"`` and ``"concentration"`` why there may
    be none, and what to do.
    """

    title: str
    rows: Sequence[Row]
    spectra: Callable[[int | None, str], Mapping[str, Sequence[float]]]
    concentrations: Callable[[int | None, str], Sequence[Row]]
    steps: tuple[int, ...] = ()
    curves: Mapping[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    beside: str = "Concentration of"
    missing: Mapping[str, str] = field(default_factory=dict)

    def without(self, what: str, choice: Mapping[str, Any]) -> str:
        """Why nothing is shown of the chosen block, and what to do."""
        block, name = choice["block"], choice["reference"]
        verb = "are" if what.endswith("s") else "is"
        of = name or "exact matrix"
        where = f"the whole {of}" if block == WHOLE else f"{place(block)} of the {of}"
        known = name.lower() in ("ggn", "hessian")
        code = f"cs.{name.lower()}(problem)" if known else "operator"
        code += "" if block == WHOLE else f".blocks[{block!r}]"
        reason = self.missing.get(what, "").replace("OPERATOR", code)
        return f"There {verb} no {what} of {where} to show. {reason}".strip()

    @cached_property
    def references(self) -> list[str]:
        """Names of the exact matrices, in order."""
        return list(dict.fromkeys(row["reference"] for row in self.rows)) or [""]

    def blocks(self, reference: str) -> list[str]:
        """Blocks with rows, the whole matrix last."""
        found = dict.fromkeys(r["block"] for r in self.rows if r["reference"] == reference)
        names = [name for name in found if name != WHOLE]
        return [*names, *([WHOLE] if WHOLE in found else [])] or [WHOLE]

    def approximations(self, reference: str) -> list[str]:
        """Approximations with rows."""
        found = dict.fromkeys(r["approximation"] for r in self.rows if r["reference"] == reference)
        return list(found) or ["(none)"]

    @cached_property
    def metrics(self) -> list[str]:
        """Columns with numbers, errors first."""
        first = [name for name in ("error", *METRICS, "best_in_class") if name in self._columns]
        rest = [name for name in self._columns if name not in first and name not in _PLACE]
        return [*dict.fromkeys(first), *rest] or ["error"]

    @cached_property
    def _columns(self) -> list[str]:
        found: dict[str, None] = {}
        for row in self.rows:
            for name, value in row.items():
                if isinstance(value, float) and not math.isnan(value):
                    found[name] = None
        return list(found)

    def chosen(
        self,
        reference: str,
        *,
        step: int | None = None,
        block: str | None = None,
        approximation: str | None = None,
    ) -> list[Row]:
        """Rows of what is given; ``None`` means all."""
        wanted = {"step": step, "block": block, "approximation": approximation}
        given = {name: value for name, value in wanted.items() if value is not None}
        given["reference"] = reference
        return [r for r in self.rows if all(r.get(name) == v for name, v in given.items())]


def read(source: Any) -> Data:
    """A run, a report or a comparison, or the path of one of the first two."""
    if isinstance(source, Comparison):
        return _of_comparison(source)
    if isinstance(source, Run):
        return _of_run(source)
    if isinstance(source, Mapping):
        return _of_report(source)
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if (path / "run.json").is_file():
            return _of_run(Run(path))
        # several trainings lie at OPTIMIZER/lr=RATE/seed=SEED
        found = (
            p.parent for depth in ("*", "*/*", "*/*/*") for p in path.glob(f"{depth}/run.json")
        )
        inner = sorted(found) if path.is_dir() else []
        if inner and not (path / "report.json").is_file():
            few = ", ".join(str(p) for p in inner[:4]) + (", ..." if len(inner) > 4 else "")
            raise RunError(f"{path} is a folder of runs; explore one of them: {few}.")
        return _of_report(read_report(path))
    raise OptionError(
        f"cs.explore takes a Run, a report, a Comparison or a path, not {type(source).__name__}. "
        "Results have .plot() and .to_frame()."
    )


def _of_comparison(found: Comparison) -> Data:
    rows = [_row(found.reference, record) for record in found.records()]
    best = {ref.block: {f"nearest {k}": v for k, v in ref.best.items()} for ref in found.references}
    return Data(
        title=f"Comparison with the {found.reference}",
        rows=rows,
        spectra=lambda step, block: {},
        concentrations=lambda step, block: [best[block]] if best.get(block) else [],
        notes=tuple(found.warnings),
        beside="Error of the nearest matrix of each class, on",
        missing={
            "eigenvalues": "A comparison keeps none: cs.spectrum(OPERATOR).plot() computes and "
            "draws them; cs.explore of a report shows them beside the errors.",
            "concentration": "A comparison keeps none: cs.concentration(OPERATOR) computes it.",
        },
    )


def _of_report(document: Mapping[str, Any]) -> Data:
    if document.get("kind") != KIND:
        raise ReportError(
            "This report is about several trainings; explore one of their runs: "
            "cs.explore('FOLDER/RUN'), the folders that hold run.json."
        )
    rows = []
    for reference, found in document["comparisons"].items():
        for row in found["rows"]:
            record = {"best_class": row["best_class"], "status": row["status"]}
            record |= {"block": row["block"], "approximation": row["approximation"]}
            record |= {"size": row["size"], "note": row["note"], **row["values"]}
            record["error_stderr"] = row["stderr"].get("error", math.nan)
            rows.append(_row(reference, record))

    def spectra(step: int | None, block: str) -> Mapping[str, Sequence[float]]:
        of_block = document["spectra"].get(block, {})
        return {name: one["eigenvalues"] for name, one in of_block.items() if one}

    def concentrations(step: int | None, block: str) -> Sequence[Row]:
        found = document["concentration"].get(block) or {}
        parts = {"": found.get("block"), **(found.get("factors") or {})}
        return [
            {
                "factor": name or "(the block)",
                "size": part.get("size"),
                "diagonal_share": part.get("diagonal_share"),
                "null_share": part["null"]["diagonal_share"],
                **{key: part.get(key) for key in _CONCENTRATION},
            }
            for name, part in parts.items()
            if part
        ]

    problem = document["problem"]
    return Data(
        title=f"Report on {problem['name']}",
        rows=rows,
        spectra=spectra,
        concentrations=concentrations,
        notes=tuple(str(line) for line in document["warnings"]),
        missing={
            "eigenvalues": "A report has those of single blocks, where they are small or have a "
            "structure that gives them: choose another block, or compute the largest ones by "
            "cs.eigsh(OPERATOR, 10), the density of all by cs.density(OPERATOR).",
            "concentration": "A report has that of single blocks: choose one, or compute it "
            "by cs.concentration(OPERATOR).",
        },
    )


def _of_run(run: Run) -> Data:
    rows: dict[tuple[Any, ...], Row] = {}
    for measure in _MEASURES:
        for record in run.rows(measure):
            row = _row(str(record.get("reference", "")), record)
            if measure == "fresh":
                row["approximation"] = f"{row['approximation']} (fresh)"
            elif measure == "staleness":
                row["approximation"] += " against a fresh one"
            key = (row["reference"], row["step"], row["block"], row["approximation"])
            rows[key] = {**rows.get(key, {}), **row}
    if not run.steps:
        raise NotDefinedError(
            f"The run {run.path} has recorded nothing yet. Wait for its first step, or give the "
            "monitor measures= and a budget= in which they fit."
        )
    notes = [*run.problems, *run.alarms["message"].astype(str)]
    if not rows:
        notes.insert(
            0, f"This run compared nothing; it has {', '.join(run.measures)}. See run.frame(...)."
        )
    steps = tuple(sorted({row["step"] for row in rows.values()})) or run.steps
    curves = {}
    for measure, column in (("loss", "loss"), ("sharpness", "lambda_max")):
        known = [r for r in run.rows(measure) if isinstance(r.get(column), float)]
        if known:
            name = "loss" if measure == "loss" else "largest eigenvalue"
            curves[name] = [r["step"] for r in known], [r[column] for r in known]

    def spectra(step: int | None, block: str) -> Mapping[str, Sequence[float]]:
        measured = run.rows("spectrum")
        known = [int(r["step"]) for r in measured]
        if not known or step is None:
            return {}
        nearest = _nearest(known, step)
        tensors = run.tensors(next(r for r in measured if int(r["step"]) == nearest))
        if "eigenvalues" not in tensors:
            return {}
        name = f"whole {measured[0].get('reference', 'matrix')}, largest at step {nearest}"
        return {name: tensors["eigenvalues"].tolist()}

    def concentrations(step: int | None, block: str) -> Sequence[Row]:
        measured = [r for r in run.rows("concentration") if r.get("block") == block]
        if not measured or step is None:
            return []
        nearest = _nearest([int(r["step"]) for r in measured], step)
        hidden = ("measure", "seconds", "row", "rows", "block")
        named = {"share": "diagonal_share"}
        return [
            {named.get(name, name): value for name, value in r.items() if name not in hidden}
            for r in measured
            if int(r["step"]) == nearest
        ]

    return Data(
        title=f"Run {run.name}",
        rows=list(rows.values()),
        spectra=spectra,
        concentrations=concentrations,
        steps=steps,
        curves=curves,
        notes=tuple(notes),
        missing={
            "eigenvalues": "The monitor did not measure them: "
            "cs.Monitor(..., measures=['default', 'spectrum']) takes the largest, over all layers.",
            "concentration": "The monitor did not measure it, or not on this block: "
            "cs.Monitor(..., measures=['default', 'concentration']).",
        },
    )


def _row(reference: str, record: Mapping[str, Any]) -> Row:
    numbers = {k: math.nan if v is None and k in METRICS else v for k, v in record.items()}
    return {**numbers, "reference": reference}


def _nearest(known: Iterable[int], step: int) -> int:
    return min(known, key=lambda each: (abs(each - step), each))
