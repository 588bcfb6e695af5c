"""Between the monitor and its run: begins, continues, and survives a full disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import OptionError, RunError
from .lines import CONTINUED
from .run import Run
from .store import Memory, Record, Writer

_LATER = 0.5  # seconds for which cheap records wait for others


class Recorder:
    """Writes records to a folder or keeps them in memory; stops, saying so once, if it must."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        header: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self.path = path
        self._mine = dict(header)
        self._warn = warn
        self._store: Writer | Memory = Memory(header) if path is None else Writer(path, header)
        self.writing = True
        self._later: list[Record] = []
        self._since = 0.0

    @property
    def id(self) -> str:
        """The run's own name, which its checkpoints carry."""
        return str(self._store.header.get("id", ""))

    @property
    def at_start(self) -> set[str]:
        """Measures of which the run had a record of step 0 when it was opened."""
        return self._store.at_start

    def begin(self, start: int) -> None:
        """Before the first record: mark what comes after step ``start`` as superseded.

        Raises ``RunError`` where the run has records and the training begins anew from other
        parameters.
        """
        store = self._store
        again = isinstance(store, Writer) and store.rows > 0
        if again and start == 0 and store.header.get("initial") != self._mine["initial"]:
            raise RunError(
                f"{self.path} holds a run up to step {store.last_step} that began from other "
                "parameters, and this training begins at step 0: nothing is written. Give path= "
                "another folder, or continue the run from a checkpoint: optimizer.load_state_dict "
                "and monitor.load_state_dict before the first step."
            )
        versions = {"versions": self._mine["versions"]}
        if again:
            row = {"superseded_up_to": store.last_step, **versions}
            self.write(start, CONTINUED, [row], 0.0)
        else:
            self.write(start, "monitor", [{"event": "began", **versions}], 0.0)

    def write(
        self,
        step: int,
        measure: str,
        rows: Sequence[Mapping[str, Any]],
        seconds: float,
        tensors: Any = None,
        *,
        later: bool = False,
    ) -> None:
        """One record; ``seconds`` of training. An ``OSError`` ends the writing only.

        ``later`` ones, such as the loss of every step, are kept until another one comes or half a
        second has passed, and then written together.
        """
        if not self.writing or not rows:
            return
        stamped = [{"seconds": round(seconds, 6), **row} for row in rows]
        now = time.monotonic()
        if later:
            if not self._later:
                self._since = now
            self._later.append((step, measure, stamped))
            if now - self._since < _LATER:
                return
        self.flush()
        if not later and self.writing:
            self._store_or_give_up(
                step, lambda: self._store.append(step, measure, stamped, tensors)
            )

    def flush(self) -> None:
        """Write what was kept for later."""
        records, self._later = self._later, []
        if records and self.writing:
            self._store_or_give_up(records[0][0], lambda: self._store.extend(records))

    def _store_or_give_up(self, step: int, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.give_up()
            self._warn(
                f"Step {step}: the run {self.path} can no longer be written ({error}). "
                "Training goes on without records; those written so far are complete."
            )

    def give_up(self) -> None:
        """Write nothing more."""
        self.writing = False
        self._later = []
        self._store.close()

    def close(self) -> None:
        """Everything to the disk."""
        self.flush()
        if self.writing:
            self._store.close()
            self.writing = False

    def frame(self, measure: str | None) -> Any:
        """Records as a pandas frame."""
        self.flush()
        if self.path is not None:
            return Run(self.path).frame(measure)
        import pandas as pd

        assert isinstance(self._store, Memory)
        kept = [r for r in self._store.kept if measure in (None, r["measure"])]
        if measure is not None and not kept:
            raise OptionError(f"There is no record of {measure!r} yet.")
        return pd.DataFrame.from_records(kept)
