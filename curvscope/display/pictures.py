"""Small pictures without matplotlib: a line, a strip of blocks, the look of a matrix.

They are drawn in two colours that stand out on white and on black, and in the text's own colour.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import counted

POSITIVE = (47, 127, 208)
NEGATIVE = (214, 107, 19)
_MOST_ENTRIES = 1 << 20  # larger matrices have no small picture
_PIXELS = 40
_SHADES = (0.85, 0.5)  # neighbours in a strip differ


def strip(sizes: Mapping[str, int], missing: Sequence[str] = (), *, width: int = 420) -> str:
    """Blocks side by side, as wide as they are large; ``missing`` ones are only outlined."""
    total = sum(sizes.values())
    if not total or len(sizes) > 400:
        return ""
    parts, x = [], 0.0
    for place, (name, size) in enumerate(sizes.items()):
        wide = width * size / total
        fill = "none" if name in missing else _rgb(POSITIVE)
        note = ", not covered" if name in missing else ""
        label = html.escape(f"{name}: {size:,} ({100 * size / total:.3g} %){note}", quote=True)
        parts.append(
            f'<rect x="{x + 0.5:.1f}" y="0.5" width="{max(wide - 1, 0.6):.1f}" height="13" '
            f'fill="{fill}" fill-opacity="{_SHADES[place % 2]}" stroke="currentColor" '
            f'stroke-opacity="{0.6 if fill == "none" else 0}"><title>{label}</title></rect>'
        )
        x += wide
    text = f"{counted(len(sizes), 'block')} side by side, as wide as they are large"
    return _svg(width, 14, "".join(parts), text)


def spark(values: Sequence[float], label: str, *, width: int = 180, height: int = 36) -> str:
    """A line through ``values``, on a logarithmic scale if they are positive over decades.

    Values that are not finite break the line. Empty below two finite values.
    """
    numbers = [float(v) for v in values]
    if len(numbers) > 2 * width:  # no more points than the eye can tell apart
        step = len(numbers) / (2 * width)
        numbers = [numbers[int(k * step)] for k in range(2 * width)]
    known = [v for v in numbers if math.isfinite(v)]
    if len(known) < 2:
        return ""
    logarithmic = min(known) > 0 and max(known) > 50 * min(known)
    if logarithmic:
        numbers = [math.log10(v) if math.isfinite(v) else v for v in numbers]
        known = [v for v in numbers if math.isfinite(v)]
        label += " (logarithmic)"
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    points, pieces = [], []
    for place, value in enumerate([*numbers, math.nan]):
        if math.isfinite(value):
            x = 1 + (width - 2) * place / max(1, len(numbers) - 1)
            points.append(f"{x:.1f},{height - 2 - (height - 4) * (value - low) / span:.1f}")
        elif points:
            pieces.append(
                f'<polyline points="{" ".join(points)}" fill="none" stroke="{_rgb(POSITIVE)}" '
                'stroke-width="1.5"/>'
            )
            points = []
    if low < 0 < high and not logarithmic:
        y = height - 2 - (height - 4) * -low / span
        pieces.append(
            f'<line x1="0" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
            'stroke-opacity="0.4" stroke-dasharray="2 3"/>'
        )
    return _svg(width, height, "".join(pieces), label)


def bar(share: float) -> str:
    """A bar of ``share`` (0 to 1) of its width; empty for NaN."""
    if not math.isfinite(share):
        return ""
    wide = 60 * min(max(share, 0.0), 1.0)
    return (
        '<svg width="60" height="8" viewBox="0 0 60 8" aria-hidden="true">'
        f'<rect width="{wide:.1f}" height="8" rx="1.5" fill="{_rgb(POSITIVE)}"/></svg>'
    )


def thumbnail(matrix: Tensor, label: str) -> str:
    """The look of a stored matrix ``[m, n]``: root mean square over tiles, blue plus, orange minus.

    Empty for more than a million entries, and where an entry is not finite.
    """
    if matrix.ndim != 2 or not 0 < matrix.numel() <= _MOST_ENTRIES:
        return ""
    with torch.no_grad():
        values = matrix.detach().to(torch.float64)
        rows, columns = (min(n, _PIXELS) for n in values.shape)
        pool = torch.nn.functional.adaptive_avg_pool2d
        tiles = pool(values.square()[None], (rows, columns))[0].sqrt().cpu()
        signs = pool(values[None], (rows, columns))[0].cpu()
    top = float(tiles.max())
    if not math.isfinite(top):
        return ""
    alpha = (255 * (tiles / top if top else tiles).sqrt()).round().to(torch.uint8)
    pixels = bytearray()
    for shades, line in zip(alpha.tolist(), signs.tolist(), strict=True):
        pixels.append(0)  # no filter
        for shade, sign in zip(shades, line, strict=True):
            pixels += bytes((*(POSITIVE if sign >= 0 else NEGATIVE), shade))
    source = base64.b64encode(_png(bytes(pixels), columns, rows)).decode()
    scale = 80 / max(rows, columns)
    name = html.escape(label, quote=True)
    return (
        f'<img alt="{name}" title="{name}" width="{max(3, round(columns * scale))}" '
        f'height="{max(3, round(rows * scale))}" '
        f'style="image-rendering:pixelated;outline:1px solid rgba(128,128,128,.5)" '
        f'src="data:image/png;base64,{source}"/>'
    )


def _png(pixels: bytes, width: int, height: int) -> bytes:
    """A PNG file of RGBA rows, each after its filter byte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(pixels, 9)),
            chunk(b"IEND", b""),
        )
    )


def _svg(width: int, height: int, body: str, label: str) -> str:
    name = html.escape(label, quote=True)
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{name}"><title>{name}</title>{body}</svg>'
    )


def _rgb(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
