"""Writing a folder so that nothing half-written is ever seen under its final name."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import OutputError

KIND = "curvscope report"
"""The entry ``"kind"`` of every ``report.json``, by which a folder of ours is recognised."""

RUNS_KIND = "curvscope report of runs"
"""The same of a report about trainings."""

SCHEMAS = {KIND: 1, RUNS_KIND: 1}
"""The layout of ``report.json`` that this version writes, and the newest that it knows, by kind;
it grows when a reader of the old one would break."""


@contextlib.contextmanager
def atomic_folder(out: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """A temporary folder that takes the name ``out`` when the body ends without exception.

    Yields the temporary folder, which lies beside the final one, and the final one.
    The place is checked, and the temporary folder made, before the body runs. If the body fails,
    or is interrupted, the temporary folder and parents made for it are removed and whatever was at
    ``out`` stays. An existing folder is replaced only if it is empty or an earlier report with
    nothing else in it.

    Raises ``OutputError`` for a place that cannot be written or holds something else.
    """
    target = _target(out)
    check_replaceable(target)
    made = _make_parents(target.parent)
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        _remove_empty(made)
        raise OutputError(
            f"Cannot write into {target.parent} ({error.strerror or error}). Choose another output "
            "folder, or make this one writable."
        ) from error
    try:
        draft.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield draft, target
        check_replaceable(target)  # somebody may have put something there meanwhile
        _replace(draft, target)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(
                f"Writing the report to {target} failed: {error}. Nothing was left there."
            ) from error
        raise


def check_output(out: str | os.PathLike[str]) -> None:
    """Raise ``OutputError`` if a report cannot be written to ``out``; leaves nothing behind."""
    with contextlib.suppress(_OnlyTrying), atomic_folder(out):
        raise _OnlyTrying


class _OnlyTrying(Exception):
    """Ends :func:`check_output` before anything is written."""


def check_replaceable(target: Path) -> None:
    """Raise ``OutputError`` unless ``target`` is free, empty, or a report and nothing else."""
    if not target.exists():
        if target.is_symlink():
            raise OutputError(f"{target} is a link to nowhere; remove it or choose another folder.")
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file; the report needs a folder. Choose another name.")
    try:
        entries = sorted(target.iterdir())
    except OSError as error:
        raise OutputError(f"{target} cannot be read ({error.strerror}).") from error
    if not entries:
        return
    ours = report_files(target)
    if ours is None:
        raise OutputError(
            f"{target} exists and is not a report of curvscope (no report.json of ours in it), so "
            "it is not replaced. Choose another folder, or remove it yourself."
        )
    newer = written_by_newer(target)
    if newer:
        raise OutputError(f"{newer} It is not replaced: choose another folder, or remove it.")
    foreign = sorted(
        str(path.relative_to(target))
        for path in target.rglob("*")
        if not path.is_dir() and path.relative_to(target).as_posix() not in ours
    )
    if foreign:
        raise OutputError(
            f"{target} holds files that do not belong to its report ({', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''}), so it is not replaced. Move them, or choose "
            "another folder."
        )


def report_files(folder: Path) -> set[str] | None:
    """Names of the files of the report in ``folder``; ``None`` if there is none."""
    try:
        document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        files = document["files"] if document["kind"] in (KIND, RUNS_KIND) else None
        return None if files is None else {str(name) for name in files}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def written_by_newer(folder: Path) -> str:
    """What to say of the report in ``folder`` if only a newer version knows its layout, or ``""``.

    Such a report may list its files in another way, so nothing of it is replaced.
    """
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    layout = document.get("schema", 1)
    if not isinstance(layout, int) or layout <= SCHEMAS[document["kind"]]:
        return ""
    return newer(document, os.fspath(folder / "report.json"))


def newer(document: dict[str, Any], place: str) -> str:
    """What to say of a report in a layout that only later versions know."""
    from .. import __version__

    try:
        theirs = f"curvscope {document['environment']['versions']['curvscope']}"
    except (KeyError, TypeError):
        theirs = "a newer curvscope"
    return (
        f"{place} was written by {theirs} in layout {document['schema']}; this is curvscope "
        f"{__version__}, which knows layouts up to {SCHEMAS[document['kind']]}. Update curvscope "
        "to the version that wrote it, or make the report again with this one. Its report.html "
        "opens in any browser."
    )


def _target(out: str | os.PathLike[str]) -> Path:
    text = os.fspath(out)
    if not text:
        raise OutputError("The name of the output folder is empty; give one.")
    target = Path(text).expanduser()
    target = target.resolve() if target.is_dir() else Path(os.path.abspath(target))
    if target.parent == target:
        raise OutputError(f"{target} is the root of the file system; choose a folder in it.")
    return target


def _make_parents(folder: Path) -> list[Path]:
    """Make ``folder``; returns those that were not there before, outermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    made: list[Path] = []
    for path in reversed(missing):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            _remove_empty(made)
            raise OutputError(
                f"Cannot make the folder {path} ({error.strerror or error}). Choose another output "
                "folder, or make its parent writable."
            ) from error
        made.append(path)
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder, so nothing can be written below it.")
    return made


def _remove_empty(folders: list[Path]) -> None:
    for path in reversed(folders):
        with contextlib.suppress(OSError):
            path.rmdir()


def _replace(draft: Path, target: Path) -> None:
    """Give ``draft`` the name ``target``; what was there goes only when that has worked."""
    if not target.exists():
        draft.rename(target)
        return
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    target.rename(old)
    try:
        draft.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
