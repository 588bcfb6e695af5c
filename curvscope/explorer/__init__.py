"""Looking around in a run, a report or a comparison with widgets: see :func:`explore`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import MissingPackageError

if TYPE_CHECKING:
    from .board import Explorer

__all__ = ["explore"]


def explore(source: Any) -> Explorer:
    """Choose step, block and approximation of a run, a report or a comparison, and see them.

    For notebooks. The views follow what is chosen: the errors (over the steps of a run, over the
    blocks otherwise), a table of all approximations of the block, its spectra, how its matrix and
    factors are concentrated, and the loss of a run. ``.controls`` and ``.views`` of what is
    returned are ordinary widgets: ``found.controls["block"].value = "conv1"`` chooses, too.

    Parameters
    ----------
    source
        A :class:`~curvscope.training.Run`, what :func:`curvscope.make_report` returned, a
        :class:`~curvscope.analysis.Comparison`, or the path of a run or a report.

    Cost: reads what was recorded; nothing is computed.

    Raises ``MissingPackageError`` without the package ``ipywidgets``, ``RunError`` or
    ``ReportError`` for a folder that is neither run nor report, ``OptionError`` for other objects,
    ``NotDefinedError`` for a run that has recorded nothing.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> found = cs.compare(matrix, {"diagonal": torch.diag(matrix.diagonal())})
    >>> board = cs.explore(found)
    >>> board.controls["metric"].value = "cosine"
    >>> board.controls["approximation"].value
    'diagonal'
    """
    try:
        import ipywidgets  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "cs.explore needs the package ipywidgets: pip install ipywidgets (or "
            "'curvscope[notebook]') and restart the notebook. Without it: result.plot() and "
            "result.to_frame() of a comparison, run.frame('error') of a run, and the report.html "
            "of a report."
        ) from error
    from .board import Explorer
    from .reading import read

    return Explorer(read(source))
