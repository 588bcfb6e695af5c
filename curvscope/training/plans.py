"""Which trainings a comparison consists of, and the file in its folder that says so."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError, OutputError, RunError, check_count, check_option, check_seed
from .checkpoints import load_json, save_json
from .optimizers_by_name import OptimizerSpec, build_optimizer
from .subjects import Source

PLAN, RESULT, CHECKPOINT = "train.json", "result.json", "checkpoint.pt"
KIND = "curvscope training"
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Job:
    """One training: an optimizer with one learning rate (``None``: it has none), and a seed."""

    spec: OptimizerSpec
    lr: float | None
    seed: int

    @property
    def label(self) -> str:
        """Of the optimizer and its options, without the learning rate."""
        return self.spec.label

    @property
    def folder(self) -> Path:
        """``OPTIMIZER/lr=RATE/seed=SEED``, below the comparison's folder."""
        name = re.sub(r"[^A-Za-z0-9=.,+_-]+", "-", self.label).strip("-.")
        rate = "default" if self.lr is None else f"{self.lr:g}"
        return Path(name) / f"lr={rate}" / f"seed={self.seed}"

    def __str__(self) -> str:
        rate = "" if self.lr is None else f", lr {self.lr:g}"
        return f"{self.label}{rate}, seed {self.seed}"


def make_jobs(
    source: Source,
    optimizers: str | OptimizerSpec | Iterable[str | OptimizerSpec],
    lrs: Sequence[float] | None,
    seeds: int | Sequence[int],
) -> list[Job]:
    """Every optimizer with every learning rate and seed; all seeds of the first one come first.

    A learning rate in an optimizer's own options (a number or a list) wins over ``lrs``, which wins
    over the optimizer's default. Every optimizer is built once, on a network that is thrown away,
    so that what cannot be built is known before anything trains. Raises what building raises, and
    ``OptionError`` for an empty or doubled list.
    """
    wanted = [optimizers] if isinstance(optimizers, str | OptimizerSpec) else list(optimizers)
    specs = [OptimizerSpec.parse(entry) for entry in wanted]
    if not specs:
        raise OptionError("Name at least one optimizer: optimizers=['kbfgs', 'adam'].")
    numbers = _seeds(seeds)
    model = source.subject(numbers[0]).model
    found: dict[tuple[str, float | None], OptimizerSpec] = {}
    for spec in specs:
        for rate in _rates(spec, lrs):
            one = spec.with_lr(rate)
            built = build_optimizer(one, model)
            own = built.lr
            if hasattr(built.optimizer, "close"):
                built.optimizer.close()
            found.setdefault((one.label, own), one.with_lr(own))
    jobs = [Job(spec, lr, seed) for seed in numbers for (_, lr), spec in found.items()]
    places: dict[Path, Job] = {}
    for job in jobs:
        other = places.setdefault(job.folder, job)
        if other is not job:
            raise OptionError(f"{other} and {job} would share the folder {job.folder}: leave one.")
    return jobs


def _rates(spec: OptimizerSpec, lrs: Sequence[float] | None) -> list[float | None]:
    own = spec.options.get("lr")
    if own is not None:
        rates = list(own) if isinstance(own, list | tuple) else [own]
    else:
        rates = [None] if not lrs else list(lrs)
    for rate in rates:
        good = rate is None or (isinstance(rate, int | float) and not isinstance(rate, bool))
        if not good or (rate is not None and not rate > 0):
            raise OptionError(f"{spec}: the learning rate {rate!r} is no positive number.")
    return [None if rate is None else float(rate) for rate in rates]


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    several = seeds if isinstance(seeds, Iterable) else range(check_count("seeds", seeds))
    numbers = [check_seed(seed) for seed in several]
    if not numbers:
        raise OptionError(f"seeds={seeds!r}: give how many, from 1 on, or a list of seeds.")
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise OptionError(f"seeds={seeds!r}: seeds are different numbers from 0 on.")
    return numbers


def begin(
    out: str | os.PathLike[str],
    source: Source,
    jobs: Sequence[Job],
    *,
    epochs: int,
    schedule: str,
    monitor: dict[str, Any],
    command: str = "",
) -> Path:
    """Make or continue the folder of a comparison, with ``train.json`` in it; returns it.

    A comparison is continued with more optimizers, learning rates, seeds, and (at constant learning
    rates) epochs. Raises ``OutputError`` for a folder with something else in it, ``RunError`` for
    a comparison on another problem or with other batches, ``OptionError`` for bad options.
    """
    check_option("schedule", schedule, SCHEDULES)
    epochs = check_count("epochs", epochs)
    folder = Path(out).expanduser()
    fixed = {"problem": source.name, "batch_size": source.batch_size, "schedule": schedule}
    if schedule == "cosine":
        fixed["epochs"] = epochs
    old = None
    if folder.exists():
        if not folder.is_dir():
            raise OutputError(f"{folder} is a file; give a new folder.")
        old = load_json(folder / PLAN)
        strangers = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
        if old is None and strangers:
            raise OutputError(
                f"{folder} holds {', '.join(sorted(strangers)[:3])} but no {PLAN}: choose a new "
                "folder for the trainings."
            )
    runs = {job.folder.as_posix(): _row(job) for job in jobs}
    if old is not None:
        if old.get("kind") != KIND:
            raise RunError(f"{folder / PLAN} is not of curvscope; choose another folder.")
        for key, value in fixed.items():
            if old.get(key) != value:
                raise RunError(
                    f"{folder} holds trainings with {key} {old.get(key)!r}, not {value!r}: give "
                    "another folder, or the same settings to go on."
                )
        runs = {row["path"]: row for row in old["runs"]} | runs
        epochs = max(epochs, int(old["epochs"]))
    save_json(
        folder / PLAN,
        {
            "kind": KIND,
            "schema": 1,
            "created": (old or {}).get("created")
            or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": command or (old or {}).get("command", ""),
            **fixed,
            "epochs": epochs,
            "data": None if source.folder is None else str(source.folder),
            "device": source.device,
            "monitor": {key: _word(value) for key, value in monitor.items()},
            "runs": list(runs.values()),
        },
    )
    return folder


def _row(job: Job) -> dict[str, Any]:
    return {
        "path": job.folder.as_posix(),
        "optimizer": job.label,
        "spec": str(job.spec),
        "lr": job.lr,
        "seed": job.seed,
    }


def _word(value: Any) -> Any:
    plain = isinstance(value, int | float | str | bool | list | tuple | type(None))
    return value if plain else repr(value)
