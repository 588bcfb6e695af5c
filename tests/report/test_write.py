"""Output folders: atomic, never over anything of the user's, refused before computing."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from curvscope.errors import CurvscopeError, OutputError
from curvscope.report.write import KIND, atomic_folder, check_output, report_files


def fill(folder: Path, text: str = "new") -> None:
    (folder / "csv").mkdir()
    (folder / "csv" / "a.csv").write_text(text)
    files = ["csv/a.csv", "report.json"]
    (folder / "report.json").write_text(json.dumps({"kind": KIND, "files": files, "text": text}))


def write(out: Path, text: str = "new") -> None:
    with atomic_folder(out) as (draft, _):
        fill(draft, text)


def text_of(out: Path) -> str:
    return str(json.loads((out / "report.json").read_text())["text"])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_folder_and_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "report")
    assert text_of(tmp_path / "a" / "b" / "report") == "new"
    assert names(tmp_path / "a" / "b") == {"report"}
    mode = stat.S_IMODE((tmp_path / "a" / "b" / "report").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode)  # readable as any folder


def test_own_report_and_empty_folder_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "report"
    out.mkdir()
    write(out, "one")
    write(out, "two")
    assert text_of(out) == "two"
    assert names(tmp_path) == {"report"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OutputError])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "report", "old")
    for out in (tmp_path / "report", tmp_path / "x" / "y" / "fresh"):
        with pytest.raises(error), atomic_folder(out) as (draft, _):
            fill(draft)
            raise error("half-way")
    assert text_of(tmp_path / "report") == "old"
    assert names(tmp_path) == {"report"}


def test_a_full_disk_is_an_output_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), atomic_folder(tmp_path / "r"):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == set()


def test_other_folders_and_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, match in (
        ("other", "not a report of curvscope"),
        ("file", "is a file"),
        ("link", "link to nowhere"),
        ("file/below", "not a folder|Cannot make"),
    ):
        with pytest.raises(OutputError, match=match):
            check_output(tmp_path / name)
    with pytest.raises(OutputError, match="empty"):
        check_output("")
    with pytest.raises(OutputError, match="root"):
        check_output("/")
    assert (other / "thesis.tex").read_text() == "years of work"
    assert issubclass(OutputError, CurvscopeError) and issubclass(OutputError, OSError)


def test_a_report_json_of_others_does_not_make_a_folder_ours(tmp_path: Path) -> None:
    for k, text in enumerate(("not json", "[]", '{"kind": "something else", "files": []}', "{}")):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / "report.json").write_text(text)
        assert report_files(folder) is None
        with pytest.raises(OutputError, match="not a report of curvscope"):
            check_output(folder)


def test_notes_beside_a_report_are_not_lost(tmp_path: Path) -> None:
    write(tmp_path / "r", "old")
    (tmp_path / "r" / "csv" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        write(tmp_path / "r")
    assert (tmp_path / "r" / "csv" / "notes.txt").read_text() == "mine"


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "r"
    with pytest.raises(OutputError, match="not a report"), atomic_folder(out) as (draft, _):
        fill(draft)
        out.mkdir()
        (out / "theirs").write_text("x")
    assert names(out) == {"theirs"} and names(tmp_path) == {"r"}


def test_link_to_a_folder_keeps_pointing_there(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and text_of(tmp_path / "real") == "new"


def test_checking_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b")
    assert names(tmp_path) == set()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere"
)
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for name in ("r", "a/r"):
        with pytest.raises(OutputError, match="writable"):
            check_output(closed / name)


def test_a_place_where_no_folder_can_be_made_is_refused() -> None:
    """Also for the superuser: the kernel's own file system takes no folders."""
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    for name in ("/proc/report", "/proc/a/report"):
        with pytest.raises(OutputError, match="Choose another output folder"):
            check_output(name)
