"""Notebooks as pages: their cells and kept outputs; nothing is executed, nothing is loaded."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"

_PICTURES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_HOLDER = '<div class="output" id="output-{}"></div>'
_HELD = re.compile(r'<div class="output" id="(output-\d+)"></div>')

# HTML outputs by page and holder: put back after Markdown, which would take them apart
_kept: dict[tuple[str, str], str] = {}


def on_files(files: Files, *, config: Any) -> Files:
    """Add every notebook as a page, with its pictures and itself to download."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        page = f"notebooks/{path.stem}.md"
        content, pictures = markdown(path, page)
        files.append(File.generated(config, page, content=content))
        files.append(File.generated(config, f"notebooks/{path.name}", content=path.read_bytes()))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Put the HTML outputs in place."""
    here = page.file.src_uri
    return _HELD.sub(lambda m: f'<div class="output">{_kept[here, m[1]]}</div>', content)


def markdown(path: Path, page: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif cell["cell_type"] == "code":
            if text:
                parts.append(_fence(text, "python"))
            for output in cell.get("outputs", []):
                name = f"{path.stem}-{len(pictures) + 1}"
                parts.append(_output(output, page, name, pictures))
    download = f'<p class="download"><a href="{path.name}" download>Download the notebook</a></p>'
    parts.insert(1, download)  # below the title, which is the first cell
    return "\n\n".join(part for part in parts if part) + "\n", pictures


def _output(output: dict[str, Any], page: str, name: str, pictures: dict[str, bytes]) -> str:
    """The richest form of one output that a page can show."""
    if output["output_type"] == "stream":
        return _fence(_COLOURS.sub("", "".join(output["text"])).rstrip(), "text")
    if output["output_type"] == "error":
        return _fence(f"{output['ename']}: {output['evalue']}", "text")
    data = {kind: "".join(value) for kind, value in output["data"].items() if _is_text(value)}
    for kind, ending in _PICTURES.items():
        if kind in data:
            raw = data[kind].encode() if ending == "svg" else base64.b64decode(data[kind])
            pictures[f"{name}.{ending}"] = raw
            return f"![The figure that the cell above draws]({name}.{ending})"
    if "text/html" in data:
        holder = f"output-{len(_kept)}"
        _kept[page, holder] = data["text/html"]
        return _HOLDER.format(len(_kept) - 1)
    if "text/markdown" in data:
        return data["text/markdown"]
    return _fence(data.get("text/plain", "").rstrip(), "text")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value)))


def _fence(text: str, language: str) -> str:
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    prose = language == "text" and "   " not in text  # sentences may break, tables may not
    head = "{ .text .prose }" if prose else language
    return f"{ticks} {head}\n{text}\n{ticks}" if text else ""
