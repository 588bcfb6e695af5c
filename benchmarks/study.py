"""The worked study of docs/study.md, repeated: numbers, figures and page.

    python benchmarks/study.py --data FOLDER [--only factors identity ...] [--threads 2]

FOLDER holds MNIST (``mnist/``: four IDX files) and CIFAR-10 (``cifar10/``: the pickled batches or
one ``.npz`` file). Every part is kept in ``--work`` when it ends, so that an interrupted study goes
on where it was. When all parts of a question are there, its numbers go to ``results/study.json``;
Without ``--data`` the parts that are there are collected, and ``--page`` only makes tables, figures
and page anew from that file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import common
import torch
from studies import page, plan

RESULT = common.RESULTS / "study.json"


def rounded(value: Any) -> Any:
    """Numbers to six digits; NaN and infinity as ``None``, which JSON has no names for."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


def place(work: Path, name: str) -> Path:
    return work / (name.replace("/", "_") + ".json")


def kept(work: Path, name: str, part: plan.Part, data: Path | None) -> dict[str, Any]:
    """The part from ``work``, or made now and kept there."""
    path = place(work, name)
    if not path.exists():
        assert data is not None
        print(name, flush=True)
        start = time.perf_counter()
        found = rounded(part(data))
        spent = time.perf_counter() - start
        whole = {"result": found, "seconds": round(spent, 1), "machine": common.machine()}
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(whole))
        unfinished.replace(path)
        print(f"  {spent:.0f} s", flush=True)
    return json.loads(path.read_text())


def collect(question: plan.Question, work: Path, data: Path | None) -> dict[str, Any]:
    """The parts of a question, as they stand in the JSON file; without data those that are kept."""
    parts = {
        name: kept(work, name, part, data)
        for name, part in question.parts.items()
        if data is not None or place(work, name).exists()
    }
    return {
        "machine": sorted({part["machine"] for part in parts.values()}),
        "minutes": round(sum(part["seconds"] for part in parts.values()) / 60, 1),
        "settings": rounded(dict(question.settings)),
        "parts": {name: part["result"] for name, part in parts.items()},
    }


def dumped(study: dict[str, Any]) -> str:
    """JSON with one part to a line: small, and readable in a comparison of versions."""
    lines = []
    for name, question in study.items():
        head = {key: value for key, value in question.items() if key != "parts"}
        parts = [
            f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in question["parts"].items()
        ]
        inner = ",\n".join(
            [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
            + ['  "parts": {\n' + ",\n".join(parts) + "\n  }"]
        )
        lines.append(f" {json.dumps(name)}: {{\n{inner}\n }}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def known() -> dict[str, Any]:
    """What the JSON file holds."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST and CIFAR-10")
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--only", nargs="*", default=list(plan.QUESTIONS), help="questions")
    parser.add_argument("--page", action="store_true", help="tables, figures and page only")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if not chosen.page:
        chosen.work.mkdir(parents=True, exist_ok=True)
        for name in chosen.only:
            found = collect(plan.QUESTIONS[name], chosen.work, chosen.data)
            if not found["parts"]:
                continue
            study = {**known(), name: found}  # another question may have been written meanwhile
            RESULT.write_text(dumped({q: study[q] for q in plan.QUESTIONS if q in study}))
    page.write(known())


if __name__ == "__main__":
    main()
