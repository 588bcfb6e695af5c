"""Comparing pictures with those kept in ``baselines/``, loosely enough for other releases.

Both pictures are averaged over tiles, so that what counts is where ink of which colour lies: lines,
bars, panels, legends, labels; not how a letter is drawn. ``python -m tests.plotting.baselines``
draws the kept pictures anew (give names to draw only those); look at every one before committing.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).with_name("baselines")
DPI = 60
TILE = 6  # pixels a side
MEAN, WORST = 0.012, 0.35  # of tiles' differences in a colour (0 none of it, 1 all)


def render(draw: Callable[[], Any]) -> bytes:
    """The picture of the axes that ``draw`` returns, as a PNG of few colours."""
    from PIL import Image

    from curvscope.plotting.style import style

    buffer = io.BytesIO()
    with style():
        drawn = draw()
        axes = drawn[0] if isinstance(drawn, list) else drawn
        axes.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    image = Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def tiles(png: bytes) -> np.ndarray:
    """Mean red, green and blue of every tile."""
    from PIL import Image

    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float) / 255
    rows, columns = (n // TILE for n in image.shape[:2])
    cut = image[: rows * TILE, : columns * TILE]
    return cut.reshape(rows, TILE, columns, TILE, 3).mean((1, 3))


def difference(one: bytes, other: bytes) -> str:
    """What makes two pictures different; ``""`` if they are the same to the eye."""
    first, second = tiles(one), tiles(other)
    if first.shape != second.shape:
        return f"sizes differ: {first.shape} and {second.shape} tiles"
    # A tile may have moved by one: the best of its neighbours is what it is compared with.
    shifted = [
        np.abs(first - np.roll(second, (dy, dx), (0, 1))) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    ]
    apart = np.minimum.reduce(shifted)
    mean, worst = float(apart.mean()), float(apart.max())
    if mean <= MEAN and worst <= WORST:
        return ""
    return f"tiles differ by {mean:.4f} in the mean (up to {MEAN}), {worst:.2f} at most ({WORST})"


def compared() -> dict[str, Callable[[], Any]]:
    """The pictures that are kept, by name."""
    from curvscope import plot as cplot

    from .pictures import kronecker, pictures, symmetric

    every: dict[str, Any] = dict(pictures())
    chosen = {name: every[name] for name in NAMES}
    matrices = {"exact": symmetric(8), "approximation": symmetric(8, 1)}
    chosen["blocks"] = lambda: list(cplot.plot_blocks(matrices))
    chosen["factors"] = lambda: list(cplot.plot_factors(kronecker()))
    chosen["run"] = a_run
    return chosen


def a_run() -> Any:
    """The picture of a run, which lies in a folder for as long as it is read."""
    from .test_runs import watched

    with tempfile.TemporaryDirectory() as folder:
        return watched(Path(folder) / "run").plot()


NAMES = (
    "bars",
    "spectrum",
    "discs",
    "bands",
    "fourier",
    "coverage",
    "verification",
    "trace",
    "surface",
    "distances",
    "edges of stability",
)


def path(name: str) -> Path:
    """Where the picture of that name is kept."""
    return FOLDER / f"{name.replace(' ', '-')}.png"


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    FOLDER.mkdir(exist_ok=True)
    wanted = sys.argv[1:] or list(compared())
    for name in wanted:
        path(name).write_bytes(render(compared()[name]))
        print(path(name), path(name).stat().st_size, "bytes")
