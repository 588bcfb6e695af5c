"""Writing a run: records are appended, tensors are put beside them, nothing is ever rewritten.

    run.json           format, id, fingerprint, settings, versions, machine: written once
    records.jsonl      the records (see ``lines``)
    tensors/           one safetensors file per record that has tensors, named by its line

A tensor file is complete under its name before the line that names it is written, and a record is
one ``write`` to a file opened for appending: after ``kill -9`` every finished record is there.
Against a crash of the machine itself the file is also forced to the disk, every few seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import OutputError, RunError
from . import lines

FORMAT = 1
HEADER, RECORDS, TENSORS = "run.json", "records.jsonl", "tensors"
Record = tuple[int, str, Sequence[Mapping[str, Any]]]  # step, measure, rows
_SYNC = 5.0  # seconds between forcing the records to the disk


class Writer:
    """Appends records to the folder of a run; see the module.

    ``header`` is written if the folder is new; a folder of another run (another ``fingerprint``)
    is refused. Raises ``RunError`` for such a folder, for one that another process writes, and
    ``OutputError`` where nothing can be written at all.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._file: int | None = None
        self._synced = time.monotonic()
        try:
            (self.path / TENSORS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be made a folder ({error.strerror or error}); give path= a "
                "place that can be written."
            ) from error
        new = not (self.path / HEADER).exists()
        if new:
            self._refuse_strangers()
            self.header = dict(header)
            text = json.dumps(lines._value(self.header), indent=1, ensure_ascii=False)
            self._place(self.path / HEADER, text.encode())
        else:
            self.header = read_header(self.path)
            same_run(self.path, self.header, header)
        self._open()
        content = (self.path / RECORDS).read_bytes()
        found = lines.scan(content, RECORDS)
        if found.end < len(content):
            os.ftruncate(self._handle, found.end)
        self.last_step = max((row["step"] for row in found.rows), default=0)
        self.rows = len(found.rows)
        self.at_start = {row["measure"] for row in found.rows if row["step"] == 0}
        self._end = found.end

    def _refuse_strangers(self) -> None:
        others = [p.name for p in self.path.iterdir() if p.name != TENSORS]
        if [name for name in others if not name.startswith(".")]:
            raise RunError(
                f"{self.path} holds {', '.join(sorted(others)[:3])} but no {HEADER}: it is no run. "
                "Give path= a new or empty folder."
            )

    def _open(self) -> None:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._file = os.open(self.path / RECORDS, flags, 0o644)
        except OSError as error:
            raise OutputError(f"{self.path / RECORDS} cannot be written ({error}).") from error
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise RunError(
                f"{self.path} is being written by another process or another Monitor: end that "
                "one, or give path= another folder."
            ) from error

    @property
    def _handle(self) -> int:
        if self._file is None:
            raise OSError("the run is closed")
        return self._file

    def append(
        self,
        step: int,
        measure: str,
        rows: Sequence[Mapping[str, Any]],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write one record. Raises ``OSError``; the file then ends as it did before."""
        own = [dict(row) for row in rows]
        if tensors:
            own[0]["file"] = self._write_tensors(step, measure, tensors)
        self.extend([(step, measure, own)])

    def extend(self, records: Sequence[Record]) -> None:
        """Write several records without tensors at once; otherwise as :meth:`append`."""
        content = b"".join(lines.encode(*record) for record in records)
        try:
            _write(self._handle, content)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._end)
            raise
        self._end += len(content)
        self.rows += sum(len(rows) for _, _, rows in records)
        if time.monotonic() - self._synced > _SYNC:
            self.sync()

    def _write_tensors(self, step: int, measure: str, tensors: Mapping[str, Tensor]) -> str:
        from safetensors.torch import save

        name, again = f"{step:08d}-{measure}.safetensors", 1
        while (self.path / TENSORS / name).exists():  # measured again after a restart
            again += 1
            name = f"{step:08d}-{measure}-{again}.safetensors"
        content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self._place(self.path / TENSORS / name, save(content))
        return f"{TENSORS}/{name}"

    def _place(self, path: Path, content: bytes) -> None:
        """Write a file that is either complete under its name or not there."""
        part = path.with_name(f".{path.name}.part")
        try:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                _write(handle, content)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(part, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            if path.name == HEADER:
                raise OutputError(f"{path} cannot be written ({error}).") from error
            raise

    def sync(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._handle)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Force everything to the disk and let other processes write."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file)
            os.close(self._file)
            self._file = None


class Memory:
    """Stands in for a :class:`Writer` where there is no path: keeps the latest rows only."""

    def __init__(self, header: Mapping[str, Any], most: int = 10_000) -> None:
        from collections import deque

        self.header = dict(header)
        self.kept: Any = deque(maxlen=most)
        self.last_step = 0
        self.rows = 0
        self.at_start: set[str] = set()

    def append(
        self,
        step: int,
        measure: str,
        rows: Sequence[Mapping[str, Any]],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep the rows of a record; its tensors are let go."""
        self.extend([(step, measure, rows)])

    def extend(self, records: Sequence[Record]) -> None:
        """Keep the rows of several records."""
        for step, measure, rows in records:
            self.kept.extend({"step": step, "measure": measure, **row} for row in rows)
            self.rows += len(rows)

    def sync(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do; the rows stay."""


def _write(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


def read_header(path: Path) -> dict[str, Any]:
    """``run.json``. Raises ``RunError`` if it is missing or damaged."""
    try:
        header = json.loads((path / HEADER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        below = sorted(p.parent for p in path.glob(f"*/{HEADER}"))
        hint = f" Runs are below it: cs.Run({str(below[0])!r})" if below else ""
        if len(below) > 1:
            hint += f" and {len(below) - 1} more"
        raise RunError(
            f"{path} is no run: it has no {HEADER}. A run is the folder that "
            f"cs.Monitor(..., path=...) writes.{hint + '.' if hint else ''}"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path / HEADER} is damaged ({error}). The records beside it can still be read with "
            f"pandas.read_json({str(path / RECORDS)!r}, lines=True)."
        ) from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise RunError(
            f"{path / HEADER} has format {found!r}, this curvscope reads format {FORMAT}: use the "
            "release that wrote it."
        )
    return header


def same_run(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ``RunError`` unless two headers have the same fingerprint."""
    before = old.get("fingerprint", {})
    now = lines._value(dict(new.get("fingerprint", {})))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        said = "; ".join(
            f"{k}: {_short(before.get(k))} there, {_short(now.get(k))} here" for k in changed
        )
        raise RunError(
            f"{path} belongs to another run ({said}). Give path= another folder; a run is "
            "continued by the same problem and optimizer only."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 90 else text[:87] + "..."
