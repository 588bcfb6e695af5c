"""Pictures of results and matrices with matplotlib: every function takes axes and returns them.

:func:`plot` picks the picture by the type of what it is given, which is what ``result.plot()``
calls; the functions beside it draw one kind of picture each. They need no display, change no
setting of matplotlib, and import it only when they are called.

Without ``ax=`` a picture gets a figure of its own. In a notebook or at a prompt it is shown as
figures of ``pyplot`` are; in a script it is a plain figure that goes when it is no longer used:
``plot.save(result.plot(), "file.pdf")``, or ``result.plot(ax=plt.gca())`` to show it in a
window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import OptionError, check_option
from .operators import Operator
from .plotting.bars import plot_comparison, plot_cost
from .plotting.batches import plot_batch_densities, plot_batch_spectra
from .plotting.checks import plot_verification
from .plotting.coverage import plot_coverage
from .plotting.discs import plot_fourier, plot_gershgorin, plot_scree
from .plotting.estimates import (
    plot_density,
    plot_diagonal,
    plot_eigenpairs,
    plot_estimate,
    plot_solution,
)
from .plotting.extremes import plot_extremes
from .plotting.local import plot_gradient_noise, plot_local_model
from .plotting.matrices import plot_blocks, plot_factors, plot_matrix
from .plotting.runs import plot_run
from .plotting.saving import save
from .plotting.shares import plot_bands, plot_diagonal_shares
from .plotting.spectra import plot_histogram, plot_spectra
from .plotting.stability import (
    plot_density_over_steps,
    plot_edge_of_stability,
    plot_eigenvalues_over_steps,
)
from .plotting.style import style
from .plotting.surfaces import plot_ellipses, plot_surface
from .plotting.trajectories import plot_distances, plot_trajectories

__all__ = [
    "plot",
    "plot_bands",
    "plot_batch_densities",
    "plot_batch_spectra",
    "plot_blocks",
    "plot_comparison",
    "plot_cost",
    "plot_coverage",
    "plot_density",
    "plot_density_over_steps",
    "plot_diagonal",
    "plot_diagonal_shares",
    "plot_distances",
    "plot_edge_of_stability",
    "plot_eigenpairs",
    "plot_eigenvalues_over_steps",
    "plot_ellipses",
    "plot_estimate",
    "plot_extremes",
    "plot_factors",
    "plot_fourier",
    "plot_gershgorin",
    "plot_gradient_noise",
    "plot_histogram",
    "plot_local_model",
    "plot_matrix",
    "plot_run",
    "plot_scree",
    "plot_solution",
    "plot_spectra",
    "plot_surface",
    "plot_trajectories",
    "plot_verification",
    "save",
    "style",
]

# Type of the result -> kinds of pictures, the first being the default.
_KINDS: dict[str, dict[str, Callable[..., Any]]] = {
    "Comparison": {"bars": plot_comparison},
    "Spectrum": {"rank": plot_spectra, "histogram": plot_histogram},
    "Concentration": {
        "discs": plot_gershgorin,
        "diagonal": plot_diagonal_shares,
        "bands": plot_bands,
        "scree": plot_scree,
        "fourier": plot_fourier,
    },
    "Coverage": {"matrix": plot_coverage},
    "Verification": {"checks": plot_verification},
    "Estimate": {"probes": plot_estimate},
    "DiagonalEstimate": {"entries": plot_diagonal},
    "Eigenpairs": {"rank": plot_eigenpairs},
    "NegativeCurvature": {"rank": plot_eigenpairs},
    "Solution": {"residuals": plot_solution},
    "Density": {"density": plot_density},
    "Extremes": {"ends": plot_extremes},
    "BatchSpectra": {"batch sizes": plot_batch_spectra, "density": plot_batch_densities},
    "GradientNoise": {"batch sizes": plot_gradient_noise},
    "LocalModel": {"ratio": plot_local_model},
    "LossSurface": {"contours": plot_surface},
    "Trajectories": {"paths": plot_trajectories, "distances": plot_distances},
    "Run": {"steps": plot_run},
}


def plot(result: Any, *, kind: str | None = None, **options: Any) -> Any:
    """Draw a result, an operator or a run; returns the matplotlib axes.

    ``kind`` chooses among the pictures of a type: ``"rank"`` or ``"histogram"`` of a Spectrum;
    ``"discs"``, ``"diagonal"``, ``"bands"``, ``"scree"`` or ``"fourier"`` of a Concentration (by
    default discs, and ``"diagonal"`` for an operator with blocks); ``"matrix"`` or ``"factors"`` of
    an Operator. ``options`` go to the function that draws; all of them take ``ax=`` (those with
    several panels ``axes=``).

    Raises ``OptionError`` for what has no picture.
    """
    name = type(result).__name__
    if isinstance(result, Operator):
        kinds: dict[str, Callable[..., Any]] = {"matrix": plot_matrix, "factors": plot_factors}
        # those of exact blocks in factored form are rows per sample: no pictures
        if kind is None and set(getattr(result, "factors", ())) == {"G", "A"}:
            kind = "factors"
    elif name in _KINDS:
        kinds = _KINDS[name]
        if name == "Spectrum" and result.blocks and kind in (None, "rank"):
            return plot_spectra(dict(result.blocks), **options)
        if name == "Concentration" and kind is None and result.blocks:
            kind = "diagonal"
    else:
        raise OptionError(
            f"There is no picture for {name}. Operators and {', '.join(_KINDS)} have one."
        )
    chosen = next(iter(kinds)) if kind is None else kind
    check_option("kind", chosen, kinds)
    return kinds[chosen](result, **options)


def __dir__() -> list[str]:
    """What is offered after ``cs.plot.``: the pictures alone."""
    return sorted(__all__)
