"""What all pages share: the base template, its macros, and the styles and scripts put inline.

A page is a template in ``templates/`` that extends ``base.html.j2`` and fills its blocks ``main``
and, where there is something to choose, ``controls``; tables and figures come from the macros in
``macros.html.j2``. Styles and scripts are the plain files in ``assets/``, in the order below; a
page that needs one more names it.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

_HERE = Path(__file__).parent
STYLES = ("base.css", "tables.css", "figures.css", "print.css")
SCRIPTS = ("core.js", "nav.js", "tables.js", "figures.js", "zoom.js", "choose.js")


@dataclass(frozen=True)
class Link:
    """An entry of the side bar: a title, where it leads, and what lies below it."""

    title: str
    href: str
    children: list[Link] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """A name that can be switched off in tables and figures, and the group it is listed under."""

    name: str
    group: str = ""
    on: bool = True


def render_page(
    template: str,
    *,
    kicker: str,
    title: str,
    subtitle: str = "",
    links: Sequence[Link],
    created: str,
    choices: Sequence[Choice] = (),
    rules: str = "",
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    **context: Any,
) -> str:
    """A template that extends ``base.html.j2`` as one HTML text that needs nothing else.

    ``links`` are the contents of the side bar, ``choices`` the names that its check boxes switch,
    ``rules`` more style rules (those that :func:`~curvscope.report.svg.share_styles` returns),
    ``styles`` and ``scripts`` names of more files in ``assets/``; the rest goes to the template.
    Everything that comes from outside is escaped.
    """
    from markupsafe import Markup

    return (
        environment()
        .get_template(template)
        .render(
            style=Markup("".join(map(asset, (*STYLES, *styles))) + rules),
            early=Markup(asset("early.js")),
            script=Markup('"use strict";\n' + "".join(map(asset, (*SCRIPTS, *scripts)))),
            kicker=kicker,
            title=title,
            subtitle=subtitle,
            links=list(links),
            choices=_grouped(choices),
            created=created,
            **context,
        )
    )


@functools.cache
def environment() -> jinja2.Environment:
    """Jinja with these templates: strict, escaping, with the filters ``breakable`` and ``day``."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["breakable"] = _breakable
    made.filters["day"] = day
    return made


@functools.cache
def asset(name: str) -> str:
    """The text of a file in ``assets/``."""
    return (_HERE / "assets" / name).read_text(encoding="utf-8")


def _grouped(choices: Sequence[Choice]) -> dict[str, list[Choice]]:
    groups: dict[str, list[Choice]] = {}
    for choice in choices:
        groups.setdefault(choice.group, []).append(choice)
    return groups


def day(moment: str) -> str:
    """A moment as ``report.json`` has it, for people: ``"2026-11-21 15:45 UTC"``."""
    try:
        read = datetime.datetime.fromisoformat(moment)
    except ValueError:
        return moment
    if read.tzinfo is None:
        return moment
    return f"{read.astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _breakable(text: str) -> Any:
    """Dotted names may break behind their dots."""
    from markupsafe import Markup, escape

    return Markup(str(escape(text)).replace(".", ".<wbr>"))
