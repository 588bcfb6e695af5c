"""What a problem shows of itself in a notebook: sizes that are known without a pass over data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..display import Card, Table, strip

if TYPE_CHECKING:
    from .problem import Problem


def problem_card(problem: Problem) -> Card:
    """Model, loss, blocks; samples and objective if a pass was made already."""
    known = problem._facts
    entries = {spec.name: spec for spec in problem.layout}
    sizes = {
        name: sum(entries[p].numel for p in members) for name, members in problem.blocks.items()
    }
    modules = dict(problem.model.named_modules())
    facts: dict[str, Any] = {
        "parameters": problem.layout.numel,
        "blocks": len(sizes),
        "loss": f"{problem.loss.name} ({problem.loss.reduction})",
        "number type": str(problem.dtype)[6:],
        "device": str(problem.device) if problem.device.type != "cpu" else "",
    }
    if known is not None:
        facts |= {
            "samples": known.samples,
            "terms": known.terms if known.terms != known.samples else None,
            "batches": known.batches,
            "objective when first evaluated": known.total * problem.scale,
        }
    left_out = sum(p.numel() for p in problem.model.parameters()) - problem.layout.numel
    notes = []
    if left_out:
        notes.append(f"{left_out:,} parameters of the model are frozen or left out.")
    if problem.batchnorm == "batch":
        notes.append("BatchNorm uses the statistics of each batch, which couples its samples.")
    total = problem.layout.numel
    rows = [
        {
            "block": name,
            "layer": type(modules[name]).__name__ if name in modules else "",
            "parameters": ", ".join(
                f"{p.removeprefix(name + '.')} {' × '.join(map(str, entries[p].shape))}".strip()
                for p in members
            ),
            "size": sizes[name],
            "share": sizes[name] / total,
        }
        for name, members in problem.blocks.items()
    ]
    pictures = [("blocks, as wide as large", strip(sizes))] if len(sizes) > 1 else []
    return Card(
        title=problem.name,
        kind="Problem",
        facts=facts,
        text=notes,
        pictures=pictures,
        tables=[Table(rows, bars=("share",), where="problem.blocks")],
        hints=["cs.ggn(problem)", "cs.verify(problem)", "cs.coverage(problem)"],
    )
