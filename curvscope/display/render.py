"""A card as an HTML fragment: the notebook's own colours, escaped names, tables that sort."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .card import Card, Table
from .numbers import cell, is_number, with_error
from .pictures import bar

MOST_ROWS = 60
"""Rows of a table that are shown; what is longer is cut, with a note."""

_LONG = 48  # letters after which a cell is text that wraps

# Everything hangs on the class, twice for more weight than the notebook's rules for tables.
_STYLE = """<style>
.curvscope.curvscope{font-size:13px;line-height:1.45;color:inherit;max-width:100%}
.curvscope.curvscope p{margin:.25em 0;max-width:75em}
.curvscope .cs-head{margin:0 0 .3em}
.curvscope .cs-head b{font-size:1.08em}
.curvscope .cs-soft{opacity:.72}
.curvscope .cs-mark{border:1px solid rgba(128,128,128,.6);border-radius:9px;padding:0 7px;
margin-left:6px;font-size:.88em;white-space:nowrap}
.curvscope .cs-warn{border-left:3px solid #d66b13;padding-left:8px}
.curvscope .cs-facts{display:flex;flex-wrap:wrap;gap:.1em 1.6em;margin:.2em 0}
.curvscope .cs-pictures{display:flex;flex-wrap:wrap;gap:.6em 1.6em;margin:.5em 0}
.curvscope .cs-pictures figure{margin:0}
.curvscope .cs-pictures figcaption{opacity:.72;font-size:.88em}
.curvscope .cs-pictures svg{max-width:100%}
.curvscope .cs-scroll{overflow-x:auto;max-height:30em;overflow-y:auto}
.curvscope.curvscope table{border-collapse:collapse;margin:.4em 0;font-size:12px;border:0;
color:inherit}
.curvscope.curvscope th,.curvscope.curvscope td{padding:2px 9px;border:0;text-align:left;
vertical-align:top;white-space:nowrap;border-bottom:1px solid rgba(128,128,128,.22)}
.curvscope.curvscope th{border-bottom:1px solid rgba(128,128,128,.7);font-weight:600}
.curvscope.curvscope .cs-n{text-align:right;font-variant-numeric:tabular-nums}
.curvscope.curvscope .cs-t{white-space:normal;min-width:16em;max-width:44em}
.curvscope th button{all:unset;cursor:pointer}
.curvscope th button:focus-visible{outline:2px solid #2f7fd0;outline-offset:2px}
.curvscope th[aria-sort=ascending] button::after{content:" ▲"}
.curvscope th[aria-sort=descending] button::after{content:" ▼"}
.curvscope summary{cursor:pointer}
.curvscope code{font-size:.95em;background:rgba(128,128,128,.14);padding:0 3px;border-radius:3px;
color:inherit}
</style>"""

# Buttons are made by the script, so that a page without scripts has plain headings.
_SCRIPT = """<script>
document.querySelectorAll(".curvscope table:not([data-live])").forEach(t=>{t.dataset.live=1;
const H=[...t.tHead.rows[0].cells];H.forEach((h,i)=>{const b=document.createElement("button");
b.append(...h.childNodes);b.title="Sort";h.append(b);b.onclick=()=>{
const down=h.getAttribute("aria-sort")==="ascending";
H.forEach(x=>x.removeAttribute("aria-sort"));
h.setAttribute("aria-sort",down?"descending":"ascending");const s=down?-1:1;
const key=r=>r.cells[i].dataset.v??r.cells[i].textContent;
const B=t.tBodies[0];[...B.rows].sort((x,y)=>{const a=key(x),c=key(y);
if(a===""||c==="")return (a==="")-(c==="");const d=a-c;
return s*(isNaN(d)?a.localeCompare(c,undefined,{numeric:true}):d)}).forEach(r=>B.append(r))}})})
</script>"""


def render(card: Card) -> str:
    """The fragment: one ``div`` with its own styles, readable also without them."""
    marks = "".join(f'<span class="cs-mark">{_text(mark)}</span>' for mark in card.marks if mark)
    kind = f' <span class="cs-soft">{_text(card.kind)}</span>' if card.kind else ""
    parts = [f'<p class="cs-head"><b>{_text(card.title)}</b>{kind}{marks}</p>']
    facts = [
        f'<span><span class="cs-soft">{_text(name)}</span> {_text(cell(value))}</span>'
        for name, value in card.facts.items()
        if cell(value)
    ]
    if facts:
        parts.append(f'<div class="cs-facts">{" ".join(facts)}</div>')
    parts += [f"<p>{_text(line)}</p>" for line in card.text]
    parts += [f'<p class="cs-warn"><b>Warning:</b> {_text(line)}</p>' for line in card.warnings]
    pictures = [
        f"<figure>{picture}<figcaption>{_text(caption)}</figcaption></figure>"
        for caption, picture in card.pictures
        if picture
    ]
    if pictures:
        parts.append(f'<div class="cs-pictures">{"".join(pictures)}</div>')
    tables = [_table(table) for table in card.tables if table.rows]
    parts += tables
    if card.hints:
        code = " ".join(f"<code>{_text(hint)}</code>" for hint in card.hints)
        parts.append(f'<p class="cs-soft">{code}</p>')
    body = "\n".join(parts)
    return f'<div class="curvscope">{_STYLE}\n{body}\n{_SCRIPT if tables else ""}</div>'


def _table(table: Table) -> str:
    rows = list(table.rows[:MOST_ROWS])
    total = len(table.rows) if table.total is None else table.total
    wanted = list(table.columns or rows[0])
    errors = {name: _error_of(name, rows[0]) for name in wanted}
    hidden = {error for error in errors.values() if error}
    columns = [
        name
        for name in wanted
        if name not in hidden and any(cell(row.get(name)) != "" for row in rows)
    ]
    most = {name: _largest(rows, name) for name in table.bars}
    numeric = {
        name: all(is_number(v) for row in rows if (v := row.get(name)) is not None)
        for name in columns
    }
    head = "".join(
        f'<th scope="col"{_class("cs-n" if numeric[name] else "")}{_title(table.docs.get(name))}>'
        f"{_text(table.names.get(name, name.replace('_', ' ')))}</th>"
        for name in columns
    )
    body = "".join(
        "<tr>"
        + "".join(_cell(row, n, errors[n], numeric[n], most.get(n)) for n in columns)
        + "</tr>"
        for row in rows
    )
    text = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    text = f'<div class="cs-scroll"><table>{text}</table></div>'
    if total > len(rows):
        text += (
            f'<p class="cs-soft">{len(rows)} of {total:,} rows; all of them with '
            f"<code>{_text(table.where)}</code>.</p>"
        )
    if table.folded:
        return f"<details><summary>{_text(table.title)}</summary>{text}</details>"
    return (f'<p class="cs-soft">{_text(table.title)}</p>' if table.title else "") + text


def _cell(row: Mapping[str, Any], name: str, error: str, numeric: bool, most: float | None) -> str:
    value: Any = row.get(name)
    if not numeric:
        text = cell(value)
        return f"<td{_class('cs-t' if len(text) > _LONG else '')}>{_text(text)}</td>"
    spread = row.get(error) if error else None
    shown = cell(value) if spread is None or value is None else with_error(value, float(spread))
    known = value is not None and not math.isnan(value)
    drawn = f" {bar(value / most)}" if most and known else ""
    order = f' data-v="{float(value)!r}"' if known else ""
    exact = f' title="{value!r}"' if known and isinstance(value, float) else ""
    return f'<td class="cs-n"{order}{exact}>{_text(shown)}{drawn}</td>'


def _error_of(name: str, row: Mapping[str, Any]) -> str:
    """The column with the standard error of another one, or nothing."""
    for error in (f"{name}_stderr", f"{name}_std", "stderr" if name == "value" else ""):
        if error and error in row:
            return error
    return ""


def _largest(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    values: list[Any] = [v for row in rows if is_number(v := row.get(name))]
    return max((float(v) for v in values if math.isfinite(v)), default=0.0)


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _title(doc: str | None) -> str:
    return f' title="{html.escape(doc, quote=True)}"' if doc else ""


def _text(value: str) -> str:
    return html.escape(str(value), quote=False)
