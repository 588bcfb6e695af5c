"""Matplotlib's SVG made fit for a page: small, in the page's colours, with unique names."""

from __future__ import annotations

import base64
import html
import io
import re
from collections import Counter

from ..plotting.style import GRID, INK, PAPER

_COLOURS = {INK: "currentColor", GRID: "var(--grid)", PAPER: "var(--paper)"}
_STYLE = re.compile(r' style="([^"]*)"')
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
# Attributes whose numbers are places on the page; scales and text are left alone.
_PLACES = re.compile(r'(\s(?:d|x|y|points|width|height)=")([^"]*)(")')
_IMAGE = re.compile(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)")


def lighter(markup: str) -> str:
    """The same figure with its raster images (heat maps) in a palette, a third of the size."""
    return _IMAGE.sub(lambda match: _smaller(match.group(1)), markup)


def for_page(markup: str, prefix: str, alt: str) -> str:
    """The ``<svg>`` element of a figure for inlining into HTML.

    Ink, grid and paper become the page's own colours, so that the figure follows its light and
    dark scheme; ids get a prefix, so that figures do not share them; numbers lose digits that no
    screen shows; ``alt`` becomes the accessible name.
    """
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    markup = re.sub(r"<!--.*?-->", "", markup, flags=re.DOTALL)
    markup = markup[markup.index("<svg") :]
    for colour, variable in _COLOURS.items():
        markup = re.sub(re.escape(colour), variable, markup, flags=re.IGNORECASE)
    images: list[str] = []

    def keep(match: re.Match[str]) -> str:
        images.append(f"data:image/png;base64,{''.join(match.group(1).split())}")
        return f"@@{len(images) - 1}@@"

    markup = _IMAGE.sub(keep, markup)
    markup = _PLACES.sub(
        lambda match: match.group(1) + _NUMBER.sub(_rounded, match.group(2)) + match.group(3),
        markup,
    )
    markup = _own_names(markup, re.sub(r"[^A-Za-z0-9_-]", "_", prefix))
    markup = _without_ballast(markup)
    markup = re.sub(r"\n\s*", " ", markup)
    markup = re.sub(r"> <", "><", markup)
    head = re.search(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', markup)
    assert head is not None, "matplotlib writes a viewBox"
    label = html.escape(alt, quote=True)
    opening = (
        f'<svg class="figure" viewBox="{head.group(1)}" role="img" aria-label="{label}">'
        f"<title>{html.escape(alt)}</title>"
    )
    markup = opening + markup[head.end() :]
    markup = markup.replace("xlink:href=", "href=").strip()
    for place, data in enumerate(images):
        markup = markup.replace(f"@@{place}@@", data)
    return markup


def _own_names(markup: str, tag: str) -> str:
    """Ids with a prefix; those that nothing refers to, or that stand there twice, are dropped."""
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', markup))

    def keep(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in wanted:
            return ""
        wanted.remove(name)  # matplotlib writes the same definition again under the same name
        return f' id="{tag}--{name}"'

    markup = re.sub(r'\sid="([^"]+)"', keep, markup)
    return re.sub(r'(href="|url\()#', rf"\1#{tag}--", markup)


def _without_ballast(markup: str) -> str:
    """Without what the page's own style sheet says, and groups that group nothing."""
    markup = re.sub(r"<style.*?</style>", "", markup, flags=re.DOTALL)
    markup = re.sub(r' transform="rotate\(-?0 [^"]*"', "", markup)
    markup = markup.replace("font-family: 'DejaVu Sans'; ", "")
    markup = re.sub(r'(<text style="[^"]*?);? ?fill: currentColor', r"\1", markup)
    markup = re.sub(
        r'(\sd=")([^"]*)',
        lambda m: m.group(1) + re.sub(r" *([MLCQz]) *", r"\1", m.group(2)),
        markup,
    )
    kept: list[bool] = []
    parts = []
    for part in re.split(r"(<[^>]+>)", markup):
        if part == "</g>":
            if not kept.pop():
                continue
        elif re.fullmatch(r"<g\s*/>", part):
            continue
        elif re.match(r"<g[\s>]", part) and not part.endswith("/>"):
            kept.append(part != "<g>")
            if not kept[-1]:
                continue
        parts.append(part)
    return "".join(parts)


def share_styles(figures: list[str]) -> tuple[list[str], str]:
    """Figures in which repeated style attributes are classes, and the rules of those classes."""
    counts = Counter(style for figure in figures for style in _STYLE.findall(figure))
    names = {
        style: f"s{place}"
        for place, style in enumerate(s for s, count in counts.most_common() if count > 2)
    }

    def short(match: re.Match[str]) -> str:
        name = names.get(match.group(1))
        return f' class="{name}"' if name else match.group(0)

    rules = "".join(f".figure .{name}{{{html.unescape(s)}}}" for s, name in names.items())
    return [_STYLE.sub(short, figure) for figure in figures], rules


def _rounded(match: re.Match[str]) -> str:
    text = f"{float(match.group(0)):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _smaller(data: str) -> str:
    """A PNG with a palette of 128 colours, which no eye tells from the original heat map."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(data)))
    if image.width * image.height < 400:
        return f"data:image/png;base64,{''.join(data.split())}"
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
    small = flat.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
