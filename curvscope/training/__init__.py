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
    "Density": "spectral_measures",
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
    "NamedOptimizer": "optimizers_by_name",
    "NotFinite": "alarms",
    "OptimizerSpec": "optimizers_by_name",
    "PairOfPaths": "trajectory",
    "Plane": "planes",
    "PowersOfTwo": "schedules",
    "ProjectedPath": "trajectory",
    "Run": "run",
    "Schedule": "schedules",
    "Share": "schedules",
    "Sharpness": "spectral_measures",
    "SnapshotSet": "snapshots",
    "Snapshots": "snapshots",
    "Spectrum": "spectral_measures",
    "TooSharp": "alarms",
    "Trained": "trainings",
    "Trainings": "trainings",
    "Trajectories": "trajectory",
    "build_optimizer": "optimizers_by_name",
    "curvature_of": "adapters",
    "default_alarms": "alarms",
    "ellipse": "ellipses",
    "flat_parameters": "paths",
    "lightning_callback": "callbacks",
    "loss_surface": "surfaces",
    "plane_along": "planes",
    "plane_of_paths": "planes",
    "plane_through": "planes",
    "random_plane": "planes",
    "register_adapter": "adapters",
    "stop": "alarms",
    "train": "trainings",
    "trajectories": "trajectory",
    "transformers_callback": "callbacks",
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
    from .callbacks import lightning_callback, transformers_callback
    from .curvature_measures import Error, Fresh
    from .ellipses import Ellipse, ellipse
    from .measures import Loss, Measure
    from .moment import Moment
    from .monitor import Monitor
    from .optimizers_by_name import NamedOptimizer, OptimizerSpec, build_optimizer
    from .paths import flat_parameters
    from .planes import Plane, plane_along, plane_of_paths, plane_through, random_plane
    from .run import Run
    from .schedules import At, Every, PowersOfTwo, Schedule, Share
    from .snapshots import Snapshots, SnapshotSet
    from .spectral_measures import Density, Sharpness, Spectrum
    from .surfaces import LossSurface, loss_surface
    from .trainings import Trained, Trainings, train
    from .trajectory import PairOfPaths, ProjectedPath, Trajectories, trajectories

__all__ = [
    "Above",
    "Alarm",
    "AlarmEvent",
    "At",
    "DampingFires",
    "Density",
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
    "NamedOptimizer",
    "NearIdentity",
    "NotFinite",
    "OptimizerSpec",
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
    "Trained",
    "Trainings",
    "Trajectories",
    "build_optimizer",
    "curvature_of",
    "default_alarms",
    "ellipse",
    "flat_parameters",
    "lightning_callback",
    "loss_surface",
    "plane_along",
    "plane_of_paths",
    "plane_through",
    "random_plane",
    "register_adapter",
    "stop",
    "train",
    "trajectories",
    "transformers_callback",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module 'curvscope.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
