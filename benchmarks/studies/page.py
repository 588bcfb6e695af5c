"""From the numbers of the study to docs/study.md and results/study.md.

The page is a Jinja template; every table, and every number in a sentence that was measured, is
asked for there and comes from the JSON file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from . import facts, figures, plan
from .numbers import Study
from .tables import TABLES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "study.md"
TABLES_PAGE = ROOT / "benchmarks" / "results" / "study.md"
ASSETS = ROOT / "docs" / "assets" / "study"


def render(study: Study) -> str:
    """The page."""
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    have = {name: bool(study.get(name, {}).get("parts")) for name in TABLES}
    values: dict[str, Any] = {"study": study, "plan": plan, "have": have}
    for name, makers in TABLES.items():
        if have[name]:
            values |= {f"table_{make.__name__}": make(study) for make in makers}
    text = environment.get_template("study.md.j2").render(**values, **facts.facts(study))
    return text


def tables(study: Study) -> str:
    """All tables with machine and times."""
    parts = ["# The study in numbers", "Explained in [the study](../../docs/study.md)."]
    for name, makers in TABLES.items():
        question = study.get(name)
        if not question or not question["parts"]:
            continue
        machines = "; ".join(question["machine"])
        parts.append(
            f"## {name}\n\n{question['minutes']} minutes on {machines}, busy with other work."
        )
        parts += [make(study) for make in makers]
    return "\n\n".join(parts) + "\n"


def write(study: Study) -> None:
    """Page, tables and figures."""
    figures.draw(study, ASSETS)
    TABLES_PAGE.write_text(tables(study))
    PAGE.write_text(render(study))
