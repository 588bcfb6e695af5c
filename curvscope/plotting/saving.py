"""Pictures as files, with text that stays text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, OutputError, check_option
from .style import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = ("svg", "pdf", "png")


def save(
    drawn: Axes | Figure | Sequence[Axes], path: str | os.PathLike[str], *, dpi: float = 300
) -> Path:
    """Write a picture as SVG, PDF or PNG, by the ending of ``path``; returns the path.

    Parameters
    ----------
    drawn
        What a plotting function returned, or a figure with several pictures.
    path
        The file; one that is there is replaced.
    dpi
        Dots per inch of a PNG, and of heat maps in all formats.

    Text stays text (in SVG in the reader's DejaVu Sans or another sans serif, in PDF with its font
    embedded as TrueType, which journals ask for), and the same numbers give the same file. The
    figure and matplotlib's settings are left as they are.

    Cost: that of drawing, about a tenth of a second.

    Raises ``OptionError`` for another ending or something that is no picture, ``OutputError`` if
    the file cannot be written.

    Examples
    --------
    >>> import tempfile, torch, curvscope as cs
    >>> ax = cs.spectrum(torch.diag(torch.tensor([3.0, 2.0, 1.0]))).plot()
    >>> cs.plot.save(ax, f"{tempfile.mkdtemp()}/spectrum.pdf").name
    'spectrum.pdf'
    """
    target = Path(path).expanduser()
    ending = target.suffix[1:].lower()
    check_option("the ending of path", ending, _FORMATS)
    figure = _figure(drawn)
    # no date: it would make two files of the same picture differ
    stamp = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": None}[ending]
    try:
        with style():
            figure.savefig(target, format=ending, dpi=dpi, metadata=stamp)
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror or error}).") from error
    return target


def _figure(drawn: Any) -> Any:
    """The figure of axes, of a list of axes, or the figure itself."""
    first = drawn[0] if isinstance(drawn, list | tuple) and drawn else drawn
    figure = getattr(first, "figure", None)
    if figure is None or not hasattr(figure, "savefig"):
        raise OptionError(
            f"{type(drawn).__name__} is no picture; give what a plotting function returned, or a "
            "figure of matplotlib."
        )
    return figure
