"""Diagrams that are drawn from the source: who imports whom, and what approximates what."""

from __future__ import annotations

import ast
import html
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "curvscope"

HOUSE: dict[str, tuple[tuple[str, ...], str]] = {
    "cli": (("cli", "commands", "doctor", "__main__"), "the commands"),
    "explorer": (("explorer",), "a look around with widgets"),
    "report": (("report",), "results as a page, JSON, CSV and figures"),
    "plot": (("plot", "plotting"), "results as pictures"),
    "training": (("training",), "monitor, runs, trajectories, surfaces"),
    "zoo": (("zoo", "loading"), "ready problems on real data"),
    "optim": (("optim",), "optimizers that show their curvature"),
    "analysis": (("analysis",), "compare, spectra, estimators, verify"),
    "curvature": (("curvature",), "from a Problem to an Operator"),
    "problem": (("problem",), "model, loss, data, blocks, scale"),
    "layers": (("layers", "layer_calls"), "what is known of a layer type"),
    "operators": (("operators",), "the matrices: linear algebra alone"),
    "errors": (("errors", "memory", "modes", "progress", "display"), "errors and small tools"),
}
"""Floors from the top down: their modules, and what they hold. Imports point down only."""

_ROW, _WIDTH, _BOX = 34, 720, 470  # of the house, in its own units


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the diagrams where pages ask for them."""
    for mark, draw in (("house", house), ("map of approximations", approximations)):
        if f"<!-- {mark} -->" in markdown:
            markdown = markdown.replace(f"<!-- {mark} -->", draw())
    return markdown


def house() -> str:
    """The floors of the package as SVG; arcs on the right are imports, all of them downwards."""
    arrows = imports()
    order = list(HOUSE)
    height = _ROW * len(order)
    parts = []
    for level, (name, (_, about)) in enumerate(HOUSE.items()):
        y = level * _ROW
        parts.append(
            f'<rect x="1" y="{y + 3}" width="{_BOX}" height="{_ROW - 6}" rx="4" '
            'fill="currentColor" fill-opacity="0.06" stroke="currentColor" stroke-opacity="0.35"/>'
            f'<text x="12" y="{y + 22}" font-weight="600">{name}</text>'
            f'<text x="112" y="{y + 22}">{html.escape(about)}</text>'
        )
    most = max(arrows.values())
    for (above, below), count in arrows.items():
        top, end = ((order.index(name) + 0.5) * _ROW for name in (above, below))
        top, end = top + 5, end - 5
        reach = _BOX + 14 + (end - top) * 0.62
        title = f"{above} imports {below} in {count} file{'s' * (count > 1)}"
        parts.append(
            f'<path d="M{_BOX + 1} {top:g} '
            f'C{reach:g} {top:g} {reach:g} {end:g} {_BOX + 7} {end:g}" '
            f'fill="none" stroke="currentColor" stroke-width="{0.7 + 2 * count / most:.2f}" '
            f'stroke-opacity="0.45"><title>{title}</title></path>'
            f'<path d="M{_BOX + 1} {end:g} l8 -3.5 v7 z" fill="currentColor"/>'
        )
    label = "The parts of curvscope from top to bottom; imports, drawn as arcs, point down only"
    return (
        f'<div class="diagram"><svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{label}" font-size="14" fill="currentColor">{"".join(parts)}</svg></div>'
    )


def recipes() -> list[tuple[str, str, str]]:
    """Name, group and description of every approximation of a report, from its registry."""
    tree = ast.parse((PACKAGE / "report" / "approximations.py").read_text(encoding="utf-8"))
    groups: dict[str, str] = {}
    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            names = [ast.unparse(name) for name in node.targets[0].elts]
            groups.update(zip(names, ast.literal_eval(node.value), strict=True))
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "RECIPES":
            assert isinstance(node.value, ast.Tuple)
            for entry in node.value.elts:
                assert isinstance(entry, ast.Call)
                name, group, about = entry.args[:3]
                found.append(
                    (ast.literal_eval(name), groups[ast.unparse(group)], ast.literal_eval(about))
                )
    return found


def approximations() -> str:
    """All approximations of a report, by what kind of matrix they are."""
    cards: dict[str, list[str]] = {}
    for name, group, about in recipes():
        entry = f"<dt>{html.escape(name)}</dt><dd>{html.escape(about)}</dd>"
        cards.setdefault(group, []).append(entry)
    body = "".join(
        f"<div><p>{group[0].upper()}{group[1:]}</p><dl>{''.join(entries)}</dl></div>"
        for group, entries in cards.items()
    )
    return f'<div class="map">{body}</div>'


def floor_of(module: str) -> str | None:
    """The floor of ``curvscope.<module>``; ``None`` for the package itself."""
    return next((name for name, (parts, _) in HOUSE.items() if module in parts), None)


def imports() -> dict[tuple[str, str], int]:
    """How many files of one floor import from another when they are imported themselves."""
    found: dict[tuple[str, str], int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        above = floor_of(parts[0])
        if above is None:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {name for node in tree.body for name in _imported(node, parts)}
        for below in {floor_of(name) for name in names} - {above, None}:
            found[above, str(below)] = found.get((above, str(below)), 0) + 1
    return found


def _imported(node: ast.stmt, parts: tuple[str, ...]) -> list[str]:
    """Modules directly below ``curvscope`` that a statement of ``parts`` imports."""
    if isinstance(node, ast.Import):
        full = [alias.name.split(".") for alias in node.names]
        return [names[1] for names in full if names[0] == "curvscope" and len(names) > 1]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level == 0:
        names = str(node.module).split(".")
        if names[0] != "curvscope":
            return []
        return names[1:2] or [alias.name for alias in node.names]
    base = parts[: len(parts) - node.level]  # a package's own file counts as one of its modules
    target = [*base, *str(node.module or "").split(".")]
    target = [name for name in target if name]
    return target[:1] or [alias.name for alias in node.names]
