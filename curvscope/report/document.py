"""The report as data: ``report.json`` and the CSV tables."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..analysis.result import plain
from .figures import Picture
from .findings import Findings
from .layer_table import layer_records
from .summary import summary, warnings
from .tables import concentration_records
from .write import KIND, SCHEMAS

SCHEMA = SCHEMAS[KIND]
"""Version of the layout of ``report.json``; it grows when a reader of the old one would break."""

_PACKAGES = ("torch", "numpy", "scipy", "pandas", "matplotlib", "backpack-for-pytorch")


def schema() -> dict[str, Any]:
    """The JSON Schema that every ``report.json`` of this version fulfils."""
    text = (Path(__file__).parent / "schema" / f"report-{SCHEMA}.schema.json").read_text("utf-8")
    return dict(json.loads(text))


def make_document(found: Findings, pictures: Sequence[Picture], command: str) -> dict[str, Any]:
    """Everything in the report as JSON types, except the list of files."""
    problem = found.problem
    facts = problem.check()
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "settings": {**plain(found.settings), "damping": found.damping},
        "environment": environment(problem.device.type),
        "problem": {
            "name": problem.name,
            "description": getattr(problem, "description", "") or problem.describe(),
            "loss": problem.loss.name,
            "reduction": problem.loss.reduction,
            "samples": facts.samples,
            "terms": facts.terms,
            "batches": facts.batches,
            "dtype": str(problem.dtype)[6:],
            "device": str(problem.device),
            "batchnorm": problem.batchnorm,
            "parameters": problem.layout.numel,
            "blocks": {name: list(members) for name, members in problem.blocks.items()},
            "shapes": {spec.name: list(spec.shape) for spec in problem.layout},
            "recipe": str(getattr(problem, "recipe", ""))
            if getattr(problem, "history", ())
            else "",
            "objective": found.objective,
            "gradient_norm": found.gradient_norm,
            "test_accuracy": found.accuracy,
        },
        "summary": summary(found),
        "warnings": warnings(found),
        "layers": plain(layer_records(found)),
        "approximations": [
            {
                "name": entry.name,
                "group": entry.group,
                "about": entry.about,
                "available": entry.op is not None,
                "reason": entry.reason,
                "same_as": entry.same_as or None,
                "what": entry.op.info.what if entry.op else None,
                "route": entry.op.info.route if entry.op else None,
                "settings": plain(entry.op.info.settings) if entry.op else {},
                "uncovered": dict(entry.uncovered),
                "seconds": entry.seconds,
            }
            for entry in found.approximations
        ],
        "comparisons": {name: one.to_dict() for name, one in found.comparisons.items()},
        "spectra": {
            block: {name: one.to_dict() for name, one in spectra.items()}
            for block, spectra in found.spectra.items()
        },
        "hessian_extremes": found.ends.to_dict() if found.ends else None,
        "concentration": {
            block: {
                "block": one.to_dict(),
                "factors": {
                    name: part.to_dict() for name, part in found.factors.get(block, {}).items()
                },
            }
            for block, one in found.blocks.items()
        },
        "coverage": found.coverage.to_dict() if found.coverage else None,
        "verification": found.verification.to_dict() if found.verification else None,
        "cost": plain(found.cost),
        "skipped": list(found.skipped),
        "figures": [
            {"name": p.name, "block": p.block or None, "caption": p.caption, "alt": p.alt}
            for p in pictures
            if p.svg
        ],
        "seconds": found.seconds,
        "peak_memory_bytes": peak_memory(),
    }


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write ``document``; numbers that JSON does not have are ``null``."""
    text = json.dumps(plain(document), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")


def write_tables(found: Findings, folder: Path) -> None:
    """Write one CSV file per table into ``folder``, with a header line each."""
    layers = layer_records(found)
    for record in layers:
        record["shapes"] = "; ".join(
            f"{name} {'x'.join(map(str, shape))}" for name, shape in record["shapes"].items()
        )
        record["top_eigenvalues"] = " ".join(f"{v:.8g}" for v in record["top_eigenvalues"])
    write_records(folder / "layers.csv", layers)
    write_records(
        folder / "approximations.csv",
        [
            {
                "approximation": entry.name,
                "group": entry.group,
                "available": entry.op is not None,
                "same_as": entry.same_as,
                "uncovered": " ".join(entry.uncovered),
                "seconds": entry.seconds,
                "reason": entry.reason,
                "about": entry.about,
            }
            for entry in found.approximations
        ],
    )
    for name, comparison in found.comparisons.items():
        tag = name.lower()
        comparison.to_frame().to_csv(folder / f"errors-{tag}.csv", index=False)
        comparison.details().to_csv(folder / f"metrics-{tag}.csv", index=False)
        comparison.best_frame().to_csv(folder / f"best-in-class-{tag}.csv", index=False)
    spectra = [
        (block, name, one) for block, all_ in found.spectra.items() for name, one in all_.items()
    ]
    write_records(
        folder / "spectra.csv",
        [{"block": block, "matrix": name, **one.facts()} for block, name, one in spectra],
    )
    write_records(
        folder / "eigenvalues.csv",
        [
            {"block": block, "matrix": name, "index": place, "eigenvalue": value}
            for block, name, one in spectra
            for place, value in enumerate(one.eigenvalues.tolist())
        ],
    )
    write_records(folder / "concentration.csv", concentration_records(found))
    if found.coverage is not None:
        found.coverage.to_frame().to_csv(folder / "coverage.csv", index=False)
        found.coverage.details().to_csv(folder / "coverage-reasons.csv", index=False)
    if found.verification is not None:
        found.verification.to_frame().to_csv(folder / "verification.csv", index=False)
        found.verification.trust_frame().to_csv(folder / "trust.csv", index=False)
    write_records(
        folder / "cost.csv",
        [
            {
                "computation": row.name,
                "seconds": row.seconds,
                "passes": row.passes,
                "products": row.products,
                "route": row.route,
            }
            for row in found.cost
        ],
    )


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """A CSV file with the columns of all ``records``; none of no records."""
    if not records:
        return
    columns = dict.fromkeys(key for record in records for key in record)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows({k: "" if _missing(v) else v for k, v in r.items()} for r in records)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def environment(device: str) -> dict[str, Any]:
    """Versions and machine, as far as they bear on numbers and times."""
    import torch

    from .. import __version__

    versions = {"curvscope": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = str(torch.__version__)  # with its build, which package metadata may lack
    found: dict[str, Any] = {
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def peak_memory() -> int | None:
    """The most bytes that this process has held; ``None`` where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used if sys.platform == "darwin" else used * 1024)


__all__ = ["SCHEMA", "make_document", "schema", "write_json", "write_records", "write_tables"]
