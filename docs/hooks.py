"""What mkdocs does not do by itself: formulas, cross references, and pages from elsewhere."""

from __future__ import annotations

import ast
import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

# files of the repository that are pages of the site, and what they are called there
_ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "license.md",
}
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>~?([\w.]+)</code>")
_REST = re.compile(r"^<!-- all (other names|classes) of curvscope\.([\w.]+) -->$", re.MULTILINE)
_NAMED = re.compile(r"^::: (\S+)", re.MULTILINE)
_LINK = re.compile(r"(\]\()((?:\.\./)*)([\w./-]+)(#[\w-]+)?\)")


def on_config(config: Any) -> Any:
    """Fill the navigation: ``folder/*.md`` is all pages there, ``page.md?`` may be missing."""
    config.nav = _filled(config.nav)
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add README, changelog, licence and the tables of the benchmarks as pages."""
    for source, page in _ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source == "LICENSE":
            text = "# License\n\n" + text
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "benchmarks" / "results").iterdir()):
        if path.suffix in (".md", ".svg"):
            page = f"benchmarks/results/{path.name}"
            files.append(File.generated(config, page, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Links that hold in the repository hold in the site."""
    here = page.file.src_uri
    markdown = _NAMED.sub(lambda m: f"::: {unambiguous(m[1])}", _REST.sub(_rest, markdown))
    sources = {page: source for source, page in _ELSEWHERE.items()}
    outside = here.startswith(("benchmarks/", "notebooks/"))
    place = sources.get(here, here if outside else f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        target = (ROOT / place).parent / (match[2] + match[3])
        try:
            name = target.resolve().relative_to(ROOT).as_posix()
        except ValueError:
            return match[0]
        name = _ELSEWHERE.get(name, name.removeprefix("docs/"))
        name = re.sub(r"^(notebooks/.+)\.ipynb$", r"\1.md", name)
        if files.get_file_from_path(name) is None:
            return match[0]
        return f"{match[1]}{'../' * here.count('/')}{name}{match[4] or ''})"

    return _LINK.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, roles of the docstrings as cross references."""
    content = _FORMULA.sub(_mathml, content)
    return _ROLE.sub(_reference, content)


def _filled(entries: list[Any]) -> list[Any]:
    filled: list[Any] = []
    for entry in entries:
        title, value = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(value, list):
            value = _filled(value)
        elif "*" in value:
            found = sorted(ROOT.glob(value))
            value = [{_title(p): p.relative_to(ROOT).with_suffix(".md").as_posix()} for p in found]
        elif value.endswith("?"):
            value = value.removesuffix("?")
            value = value if (ROOT / "docs" / value).exists() else None
        if value:
            filled.append(value if title is None else {title: value})
    return filled


def _title(path: Path) -> str:
    """The first heading of a page or notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{path} has no heading.")
    return found[1]


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    formula = html.unescape(match[3]).strip()
    return convert(formula, display=display).replace(
        "<math", f'<math alttext="{html.escape(formula)}"', 1
    )


def _reference(match: re.Match[str]) -> str:
    name = match[1]
    short = name.rpartition(".")[2]
    return f'<autoref identifier="{canonical(name)}" optional><code>{short}</code></autoref>'


def canonical(name: str) -> str:
    """``curvscope.kfac`` or ``kfac`` -> the path under which the reference has it."""
    first, _, rest = name.removeprefix("curvscope.").partition(".")
    if first not in _PUBLIC:
        return name
    path = unambiguous(f"curvscope.{_PUBLIC[first]}.{first}")
    return f"{path}.{rest}" if rest else path


def unambiguous(path: str) -> str:
    """The path of a function that is called like the module in which it is."""
    *package, name = path.split(".")
    files = {file.name for file in ROOT.joinpath(*package).glob("*.py")}
    return f"{path}.{name}" if f"{name}.py" in files and len(package) > 1 else path


def _rest(match: re.Match[str]) -> str:
    """The public names (or classes) of a package that no page of the reference has by hand."""
    classes, package = match[1] == "classes", match[2]
    pages = (ROOT / "docs" / "reference").glob("*.md")
    text = "".join(page.read_text("utf-8") for page in pages)
    named = set(_NAMED.findall(text))
    apart = f"<!-- all classes of curvscope.{package} -->" in text and not classes
    names = [name for name, where in _PUBLIC.items() if where == package]
    folder = ROOT.joinpath("curvscope", *package.split("."))
    names += _assigned(folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py"))
    names = list(dict.fromkeys(names))
    wanted = [n for n in names if not (classes or apart) or n[0].isupper() is classes]
    paths = [f"curvscope.{package}.{name}" for name in wanted]
    options = "\n    options:\n      heading_level: 3" if "." in package else ""
    return "\n\n".join(f"::: {path}{options}" for path in paths if path not in named)


def _assigned(path: Path, name: str = "__all__") -> Any:
    """What a module assigns to a name, read from its source: building needs no torch."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise RuntimeError(f"{path} assigns no {name}")


_PUBLIC: dict[str, str] = _assigned(ROOT / "curvscope" / "__init__.py", "_PUBLIC")
