"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import html
import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
_MARK = "<!-- commands -->"
_INFOS = ("OptionInfo", "ArgumentInfo")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands where a page asks for them."""
    return markdown.replace(_MARK, commands()) if _MARK in markdown else markdown


def commands() -> str:
    """Every command as a section: usage, what it does, arguments, options, examples."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from curvscope.cli import make_app

    return "\n\n".join(_section(info) for info in make_app().registered_commands)


def _section(info: Any) -> str:
    function = info.callback
    name = info.name or function.__name__
    hints = get_type_hints(function, include_extras=True)
    arguments, options = [], []
    for parameter in inspect.signature(function).parameters.values():
        kind, *extras = get_args(hints[parameter.name]) or (hints[parameter.name],)
        found = (e for e in extras if type(e).__name__ in _INFOS)
        extra = next(found, None)
        if extra is not None:
            listed = arguments if type(extra).__name__ == "ArgumentInfo" else options
            listed.append((parameter, kind, extra))
    called = [_argument(parameter, extra) for parameter, _, extra in arguments]
    usage = " ".join(["curvscope", name, *(["[OPTIONS]"] if options else []), *called])
    parts = [f"## curvscope {name}", f"```text\n{usage}\n```", _plain(inspect.getdoc(function))]
    rows = [f"| `{_metavar(p, e)}` | {_cell(e.help)} | |" for p, _, e in arguments]
    rows += [f"| {_names(*one)} | {_cell(one[2].help)} | {_default(one[0])} |" for one in options]
    if rows:
        parts.append("\n".join(["| | | default |", "|---|---|---|", *rows]))
    if lines := (info.epilog or "").split("\n\n")[1:]:  # the first says that these are examples
        parts.append("```sh\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(parts)


def _metavar(parameter: inspect.Parameter, extra: Any) -> str:
    return extra.metavar or parameter.name.upper()


def _argument(parameter: inspect.Parameter, extra: Any) -> str:
    needed = parameter.default is inspect.Parameter.empty
    return _metavar(parameter, extra) if needed else f"[{_metavar(parameter, extra)}]"


def _names(parameter: inspect.Parameter, kind: Any, extra: Any) -> str:
    long = f"--{parameter.name.replace('_', '-')}"
    # in an annotation, the first name of an option stands where its default would be
    given = [d for d in (extra.default, *(extra.param_decls or ())) if isinstance(d, str)]
    names = given or ([long, f"--no-{long[2:]}"] if kind is bool else [long])
    text = ", ".join(f"`{name}`" for name in names)
    value = "" if kind is bool else f" {extra.metavar or _kind(kind)}"
    return text + html.escape(value).replace("|", "\\|")


def _kind(kind: Any) -> str:
    """``int | None`` -> ``INT``, ``list[float]`` -> ``FLOAT``."""
    while isinstance(kind, types.UnionType) or get_origin(kind) is list:
        kind = get_args(kind)[0]
    return {Path: "PATH", str: "TEXT"}.get(kind, kind.__name__.upper())


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is inspect.Parameter.empty:
        return "needed"
    if value is True:
        return "yes"
    return "" if value is None or value is False else f"`{value}`"


def _plain(text: str | None) -> str:
    """One line per paragraph."""
    paragraphs = re.split(r"\n\s*\n", (text or "").strip())
    return "\n\n".join(" ".join(part.split()) for part in paragraphs)


def _cell(text: str | None) -> str:
    return _plain(text).replace("|", "\\|")
