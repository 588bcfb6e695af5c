"""What columns of numbers and settings are called: one list for pages, tables and widgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..analysis.metrics import METRICS
from .cells import Column


@dataclass(frozen=True)
class Heading:
    """The title of a column, with its unit if it has one, and its meaning in a sentence."""

    title: str
    doc: str = ""

    def column(self, more: str = "", *, numeric: bool = True) -> Column:
        """The head of a column of a page; ``more`` is said behind the meaning."""
        return Column(self.title, f"{self.doc} {more}".strip(), numeric)


_TITLES: dict[str, str | tuple[str, str]] = {
    # of a comparison; what the metrics mean is said where they are defined
    "error": "error",
    "best_in_class": ("best of class", "Error of the nearest matrix of the same class."),
    "best_class": ("class", "The class of matrices that the approximation belongs to."),
    "excess": (
        "error / best",
        "How many times the error is that of the nearest matrix of the class.",
    ),
    "outside": ("outside the blocks", "Share of the exact matrix's energy outside its blocks."),
    "error_rescaled": "error, best scale",
    "cosine": "cosine",
    "trace_ratio": "trace ratio",
    "spectral_error": "spectral error",
    "spectrum_distance": "distance of spectra",
    "diagonal_correlation": "diagonal correlation",
    "eigenspace_overlap": "eigenspace overlap",
    "step_angle": "step angle (°)",
    "step_efficiency": "step efficiency",
    "decrease_ratio": "actual / predicted",
    "stein_divergence": "log-det divergence",
    # of a layer
    "route": ("route", "Algorithm that computed the exact GGN and Hessian block."),
    "trace": ("trace", "Sum of the eigenvalues."),
    "norm": ("norm", "Frobenius norm of the GGN block."),
    "share": (
        "share of energy",
        "Squared norm of the block over that of the whole GGN.",
    ),
    "top_eigenvalues": ("top eigenvalues", "The three largest of the GGN block."),
    "negative_eigenvalues": ("negative eigenvalues", "Of the Hessian block."),
    "best_approximation": ("closest approximation", "By relative error, limits of classes aside."),
    "best_error": ("error of the closest", "Relative error of the closest approximation."),
    "nearest_diagonal_error": ("nearest diagonal", "Relative error of the nearest diagonal."),
    "nearest_kronecker_error": (
        "nearest Kronecker",
        "Relative error of the nearest Kronecker product.",
    ),
    # of a spectrum
    "largest": ("largest eigenvalue", "With its sign."),
    "smallest": ("smallest eigenvalue", "With its sign."),
    "effective_rank": (
        "effective rank",
        "How many eigenvalues matter: exp of the entropy of their shares of the trace.",
    ),
    "positive": ("positive eigenvalues", "How many lie above rounding."),
    "negative": ("negative eigenvalues", "How many lie below zero by more than rounding."),
    # of concentration
    "size": "rows",
    "diagonal_share": ("diagonal share", "Share of squared entries on the diagonal."),
    "null_share": (
        "share by chance",
        "What the null model has: the same eigenvalues, random orthogonal eigenvectors.",
    ),
    "score": ("score (σ)", "Standard deviations of the diagonal share above the null model."),
    "disjoint": ("separate discs", "Gershgorin discs that touch no other."),
    "dominant": ("dominant rows", "Share of rows whose diagonal exceeds the rest."),
    "kaiser": ("Kaiser count", "Kaiser's rule: how many eigenvalues exceed the mean diagonal."),
    "snr": ("signal to noise (dB)", "Diagonal against off-diagonal energy."),
    "largest eigenvalue": ("largest eigenvalue", "Of the GGN block."),
    # of a problem and of trainings
    "objective": ("objective", "The loss over all data."),
    "gradient_norm": ("gradient norm", "Length of the gradient over all data."),
    "test_accuracy": ("test accuracy", "Share of test samples that are classified rightly."),
    "train_loss": ("training loss", "At the end."),
    "test_loss": ("test loss", "At the end."),
    "covered": ("covered", "Share of the parameters, counted by entries."),
}

_SETTINGS = {
    "samples": "samples",
    "terms": "terms of the loss",
    "hessian": "Hessian computed",
    "verify": "problem verified",
    "verification": "problem verified",
    "probes": "random probes of Hutchinson diagonals",
    "damping": "damping in metrics of steps",
    "seed": "seed of everything random",
    "quick": "shortened (quick)",
    "recipe": "trained by",
    "dtype": "precision",
    "batchnorm": "batch normalisation as in",
    "backpack-for-pytorch": "BackPACK",
    "data": "folder with the data",
    "schedule": "learning rate over the training",
}


def setting_title(key: str) -> str:
    """What a setting of a report is called."""
    return _SETTINGS.get(key, key.replace("_", " "))


def setting_word(value: Any) -> str:
    """A setting as people write it, with all its digits: no quotes, no brackets."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        parts = (f"{setting_title(str(k))} {setting_word(v)}" for k, v in value.items())
        return ", ".join(parts) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting_word, value)) or "none"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value) if value is not None else "not set"


def heading(key: str) -> Heading:
    """The heading of a column by its name in ``report.json``, a frame or a record.

    A name without one, such as that of a registered metric, has the metric's title and definition,
    or is shown with blanks for underscores.
    """
    given = _TITLES.get(key)
    metric = METRICS.get(key)
    if isinstance(given, tuple):
        return Heading(*given)
    title = given or (metric.title if metric else key.replace("_", " "))
    return Heading(title, " ".join(metric.doc.replace("``", "").split()) if metric else "")
