"""The notebooks run, what is kept of them is whole and small, and says nothing of a machine."""

from __future__ import annotations

import base64
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT = 400_000  # bytes
PATHS = re.compile(
    r"(?:/(?:home|root|tmp|work|usr|opt|Users|var)/)|(?:\b[A-Z]:\\\\)|0x[0-9a-f]{6,}"
)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])


def _execute(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute(path, timeout=120)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _kinds(cell: Any) -> list[str]:
    """What a cell shows, in order: streams by name, pictures and tables by type."""
    found = []
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "stream":
            found.append(output.name)
        elif "image/png" in data:
            found.append("picture")
        else:
            found.append("value")
    return list(dict.fromkeys(found))


@each
def test_runs_without_errors_and_shows_what_is_kept(path: Path) -> None:
    fresh, kept = _execute(path), nbformat.read(path, as_version=4)
    for new, old in zip(_code(fresh), _code(kept), strict=True):
        assert "stderr" not in _kinds(new), new.outputs
        assert sorted(_kinds(new)) == sorted(_kinds(old)), new.source


@each
def test_what_is_kept(path: Path) -> None:
    assert path.stat().st_size < LIMIT
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    cells = _code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) // 2
    pictures = 0
    for cell in cells:
        assert not cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            data = output.get("data", {})
            if "image/png" in data:
                pictures += 1
                assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
            for text in (output.get("text", ""), *(v for k, v in data.items() if "image" not in k)):
                assert not PATHS.search(str(text)), PATHS.search(str(text))
    assert pictures, "a notebook without a picture"


@each
def test_prose_stands_between_the_cells(path: Path) -> None:
    """A title first, an end that says what to do next, and a word between any two long cells."""
    notebook = nbformat.read(path, as_version=4)
    first, last = notebook.cells[0], notebook.cells[-1]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert last.cell_type == "markdown" and "next" in last.source
    for cell in notebook.cells:
        assert not PATHS.search(cell.source), cell.source


def test_all_are_there_and_named_in_the_readme() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [
        f"{k:02}" for k in range(1, len(NOTEBOOKS) + 1)
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in readme
