"""Training under observation: monitor, run, trajectories, and the loss surface around them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# public name -> module; resolved on first use
_PUBLIC = {
    "Above": "alarms",
    "Alarm": "alarms",
    "AlarmEvent": "alarms",
    "At": "schedules",
    "DampingFires": "alarms",
    "Ellipse": "ellipses",
    "Error": "curvature_measures",
    "Every": "schedules",
    "Finding": "alarms",
    "Fresh": "curvature_measures",
    "Loss": "measures",
    "LossSurface": "surfaces",
    "Measure": "measures",
    "Moment": "moment",
    "Monitor": "monitor",
    "MonitorWarning": "alarms",
    "NearIdentity": "alarms",
    "NotFinite": "alarms",
    "PairOfPaths": "trajectory",
    "Plane": "planes",
    "PowersOfTwo": "schedules",
    "ProjectedPath": "trajectory",
    "Run": "run",
    "Schedule": "schedules",
    "Share": "schedules",
    "Sharpness": "curvature_measures",
    "SnapshotSet": "snapshots",
    "Snapshots": "snapshots",
    "Spectrum": "curvature_measures",
    "TooSharp": "alarms",
    "Trajectories": "trajectory",
    "curvature_of": "adapters",
    "default_alarms": "alarms",
    "ellipse": "ellipses",
    "flat_parameters": "paths",
    "loss_surface": "surfaces",
    "plane_along": "planes",
    "plane_of_paths": "planes",
    "plane_through": "planes",
    "random_plane": "planes",
    "register_adapter": "adapters",
    "stop": "alarms",
    "trajectories": "trajectory",
}

if TYPE_CHECKING:
    from .adapters import curvature_of, register_adapter
    from .alarms import (
        Above,
        Alarm,
        AlarmEvent,
        DampingFires,
        Finding,
        MonitorWarning,
        NearIdentity,
        NotFinite,
        TooSharp,
        default_alarms,
        stop,
    )
    from .curvature_measures import Error, Fresh, Sharpness, Spectrum
    from .ellipses import Ellipse, ellipse
    from .measures import Loss, Measure
    from .moment import Moment
    from .monitor import Monitor
    from .paths import flat_parameters
    from .planes import Plane, plane_along, plane_of_paths, plane_through, random_plane
    from .run import Run
    from .schedules import At, Every, PowersOfTwo, Schedule, Share
    from .snapshots import Snapshots, SnapshotSet
    from .surfaces import LossSurface, loss_surface
    from .trajectory import PairOfPaths, ProjectedPath, Trajectories, trajectories

__all__ = [
    "Above",
    "Alarm",
    "AlarmEvent",
    "At",
    "DampingFires",
    "Ellipse",
    "Error",
    "Every",
    "Finding",
    "Fresh",
    "Loss",
    "LossSurface",
    "Measure",
    "Moment",
    "Monitor",
    "MonitorWarning",
    "NearIdentity",
    "NotFinite",
    "PairOfPaths",
    "Plane",
    "PowersOfTwo",
    "ProjectedPath",
    "Run",
    "Schedule",
    "Share",
    "Sharpness",
    "SnapshotSet",
    "Snapshots",
    "Spectrum",
    "TooSharp",
    "Trajectories",
    "curvature_of",
    "default_alarms",
    "ellipse",
    "flat_parameters",
    "loss_surface",
    "plane_along",
    "plane_of_paths",
    "plane_through",
    "random_plane",
    "register_adapter",
    "stop",
    "trajectories",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module 'curvscope.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
