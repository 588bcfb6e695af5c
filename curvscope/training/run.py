"""Reading a run: frames, spectra, snapshots, alarms, also while training goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..display import Card, Shown
from ..errors import OptionError, RunError, nearest
from . import lines, store
from .snapshots import SnapshotSet

if TYPE_CHECKING:
    import pandas as pd

EVENTS = ("alarm", "monitor", lines.CONTINUED)
"""Measures that are no measurements: what happened, and what the monitor did."""


class Run(Shown):
    """The folder that a :class:`~curvscope.training.Monitor` writes, for reading.

    ``path`` holds ``run.json`` (settings, versions, machine), ``records.jsonl`` (one line per row,
    which ``pandas.read_json(..., lines=True)`` reads as it is) and ``tensors/`` (safetensors).
    Reading takes no lock: a run can be read while it is written, and after the process was killed;
    :meth:`refresh` reads again. A line that was being written is left out; damaged lines and
    tensor files are named in :attr:`problems` and the rest stays readable. What a restart
    superseded is left out unless ``superseded=True``.

    Raises ``RunError`` if the folder is no run. Cost: one pass over the record file.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> import curvscope as cs
    >>> model, path = torch.nn.Linear(3, 2), tempfile.mkdtemp() + "/run"
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with cs.Monitor(problem, optimizer, path, measures=["loss"], budget=None) as monitor:
    ...     for _ in range(2):
    ...         optimizer.zero_grad()
    ...         loss = torch.nn.functional.cross_entropy(model(data[0]), data[1])
    ...         loss.backward()
    ...         optimizer.step()
    ...         monitor.step(loss)
    >>> run = cs.Run(path)
    >>> run.name, run.measures, run.last_step
    ('Linear, SGD', ('loss',), 2)
    """

    def __init__(self, path: str | os.PathLike[str], *, superseded: bool = False) -> None:
        self.path = Path(path)
        self.header = store.read_header(self.path)
        self.superseded = superseded
        self._damaged: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> Run:
        """Read the records again, for a run that is being written; returns the run."""
        try:
            content = (self.path / store.RECORDS).read_bytes()
        except FileNotFoundError:  # between the first file and the second
            content = b""
        except OSError as error:
            raise RunError(f"{self.path / store.RECORDS} cannot be read ({error}).") from error
        self._scan = lines.scan(content, store.RECORDS, superseded=self.superseded)
        self.__dict__.pop("_missing", None)
        return self

    # -- what is in it ---------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """What the monitor was made with: measures and their schedules, budget, probe, seed."""
        return dict(self.header.get("settings", {}))

    @property
    def versions(self) -> dict[str, Any]:
        """Versions of Python, curvscope, torch and NumPy, and the machine."""
        return dict(self.header.get("versions", {}))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What says that a training is this run's: problem, parameters, data, optimizer."""
        return dict(self.header.get("fingerprint", {}))

    @property
    def name(self) -> str:
        """The problem's name and the optimizer's."""
        return str(self.header.get("name", self.path.name))

    @property
    def problems(self) -> tuple[str, ...]:
        """Damaged lines and damaged or missing tensor files, each as a sentence."""
        return (*self._scan.problems, *self._missing, *self._damaged.values())

    @cached_property
    def _missing(self) -> tuple[str, ...]:
        wanted = [row["file"] for row in self._scan.rows if isinstance(row.get("file"), str)]
        return tuple(
            f"{name} is missing; the numbers of its record can still be read."
            for name in wanted
            if not (self.path / name).exists()
        )

    @property
    def records(self) -> list[lines.Row]:
        """All rows as dictionaries, in the order in which they were written."""
        return [dict(row) for row in self._scan.rows]

    def rows(self, measure: str) -> list[lines.Row]:
        """The rows of one measure; none if it was never taken."""
        return [dict(row) for row in self._scan.rows if row["measure"] == measure]

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures that have records, in the order of their first one."""
        found = dict.fromkeys(row["measure"] for row in self._scan.rows)
        return tuple(name for name in found if name not in EVENTS)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps at which anything was measured."""
        found = {r["step"] for r in self._scan.rows if r["measure"] not in EVENTS}
        return tuple(sorted(found))

    @property
    def last_step(self) -> int:
        """The last step with a record; 0 for an empty run."""
        return max((row["step"] for row in self._scan.rows), default=0)

    def frame(self, measure: str | None = None) -> pd.DataFrame:
        """The rows of one measure, or of all, as a table; columns that are empty are left out.

        Columns of every measure: ``step``, ``seconds`` (of training, the monitor's own not
        counted); then ``block``, ``approximation`` and the measure's numbers. Raises
        ``OptionError`` for a measure without records.
        """
        import pandas as pd

        rows = self._scan.rows
        if measure is not None:
            rows = [row for row in rows if row["measure"] == measure]
            if not rows:
                known = list(dict.fromkeys(row["measure"] for row in self._scan.rows))
                raise OptionError(
                    f"This run has no record of {measure!r}.{nearest(measure, known)} "
                    f"It has {', '.join(known) or 'no records yet'}."
                )
        frame = pd.DataFrame.from_records(rows)
        frame = frame.drop(columns=["row", "rows"], errors="ignore")
        if measure is not None and not frame.empty:
            always = [c for c in ("step", "measure") if c in frame.columns]
            full = [c for c in frame.columns if c in always or frame[c].notna().any()]
            frame = frame[full]
        return frame

    @property
    def alarms(self) -> pd.DataFrame:
        """Alarms: ``step``, ``alarm``, ``block``, ``state`` (raised or over) and the sentence."""
        import pandas as pd

        columns = ["step", "seconds", "alarm", "block", "state", "message"]
        rows = self.rows("alarm")
        return pd.DataFrame.from_records(
            [{c: r.get(c) for c in columns} for r in rows], columns=columns
        )

    # -- tensors ---------------------------------------------------------------------------------

    def tensors(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of one row, by name; none if its file is damaged (see :attr:`problems`)."""
        name = row.get("file")
        if not isinstance(name, str):
            return {}
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path / name)
        except FileNotFoundError:
            return {}
        except (SafetensorError, OSError, ValueError) as error:
            self._damaged[name] = f"{name} is damaged ({error}); its tensors are left out."
            return {}

    def spectra(self) -> dict[int, dict[str, Tensor]]:
        """By step, the tensors of the measure ``"spectrum"``.

        ``"eigenvalues"`` and ``"residuals"`` of the leading ones, in the order of the rows.
        """
        return self._by_step("spectrum")

    def densities(self, points: int = 200) -> tuple[list[int], Tensor, Tensor]:
        """Steps, grid ``[points]`` and densities ``[steps, points]`` of the measure ``"density"``.

        What ``cs.plot.plot_density_over_steps`` draws: every density, interpolated on one grid that
        reaches over all of them. Raises ``OptionError`` where none was measured.
        """
        import numpy as np

        found = self._by_step("density")
        if not found:
            raise OptionError(
                'This run has no densities: cs.Monitor(..., measures=["default", "density"]).'
            )
        ends = [(float(t["grid"][0]), float(t["grid"][-1])) for t in found.values()]
        grid = np.linspace(min(a for a, _ in ends), max(b for _, b in ends), points)
        curves = [
            np.interp(grid, t["grid"].double(), t["density"].double(), left=0, right=0)
            for t in found.values()
        ]
        return list(found), torch.from_numpy(grid), torch.from_numpy(np.stack(curves))

    def _by_step(self, measure: str) -> dict[int, dict[str, Tensor]]:
        found = {}
        for row in self.rows(measure):
            tensors = self.tensors(row)
            if tensors:
                found[int(row["step"])] = tensors
        return found

    def snapshots(self) -> SnapshotSet:
        """The parameters along the way: in full, every n-th entry, or randomly projected."""
        rows = [row for row in self.rows("snapshot") if isinstance(row.get("file"), str)]
        order = [str(p).rpartition(" [")[0] for p in self.fingerprint.get("parameters", ())]
        return SnapshotSet(rows, self.tensors, self.settings.get("snapshots"), order)

    # -- elsewhere -------------------------------------------------------------------------------

    def to_tensorboard(self, folder: str | os.PathLike[str]) -> int:
        """Write all numbers as TensorBoard events into ``folder``; returns how many.

        Needs the package ``tensorboard``; raises ``MissingPackageError`` without it.
        """
        from .export import to_tensorboard

        return to_tensorboard(self, folder)

    def to_wandb(self, **options: Any) -> int:
        """Log all numbers to Weights & Biases; ``options`` go to ``wandb.init``. Returns how many.

        Needs the package ``wandb``; raises ``MissingPackageError`` without it.
        """
        from .export import to_wandb

        return to_wandb(self, **options)

    def plot(self, **options: Any) -> Any:
        """Draw loss, error, sharpness and alarms over the steps: :func:`curvscope.plot.plot_run`.

        ``options`` go to it; returns the axes. Raises ``NotDefinedError`` for an empty run.
        """
        from .. import plot

        return plot.plot(self, **options)

    def _card_(self) -> Card:
        from .card import run_card

        return run_card(self)

    def __repr__(self) -> str:
        text = f"{len(self._scan.rows)} rows of {len(self.measures)} measures"
        damage = f", {len(self.problems)} problems" if self.problems else ""
        return f"Run({str(self.path)!r}, {self.name}: {text} up to step {self.last_step}{damage})"
