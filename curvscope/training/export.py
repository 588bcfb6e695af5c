"""Runs for other tools: TensorBoard and Weights & Biases, where they are installed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import MissingPackageError

if TYPE_CHECKING:
    from .run import Run

_PLACE = ("step", "measure", "block", "approximation", "reference", "seconds", "row", "rows")


def scalars(run: Run) -> Iterator[tuple[str, int, float]]:
    """Every finite number of a run as ``(tag, step, value)``; the tag is ``measure/column/...``."""
    for row in run.records:
        beside = [str(row[key]) for key in ("block", "approximation") if _text(row.get(key))]
        for key, value in row.items():
            if key in _PLACE or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                yield "/".join([str(row["measure"]), key, *beside]), int(row["step"]), float(value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def to_tensorboard(run: Run, folder: str | os.PathLike[str]) -> int:
    """See :meth:`curvscope.training.Run.to_tensorboard`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackageError(
            "to_tensorboard needs the package tensorboard: pip install tensorboard."
        ) from error
    count = 0
    with SummaryWriter(os.fspath(folder)) as writer:
        for tag, step, value in scalars(run):
            writer.add_scalar(tag, value, step)
            count += 1
        for row in run.rows("alarm"):
            writer.add_text("alarm", str(row.get("message", "")), int(row["step"]))
        for step, tensors in run.spectra().items():
            if "eigenvalues" in tensors:
                writer.add_histogram("spectrum", tensors["eigenvalues"], step)
    return count


def to_wandb(run: Run, **options: Any) -> int:
    """See :meth:`curvscope.training.Run.to_wandb`."""
    try:
        import wandb
    except ImportError as error:
        raise MissingPackageError("to_wandb needs the package wandb: pip install wandb.") from error
    by_step: dict[int, dict[str, float]] = {}
    count = 0
    for tag, step, value in scalars(run):
        by_step.setdefault(step, {})[tag] = value
        count += 1
    options = {"name": run.name, "config": run.settings, **options}
    session = wandb.init(**options)
    try:
        for step in sorted(by_step):
            session.log(by_step[step], step=step)
    finally:
        session.finish()
    return count
