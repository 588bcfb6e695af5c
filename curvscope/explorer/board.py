"""The widgets: controls on top, views below that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets

from ..analysis.comparison import place
from ..report.headings import heading
from . import views
from .reading import Data

_VIEWS = {
    "errors": views.errors,
    "spectra": views.spectra,
    "table": views.table,
    "factors": views.factors,
    "training": views.training,
}


class Explorer:
    """What :func:`curvscope.explore` returns.

    ``controls`` are the widgets by name: ``"reference"``, ``"step"`` (of a run), ``"block"``,
    ``"approximation"`` and ``"metric"``; ``views`` are the widgets that show ``"errors"``,
    ``"spectra"``, ``"table"``, ``"factors"`` and, of a run, ``"training"``, whose ``value`` is
    HTML; ``box`` holds all.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        reference = data.references[0]
        self.controls: dict[str, Any] = {
            "reference": _choice("Against", data.references),
            "block": _choice("Block", data.blocks(reference), place),
            "approximation": _choice("Method", data.approximations(reference)),
            "metric": _choice("Metric", data.metrics, lambda metric: heading(metric).title),
        }
        if data.steps:
            self.controls["step"] = widgets.SelectionSlider(
                options=data.steps,
                value=data.steps[-1],
                description="Step",
                continuous_update=False,
            )
        self.views = {name: widgets.HTML() for name in _VIEWS}
        for name, control in self.controls.items():
            control.observe(self._reference if name == "reference" else self._update, "value")
        shown = [
            control
            for name, control in self.controls.items()
            if name != "reference" or len(data.references) > 1
        ]
        wrap = widgets.Layout(flex_flow="row wrap")
        self.box = widgets.VBox(
            [
                widgets.HBox(shown, layout=wrap),
                widgets.HBox([self.views["errors"], self.views["spectra"]], layout=wrap),
                self.views["table"],
                widgets.HBox([self.views["factors"], self.views["training"]], layout=wrap),
                widgets.HTML(views.notes(data)),
            ]
        )
        self._held = False
        self._update()

    @property
    def choice(self) -> dict[str, Any]:
        """What is chosen now, by the names of the controls."""
        return {"step": None, **{name: control.value for name, control in self.controls.items()}}

    def _reference(self, change: Any = None) -> None:
        """Another exact matrix may have other blocks and approximations."""
        self._held = True
        try:
            reference = self.controls["reference"].value
            _replace(self.controls["block"], self.data.blocks(reference), place)
            _replace(self.controls["approximation"], self.data.approximations(reference))
        finally:
            self._held = False
        self._update()

    def _update(self, change: Any = None) -> None:
        if self._held:
            return
        choice = self.choice
        for name, view in _VIEWS.items():
            self.views[name].value = view(self.data, choice)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)

    def __repr__(self) -> str:
        chosen = ", ".join(f"{k}={v!r}" for k, v in self.choice.items() if v not in (None, ""))
        return f"Explorer({self.data.title}: {chosen})"


def _choice(title: str, names: Sequence[str], shown: Any = str) -> Any:
    options = [(shown(name), name) for name in names]
    return widgets.Dropdown(options=options, value=names[0], description=title)


def _replace(control: Any, names: Sequence[str], shown: Any = str) -> None:
    """Other options, keeping what is chosen where it exists."""
    before = control.value
    control.options = [(shown(name), name) for name in names]
    control.value = before if before in names else names[0]
