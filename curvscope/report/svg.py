"""Matplotlib's SVG made fit for a page: small, in the page's colours, with unique names."""

from __future__ import annotations

import base64
import html
import io
import re

from ..plotting.style import GRID, INK, PAPER

_COLOURS = {INK: "currentColor", GRID: "var(--grid)", PAPER: "var(--paper)"}
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
# Attributes whose numbers are places on the page; scales and text are left alone.
_PLACES = re.compile(r'(\s(?:d|x|y|points|width|height)=")([^"]*)(")')
_IMAGE = re.compile(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)")


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
        images.append(_smaller(match.group(1)))
        return f"@@{len(images) - 1}@@"

    markup = _IMAGE.sub(keep, markup)
    markup = _PLACES.sub(
        lambda match: match.group(1) + _NUMBER.sub(_rounded, match.group(2)) + match.group(3),
        markup,
    )
    tag = re.sub(r"[^A-Za-z0-9_-]", "_", prefix)
    markup = re.sub(r'\bid="([^"]+)"', rf'id="{tag}--\1"', markup)
    markup = re.sub(r'(href="|url\()#', rf"\1#{tag}--", markup)
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
